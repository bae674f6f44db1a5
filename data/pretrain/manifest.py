"""Write ``manifest.json`` (SHA-256 of every file) in each folder of weights: ``python data/pretrain/manifest.py``."""

import hashlib
import json

from common import ROOT

for name in ("emoji-diffusion", "judge", "lpips", "emoji"):
    folder = ROOT / "data" / name
    if not folder.exists():  # the judge and the backbone of LPIPS come last
        continue
    skipped = {"manifest.json", "evaluation.json", "README.md"}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped)
    digests = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "manifest.json").write_text(json.dumps(digests, indent=1) + "\n")
    print(f"{name}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB")
