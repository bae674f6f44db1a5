"""Edits: arithmetic, labels, files, exports, and the world's exact restore."""

import json

import numpy as np
import pytest
import torch
from conftest import build_tiny_world, full_edit, random_edit
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from helpers import Edit, adapters, guards, unlearn
from helpers.adapters import Adapter
from helpers.guards import NegativePrompt


@pytest.fixture
def edit(tiny_world):
    found = random_edit(tiny_world, scale=0.01, seed=1)
    return Edit(found.delta, [{"step": 0, "loss": 1.0}], found.meta)


def weights(world):
    """Every weight that an edit may touch, as it is now."""
    return {name: p.detach().clone() for name, p in world.parameters().items()}


def hooks(world):
    """How many forward hooks there are in the UNet and the text encoder."""
    modules = [*world.unet.modules(), *world.pipe.text_encoder.modules()]
    return sum(len(module._forward_hooks) for module in modules)


def same(a, b):
    """Whether two dicts of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def near(a, b):
    """Whether two dicts of tensors are equal up to rounding."""
    return a.keys() == b.keys() and all(
        torch.allclose(value, b[name], atol=1e-6) for name, value in a.items()
    )


# --- arithmetic


def test_norm_by_hand():
    edit = Edit({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])})
    assert edit.norm() == 3.0  # (1 + 2 + 3) / 2 tensors
    assert edit.M == 2 and Edit({}).norm() == 0.0


def test_norm_counts_adapters_at_full_strength_and_a_tensor_once():
    A, B = {"a": torch.tensor([[1.0, 2.0]])}, {"a": torch.tensor([[3.0]])}  # B A = (3, 6)
    dense = {"a.weight": torch.tensor([[-3.0, 0.0]]), "b": torch.tensor([1.0])}
    edit = Edit(dense, adapters=(Adapter(A, B, 0.5),))
    assert edit.M == 2 and edit.norm() == (1.5 + 3.0 + 1.0) / 2
    assert Edit({}, guards=(NegativePrompt("church"),)).norm() == 0.0


def test_arithmetic(edit):
    other = 2.0 * edit
    for name, value in edit.delta.items():
        assert torch.equal((edit + other).delta[name], value + 2 * value)
        assert torch.equal((edit - 2.0 * edit).delta[name], -value)
        assert torch.equal((-edit).delta[name], -value)
        assert torch.equal((0.5 * edit).delta[name], 0.5 * value)
        assert torch.equal((edit + other).delta[name], (other + edit).delta[name])


def test_arithmetic_of_different_parameters(tiny_world, edit):
    text = random_edit(tiny_world, group="text", concepts=["dog"])
    both = edit + text
    assert both.delta.keys() == edit.delta.keys() | text.delta.keys()
    assert both.base == {part: tiny_world.fingerprint(part) for part in ("unet", "text_encoder")}
    back = both - text  # what cancels is left out, and so is the base of a part left alone
    assert same(back.delta, edit.delta) and back.base == edit.base
    assert all(torch.equal((edit - text).delta[n], -text.delta[n]) for n in text.delta)


def test_sum(tiny_world):
    a, b, c = (random_edit(tiny_world, seed=i, concepts=[n]) for i, n in enumerate("abc"))
    total = Edit.sum(edit for edit in (a, b, c))
    assert same(total.delta, (a + b + c).delta) and total.erased == ["a", "b", "c"]
    assert Edit.sum([]) is None


def test_adapters_add_and_subtract(tiny_world):
    edit = full_edit(tiny_world)
    (adapter,) = edit.adapters
    plain = Edit(edit.delta, meta=edit.meta, adapters=edit.adapters)
    assert (plain - plain).adapters == () == (0.0 * plain).adapters
    assert [a.factor for a in (plain + plain).adapters] == [1.0]
    assert [a.factor for a in (-2.0 * plain).adapters] == [-1.0]
    gated = Adapter(adapter.down, adapter.up, 0.5, settings={"word": "dog"})  # another prompt's
    assert len((plain + Edit({}, adapters=(gated,))).adapters) == 2
    assert near(plain.adapters[0].delta(3.0), (3.0 * plain).adapters[0].delta())


# --- labels


def test_labels_follow_the_algebra(tiny_world):
    a = random_edit(tiny_world, concepts=["church"])
    b = random_edit(tiny_world, seed=8, concepts=["dog", "Noto"])
    assert (a + b).erased == ["church", "dog", "Noto"]
    back = (a + b) - b
    assert back.concepts == {"church": 1.0} and back.erased == ["church"]
    assert near(back.delta, a.delta)
    assert (-a).erased == [] and (-a).concepts == {"church": -1.0}
    assert (a - b).concepts == {"church": 1.0, "dog": -1.0, "Noto": -1.0}
    assert (a - b).erased == ["church"]
    assert (a - a).concepts == {} and (a - a).erased == []
    assert (0.0 * a).concepts == {}
    once = 0.5 * (2.0 * a)
    assert once.concepts == {"church": 1.0} and once.meta["scale"] == 1.0
    assert (2.0 * a - a).concepts == {"church": 1.0} and (a + a).concepts == {"church": 2.0}
    assert 0.1 + 0.2 - 0.3 != 0  # no exact zero in floats
    assert (0.1 * a + 0.2 * a - 0.3 * a).concepts == {}


def test_what_is_taken_back_is_gone():
    """(a + b) - b is a in its names, norm, M, base and sources; b's own tensors are not in it."""

    def make(name, *tensors):
        meta = {"base": {"unet": "x"}, "concepts": [name], "method": "esd"}
        draw = torch.Generator().manual_seed(len(name))
        return Edit({f"unet.{t}": torch.randn(9, 9, generator=draw) for t in tensors}, meta=meta)

    a, b, c = make("church", "k"), make("castle", "k", "v", "q"), make("dog", "v", "o")
    for back in ((a + b) - b, (a + b + c) - c - b, b + (a - b), a + c + b - (b + c)):
        assert back.concepts == a.concepts and back.erased == ["church"] and back.base == a.base
        assert back.M == a.M == 1 and back.delta.keys() == a.delta.keys()
        assert back.norm() == pytest.approx(a.norm(), rel=1e-5)
        assert [meta["concepts"] for meta in back.meta["merged_from"]] == [{"church": 1.0}]
    assert (a - a).M == 0 and (a - a).norm() == 0 and (a - a).meta["merged_from"] == []
    assert (2 * (3 * a)).meta["scale"] == 6 and (-1 * -a).meta["scale"] == 1
    assert (a - b).concepts == (a + (-b)).concepts and (a + a).concepts == {"church": 2.0}
    assert (0 * a).M == 0 and (0 * a).concepts == {}
    quiet = Edit({"unet.k": torch.zeros(2)}, meta=a.meta)  # a training of no steps keeps its names
    assert (quiet + quiet).M == 1


