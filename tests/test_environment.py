"""The ranges of pyproject.toml admit what Colab ships, so that installing the kit there upgrades nothing."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COLAB = {  # as of November 2026; Python 3.13
    "torch": "2.11.0", "torchvision": "0.26.0", "diffusers": "0.39.0", "transformers": "5.15.0", "ipywidgets": "7.7.1",
    "numpy": "2.0.2", "pillow": "11.3.0", "matplotlib": "3.10.0", "tqdm": "4.67.1", "accelerate": "1.12.0",
    "safetensors": "0.7.0",
}  # fmt: skip


@pytest.mark.parametrize("package", COLAB)
def test_range_admits_colab(package):
    ranges = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert ranges[package].contains(COLAB[package])


def test_python_range():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(supported.contains(v) for v in ("3.11.0", "3.12.4", "3.13.1"))
    assert not supported.contains("3.10.9")


def test_each_dependency_says_who_needs_it():
    text = (ROOT / "pyproject.toml").read_text()
    names = [
        Requirement(r).name
        for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for r in group
    ]
    for name in names:
        assert re.search(rf'"{name}[^"]*",\s+# \S+', text), f"{name} has no comment that says who needs it"


def test_no_size_of_a_particular_model_in_the_helpers():
    """77, 768, 512 belong to Stable Diffusion: only a model may say so. (64 is the emoji tiles' own size, in renders.py.)"""
    for path in (ROOT / "helpers").rglob("*.py"):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        assert not re.search(r"(?<![\w.])(77|768|512)(?![\w.])", code), f"{path.name} names a size of one model"
