"""The student's and the teacher's copies, and the sources of the site."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def run(script: str, *words: str) -> None:
    subprocess.run([sys.executable, ROOT / script, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def editions(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("student", "teacher")}
    for name, folder in folders.items():
        run("notebooks/editions.py", name, str(folder))
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_the_student_s_copy_gives_nothing_away(editions, name):
    mine, whole = (nbformat.read(f / name, 4) for f in (editions["student"], ROOT / "notebooks"))
    nbformat.validate(mine)
    code = [c.source for c in mine.cells if c.cell_type == "code"]
    assert code == [c.source for c in whole.cells if c.cell_type == "code" and c.source]
    assert not any(c.outputs or c.execution_count for c in mine.cells if c.cell_type == "code")
    text = "\n".join(c.source for c in mine.cells if c.cell_type == "markdown")
    assert {*re.findall(r"<summary>(.*?)</summary>", text)} <= {"Hint"}
    assert "Hint" in text or "<details>" not in str(whole)
    assert text.count("### Exercise") == str([c.source for c in whole.cells]).count("### Exercise")


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_s_copy_has_its_guide_and_the_outputs(editions, name):
    mine, whole = (nbformat.read(f / name, 4) for f in (editions["teacher"], ROOT / "notebooks"))
    nbformat.validate(mine)
    guide = " ".join(mine.cells[1].source.split())
    assert guide.startswith("> **For the teacher**")
    for word in ("**Stop**", "**Expected:**", "**Typical wrong answers:**", "**Minutes:**"):
        assert word in guide, f"{name}: the guide has no {word}"
    assert "<details>" not in str(mine.cells)
    assert len(mine.cells) == len(whole.cells) + 1
    assert [c.get("outputs") for c in mine.cells if c.cell_type == "code"] == [
        c.get("outputs") for c in whole.cells if c.cell_type == "code"
    ]


def test_the_book_has_every_notebook_and_every_page_of_docs(tmp_path):
    run("docs/site.py", str(tmp_path / "site"))
    index = (tmp_path / "site/index.md").read_text()
    listed = set(re.findall(r"^(?:.*<)?((?:notebooks|docs)/\w+)>?$", index, re.M))
    there = {f"notebooks/{Path(name).stem}" for name in NAMES}
    there |= {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} - {"docs/index"}
    assert listed == there
    for name in NAMES:
        nbformat.validate(nbformat.read(tmp_path / "site/notebooks" / name, 4))


@pytest.mark.parametrize("page", ["README.md", "TEACHING.md", "docs/field.md", "docs/guide.md"])
def test_links_of_the_pages_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_notebook_stands_in_the_readme_and_in_the_teaching_plan():
    readme, plan = ((ROOT / page).read_text() for page in ("README.md", "TEACHING.md"))
    for name in NAMES:
        assert f"(notebooks/{name})" in readme and f"blob/main/notebooks/{name})" in readme
        assert f"(notebooks/{name})" in plan


def test_the_readme_says_the_minutes_of_each_notebook():
    readme = (ROOT / "README.md").read_text()
    for name in NAMES:
        first = nbformat.read(ROOT / "notebooks" / name, 4).cells[0].source
        said = re.search(r"(\d+) minutes with the exercise", first)[1]
        row = next(line for line in readme.splitlines() if f"](notebooks/{name})" in line)
        assert row.split("|")[4].strip() == said, f"{name}: the first cell says {said}"
