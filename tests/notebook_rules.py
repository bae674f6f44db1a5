"""What every notebook must satisfy; ``test_notebooks.py`` applies it, also to bad notebooks."""

import ast
import importlib
import re

import nbformat

from helpers.show import NOT_HERE

SETUP = """# Set-up, the same in every notebook: find the kit; on Colab, clone it, install the rest.
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

kit = find_spec("helpers")  # installed, or imported by a cell before
installed = [Path(place).parent for place in (kit and kit.submodule_search_locations) or ()]
cloned = sorted(p.resolve() for p in Path.cwd().glob("lethe*"))  # by this cell, earlier
here = [Path.cwd(), *Path.cwd().parents, *cloned, *installed]
root = next((p for p in here if (p / "helpers" / "worlds.py").exists()), None)
if root is None:
    repository = os.environ.get("LETHE_REPOSITORY", "https://github.com/lethe-course/lethe")
    if shutil.which("git") is None:
        raise RuntimeError(f"git is not here: unpack {repository} as the folder lethe beside this")
    root = Path("lethe").resolve()
    if root.exists():  # half a clone, or something of yours: it stays
        root = root.with_name(f"lethe-{len(cloned) + 1}")
    subprocess.run(["git", "clone", "--depth", "1", repository, str(root)], check=True)
missing = [name for name in ("diffusers", "transformers", "lpips") if find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
os.chdir(root)
sys.path[:] = [str(root), *(place for place in sys.path if place != str(root))]"""
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(home|root|tmp|work|Users|usr/local|opt)/[\w.-]+")


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


FIGURE = re.compile(r"\bplt\.|\bax(es)?\b|\bshow\.")
LONG, LONGEST = 15, 25  # lines of a cell; of one that draws, or is a single definition


def too_long(cell) -> bool:
    """Whether a cell has more lines than a reader takes in at once."""
    body = ast.parse(cell.source).body
    whole = len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.ClassDef)
    may = whole or FIGURE.search(cell.source) or {"setup", "parameters"} & {*tags(cell)}
    imports = sum(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
    return lines(cell) > (LONGEST if may or imports > 3 else LONG)


def without_docstrings(node: ast.AST) -> str:
    """The syntax tree of a definition as text, docstrings and checks of arguments taken out."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            inner.decorator_list = [d for d in inner.decorator_list if not checks(d)]
        definition = isinstance(inner, ast.FunctionDef | ast.ClassDef)
        if definition and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:]
    return ast.dump(node)


def checks(decorator: ast.AST) -> bool:
    """Whether a decorator is ``options.typed``, which a notebook leaves out."""
    return getattr(getattr(decorator, "func", decorator), "id", None) == "typed"


def helper_definition(address: str) -> ast.AST:
    """``helpers.diffusion:add_noise`` -> the syntax tree of that definition."""
    module, name = address.split(":")
    source = open(importlib.import_module(module).__file__).read()
    return next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)


def output_text(cell) -> str:
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        data = output.get("data", {})
        parts += [data.get(kind, "") for kind in ("text/plain", "text/html", "text/markdown")]
        parts += output.get("traceback", [])
    return "\n".join("".join(part) for part in parts)


def wrong_finding(cell) -> list[str]:
    """What is wrong with a cell as a finding: a sentence, its condition, its figures; it holds."""
    calls = [
        node
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "finding"
    ]
    if ("finding" in tags(cell)) != (len(calls) == 1):
        return [f"has {len(calls)} findings and the tags {tags(cell)}: one call, one tag"]
    said = []
    for call in calls:
        if len(call.args) != 3 or isinstance(call.args[1], ast.Constant):
            said.append("has a finding without a sentence, a computed condition and figures")
        if re.search(r"\d\.\d", ast.unparse(call.args[0])):
            said.append("writes a figure into a finding's sentence: give it among the figures")
        if NOT_HERE in output_text(cell):
            said.append(f"holds a finding that does not hold: {output_text(cell)[:80]!r}")
        elif cell.source.strip() and "**Found:**" not in output_text(cell):
            said.append("does not show its finding: end the cell with it")
    return said


CARD = re.compile(r"\*(?:Difficulty|Easy|Medium|Hard|Harder)[^*]*?(\d+) minutes")
MOST_PROSE = 3000  # words that one is asked to read in a sitting
WORDS, CODE = 200, 20  # words and lines of code that one reads in a minute: our estimate


def minutes(notebook: nbformat.NotebookNode) -> int:
    """Minutes of a notebook, to five: its words (no folds, no references), code, and exercises."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    cards = sum(int(found) for found in CARD.findall(text))
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.S).split("## References")[0]
    code = [c for c in notebook.cells if c.cell_type == "code" and "setup" not in tags(c)]
    read = len(text.split()) / WORDS + sum(map(lines, code)) / CODE
    return 5 * round((read + cards) / 5)


