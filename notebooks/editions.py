"""A student's and a teacher's copy of every notebook.

python notebooks/editions.py student build/student   # no outputs, no solutions
python notebooks/editions.py teacher build/teacher   # outputs, open solutions, a guide on top
"""

import argparse
import re
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
GUIDE = HERE.parent / "docs" / "guide.md"
FOLD = re.compile(r"<details><summary>(.*?)</summary>(.*?)</details>\n*", re.S)
HINT = "Hint"  # the folds of these titles stay in the student's copy


def guides(text: str) -> dict[str, str]:
    """The teacher's guide by notebook: "03" -> its section, without the heading."""
    parts = re.split(r"^## (\d\d) .*$", text, flags=re.M)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def student(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without outputs and without solutions. A hint stays folded."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = FOLD.sub(lambda f: f[0] if HINT in f[1] else "", cell.source).strip()
    notebook.cells = [cell for cell in notebook.cells if cell.source]
    notebook.metadata.pop("widgets", None)
    return notebook


def teacher(notebook: nbformat.NotebookNode, guide: str) -> nbformat.NotebookNode:
    """A copy with its guide below the title, and every fold open."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("<details>", "<details open>")
    note = nbformat.v4.new_markdown_cell(f"> **For the teacher**\n\n{guide}", id="teacher-guide")
    notebook.cells.insert(1, note)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("edition", choices=["student", "teacher"])
    parser.add_argument("target", nargs="?", help="folder (default: build/ and the edition)")
    args = parser.parse_args()
    target = Path(args.target or f"build/{args.edition}")
    target.mkdir(parents=True, exist_ok=True)
    told = guides(GUIDE.read_text())
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, 4)
        if args.edition == "student":
            notebook = student(notebook)
        else:
            notebook = teacher(notebook, told[path.name[:2]])
        nbformat.write(notebook, target / path.name)
    print(f"The {args.edition}'s edition is ready in {target}")


if __name__ == "__main__":
    main()
