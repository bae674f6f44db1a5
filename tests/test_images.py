"""Images to train on: the base's own, kept on disk; folders; new views; photographs of people."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_world, full_edit, random_edit
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import checked, images, sample, unlearn
from helpers.attention import find_tokens
from helpers.concepts import BARE, TEMPLATES, concepts, pair_prompt
from helpers.denoise import SAMPLERS
from helpers.diffusion import to_latents
from helpers.identity import value_digest
from helpers.images import (
    FACES,
    as_stored,
    augmented,
    base_images,
    caption_templates,
    captions,
    concept_latents,
    folder_images,
    photographs,
    retain_latents,
    to_bytes,
)
from helpers.methods import gcirs
from helpers.seeds import retain_seeds, training_seeds

FAST = {"steps": 2}


def files(folder):
    """The images that are kept; none is half written."""
    assert not [p for p in folder.glob("*") if p.suffix != ".safetensors"]
    return sorted(folder.glob("*.safetensors"))


def test_eight_bits_are_what_a_file_gives_back(tmp_path):
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert to_bytes(x).dtype == torch.uint8
    assert to_bytes(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    assert (as_stored(x) - x).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(as_stored(as_stored(x)), as_stored(x))
    Image.fromarray(to_bytes(x)[0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    assert torch.equal(folder_images(tmp_path, 8), as_stored(x))


# --- what the base samples


def test_base_images_are_kept(tiny_world, cache, monkeypatch):
    first = base_images(tiny_world, ["church"], [1], **FAST)
    assert len(files(cache)) == 1
    fresh = sample(tiny_world, ["church"], [1], progress=False, **FAST)
    assert torch.equal(first, as_stored(fresh))  # the first call gives what later ones read
    monkeypatch.setattr(images, "sample", None)  # sampling again would fail
    assert torch.equal(first, base_images(tiny_world, ["church"], [1], **FAST))
    with pytest.raises(TypeError):
        base_images(tiny_world, ["church"], [2], **FAST)


def test_the_name_depends_on_all_that_was_asked(tiny_world, cache):
    """Prompts, seeds, each option, what is hidden, and both parts' weights."""
    asked = [
        {}, {"prompts": ["dog"]}, {"seeds": [2]}, {"steps": 3}, {"guidance": 1.0},
        {"sampler": "ddim"}, {"hide": [[1]]}, {"hide": [[2]]},
    ]  # fmt: skip
    for i, change in enumerate(asked):
        options = {"prompts": ["church"], "seeds": [1], **FAST, **change}
        base_images(tiny_world, **options)
        base_images(tiny_world, **options)
        assert len(files(cache)) == i + 1
    for part in ("unet", "text_encoder"):
        other = build_tiny_world()
        next(other.part(part).parameters()).data.add_(0.1)
        base_images(other, ["church"], [1], **FAST)
    assert len(files(cache)) == len(asked) + 2


def test_the_world_s_own_sampling_is_spelled_out_in_the_name(tiny_world, cache):
    """A default that changes must not find images of the old one."""
    base_images(tiny_world, ["church"], [1], steps=12, guidance=5.0, sampler="dpm++")
    base_images(tiny_world, ["church"], [1])
    assert len(files(cache)) == 1
    tiny_world.sampling = type(tiny_world.sampling)(2, 3.0, "euler")
    base_images(tiny_world, ["church"], [1])
    assert len(files(cache)) == 2
    with pytest.raises(ValueError, match="no option bogus"):
        base_images(tiny_world, ["church"], [1], bogus=1)


def test_hidden_positions_reach_the_sampler(tiny_world, cache):
    prompts = ["a church", "church"]
    positions = find_tokens(tiny_world, prompts, "church")
    hidden = base_images(tiny_world, prompts, [1, 2], hide=positions, **FAST)
    fresh = sample(tiny_world, prompts, [1, 2], hide="church", progress=False, **FAST)
    assert torch.equal(hidden, as_stored(fresh))
    plain = base_images(tiny_world, prompts, [1, 2], **FAST)
    assert (hidden - plain).abs().max() > 0 and len(files(cache)) == 2


