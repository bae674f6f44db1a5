"""pyproject.toml: Colab's versions fit, nothing is imported that is not asked for, sizes."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COLAB = {  # as of November 2026; Python 3.13
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "diffusers": "0.39.0",
    "transformers": "5.15.0",
    "ipywidgets": "7.7.1",
    "numpy": "2.0.2",
    "pillow": "11.3.0",
    "matplotlib": "3.10.0",
    "tqdm": "4.67.1",
    "safetensors": "0.7.0",
    "scipy": "1.16.3",
    "pandas": "2.2.2",
    "ipython": "7.34.0",
}
NOT_ON_COLAB = {"lpips"}  # small, and it needs only what Colab has
BROUGHT = {"huggingface-hub"}  # by transformers, in a version that it accepts
IMPORTED_AS = {  # where it is not the package's own name
    "pillow": "PIL", "ipython": "IPython", "huggingface-hub": "huggingface_hub",
}  # fmt: skip


def requirements(*groups: str) -> dict[str, SpecifierSet]:
    """The project's dependencies and those of the optional groups: name -> versions."""
    lines = [*PROJECT["dependencies"]]
    for group in groups:
        lines += PROJECT["optional-dependencies"][group]
    return {r.name: r.specifier for r in map(Requirement, lines)}


@pytest.mark.parametrize("package", COLAB)
def test_range_admits_colab(package):
    assert requirements()[package].contains(COLAB[package])


def test_every_dependency_is_on_colab_or_small():
    assert set(requirements()) == set(COLAB) | NOT_ON_COLAB | BROUGHT


def test_python_range():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(supported.contains(v) for v in ("3.11.0", "3.12.4", "3.13.1"))
    assert not supported.contains("3.10.9")


def test_each_dependency_says_who_needs_it():
    text = (ROOT / "pyproject.toml").read_text()
    for name in requirements(*PROJECT["optional-dependencies"]):
        comment = re.search(rf'"{name}[^"]*",\s+# \S+', text)
        assert comment, f"{name} has no comment that says who needs it"


def test_the_files_that_need_a_dependency_exist():
    text = (ROOT / "pyproject.toml").read_text()
    named = {f for line in re.findall(r"# (.*)", text) for f in re.findall(r"[\w/]+\.py\b", line)}
    assert named and not [file for file in sorted(named) if not (ROOT / file).exists()]


def test_every_package_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [p for top in ("helpers", "workflow") for p in (ROOT / top).rglob("*.py")]
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in files}
    assert set(setup["packages"]) == folders


def imported(folder: str) -> dict[str, str]:
    """The packages that a folder's code imports, each with a file that does."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.split(".")[0]: path.name for name in names}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize(("folder", "groups"), [("helpers", ["paper"]), ("workflow", ["dev"])])
def test_what_is_imported_is_a_dependency(folder, groups):
    known = {IMPORTED_AS.get(name, name) for name in requirements(*groups)}
    ours = {"helpers", "workflow"}
    unknown = {name: file for name, file in imported(folder).items() if name not in known | ours}
    assert not unknown


def test_no_size_of_a_particular_model_in_the_helpers():
    """77, 768, 512 belong to Stable Diffusion: only a model may say so.

    64 is the emoji tiles' own size, in renders.py.
    """
    for path in (ROOT / "helpers").rglob("*.py"):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        size = re.search(r"(?<![\w.])(77|768|512)(?![\w.])", code)
        assert not size, f"{path.name} names a size of one model"
