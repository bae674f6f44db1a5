"""Digests: what they tell apart, what they do not, and that nothing else makes one."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_world

from helpers import load_world, provenance
from helpers.denoise import Sampling
from helpers.identity import (
    file_digest,
    module_digest,
    plain,
    tensors_digest,
    value_digest,
)
from helpers.judge import load_judge
from helpers.tables import RESULTS, read_csv
from workflow import plan

ROOT = Path(__file__).resolve().parents[1]


def imports(path: Path) -> set[str]:
    """The modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_nothing_else_makes_digests():
    files = [p for folder in ("helpers", "workflow", "data") for p in (ROOT / folder).rglob("*.py")]
    found = {p.name for p in files if imports(p) & {"hashlib", "zlib", "_hashlib"}}
    assert len(files) > 60 and found == {"identity.py"}


def test_planning_needs_no_torch():
    """``plan.py`` runs this file by its path."""
    wanted = {"hashlib", "json", "collections.abc", "pathlib"}
    assert imports(ROOT / "helpers/identity.py") == wanted
    assert plan.digest("a", {"b": (1, 2)}) == plan.digest("a", {"b": [1, 2]})


def test_values():
    """Equal for what JSON does not tell apart, whatever the order of keys."""
    value = {"b": [1, 2.5, None], "a": {"c": True}}
    text = json.dumps(value, sort_keys=True)
    assert value_digest(value) == hashlib.sha256(text.encode()).hexdigest()
    same = {"a": {"c": np.bool_(True)}, "b": (np.int64(1), np.float64(2.5), None)}
    assert value_digest(same) == value_digest(value)
    others = [
        {"b": [1, 2.5, None]}, {**value, "b": [1, 2.5]}, {**value, "b": [2.5, 1, None]},
        {**value, "a": {"c": False}}, {**value, "a": {"d": True}}, [value],
    ]  # fmt: skip
    assert len({value_digest(v) for v in [value, *others]}) == 7
    assert value_digest(json.loads(json.dumps(value))) == value_digest(value)


def test_plain_values_are_what_json_gives_back():
    given = {
        "path": Path("a") / "b", "n": np.int32(3), "x": np.float32(0.5), "t": torch.tensor(2),
        "name": np.str_("esd"), "pair": (1, (2, 3)), 4: "four", None: 0, "flag": True,
    }  # fmt: skip
    found = plain(given)
    assert found == json.loads(json.dumps(found))
    assert found == {
        "path": str(Path("a") / "b"), "n": 3, "x": 0.5, "t": 2, "name": "esd", "pair": [1, [2, 3]],
        "4": "four", "null": 0, "flag": True,
    }  # fmt: skip
    assert [type(found[k]) for k in ("n", "x", "t", "name", "flag")] == [int, float, int, str, bool]