def test_images_of_an_edited_model_are_never_the_base_s(tiny_world, cache):
    """Inside ``applied`` nothing is sampled, read, or written: not for a guard alone either."""
    guarded = full_edit(tiny_world)
    guarded = type(guarded)({}, guards=guarded.guards)
    for edit in (random_edit(tiny_world), random_edit(tiny_world, group="text"), guarded):
        with tiny_world.applied(edit), tiny_world.applied(None):
            with pytest.raises(RuntimeError, match="leave the block first, or use sample"):
                base_images(tiny_world, ["church"], [1], **FAST)
            with pytest.raises(RuntimeError, match="base_images"):
                retain_latents(tiny_world, ["church"])
        assert not cache.exists()
    base = base_images(tiny_world, ["church"], [1], **FAST)
    with tiny_world.applied(random_edit(tiny_world)), pytest.raises(RuntimeError):
        base_images(tiny_world, ["church"], [1], **FAST)  # kept already: still not handed out
    assert torch.equal(base_images(tiny_world, ["church"], [1], **FAST), base)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_files_hold_bytes(tiny_world, cache, sampler):
    base_images(tiny_world, ["church", "dog"], [1, 2], sampler=sampler, **FAST)
    (path,) = files(cache)
    stored = load_file(path)["images"]
    assert stored.dtype == torch.uint8 and stored.shape == (2, 3, 16, 16)


def test_weights_changed_in_place_are_another_base(tiny_world, cache):
    """Each part, under no_grad and through ``.data``, which torch counts as no new version."""
    seen = [base_images(tiny_world, ["church"], [1], **FAST)]
    encoder, decoder = tiny_world.pipe.text_encoder, tiny_world.pipe.vae.decoder
    for layer in (encoder.get_input_embeddings(), decoder.conv_out, tiny_world.unet.conv_in):
        for weight in (layer.weight, layer.weight.data):
            with torch.no_grad():
                weight.mul_(-0.5)
            found = base_images(tiny_world, ["church"], [1], **FAST)
            fresh = sample(tiny_world, ["church"], [1], progress=False, **FAST)
            assert torch.equal(found, as_stored(fresh)) and not torch.equal(found, seen[-1])
            seen.append(found)
    assert len(files(cache)) == len(seen) == 7


def test_a_file_of_images_says_what_it_answers(tiny_world, cache):
    base_images(tiny_world, ["church"], [1], **FAST)
    (path,) = files(cache)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    asked = json.loads(metadata["asked"])
    assert asked["prompts"] == ["church"] and asked["seeds"] == [1] and asked["hide"] is None
    assert asked["sampling"]["steps"] == 2 and set(asked["networks"]) == {
        "unet", "text_encoder", "vae",
    }  # fmt: skip
    assert path.stem == value_digest(asked)[:24] and len(metadata["digest"]) == 64


def test_what_was_sampled_twice_is_one_file_to_the_byte(tiny_world, cache, tmp_path, monkeypatch):
    base_images(tiny_world, ["church"], [1], **FAST)
    monkeypatch.setattr(images, "CACHE", tmp_path / "other")
    base_images(tiny_world, ["church"], [1], **FAST)
    (one,), (two,) = files(cache), files(tmp_path / "other")
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's own folder for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    images._writable.cache_clear()
    yield tmp_path / "home" / "lethe"
    images._writable.cache_clear()


