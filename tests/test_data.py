"""The committed data: digests, sizes, names, licences; nothing pickled."""

import json
import re
from pathlib import Path

import pytest
import torch

from helpers import renders
from helpers.worlds import check_manifest

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize("folder", ["emoji", "emoji-diffusion", "judge", "lpips"])
def test_manifest_matches(folder):
    check_manifest(DATA / folder)
    listed = set(json.loads((DATA / folder / "manifest.json").read_text()))
    there = {str(p.relative_to(DATA / folder)) for p in (DATA / folder).rglob("*") if p.is_file()}
    assert there - listed <= {"manifest.json", "evaluation.json", "README.md"}


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_named(tmp_path, damage):
    (tmp_path / "a.bin").write_bytes(b"one")
    (tmp_path / "manifest.json").write_text('{"a.bin": "0000"}')
    if damage == "missing":
        (tmp_path / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"a\.bin.*git checkout"):
        check_manifest(tmp_path)


def test_sizes():
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 60e6
    assert sum(p.stat().st_size for p in (DATA / "emoji").iterdir()) < 10e6


def test_weights_are_safetensors():
    assert not [p for p in DATA.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_no_file_names_a_folder_of_the_machine_that_made_it():
    texts = [p for p in DATA.rglob("*") if p.suffix in (".json", ".toml", ".csv", ".md")]
    assert len(texts) > 20
    assert [str(p) for p in texts if re.search(r"[\"'`](/|[A-Z]:\\)\w", p.read_text())] == []


def test_tiles_and_names():
    tiles = renders.tiles()
    assert tiles.shape == (9, len(renders.object_names()), 4, renders.TILE, renders.TILE)
    assert tiles[:, :, 3].flatten(2).mean(-1).min() > 0.02, "a drawing is empty"
    names = [*renders.style_names(), *renders.object_names()]
    assert len(set(names)) == len(names)
    assert len(renders.object_names(people=True)) == 10 and len(renders.object_names(people=False)) >= 40


def test_roles_name_concepts_of_the_world():
    roles = renders.concepts()["roles"]
    objects = renders.object_names()
    assert set(roles["erased_styles"]) <= set(renders.style_names()) and len(roles["erased_styles"]) == 3
    assert set(roles["nine_objects"]) <= set(objects) and len(roles["nine_objects"]) == 9
    people = [roles["forgotten_person"], roles["look_alike"], *roles["other_people"]]
    assert set(people) <= set(renders.object_names(people=True)) and len(people) == 4
    assert {*roles["neighbours"], *roles["neighbours"].values()} <= {*objects, *renders.style_names()}


def test_held_out_templates_are_held_out():
    captions = renders.concepts()["captions"]
    used = {*captions["both"], *captions["object"], *captions["style"]}
    assert not used & set(captions["held_out"])


def test_every_set_is_licensed_in_the_data_card():
    card = (DATA / "emoji" / "README.md").read_text()
    for style in renders.concepts()["styles"]:
        assert f"`{style['set']}`" in card
    assert "share-alike" in card.lower()


def test_compose_is_seeded_and_plain_without_variation():
    tiles = renders.tiles()[:, 0]
    a, b = (renders.compose(tiles, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1
    still = renders.compose(tiles, torch.Generator().manual_seed(1), vary=0)
    assert torch.equal(still, renders.compose(tiles, torch.Generator().manual_seed(2), vary=0))
    assert torch.equal(still[:, :, 0, 0], torch.ones(9, 3))  # the corner is white


def test_references_refuse_unknown_names():
    with pytest.raises(ValueError, match="zebra"):
        renders.references(None, "zebra", 1)
    assert renders.references("Twemoji", "church", 2).shape == (2, 3, renders.TILE, renders.TILE)
