"""What an adversary tried in vain, so that it goes on holding: restoring, no network, odd places.

Its other tries have tests beside what they tried: kills and two runs at once (test_tables.py),
resuming (test_every_method.py), full disks (test_files.py), damaged files (test_damaged_files.py).
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_world, full_edit, random_edit
from torchvision.transforms.functional import to_pil_image

from helpers import Edit, images, sample
from helpers.reader import folder_images
from helpers.renders import references
from helpers.tables import read_csv, write_csv

ROOT = Path(__file__).resolve().parents[1]
ODD = 'it\'s a "test" {x} $HOME %d & [1] äö 日本'  # a folder's name that shells and formats trip on


def python(code: str, *, cwd: Path, **environment) -> dict:
    """What a program of its own prints last, as JSON. It gets this environment and nothing else."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    ours = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]"
    run = subprocess.run(
        [sys.executable, "-c", f"{ours}\n{code}"],
        cwd=cwd, capture_output=True, text=True,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# --- the weights come back to the bit, whatever happens inside


class Stop(Exception):
    """Somebody's own error."""


ERRORS = [Stop, ValueError, KeyError, KeyboardInterrupt, GeneratorExit]


def at_random(world, edits: list, rng: random.Random, depth: int) -> None:
    """Enter a block, then maybe another, maybe sample, maybe leave by an error."""
    with world.applied(rng.choice([*edits, None])):
        if depth and rng.random() < 0.6:
            at_random(world, edits, rng, depth - 1)
        if rng.random() < 0.4:
            raise rng.choice(ERRORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_within_blocks_and_every_way_out_restore_the_weights(dtype):
    world, rng, left = build_tiny_world(), random.Random(0), 0
    edits = [random_edit(world), random_edit(world, group="text"), full_edit(world)]
    for part in (world.unet, world.pipe.text_encoder):
        part.to(dtype)
    before = {name: value.detach().clone() for name, value in world.parameters().items()}
    for _ in range(100):
        try:
            at_random(world, edits, rng, depth=3)
        except (*ERRORS, RuntimeError):  # a block within a block may be refused
            left += 1
        assert all(torch.equal(value, before[n]) for n, value in world.parameters().items())
        assert not world.is_edited and not world.guards
    assert 10 < left < 100, "both ways out were to be tried"


# --- no network, and the same numbers in every process


QUIET = """
import json, sys
tried = []
asked = [f"socket.{name}" for name in ("connect", "getaddrinfo", "gethostbyname", "sendto")]
sys.addaudithook(lambda event, given: tried.append(event) if event in asked else None)
from helpers import load_world, metrics, sample, unlearn
world = load_world()
edit = unlearn(world, "church", "esd", steps=1, batch_size=1, progress=False)
image = sample(world, ["church"], [0], edit, steps=2, progress=False)
world.judge.things(image), world.second_judge.things(image)
metrics.clip_score(world, image, ["church"]), metrics.lpips_distance(world, image, image)
edit.save("edit.safetensors"), edit.export(world, "pipeline")
print(json.dumps({"tried": tried, "norm": edit.norm(), "sum": image.double().sum().item()}))
"""


def test_no_network_no_home_another_folder_and_twice_the_same(tmp_path):
    """HF_HUB_OFFLINE is not set, and there is no HOME: nothing is asked for, and nothing is kept
    outside the folder that is named."""
    found = []
    for seed in ("0", "7"):  # of Python's hashes: no order of a set may matter
        cwd = tmp_path / seed
        cwd.mkdir()
        cache = str(tmp_path / "cache" / seed)
        found.append(python(QUIET, cwd=cwd, PYTHONHASHSEED=seed, LETHE_CACHE=cache))
        assert sorted(p.name for p in cwd.iterdir()) == ["edit.safetensors", "pipeline"]
    assert found[0] == found[1] and found[0]["tried"] == []


# --- places with odd names


def test_paths_with_odd_names(tmp_path, monkeypatch, tiny_world):
    place = tmp_path / ODD
    place.mkdir()
    monkeypatch.setattr(images, "CACHE", place / "cache")
    edit = full_edit(tiny_world)
    again = Edit.load(edit.save(place / "an edit {c}.safetensors"))
    assert all(torch.equal(again.delta[n], v) for n, v in edit.delta.items())
    first, second = (images.base_images(tiny_world, ["church"], [0], steps=1) for _ in range(2))
    assert torch.equal(first, second) and len(list((place / "cache").iterdir())) == 1
    write_csv(place / "table.csv", [{"a": 1, "b": "x"}])
    assert read_csv(place / "table.csv").a[0] == 1
    to_pil_image(references(None, "church", 1)[0]).save(place / "one {x}.png")
    with pytest.warns(UserWarning, match="left out"):
        assert folder_images(place, 16).shape == (1, 3, 16, 16)
    random_edit(tiny_world).export(tiny_world, place / "pipeline")
    assert (place / "pipeline" / "model_index.json").exists()
    assert sample(tiny_world, ["church"], [0], edit, steps=1, progress=False).isfinite().all()