def test_what_json_cannot_hold_is_named():
    circle: dict = {}
    circle["self"] = circle
    for value, said in (
        ({"options": {"lr": {1, 2}}}, r"meta\.options\.lr is of type set"),
        ({"seeds": [0, torch.zeros(2)]}, r"meta\.seeds\[1\] is of type Tensor"),
        ({"f": print}, r"meta\.f is of type builtin"),
        ({(1, 2): 3}, r"a key of meta is \[1, 2\]"),
        ({1: "a", "1": "b"}, "keys that are one in JSON"),
        (circle, "nested more than 100 deep"),
        (b"bytes", "meta is of type bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            plain(value, "meta")


def test_tensors():
    """Names, types, shapes and every byte count; their order and strides do not."""
    a = {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor(1)}
    other = [
        {"z": a["x"], "y": a["y"]}, {**a, "x": a["x"].double()}, {**a, "x": a["x"].view(3, 2)},
        {**a, "x": a["x"] + 1e-6}, {"x": a["x"]}, {**a, "x": a["x"].bfloat16()},
        {**a, "x": a["x"].flip(0)}, {**a, "x": -a["x"]}, {},
    ]  # fmt: skip
    assert len({tensors_digest(tensors) for tensors in [a, *other]}) == 10
    strided = {"y": a["y"], "x": a["x"].T.contiguous().T}
    assert not strided["x"].is_contiguous() and tensors_digest(strided) == tensors_digest(a)
    small = torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(0), torch.zeros(1, dtype=bool)
    assert len({tensors_digest({"a": t}) for t in small}) == 3


def test_modules_in_two_precisions():
    module = torch.nn.Linear(3, 2).half().float()
    assert module_digest(module) == module_digest(module.half())
    module.float().weight.data[0, 0] += 1e-5  # below half precision
    assert module_digest(module) == module_digest(module.half().float())
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    assert len({module_digest(*m) for m in ([one], [two], [one, two], [two, one])}) == 4


def test_fingerprints_of_committed_results_stay_valid():
    """What the tables name as their base model and their judge is what is loaded today."""
    world, judge = load_world("emoji"), load_judge()
    frame = read_csv(RESULTS / "methods.csv")
    assert set(frame["base_model"]) == {world.fingerprint()}
    assert provenance.base_parts(world)["unet"] == world.fingerprint()
    digest = hashlib.sha256()
    for network in (judge.style, judge.thing):
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    assert judge.fingerprint() == digest.hexdigest()[:16]


def test_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


# --- what an image depends on


def key(world, **more) -> str:
    asked = {"prompts": ["a church"], "seeds": [0], "how": Sampling(steps=2), "hide": None, **more}
    return value_digest(provenance.drawing_key(world, **asked))


def add_token(world):
    """A soft token as textual inversion loads it."""
    world.pipe.tokenizer.add_tokens("<mine>")
    world.pipe.text_encoder.resize_token_embeddings(len(world.pipe.tokenizer))


def add_lora(world):
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    world.unet.add_adapter(config)


def set_scale(world):
    add_lora(world)
    for layer in world.unet.modules():
        if hasattr(layer, "scaling"):
            layer.scaling = dict.fromkeys(layer.scaling, 0.3)


def off(world):
    add_lora(world)
    world.unet.disable_adapters()


def in_place(part, way):
    def act(world):
        weight = list(getattr(world.pipe, part).parameters())[-1]
        if way == "no_grad":
            with torch.no_grad():
                weight.add_(0.5)
        elif way == "data":
            weight.data.add_(0.5)  # which torch counts as no new version
        else:
            weight.data = weight.data + 0.5

    return act


def scheduled(**settings):
    def act(world):
        scheduler = world.pipe.scheduler
        world.pipe.scheduler = type(scheduler).from_config(scheduler.config, **settings)

    return act


CHANGES = {
    **{
        f"{part}, {way}": in_place(part, way)
        for part in ("unet", "text_encoder", "vae")
        for way in ("no_grad", "data", "swapped")
    },
    "soft token": add_token,
    "LoRA": add_lora,
    "LoRA of another strength": set_scale,
    "LoRA switched off": off,
    "FreeU": lambda w: w.unet.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "prediction type": scheduled(prediction_type="v_prediction"),
    "noise schedule": scheduled(beta_end=0.02),
    "spacing": scheduled(timestep_spacing="trailing"),
    "VAE's factor": lambda w: w.pipe.vae.register_to_config(scaling_factor=0.3),
    "latent size": lambda w: w.unet.register_to_config(sample_size=16),
    "half precision": lambda w: w.pipe.to(dtype=torch.bfloat16),
    "length of prompts": lambda w: setattr(w.pipe.tokenizer, "model_max_length", 12),
}


def test_everything_that_draws_is_in_the_key():
    plain_key = key(build_tiny_world())
    found = {"none": plain_key}
    assert key(build_tiny_world()) == plain_key
    for name, act in CHANGES.items():
        world = build_tiny_world()
        assert key(world) == plain_key
        with torch.no_grad():
            act(world)
        found[name] = key(world)
    twins = {"data", "swapped", "no_grad"}  # three ways to one change
    for part in ("unet", "text_encoder", "vae"):
        assert len({found[f"{part}, {way}"] for way in twins}) == 1
    assert len(set(found.values())) == len(found) - 3 * 2


def test_the_question_is_in_the_key(tiny_world):
    asked = [
        {}, {"prompts": ["church"]}, {"seeds": [1]}, {"hide": [[1]]}, {"hide": [[2]]},
        *({"how": Sampling(steps=2, **more)} for more in (
            {"guidance": 1.0}, {"sampler": "ddim"}, {"sampler": "dpm++ karras"}, {"batch_size": 1},
        )), {"how": Sampling(steps=3)},
    ]  # fmt: skip
    assert len({key(tiny_world, **more) for more in asked}) == len(asked)


# --- what a result says of its base


def test_parts_of_the_base_as_it_stands():
    world = build_tiny_world()
    before = provenance.base_parts(world)
    assert list(before) == ["unet", "text_encoder", "vae", "scheduler", "tokenizer"]
    assert before["unet"] == world.fingerprint() and provenance.base_parts(world) == before
    for part, act in (
        ("unet", in_place("unet", "data")), ("text_encoder", in_place("text_encoder", "data")),
        ("vae", in_place("vae", "data")), ("scheduler", scheduled(beta_end=0.02)),
    ):  # fmt: skip
        world = build_tiny_world()
        provenance.base_parts(world)
        act(world)
        after = provenance.base_parts(world)
        assert {p for p in before if before[p] != after[p]} == {part}
    world = build_tiny_world()
    add_token(world)
    changed = {p for p, mark in provenance.base_parts(world).items() if mark != before[p]}
    assert changed == {"text_encoder", "tokenizer"}


def test_own_pictures_count_by_name_and_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(name.encode())
    of = provenance.pictures_digest
    found = [
        of(tmp_path),
        of(tmp_path / "a"),
        of({"church": tmp_path / "a", "dog": tmp_path / "b"}),
    ]
    assert len({*found}) == 3 and of(4) is None and of(str(tmp_path / "a")) == found[1]
    (tmp_path / "a" / "x.png").write_bytes(b"c")
    assert of(tmp_path / "a") != found[1]
