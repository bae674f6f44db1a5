"""The definitions of a notebook, run without the rest of it: what its tests call."""

import ast
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def cells_of(notebook: str) -> dict[str, str]:
    """The code of a notebook, named by the start of its file's name ("07"): id -> source."""
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    cells = nbformat.read(path, 4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


def definitions(notebook: str, *cells: str, **names) -> dict:
    """Run the named cells, less what only shows something, in a namespace that starts with names.

    Bare expressions at the top level are left out. Returns the namespace.
    """
    sources = cells_of(notebook)
    for cell in cells:
        body = [node for node in ast.parse(sources[cell]).body if not isinstance(node, ast.Expr)]
        exec(compile(ast.Module(body, []), cell, "exec"), names)
    return names


def functions(notebook: str, *wanted: str, **names) -> dict:
    """Run only the functions and classes of these names, from whatever cell they stand in.

    For cells that also sample or train. Returns the namespace, which starts with names.
    """
    for cell, source in cells_of(notebook).items():
        body = [n for n in ast.parse(source).body if getattr(n, "name", None) in wanted]
        exec(compile(ast.Module(body, []), cell, "exec"), names)
    missing = [name for name in wanted if name not in names]
    assert not missing, f"notebook {notebook} defines no {', '.join(missing)}"
    return names
