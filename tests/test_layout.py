"""The layout of the code: which file may import which, and how large a function may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {  # in order: a file imports from its own group or one above it
    "mathematics": (
        "identity files undo checked reader options diffusion losses nullspace closedform stats "
        "seeds show"
    ),
    "a world and what it samples": (
        "concepts renders judge judge_sd perceptual gate worlds attention denoise sampling "
        "provenance images"
    ),
    "editing it": "edits adapters guards export parameters checkpoint training inversion methods",
    "judging the edit": "evaluation metrics attacks tables",
    "for readers": "widgets check schematic",
}
LEVEL = {name: i for i, names in enumerate(GROUPS.values()) for name in names.split()}
HELPERS = sorted((ROOT / "helpers").rglob("*.py"))
MEASURED = [*HELPERS, *sorted((ROOT / "workflow").glob("*.py"))]
BODY, SIGNATURE = 40, 8  # lines without the docstring; parameters


def room(path: Path) -> str:
    """The name by which the groups know a file: its own, or its folder's."""
    return path.relative_to(ROOT / "helpers").parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """The rooms of ``helpers`` that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "helpers":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("helpers.")}
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function's body, its docstring not counted."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_every_helper_has_its_place():
    rooms = {room(path) for path in HELPERS} - {"__init__"}
    assert rooms == set(LEVEL), "a new file belongs to a group of GROUPS (and of the architecture)"


@pytest.mark.parametrize("path", HELPERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_up(path):
    mine = room(path)
    if mine == "__init__":
        return  # the package's face
    wrong = {n for n in imported(ast.parse(path.read_text())) if LEVEL[n] > LEVEL[mine]}
    assert not wrong, f"{path.name} imports {wrong}, which stand in a group below its own"


def test_no_circle():
    below = {}
    for path in HELPERS:
        mine = room(path)
        below.setdefault(mine, set()).update(imported(ast.parse(path.read_text())) - {mine})
    below.pop("__init__")
    while below:
        free = {name for name, needs in below.items() if not needs & set(below)}
        assert free, f"these import each other: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_small(path):
    for node in functions(ast.parse(path.read_text())):
        args = node.args
        count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
        count -= bool(args.args) and args.args[0].arg in ("self", "cls")
        assert body_lines(node) <= BODY, f"{path.name}:{node.name} has {body_lines(node)} lines"
        assert count <= SIGNATURE, f"{path.name}:{node.name} takes {count} arguments"


def test_imports_inside_functions_are_of_what_is_optional():
    found = {
        (path.name, alias.name)
        for path in MEASURED
        for function in functions(ast.parse(path.read_text()))
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert found <= {("images.py", "kagglehub")}


def test_these_rules_catch_what_they_should():
    tree = ast.parse(
        "from helpers import worlds\nimport helpers.show\nfrom helpers.methods.esd import x"
    )
    assert imported(tree) == {"worlds", "show", "methods"}
    long = "def f(a):\n    '''Doc.'''\n" + "    a += 1\n" * 41
    assert body_lines(functions(ast.parse(long))[0]) == 41