def test_a_cache_that_cannot_be_written(tiny_world, home, monkeypatch):
    """One warning, which names the way out; images are kept elsewhere, and found there."""
    monkeypatch.setattr(images, "CACHE", images.Path("/proc/lethe/cache"))
    with pytest.warns(UserWarning, match="LETHE_CACHE") as seen:
        first = base_images(tiny_world, ["church"], [1], **FAST)
    told = [str(warning.message) for warning in seen]  # libraries may warn of their own
    assert sum("LETHE_CACHE" in text for text in told) == 1 and len(files(home)) == 1
    monkeypatch.setattr(images, "sample", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(base_images(tiny_world, ["church"], [1], **FAST), first)


def test_without_a_home_the_cache_is_a_folder_of_nobody_else(tiny_world, home, monkeypatch):
    monkeypatch.setattr(images, "CACHE", images.Path("/proc/lethe/cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    with pytest.warns(UserWarning, match="LETHE_CACHE"):
        base_images(tiny_world, ["church"], [1], **FAST)
    folder = images.cache_folder()
    assert len(files(folder)) == 1 and folder.stat().st_mode & 0o077 == 0
    shutil.rmtree(folder)


def test_a_full_disk_costs_the_file_not_the_images(tiny_world, cache, monkeypatch):
    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checked, "save_file", full)
    with pytest.warns(UserWarning, match=r"safetensors cannot be written: no space.*LETHE_CACHE"):
        found = base_images(tiny_world, ["church"], [1], **FAST)
    fresh = sample(tiny_world, ["church"], [1], progress=False, **FAST)
    assert torch.equal(found, as_stored(fresh)) and not list(cache.iterdir())


@pytest.mark.parametrize(("given", "wanted"), [("", "build/cache"), ("/x/y", "/x/y")])
def test_an_empty_lethe_cache_is_none(given, wanted):
    code = "from helpers import images; print(images.CACHE.as_posix())"
    environment = {**os.environ, "LETHE_CACHE": given}
    root = images.Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip().endswith(wanted), run.stderr


# --- captions and latents


def test_captions_take_the_templates_of_each_kind_in_turn(tiny_world):
    assert captions(tiny_world, ["Noto", "church"], 3) == (
        ["Noto", "in the style of Noto", "Noto", "church", "a picture of a church", "church"],
        ["Noto"] * 3 + ["church"] * 3,
    )
    assert captions(tiny_world, ["old man", "church"], 2, BARE) == (
        ["old man", "old man", "church", "church"],
        ["old man", "old man", "church", "church"],
    )
    assert captions(tiny_world, ["Noto"], 0) == ([], [])
    with pytest.raises(ValueError, match="unicorn"):
        captions(tiny_world, ["unicorn"], 1)


def test_captions_are_those_of_the_concepts_file():
    assert set(TEMPLATES) == {"style", "object", "person"} == set(BARE)
    assert pair_prompt("church", "Noto") == "church in the style of Noto"
    assert pair_prompt("{o}", "{s}") in concepts()["captions"]["both"]
    assert json.dumps(concepts()["training_captions"]) == json.dumps(TEMPLATES)


def test_concept_latents_are_of_the_base_s_images(tiny_world, cache):
    latents, prompts, owners = concept_latents(tiny_world, ["church", "Noto"], 2, 3)
    assert (prompts, owners) == captions(tiny_world, ["church", "Noto"], 2)
    pixels = base_images(tiny_world, prompts, training_seeds(3, 4))
    assert len(files(cache)) == 1  # the same images, found by their name
    assert torch.equal(latents, to_latents(tiny_world, pixels)) and latents.dtype == torch.float32
    bare = concept_latents(tiny_world, ["church", "Noto"], 1, 3, templates=BARE)
    assert bare[1] == ["church", "Noto"] == bare[2]


def test_concept_latents_of_one_s_own_images(tiny_world, cache, tmp_path):
    for name, colour in (("church/a", "red"), ("church/b", "blue"), ("Dog/c", "green")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    each = {"church": str(tmp_path / "church"), "dog": str(tmp_path / "Dog")}
    for own in (each, str(tmp_path)):  # a folder for each, or one with a sub-folder for each
        latents, prompts, owners = concept_latents(tiny_world, ["dog", "church"], own, 0)
        assert owners == ["dog", "church", "church"]
        assert prompts == ["dog", "church", "a picture of a church"]
        pixels = torch.cat([folder_images(each[name], 16) for name in ("dog", "church")])
        assert torch.equal(latents, to_latents(tiny_world, pixels))
    assert not cache.exists()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "a.png")
    flat = str(tmp_path / "flat")
    with pytest.raises(ValueError, match=r"no folder of 'church': several concepts need a folder"):
        concept_latents(tiny_world, ["church", "dog"], flat, 0)
    assert concept_latents(tiny_world, ["church"], flat, 0)[2] == ["church"]


def test_concepts_may_have_different_numbers_of_their_own_images(tiny_world, cache, tmp_path):
    """Each method takes each picture for its own concept."""
    for name, colours in {"church": ("red",), "dog": ("blue", "navy", "cyan")}.items():
        (tmp_path / name).mkdir()
        for colour in colours:
            Image.new("RGB", (20, 20), colour).save(tmp_path / name / f"{colour}.png")
    chosen = gcirs.Options(images=str(tmp_path))
    found = gcirs.Correlations(tiny_world, ["dog", "church"], chosen, 0).latents
    for name, count in (("dog", 3), ("church", 1)):
        own = to_latents(tiny_world, folder_images(tmp_path / name, 16))
        assert len(own) == count and torch.allclose(found[name], own, atol=1e-6)
    own = {name: str(tmp_path / name) for name in ("church", "dog")}
    for method, more in (("resteering", {}), ("fmn", {"visual": 0.0}), ("fmn_sepme", {})):
        options = {"steps": 1, "images": own, "progress": False, **more}
        edit = unlearn(tiny_world, ["dog", "church"], method, **options)
        assert json.loads(json.dumps(edit.meta["options"]["images"])) == own


def test_captions_take_one_number_or_one_for_each(tiny_world):
    assert captions(tiny_world, ["dog", "Noto"], {"dog": 2, "Noto": 1})[1] == ["dog", "dog", "Noto"]
    templates = caption_templates(tiny_world, ["dog", "Noto", "dog", "dog"])
    assert templates == ["{c}", "{c}", "a picture of a {c}", "{c}"]


def test_the_retain_set_is_sampled_once_for_all(tiny_world, cache):
    latents, names = retain_latents(tiny_world, ["church", "Noto"])
    assert set(names) == set(tiny_world.concepts) - {"church", "Noto"}
    assert len(latents) == len(names) and len(files(cache)) == 1
    twice, others = retain_latents(tiny_world, ["dog"])
    assert len(files(cache)) == 1 and "church" in others and "dog" not in others
    assert torch.equal(latents[names.index("castle")], twice[others.index("castle")])
    _, names = retain_latents(tiny_world, ["church"], each=2)
    assert names.count("dog") == 2 and len(files(cache)) == 2
    pixels = base_images(tiny_world, tiny_world.concepts, retain_seeds(len(tiny_world.concepts)))
    row = tiny_world.concepts.index("castle")
    expected = to_latents(tiny_world, pixels[row : row + 1])[0]
    assert torch.allclose(twice[others.index("castle")], expected, atol=1e-5)


# --- folders


def test_folder_images(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (16, 32), 128).save(tmp_path / "a.jpg")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not looked at")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        pixels = folder_images(tmp_path, 16)
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels[1, 0].min() > 0.99 and pixels[1, 1].max() < 0.01  # by name: red is second


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="no readable image"):
        folder_images(tmp_path, 16)
    with pytest.raises(ValueError, match="nowhere"):
        folder_images(tmp_path / "nowhere", 16)
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="broken"), pytest.raises(ValueError, match="no readable"):
        folder_images(tmp_path, 16)


