"""Every notebook keeps the rules of the course; and the rules catch notebooks that do not."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from notebook_rules import output_text, problems, prose

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_rules(path):
    assert problems(read(path), size=path.stat().st_size) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_and_figures_exist(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)", cell.source):
                if not re.match(r"https?:|mailto:|attachment:", target):
                    there = (path.parent / target).exists()
                    assert there, f"{path.name} links to {target}, which is not there"


def edit_first(notebook):
    notebook.cells[0].source = "no title"


def edit_minutes(notebook):
    first = notebook.cells[0]
    first.source = re.sub(r"\d+ minutes with", "5 minutes with", first.source)


def edit_prose(notebook):
    words = "## More\n\n" + "word " * 200
    notebook.cells[4:4] = [nbformat.v4.new_markdown_cell(words) for _ in range(5)]


def edit_setup(notebook):
    next(c for c in notebook.cells if "setup" in c.metadata.get("tags", [])).source += "\nprint(1)"


def edit_parameters(notebook):
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = "a = 1  # untyped"


def edit_wall(notebook):
    notebook.cells[-1].source += " word" * 230


def edit_stderr(notebook):
    cell = next(c for c in notebook.cells if c.cell_type == "code")
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="careful"))


def edit_path(notebook):
    cell = next(c for c in notebook.cells if c.cell_type == "code")
    text = "/" + "home/someone/file"
    cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))


def edit_unrun(notebook):
    [c for c in notebook.cells if c.cell_type == "code"][-1].execution_count = None


def edit_long(notebook):
    last = [c for c in notebook.cells if c.cell_type == "code"][-1]
    last.source = "\n".join(f"x{i} = {i}" for i in range(30))


def edit_star(notebook):
    [c for c in notebook.cells if c.cell_type == "code"][-1].source = "from helpers import *"


def edit_drift(notebook):
    cell = next(c for c in notebook.cells if c.metadata.get("lethe", {}).get("same_as"))
    cell.source = cell.source.replace("return ", "return 2 * ", 1)


def edit_output_widget(notebook):
    state = {"abc": {"model_name": "OutputModel"}}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": state}}


def edit_ending(notebook):
    notebook.cells[:] = [c for c in notebook.cells if "Three things" not in c.source]


def finding(source: str, shown: str, tags=("finding",)):
    """A way to add a finding: its code, what it shows, and the cell's tags."""

    def add(notebook):
        last = [c for c in notebook.cells if c.cell_type == "code"][-1]
        data = nbformat.v4.new_output("display_data", {"text/markdown": shown})
        notebook.cells.append(
            nbformat.v4.new_code_cell(
                source, outputs=[data], execution_count=last.execution_count + 1,
                metadata={"tags": list(tags)},
            )
        )  # fmt: skip

    return add


GOOD = 'show.finding("The church is gone.", share < 0.5, {"church": share})'
FOUND = "**Found:** The church is gone. (church 0.12)"
edit_finding_untagged = finding(GOOD, FOUND, tags=())
edit_finding_false = finding(GOOD, "**Not with these settings:** The church is gone. (church 0.9)")
edit_finding_constant = finding(GOOD.replace("share < 0.5", "True"), FOUND)
edit_finding_figure = finding(GOOD.replace("gone", "gone to 0.12"), FOUND)
edit_finding_two = finding(f"{GOOD}\n{GOOD}", FOUND)
edit_finding_silent = finding(GOOD + ";", "")
edit_finding_none = finding("x = 1", FOUND)


def edit_finding_few(notebook):
    found = [c for c in notebook.cells if "finding" in c.metadata.get("tags", [])]
    notebook.cells[:] = [c for c in notebook.cells if c not in found[2:]]


def test_a_good_finding_is_good():
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    finding(GOOD, FOUND)(notebook)
    assert problems(notebook) == []


BREAKS = {k: v for k, v in sorted(globals().items()) if k.startswith("edit_")}


@pytest.mark.parametrize("break_it", BREAKS.values(), ids=BREAKS)
def test_the_rules_catch_a_bad_notebook(break_it):
    good = read(NOTEBOOKS[0])
    bad = copy.deepcopy(good)
    break_it(bad)
    assert problems(good) == []
    assert problems(bad) != []


def test_large_files_are_caught():
    assert problems(read(NOTEBOOKS[0]), size=800_000) != []


def test_the_readme_s_count_of_claims_is_the_notebook_s():
    counts = (
        r"Of (\d+) claims .*?, (\d+) hold by construction; of the other (\d+), (\d+) hold here,"
        r"\s+(\d+) do not, and (\d+) cannot be told"
    )
    readme = re.search(counts, (ROOT / "README.md").read_text(), re.S).groups()
    every, built, tests, *words = map(int, readme)
    cells = read(next(p for p in NOTEBOOKS if p.stem.startswith("19"))).cells
    shown = output_text(next(c for c in cells if c.get("id") == "f-claims"))
    found = re.search(
        r"holds (\d+), does not hold (\d+), cannot be told here (\d+), tests (\d+), "
        r"by construction (\d+)",
        shown,
    )
    assert [*words, tests, built] == [int(figure) for figure in found.groups()]
    assert every == built + tests == built + sum(words)


def test_optional_sections_and_folds_are_no_prose():
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    before = prose(notebook)
    fold = "<details><summary>Hint</summary>" + " word" * 100 + "</details>"
    optional = "## 99 · Optional\n\n*Optional, 5 minutes.*\n\n" + "word " * 100
    for text, words in ((fold, 0), ("## 98 · More\n\n" + "word " * 97, 100), (optional, 0)):
        end = next(i for i, c in enumerate(notebook.cells) if "Three things" in c.source)
        changed = copy.deepcopy(notebook)
        changed.cells.insert(end, nbformat.v4.new_markdown_cell(text))
        assert prose(changed) == before + words