def test_a_sum_of_sums_has_flat_sources():
    def make(name):
        meta = {"concepts": [name], "method": "esd", "seed": 1}
        return Edit({name: torch.ones(1)}, meta=meta)

    total = sum(make(str(i)) for i in range(300))  # nested, JSON's reader would not get there
    sources = total.meta["merged_from"]
    assert [list(meta["concepts"]) for meta in sources] == [[str(i)] for i in range(300)]
    assert all("merged_from" not in meta and meta["scale"] == 1 for meta in sources)
    half = 0.5 * (total - make("7") - 3 * make("8"))
    scales = {name: meta["scale"] for meta in half.meta["merged_from"] for name in meta["concepts"]}
    assert "7" not in scales and scales["8"] == -1.0 and scales["9"] == 0.5
    assert half.concepts["8"] == -1.0 and half.concepts["9"] == 0.5


def test_numbers_and_sums_of_python_and_numpy(tiny_world):
    a, b = random_edit(tiny_world), random_edit(tiny_world, seed=8, concepts=["dog"])
    assert same(sum([a, b]).delta, (a + b).delta) and sum([a, b]).erased == ["church", "dog"]
    assert same((a / 2).delta, (0.5 * a).delta) and (a / 2).concepts == {"church": 0.5}
    for two in (2, np.float64(2), np.int32(2), torch.tensor(2.0)):
        assert same((a * two).delta, (2.0 * a).delta) and same((two * a).delta, (2.0 * a).delta)
        assert (two * a).concepts == {"church": 2.0} and type((two * a).meta["scale"]) is float


