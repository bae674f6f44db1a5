"""Lay the sources of the site out for Sphinx, as they lie in the repository, so that links hold.

python docs/site.py build/site-source
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
ON_GITHUB = "https://github.com/lethe-course/lethe/blob/main/"
PAGES = ("README.md", "TEACHING.md")
FOLDED = ("setup", "parameters")  # cells that a reader of the book opens by a click


def with_links(text: str, page: Path) -> str:
    """A page's links to files that the site lacks lead to GitHub."""

    def link(found: re.Match) -> str:
        target = (page.parent / found[1]).resolve()
        if (
            not target.exists()
            or target.suffix in (".ipynb", ".png")
            or target.parent.name == "docs"
        ):
            return found[0]
        inside = target.relative_to(ROOT).as_posix()
        return found[0] if inside in PAGES else f"]({ON_GITHUB}{inside})"

    return re.sub(r"\]\(([^)#:\s]+)\)", link, text)


def page(path: Path) -> nbformat.NotebookNode:
    """A notebook as a page: its set-up folded."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, path)
        tags = cell.metadata.get("tags", [])
        if set(FOLDED) & set(tags):
            cell.metadata["tags"] = [*tags, "hide-input"]
    return notebook


def main() -> None:
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    for folder, pattern in (("figures", "*.png"), ("docs", "*.md"), ("notebooks", "[0-9]*.ipynb")):
        (target / folder).mkdir(parents=True)
        for path in sorted(ROOT.joinpath(folder).glob(pattern)):
            if path.suffix == ".ipynb":
                nbformat.write(page(path), target / folder / path.name)
            elif path.suffix == ".md":
                (target / folder / path.name).write_text(with_links(path.read_text(), path))
            else:
                shutil.copy(path, target / folder)
    for name in PAGES:
        (target / name).write_text(with_links((ROOT / name).read_text(), ROOT / name))
    shutil.copy(ROOT / "docs/conf.py", target)
    (target / "docs/index.md").rename(target / "index.md")


if __name__ == "__main__":
    main()
