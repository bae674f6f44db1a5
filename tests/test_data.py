"""The committed data: digests, sizes, names, licences; nothing pickled."""

import json
import re

import pytest
import torch

from helpers import renders
from helpers.concepts import (
    BARE,
    DATA,
    TEMPLATES,
    concepts,
    object_names,
    object_table,
    pair_prompt,
    style_names,
)
from helpers.worlds import verify_manifest


@pytest.mark.parametrize("folder", ["emoji", "emoji-diffusion", "judge", "lpips"])
def test_manifest_matches(folder):
    verify_manifest(DATA / folder)
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
        verify_manifest(tmp_path)


def test_sizes():
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 60e6
    assert sum(p.stat().st_size for p in (DATA / "emoji").iterdir()) < 10e6


def test_weights_are_safetensors():
    pickled = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    assert not [p for p in DATA.rglob("*") if p.suffix in pickled]


def test_no_file_names_a_folder_of_the_machine_that_made_it():
    texts = [p for p in DATA.rglob("*") if p.suffix in (".json", ".toml", ".csv", ".md")]
    assert len(texts) > 20
    absolute = re.compile(r"[\"'`](/|[A-Z]:\\)\w")
    assert [str(p) for p in texts if absolute.search(p.read_text())] == []


def test_tiles_and_names():
    tiles = renders.tiles()
    assert tiles.shape == (9, len(object_names()), 4, renders.TILE, renders.TILE)
    assert tiles[:, :, 3].flatten(2).mean(-1).min() > 0.02, "a drawing is empty"
    names = [*style_names(), *object_names()]
    assert len(set(names)) == len(names)
    assert len(object_names(people=True)) == 10 and len(object_names(people=False)) >= 40


def test_roles_name_concepts_of_the_world():
    roles = concepts()["roles"]
    styles, objects = set(style_names()), object_names()
    assert set(roles["erased_styles"]) <= styles and len(roles["erased_styles"]) == 3
    assert set(roles["nine_objects"]) <= set(objects) and len(roles["nine_objects"]) == 9
    people = [roles["forgotten_person"], roles["look_alike"], *roles["other_people"]]
    assert set(people) <= set(object_names(people=True)) and len(people) == 4
    assert {*roles["neighbours"], *roles["neighbours"].values()} <= {*objects, *styles}


def test_held_out_templates_are_held_out():
    captions = concepts()["captions"]
    used = {*captions["both"], *captions["object"], *captions["style"]}
    assert not used & set(captions["held_out"])


def test_training_captions_hold_the_concept_and_begin_with_its_bare_name():
    assert set(TEMPLATES) == set(BARE) == {"style", "object", "person"}
    for kind, forms in TEMPLATES.items():
        assert forms[0] == "{c}" and BARE[kind] == ("{c}",) and len(set(forms)) == len(forms) > 1
        assert all(form.count("{c}") == 1 for form in forms)


def test_a_pairs_prompt_is_one_that_pretraining_saw():
    assert pair_prompt("church", "Twemoji") == "church in the style of Twemoji"
    assert "{o} in the style of {s}" in concepts()["captions"]["both"]


def test_every_set_is_licensed_in_the_data_card():
    card = (DATA / "emoji" / "README.md").read_text()
    for style in concepts()["styles"]:
        assert f"`{style['set']}`" in card
    assert "share-alike" in card.lower()


def test_the_table_of_objects_is_that_of_the_toml_file():
    wanted = [
        {"index": str(i), "name": name, "icon": icon, "category": category, "synonyms": synonyms}
        for i, (category, (icon, name, *synonyms)) in enumerate(
            (category, row) for category, rows in concepts()["categories"].items() for row in rows
        )
    ]
    assert object_table() == wanted


def test_compose_is_seeded_and_plain_without_variation():
    tiles = renders.tiles()[:, 0]
    a, b = (renders.compose(tiles, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1
    still, again = (
        renders.compose(tiles, torch.Generator().manual_seed(seed), vary=0) for seed in (1, 2)
    )
    assert torch.equal(still, again)
    assert torch.equal(still[:, :, 0, 0], torch.ones(9, 3))  # the corner is white


def test_references_refuse_unknown_names():
    with pytest.raises(ValueError, match="zebra"):
        renders.references(None, "zebra", 1)
    images = renders.references("Twemoji", "church", 2)
    assert images.shape == (2, 3, renders.TILE, renders.TILE)