def prose(notebook: nbformat.NotebookNode) -> int:
    """Words of the text without formulas, folds, references, and sections marked as optional."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    text = text.split("## References")[0]
    for what in (r"<details>.*?</details>", r"\$\$.*?\$\$"):
        text = re.sub(what, "", text, flags=re.S)
    sections = re.split(r"^## ", text, flags=re.M)
    return sum(len(s.split()) for s in sections if not re.match(r".*\n\n\*Optional", s))


def problems(notebook: nbformat.NotebookNode, *, size: int = 0) -> list[str]:
    """Everything about a notebook that breaks the rules, in words; nothing for a good one."""
    said, cells = [], notebook.cells
    code = [c for c in cells if c.cell_type == "code"]
    text = [c for c in cells if c.cell_type == "markdown"]
    first = cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        said.append("the first cell is not a title")
    if not re.search(r"minutes?\b", first.source):
        said.append("the first cell does not say how many minutes it takes")
    said_minutes = re.search(r"(\d+) minutes with the exercise", first.source)
    if said_minutes is None or abs(int(said_minutes[1]) - minutes(notebook)) > 5:
        said.append(
            f"it takes {minutes(notebook)} minutes with the exercises: the first cell differs"
        )
    if prose(notebook) > MOST_PROSE:
        said.append(f"it has {prose(notebook)} words of text, more than {MOST_PROSE}")
    if first.source.count("\n- ") + first.source.count("\n* ") > 4:
        said.append("the first cell promises more than four things")
    if [c.source.strip() for c in code if "setup" in tags(c)] != [SETUP]:
        said.append("the set-up cell is missing or differs from the other notebooks'")
    parameters = [c for c in code if "parameters" in tags(c)]
    if len(parameters) != 1:
        said.append(f"{len(parameters)} cells are tagged parameters")
    else:
        body = ast.parse(parameters[0].source).body
        if len(body) > 10 or not all(isinstance(node, ast.AnnAssign) for node in body):
            said.append("the parameters cell is not at most ten typed literals")
        if "#" not in parameters[0].source:
            said.append("the parameters have no comments")
    for i, cell in enumerate(cells):
        where = f"cell {i}"
        if "id" not in cell:
            said.append(f"{where} has no id")
        if cell.cell_type == "markdown":
            if len(cell.source.split()) > 220:
                said.append(f"{where} is a wall of text ({len(cell.source.split())} words)")
            if re.search(r"!\[[^]]*\]\((data:|https?:)", cell.source) or "base64," in cell.source:
                said.append(f"{where} embeds a picture or fetches one")
            continue
        if cell.cell_type != "code":
            continue
        if too_long(cell):
            said.append(f"{where} has {lines(cell)} lines of code")
        tries = re.search(r"^\s*try:", cell.source, re.M)
        if "setup" not in tags(cell) and tries and "import" in cell.source:
            said.append(f"{where} wraps an import in try")
        if re.search(r"from .* import \*", cell.source):
            said.append(f"{where} imports *")
        if re.search(r"os\.environ.*\bCI\b", cell.source):
            said.append(f"{where} asks whether it runs in CI")
        if cell.source.strip() and cell.execution_count is None:
            said.append(f"{where} was never run")
        if any(o.output_type == "error" for o in cell.outputs):
            said.append(f"{where} ends in an error")
        if any(o.get("name") == "stderr" for o in cell.outputs):
            said.append(f"{where} prints to stderr: {output_text(cell)[:80]!r}")
        if re.search(r"\w+Warning\b", output_text(cell)):
            said.append(f"{where} shows a warning")
        if MACHINE_PATH.search(output_text(cell)):
            said.append(f"{where} shows a path of a machine")
        said += [f"{where} {what}" for what in wrong_finding(cell)]
        address = cell.metadata.get("lethe", {}).get("same_as")
        if address:
            kinds = ast.FunctionDef | ast.ClassDef
            mine = next(n for n in ast.parse(cell.source).body if isinstance(n, kinds))
            if without_docstrings(mine) != without_docstrings(helper_definition(address)):
                said.append(f"{where} and {address} differ")
    findings = sum("finding" in tags(c) for c in code)
    if findings < 3:
        said.append(f"it has {findings} findings, fewer than three")
    whole = "\n".join(c.source for c in text)
    if "check." in "\n".join(c.source for c in code) and "<details>" not in whole:
        said.append("there are exercises and no folded hint or solution")
    if whole.count("### Build it ·") != 1 or "in three steps" not in whole:
        said.append("it has not one exercise in three steps, Build it")
    if "**Go further.**" not in whole:
        said.append("it does not say how to go further")
    if not any(c.source.startswith("schematic(") for c in code):
        said.append("it has no schematic of what is touched")
    if "Three things to remember" not in whole:
        said.append("it does not end with three things to remember")
    if "eferences" not in whole:
        said.append("it has no references")
    counts = [c.execution_count for c in code if c.source.strip()]
    if counts != sorted(c for c in counts if c is not None):
        said.append("cells were not run from top to bottom")
    widgets = notebook.metadata.get("widgets", {})
    state = widgets.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    if any(widget["model_name"] == "OutputModel" for widget in state.values()):
        said.append(
            "an Output widget (interact, interactive): papermill may wait for it for ever "
            "(nbclient issue 312)"
        )
    if size > 700_000:
        said.append(f"the file has {size // 1000} kB, more than 700")
    return said