def test_what_an_edit_is_no_sum_of(edit):
    for wrong in (None, 3, "edit", {}, torch.ones(1)):
        for act in (lambda w=wrong: edit + w, lambda w=wrong: edit - w, lambda w=wrong: w + edit):
            with pytest.raises((ValueError, TypeError), match=r"not to|unsupported") as caught:
                act()
            assert repr(wrong)[:5] in str(caught.value) or "unsupported" in str(caught.value)
    with pytest.raises(ValueError, match="not to None: give an Edit"):
        edit + None
    for wrong in (float("nan"), float("inf"), None, "2", edit, torch.ones(2), 1j):
        with pytest.raises(ValueError, match="give a finite number"):
            edit * wrong
    with pytest.raises(ValueError, match="no 0th part"):
        edit / 0
    with pytest.raises(ValueError, match="beyond float32"):
        1e39 * edit


def test_labels_in_the_first_form_are_read():
    edit = Edit({}, meta={"concepts": ["church", "dog"], "base": "0123456789abcdef"})
    assert edit.concepts == {"church": 1.0, "dog": 1.0} and edit.erased == ["church", "dog"]
    assert edit.base == {"unet": "0123456789abcdef"}
    assert Edit({}).concepts == Edit({}).base == {} and Edit({}).erased == []


def test_parts_of_sums_and_differences(tiny_world):
    a, b, c = (
        random_edit(tiny_world, seed=i, concepts=[name])
        for i, name in enumerate(("church", "dog", "Noto"))
    )
    whole = a + b
    assert list(whole.parts) == ["church", "dog"]
    assert same(whole.parts["church"].delta, a.delta) and same(whole.parts["dog"].delta, b.delta)
    assert list((whole + c).parts) == ["church", "dog", "Noto"]
    rest = (whole + c) - (whole + c).parts["dog"]
    assert list(rest.parts) == ["church", "Noto"] == rest.erased
    assert list((whole + c - whole).parts) == ["Noto"]
    scaled = (-0.5 * whole).parts
    assert same(scaled["dog"].delta, (-0.5 * b).delta) and scaled["dog"].concepts == {"dog": -0.5}
    assert (a - a).parts == {}


def test_parts_add_up_to_the_whole_or_are_gone(tiny_world):
    a, b, c = (
        random_edit(tiny_world, seed=i, concepts=[name])
        for i, name in enumerate(("church", "dog", "Noto"))
    )
    other = random_edit(tiny_world, seed=3, concepts=["church"])  # the same concept, trained anew
    mixed = random_edit(tiny_world, seed=4, concepts=["castle", "OpenMoji"])
    unnamed = random_edit(tiny_world, seed=5, concepts=[])
    whole = a + b
    told = [whole, whole + c, c + whole, 3.0 * whole, whole + c - b, 2.0 * whole - 2.0 * b]
    lost = [
        2.0 * whole - b, whole - other, a + other, whole + mixed, mixed + a, mixed - a, whole - c,
        whole + unnamed, unnamed + whole, whole - unnamed, whole - mixed, a + b - 0.5 * b,
    ]  # fmt: skip
    for edit in told:
        assert edit.parts.keys() == edit.concepts.keys()
        assert near(Edit.sum(edit.parts.values()).delta, {n: edit.delta[n] for n in a.delta})
    for edit in lost:
        assert edit.parts == {}


# --- application


def test_applied_restores_to_the_bit(tiny_world, edit):
    before = weights(tiny_world)
    with tiny_world.applied(edit):
        changed = weights(tiny_world)
    assert same(weights(tiny_world), before)
    assert all(torch.equal(changed[n], before[n] + edit.delta[n]) for n in edit.delta)
    assert all(torch.equal(changed[n], before[n]) for n in before if n not in edit.delta)


