"""Execute the course: every numbered notebook, top to bottom, with papermill.

python notebooks/execute.py build/course      # executed copies, HTML beside them, and an index page
python notebooks/execute.py --in-place [01]   # refresh the committed outputs (of all, or of 01)
"""

import argparse
import base64
import html
import io
import logging
import re
import warnings
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from PIL import Image

HERE = Path(__file__).resolve().parent
PAGE = """<!doctype html><meta charset="utf-8"><title>Lethe, the course</title>
<style>body{{font:17px/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem;
color:#1f2933}}
li{{margin:.6rem 0}}small{{color:#52606d}}</style>
<h1>Lethe</h1><p>Forgetting in text-to-image diffusion models, in notebooks.</p><ol>{items}</ol>"""


def title_and_question(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """The heading of the first cell and the first line of text below it."""
    lines = [line.strip() for line in notebook.cells[0].source.splitlines() if line.strip()]
    return lines[0].lstrip("# "), re.sub(r"[*_`]", "", lines[1]) if len(lines) > 1 else ""


def fewer_colours(data: str) -> str:
    """A PNG of at most 256 colours, base64 in and out: figures look the same at half the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    buffer = io.BytesIO()
    small = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out timings and paths from the metadata, and make the pictures small."""
    notebook.metadata.pop("papermill", None)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["kernelspec"] = kernel
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = fewer_colours(output.data["image/png"])
    widgets = notebook.metadata.get("widgets", {})
    widgets = widgets.get("application/vnd.jupyter.widget-state+json", {})
    for widget in widgets.get("state", {}).values():
        if widget["model_name"] == "ImageModel":  # a panel's picture
            for buffer in widget["buffers"]:
                buffer["data"] = fewer_colours(buffer["data"])
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", default="build/course", help="folder for the course")
    parser.add_argument(
        "--in-place", nargs="*", metavar="START", help="write the outputs back into notebooks/"
    )
    args = parser.parse_args()
    in_place = args.in_place is not None
    starts = tuple(args.in_place or [""])
    target = HERE if in_place else Path(args.target)
    target.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    items = []
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        if in_place and not path.name.startswith(starts):
            continue
        print(path.name, flush=True)
        out = target / path.name
        running = out.with_suffix(".running.ipynb") if in_place else out
        papermill.execute_notebook(str(path), str(running), cwd=str(HERE), kernel_name="python3")
        notebook = tidy(nbformat.read(running, 4))
        nbformat.write(notebook, running)
        running.replace(out)
        if not in_place:
            page, _ = HTMLExporter().from_notebook_node(notebook)
            out.with_suffix(".html").write_text(page)
            title, question = (html.escape(text) for text in title_and_question(notebook))
            link = f'<a href="{out.stem}.html">{title}</a>'
            items.append(f"<li>{link}<br><small>{question}</small></li>")
    if not in_place:
        (target / "index.html").write_text(PAGE.format(items="\n".join(items)))
        print(f"\nThe course is ready: open {target / 'index.html'}")


if __name__ == "__main__":
    main()
