"""Write ``manifest.json``, the SHA-256 of every file, in each folder of data and weights.

    python data/pretrain/manifest.py

The model card and its figures are not listed: they may change while the weights stay.
"""

import json
from pathlib import Path

from common import ROOT

from helpers.files import complete
from helpers.identity import file_digest

FOLDERS = ("emoji-diffusion", "judge", "lpips", "emoji")
SKIPPED = {"manifest.json", "evaluation.json", "README.md"}


def write_manifest(folder: Path) -> None:
    """The digests of one folder's files, by their paths within it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in SKIPPED)
    digests = {p.relative_to(folder).as_posix(): file_digest(p) for p in files}
    with complete(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(digests, indent=1) + "\n")
    size = sum(p.stat().st_size for p in files) / 1e6
    print(f"{folder.name}: {len(files)} files, {size:.1f} MB")


if __name__ == "__main__":
    for name in FOLDERS:
        folder = ROOT / "data" / name
        if folder.exists():  # the judge and the backbone of LPIPS come last
            write_manifest(folder)