def test_applied_enters_increments_adapters_and_guards_of_both_parts(tiny_world):
    edit = full_edit(tiny_world)
    before = weights(tiny_world)
    state, x = tiny_world.encode(["church"]), torch.ones(1, *tiny_world.latent_shape)
    eps = tiny_world.unet(x, 5, state).sample
    with tiny_world.applied(edit) as world:
        assert world is tiny_world and world.is_edited
        assert all(torch.equal(weights(world)[n], before[n] + d) for n, d in edit.delta.items())
        assert hooks(world) == 3 and world.guards == edit.guards
        with_hooks = world.encode(["church"]), world.unet(x, 5, state).sample
    assert not tiny_world.is_edited and hooks(tiny_world) == 0 and tiny_world.guards == ()
    assert same(weights(tiny_world), before)
    assert torch.equal(tiny_world.encode(["church"]), state)
    assert torch.equal(tiny_world.unet(x, 5, state).sample, eps)
    with tiny_world.applied(Edit(edit.delta)):  # without adapters it is another model
        without = tiny_world.encode(["church"]), tiny_world.unet(x, 5, state).sample
    for a, b, base in zip(with_hooks, without, (state, eps), strict=True):
        assert (a - b).abs().max() > 1e-3 and (b - base).abs().max() > 1e-3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_applied_restores_after_an_exception(tiny_world, error):
    edit, before = full_edit(tiny_world), weights(tiny_world)
    with pytest.raises(error, match="stop"), tiny_world.applied(edit), tiny_world.applied(edit):
        assert hooks(tiny_world) == 6 and len(tiny_world.guards) == 2
        raise error("stop")
    assert same(weights(tiny_world), before) and not tiny_world.is_edited
    assert hooks(tiny_world) == 0 and tiny_world.guards == ()


def test_applied_nests(tiny_world, edit):
    full, before = full_edit(tiny_world), weights(tiny_world)
    with tiny_world.applied(full):
        once = weights(tiny_world)
        with tiny_world.applied(edit):
            twice = weights(tiny_world)
            assert hooks(tiny_world) == 3 and tiny_world.guards == full.guards
        back = weights(tiny_world)
        assert tiny_world.is_edited and hooks(tiny_world) == 3 and tiny_world.guards == full.guards
    for name, value in edit.delta.items():
        expected = before[name] + full.delta[name] + value
        assert torch.allclose(twice[name], expected, atol=1e-6)
    assert same(back, once) and same(weights(tiny_world), before)


def test_applied_none_is_the_base(tiny_world, edit):
    before = weights(tiny_world)
    with tiny_world.applied(None) as world:
        assert world is tiny_world and not world.is_edited and same(weights(world), before)
    with tiny_world.applied(edit), tiny_world.applied(None):
        assert tiny_world.is_edited  # None adds nothing and takes nothing away
        assert not same(weights(tiny_world), before)


def test_an_edit_that_does_not_fit_leaves_nothing_applied(tiny_world):
    full, before = full_edit(tiny_world), weights(tiny_world)
    (adapter,) = full.adapters
    absent = {"unet.nowhere": torch.ones(1, 2)}, {"unet.nowhere": torch.ones(2, 1)}
    wide = {"unet.conv_in": torch.ones(1, 4, 3, 3)}, {"unet.conv_in": torch.ones(9, 1, 1, 1)}
    for matrices, message in ((absent, "no parameter 'unet.nowhere.weight'"), (wide, "shape")):
        bad = Edit(full.delta, meta=full.meta, adapters=(adapter, Adapter(*matrices)))
        with pytest.raises(ValueError, match=message), tiny_world.applied(bad):
            pass
        assert same(weights(tiny_world), before) and hooks(tiny_world) == 0
        assert not tiny_world.is_edited