# --- new views


def test_new_views_of_images(tmp_path):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    views = augmented(x, 3, seed=1)
    assert views.shape == (6, 3, 16, 16) and views.min() >= 0 and views.max() <= 1
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is as before
    assert torch.equal(views, augmented(x, 3, seed=1))
    assert not torch.equal(views, augmented(x, 3, seed=2))
    assert len({view.sum().item() for view in views}) == 6
    nothing = augmented(x, 1, flip=False, crop=1.0, colour=0.0)
    assert torch.allclose(nothing, x, atol=1e-6)
    mirrored = augmented(x, 8, crop=1.0, colour=0.0)
    kinds = [torch.allclose(v, x[i % 2].flip(-1), atol=1e-6) for i, v in enumerate(mirrored)]
    assert any(kinds) and not all(kinds)


def test_a_pair_changes_alike():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = augmented(torch.stack([x, x], 1), 4)  # (1, 2, 3, H, W): two equal images a row
    assert views.shape == (4, 2, 3, 16, 16)
    assert torch.allclose(views[:, 0], views[:, 1], atol=1e-6)
    with pytest.raises(ValueError, match="copies is 0"):
        augmented(x, 0)
    with pytest.raises(ValueError, match=r"from 0 to 255, want \[0, 1\]: divide by 255"):
        augmented(torch.tensor([0.0, 255.0]).expand(1, 3, 8, 2), 1)


# --- photographs of people, with a stand-in for kagglehub: what can be told offline


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """Two data sets of the published layout; returns the names that were asked for."""
    folders = {
        "1/Celebrity Faces Dataset/Robert Downey Jr": "red", "2/Elon_Musk": "blue",
    }  # fmt: skip
    for path, colour in folders.items():
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (80, 60), colour).save(tmp_path / path / "001.jpg")
    asked = []

    def dataset_download(name: str) -> str:
        asked.append(name)
        return str(tmp_path / str(1 + FACES.index(name)))

    stand_in = SimpleNamespace(dataset_download=dataset_download)
    monkeypatch.setitem(sys.modules, "kagglehub", stand_in)
    return asked


def test_a_person_s_folder_is_found_and_read(kaggle):
    folder = photographs("Robert Downey Jr.")
    assert folder.name == "Robert Downey Jr" and kaggle == [FACES[0]]
    pixels = folder_images(folder, 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0, 0].mean() > 0.9 > 0.1 > pixels[0, 2].mean()
    assert photographs("elon musk").name == "Elon_Musk" and kaggle == [FACES[0], *FACES]


def test_what_cannot_be_had_says_why(kaggle, monkeypatch):
    said = r"no photographs of 'Taylor Swift' .* Elon_Musk, Robert Downey Jr"
    with pytest.raises(ValueError, match=said):
        photographs("Taylor Swift")

    def offline(name):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=offline))
    with pytest.raises(ConnectionError, match=r"celebrity-face-image-dataset.*go online once"):
        photographs("Elon Musk")
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # not installed
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install kagglehub")):
        photographs("Elon Musk")