def test_wrong_base_shape_or_values(tiny_world, edit):
    stranger = Edit(edit.delta, meta={"base": "0123456789abcdef"})
    with pytest.raises(ValueError, match="0123456789abcdef"), tiny_world.applied(stranger):
        pass
    with pytest.raises(ValueError, match="different base"):
        edit + stranger
    name = next(iter(edit.delta))
    with pytest.raises(ValueError, match="shape"), tiny_world.applied(Edit({name: torch.zeros(1)})):
        pass
    nothing = Edit({"nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="no parameter"), tiny_world.applied(nothing):
        pass
    bare = Edit({name.removeprefix("unet."): edit.delta[name]})  # names are full now
    with pytest.raises(ValueError, match="no parameter"), tiny_world.applied(bare):
        pass
    with pytest.raises(ValueError, match="shapes"):
        edit + Edit({name: torch.zeros(1)})
    with pytest.raises(ValueError, match="NaN"):
        Edit({"a": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="float32"):
        Edit({"a": torch.zeros(1, dtype=torch.float16)})


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_another_base_needs_transfer(tiny_world, part):
    group = {"unet": "kv", "text_encoder": "text"}[part]
    edit = random_edit(tiny_world, group=group)
    assert list(edit.base) == [part]
    other = build_tiny_world()
    name = next(iter(edit.delta))
    other.parameters()[name].data.view(-1)[0] += 1.0
    with pytest.raises(ValueError, match=rf"{part}.*transfer=True"), other.applied(edit):
        pass
    before = weights(other)
    with other.applied(edit, transfer=True):
        assert torch.equal(weights(other)[name], before[name] + edit.delta[name])
    assert same(weights(other), before)
    stranger = Edit({name: torch.zeros(1)}, meta=edit.meta)  # transfer still looks at shapes
    with pytest.raises(ValueError, match="shape"), other.applied(stranger, transfer=True):
        pass


def test_an_untouched_part_may_differ(tiny_world, edit):
    """A fine-tuned text encoder is no reason to refuse an edit of the UNet."""
    other = build_tiny_world()
    next(other.pipe.text_encoder.parameters()).data.add_(1.0)
    assert other.fingerprint("text_encoder") != tiny_world.fingerprint("text_encoder")
    with other.applied(edit):
        assert other.is_edited


def test_nothing_is_unlearned_inside_applied(tiny_world, edit, cache):
    with tiny_world.applied(edit), pytest.raises(RuntimeError, match="leave the `with world"):
        unlearn(tiny_world, "church", "resteering", images=1, steps=1, progress=False)
    assert not cache.exists()


# --- files


def test_file_round_trip(edit, tmp_path):
    path = edit.save(tmp_path / "deep" / "edit.safetensors")
    again = Edit.load(path)
    assert again.meta == edit.meta and again.history == edit.history
    assert same(again.delta, edit.delta)
    assert [p.name for p in path.parent.iterdir()] == ["edit.safetensors"]  # no partial file left


def assert_equal(a, b):
    """Both edits are the same in everything, to the bit."""
    assert same(a.delta, b.delta) and a.history == b.history and a.meta == b.meta
    assert a.guards == b.guards and len(a.adapters) == len(b.adapters)
    for x, y in zip(a.adapters, b.adapters, strict=True):
        assert same(x.down, y.down) and same(x.up, y.up)
        assert (x.factor, x.gate, x.settings) == (y.factor, y.gate, y.settings)
    assert list(a.parts) == list(b.parts)
    for name in a.parts:
        assert_equal(a.parts[name], b.parts[name])


def test_file_round_trip_with_adapters_guards_and_parts(tiny_world, tmp_path):
    full = full_edit(tiny_world)
    other = random_edit(tiny_world, seed=2, concepts=["dog"])
    whole = full + other
    assert list(whole.parts) == ["church", "dog"] and whole.parts["church"].adapters
    assert_equal(Edit.load(whole.save(tmp_path / "edit.safetensors")), whole)
    scaled = 0.5 * (other + random_edit(tiny_world, concepts=["Noto"]))
    assert_equal(Edit.load(scaled.save(tmp_path / "edit.safetensors")), scaled)


def test_an_edit_that_shares_tensors_with_its_part_is_saved(edit, tmp_path):
    """SepME of one concept: the whole is its only part."""
    edit.parts = {"church": Edit(edit.delta, meta=edit.meta)}
    assert_equal(Edit.load(edit.save(tmp_path / "edit.safetensors")), edit)


def test_paths_and_numpy_s_numbers_are_saved(edit, tmp_path):
    """What a training's options may hold: nothing of it makes the edit one that cannot be saved."""
    edit.meta |= {"options": {
        "images": tmp_path / "mine", "lr": np.float32(1e-3), "layers": ("a", "b"), "n": np.int64(3),
    }}  # fmt: skip
    edit.history = [{"step": np.int64(0), "total": torch.tensor(0.5)}]
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    options = again.meta["options"]
    assert options["images"] == str(tmp_path / "mine") and options["layers"] == ["a", "b"]
    assert options["n"] == 3 and options["lr"] == pytest.approx(1e-3)
    assert again.history == [{"step": 0, "total": 0.5}]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"options": {"f": print}}, r"the edit\.meta\.options\.f is of type builtin"),
        ({"x": torch.ones(2)}, r"the edit\.meta\.x is of type Tensor"),
        ({"x": {1, 2}}, r"meta\.x is of type set"), ("text", "meta is 'text', not a dict"),
        ({"concepts": {"church": float("nan")}}, "concepts are"),
    ],
)  # fmt: skip
def test_what_no_file_can_hold_is_named_before_the_disk_is_touched(edit, tmp_path, meta, said):
    path = edit.save(tmp_path / "edit.safetensors")
    before = path.read_bytes()
    edit.meta = meta
    with pytest.raises(ValueError, match=said):
        edit.save(path)
    with pytest.raises(ValueError, match=said):
        edit.save(tmp_path / "new" / "edit.safetensors")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_increments_spoiled_after_they_were_made_are_not_saved(edit, tmp_path):
    name = next(iter(edit.delta))
    edit.delta[name][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        edit.save(tmp_path / "edit.safetensors")
    edit.delta[name] = torch.ones(2).half()
    with pytest.raises(ValueError, match="float32"):
        edit.save(tmp_path / "edit.safetensors")
    assert not any(tmp_path.iterdir())


def test_one_edit_is_one_file_to_the_byte(edit, tmp_path):
    files = [edit.save(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)]
    assert len(set(files)) == 1


def test_an_edit_outlives_its_file(edit, tmp_path):
    path = edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place, as no writer of ours does
    assert same(again.delta, edit.delta)


def test_a_file_of_the_second_format_is_read(edit, tmp_path):
    """Written before there were digests."""
    path = tmp_path / "old.safetensors"
    about = {
        "meta": edit.meta, "history": edit.history, "adapters": [], "guards": [], "parts": {},
    }  # fmt: skip
    tensors = {f"delta:{n}": v.contiguous() for n, v in edit.delta.items()}
    save_file(tensors, path, metadata={"format": "lethe-edit-2", "edit": json.dumps(about)})
    assert_equal(Edit.load(path), edit)


def test_the_first_format_is_read(tiny_world, tmp_path):
    """A file as the first version wrote it: bare names, a list of concepts, one fingerprint."""
    bare = {n: v + 1.0 for n, v in tiny_world.unet.named_parameters() if "attn2.to_k" in n}
    meta = {
        "method": "esd", "concepts": ["church", "dog"], "options": {"lr": 1e-3}, "seed": 3,
        "base": tiny_world.fingerprint(), "parts": {"training": 1.5}, "seconds": 2.0,
    }  # fmt: skip
    history = [{"step": 0, "alignment": 0.5, "total": 0.5, "statistics": {"total": 0.5}}]
    path = tmp_path / "old.safetensors"
    metadata = {
        "format": "lethe-edit-1", "meta": json.dumps(meta), "history": json.dumps(history),
    }  # fmt: skip
    save_file({n: v.detach().contiguous() for n, v in bare.items()}, path, metadata=metadata)
    edit = Edit.load(path)
    assert same(edit.delta, {f"unet.{n}": v for n, v in bare.items()})
    assert edit.concepts == {"church": 1.0, "dog": 1.0} and edit.history == history
    assert edit.base == {"unet": tiny_world.fingerprint()} and edit.meta["seed"] == 3
    assert edit.adapters == () == edit.guards and edit.parts == {}
    with tiny_world.applied(edit):
        assert tiny_world.is_edited
    assert_equal(Edit.load(edit.save(tmp_path / "new.safetensors")), edit)


def test_bad_files(edit, tmp_path):
    path = edit.save(tmp_path / "edit.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        Edit.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Edit.load(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no Lethe edit"):
        Edit.load(tmp_path / "other.safetensors")


def test_a_file_with_a_guard_or_gate_that_is_not_known_here(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(adapters.GATES, "toy", lambda world, adapter, prompts: None)
    gated = full_edit(tiny_world, gate="toy")
    path = gated.save(tmp_path / "edit.safetensors")
    assert_equal(Edit.load(path), gated)
    monkeypatch.delitem(adapters.GATES, "toy")
    with pytest.raises(ValueError, match=r"unknown gate 'toy': choose from always"):
        Edit.load(path)
    path = full_edit(tiny_world).save(tmp_path / "edit.safetensors")
    monkeypatch.delitem(guards.GUARDS, "NegativePrompt")
    with pytest.raises(ValueError, match="unknown guard 'NegativePrompt'"):
        Edit.load(path)


# --- exports


def test_export_is_loaded_by_plain_diffusers(tiny_world, edit, tmp_path):
    before = weights(tiny_world)
    both = edit + random_edit(tiny_world, group="text", concepts=["dog"])
    folder = both.export(tiny_world, tmp_path / "out" / "pipeline")
    assert same(weights(tiny_world), before)
    loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with tiny_world.applied(both):
        for part in ("unet", "text_encoder"):
            ours = dict(tiny_world.part(part).named_parameters())
            for name, p in getattr(loaded, part).named_parameters():
                assert torch.equal(p, ours[name])
        states = tiny_world.encode(["church"])
    assert torch.equal(loaded.encode_prompt(["church"], "cpu", 1, False)[0], states)
    assert not list(folder.rglob("*.bin")) and len(list(folder.parent.iterdir())) == 1
    with pytest.raises(FileExistsError, match="not empty"):
        edit.export(tiny_world, folder)


def test_export_merges_adapters(tiny_world, tmp_path):
    full = full_edit(tiny_world)
    edit = Edit(full.delta, meta=full.meta, adapters=full.adapters)
    folder = edit.export(tiny_world, tmp_path / "pipeline")
    loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    before, dense = weights(tiny_world), full.adapters[0].delta()
    for name, value in dense.items():
        part, _, rest = name.partition(".")
        expected = before[name] + full.delta.get(name, 0.0) + value
        got = getattr(loaded, part).get_parameter(rest)
        assert torch.allclose(got, expected, atol=1e-6) and not torch.equal(got, before[name])
    assert hooks(tiny_world) == 0 and same(weights(tiny_world), before)


def assert_lora_is(world, edit, path):
    """The pipeline with the LoRA file loaded is the world with the edit applied."""
    x = torch.randn(2, *world.latent_shape, generator=torch.Generator().manual_seed(0))

    def outputs():
        states = world.encode(["church", ""])
        return [states, world.unet(x, torch.tensor([3, 500]), states).sample]

    base = outputs()
    with world.applied(edit):
        expected = outputs()
    world.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    for got, wanted in zip(outputs(), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)  # fp32 sums in another order
    world.pipe.unload_lora_weights()
    assert all(torch.equal(a, b) for a, b in zip(outputs(), base, strict=True))
    return [(a - b).abs().max().item() for a, b in zip(expected, base, strict=True)]


def linear_text_edit(world, scale=0.05):
    """Random increments of every linear layer of the text encoder, without biases."""
    linear = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".out_proj.weight")
    text = random_edit(world, group="text", scale=scale, concepts=["dog"])
    linear += (".fc1.weight", ".fc2.weight")
    return Edit({n: v for n, v in text.delta.items() if n.endswith(linear)}, meta=text.meta)


def test_lora_file_is_read_by_diffusers_and_peft(tiny_world, edit, tmp_path):
    change = assert_lora_is(tiny_world, edit, edit.export_lora(tmp_path / "edit.safetensors"))
    assert change[0] == 0 and change[1] > 0


def test_lora_of_the_text_encoder_is_read_by_diffusers_and_peft(tiny_world, edit, tmp_path):
    text = linear_text_edit(tiny_world)
    assert len(text.delta) == 12  # q, k, v, out, fc1, fc2 in each of two layers
    path = text.export_lora(tmp_path / "edit.safetensors")
    layer = next(iter(text.delta)).removesuffix(".weight")
    assert f"{layer}.lora_A.weight" in load_file(path) and layer.startswith("text_encoder.")
    assert min(assert_lora_is(tiny_world, text, path)) > 1e-3
    both = edit + text
    assert min(assert_lora_is(tiny_world, both, both.export_lora(path))) > 1e-3


def test_lora_merges_adapters(tiny_world, tmp_path):
    key = next(n for n in tiny_world.parameters() if n.endswith("attn2.to_k.weight"))
    layer, (out, width) = key.removesuffix(".weight"), tiny_world.parameters()[key].shape
    adapter = Adapter({layer: torch.ones(1, width)}, {layer: torch.ones(out, 1)}, 0.5)
    path = Edit({}, adapters=(adapter,)).export_lora(tmp_path / "edit.safetensors")
    file = load_file(path)
    product = file[f"{layer}.lora_B.weight"] @ file[f"{layer}.lora_A.weight"]
    assert torch.allclose(product, torch.full((out, width), 0.5), atol=1e-6)


def test_lora_of_a_lower_rank_is_the_nearest(tmp_path):
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    edit = Edit({"unet.mid.attn2.to_k.weight": delta})
    path = edit.export_lora(tmp_path / "edit.safetensors", rank=2)
    file = load_file(path)
    product = file["unet.mid.attn2.to_k.lora_B.weight"] @ file["unet.mid.attn2.to_k.lora_A.weight"]
    assert torch.allclose(product, torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("unet.attn2.to_out.0.bias", (3,)),
        ("unet.conv_in.weight", (3, 3, 2, 2)),
        ("text_encoder.encoder.layers.0.layer_norm1.weight", (3,)),
        ("text_encoder.embeddings.token_embedding.weight", (3, 3)),  # rows that are looked up
    ],
)
def test_what_has_no_lora_form(tmp_path, name, shape):
    edit = Edit({name: torch.ones(shape), "unet.attn2.to_k.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match=f"{name} is no matrix".replace(".", r"\.")):
        edit.export_lora(tmp_path / "edit.safetensors")
    assert not any(tmp_path.iterdir())
    unchanged = Edit({name: torch.zeros(shape), "unet.attn2.to_k.weight": torch.ones(3, 3)})
    assert len(load_file(unchanged.export_lora(tmp_path / "edit.safetensors"))) == 2


def test_nothing_to_export_as_lora(tmp_path):
    with pytest.raises(ValueError, match="nothing to export"):
        Edit({}).export_lora(tmp_path / "edit.safetensors")


@pytest.mark.parametrize("form", ["export", "export_lora"])
def test_what_acts_while_sampling_is_not_exported(tiny_world, tmp_path, monkeypatch, form):
    def attempt(edit):
        where = (tiny_world,) if form == "export" else ()
        getattr(edit, form)(*where, tmp_path / "out")

    with pytest.raises(ValueError, match=r"NegativePrompt.* acts while sampling.*sample"):
        attempt(full_edit(tiny_world))
    monkeypatch.setitem(adapters.GATES, "toy", lambda world, adapter, prompts: None)
    gated = full_edit(tiny_world, gate="toy").adapters
    with pytest.raises(ValueError, match=r"gate 'toy'.*one strength"):
        attempt(Edit({}, adapters=gated))
    assert not (tmp_path / "out").exists()
