"""Damaged, foreign and malicious files: each is named with a remedy, or made again; none is taken.

No error of a library stands alone (SafetensorError, JSONDecodeError, KeyError), none is silent.
"""

import json
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from conftest import full_edit
from safetensors.torch import save_file

from helpers import Edit, concepts, images, judge, judge_sd, perceptual, tables
from helpers.checkpoint import load_checkpoint
from helpers.identity import verify_manifest
from helpers.training import Problem, Training, run
from workflow import jobs

FAST = {"steps": 2}
OWN = (ValueError, FileNotFoundError, IsADirectoryError, PermissionError)
BARE = (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError)
REMEDIES = (
    "again", "git checkout", "git lfs pull", "delete it", "take a copy", "update the kit",
)  # fmt: skip


def flip(data: bytes, where: int) -> bytes:
    """One bit of one byte changed; where: from the end if negative."""
    changed = bytearray(data)
    changed[where] ^= 4
    return bytes(changed)


def header(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and the bytes of its tensors."""
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(head: dict, rest: bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + rest


def with_metadata(data: bytes, change) -> bytes:
    """A file whose metadata were changed by somebody who does not know of the digest."""
    head, rest = header(data)
    change(head["__metadata__"])
    return with_header(head, rest)


def huge(data: bytes) -> bytes:
    """A tensor that says it is a hundred terabytes."""
    head, rest = header(data)
    name = next(n for n in head if n != "__metadata__")
    head[name]["shape"] = [10**7, 10**7]
    return with_header(head, rest)


def of_type(data: bytes, dtype: str) -> bytes:
    head, rest = header(data)
    name = next(n for n in head if n != "__metadata__")
    head[name]["dtype"] = dtype
    return with_header(head, rest)


LFS = b"version https://git-lfs.example/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
ANY = {  # what may befall any safetensors file
    "empty": lambda d: b"",
    "one byte": lambda d: d[:1],
    "cut within the length": lambda d: d[:7],
    "cut after the length": lambda d: d[:8],
    "cut within the header": lambda d: d[: 8 + len(d) // 50],
    "cut in half": lambda d: d[: len(d) // 2],
    "cut by one byte": lambda d: d[:-1],
    "a byte too many": lambda d: d + b"\0",
    "a bit of the last tensor": lambda d: flip(d, -1),
    "a bit in the middle": lambda d: flip(d, -len(header(d)[1]) // 2),
    "a bit of the length": lambda d: flip(d, 0),
    "a bit of the header": lambda d: flip(d, 12),
    "zeros": lambda d: bytes(len(d)),
    "pickled": lambda d: pickle.dumps({"a": [1, 2, 3]}),
    "zip, as torch.save writes": lambda d: b"PK\x03\x04" + d[4:],
    "text": lambda d: b"an edit, honestly\n" * 20,
    "html": lambda d: b"<!doctype html><title>404 not found</title>",
    "git-lfs pointer": lambda d: LFS,
    "header of 2**63 bytes": lambda d: struct.pack("<Q", 2**63) + d[8:],
    "header that is a list": lambda d: struct.pack("<Q", 2) + b"[]",
    "huge shape": huge,
    "unknown type": lambda d: of_type(d, "F7"),
    "another type of equal size": lambda d: of_type(d, "I32"),
}  # fmt: skip


def change(key, value):
    return lambda d: with_metadata(d, lambda m: m.__setitem__(key, value))


def inner(**values):
    """Other values in an edit's own description."""

    def act(metadata):
        metadata["edit"] = json.dumps({**json.loads(metadata["edit"]), **values})

    return lambda d: with_metadata(d, act)


def undigested(act):
    """The same damage by one who takes the digest away and says that the file is an older one."""

    def older(metadata):
        metadata.pop("digest", None)
        metadata["format"] = "lethe-edit-2"

    return lambda d: act(with_metadata(d, older))


def without(key):
    def act(metadata):
        found = json.loads(metadata["edit"])
        del found[key]
        metadata["edit"] = json.dumps(found)

    return lambda d: with_metadata(d, act)


def filled(data: bytes, value: float) -> bytes:
    """Every number of every tensor replaced, the digest too: as if it were meant."""
    head, rest = header(data)
    return with_header(head, struct.pack("<f", value) * (len(rest) // 4))


EDITS = {
    "no metadata": lambda d: with_header(
        {k: v for k, v in header(d)[0].items() if k != "__metadata__"}, header(d)[1]
    ),
    "no format": lambda d: with_metadata(d, lambda m: m.pop("format")),
    "format of the future": change("format", "lethe-edit-99"),
    "digest lost": lambda d: with_metadata(d, lambda m: m.pop("digest")),
    "another digest": change("digest", "0" * 64),
    "no description": lambda d: with_metadata(d, lambda m: m.pop("edit")),
    "concepts changed": inner(meta={"concepts": {"dog": 1.0}}),
    "older: no description": undigested(lambda d: with_metadata(d, lambda m: m.pop("edit"))),
    "older: description null": undigested(change("edit", "null")),
    "older: description a list": undigested(change("edit", "[1]")),
    "older: description no JSON": undigested(change("edit", '{"meta": ')),
    "older: deep description": undigested(change("edit", "[" * 100_000)),
    "older: meta missing": undigested(without("meta")),
    "older: meta null": undigested(inner(meta=None)),
    "older: meta a list": undigested(inner(meta=[1, 2])),
    "older: concepts a number": undigested(inner(meta={"concepts": 3})),
    "older: factor of NaN": undigested(inner(meta={"concepts": {"church": float("nan")}})),
    "older: base a number": undigested(inner(meta={"base": 3})),
    "older: history missing": undigested(without("history")),
    "older: history a dict": undigested(inner(history={"a": 1})),
    "older: history of numbers": undigested(inner(history=[1])),
    "older: adapters missing": undigested(without("adapters")),
    "older: adapters a dict of text": undigested(inner(adapters={"a": "b"})),
    "older: adapter without a gate's name": undigested(inner(adapters=[{"gait": "always"}])),
    "older: unknown gate": undigested(inner(adapters=[{"gate": "os.system"}])),
    "older: guards missing": undigested(without("guards")),
    "older: guard of text": undigested(inner(guards=["NegativePrompt"])),
    "older: unknown guard": undigested(inner(guards=[{"name": "Popen", "options": {}}])),
    "older: guard without options": undigested(inner(guards=[{"name": "NegativePrompt"}])),
    "older: guard of other options": undigested(
        inner(guards=[{"name": "NegativePrompt", "options": {"word": "x"}}])
    ),
    "older: parts missing": undigested(without("parts")),
    "older: part of null": undigested(inner(parts={"church": None})),
    "older: NaN": undigested(lambda d: filled(d, float("nan"))),
    "older: infinity": undigested(lambda d: filled(d, float("inf"))),
    "older: integers": undigested(lambda d: of_type(d, "I32")),
    "first format without history": lambda d: with_metadata(
        with_metadata(d, lambda m: m.clear()), lambda m: m.update(format="lethe-edit-1", meta="{}")
    ),
}


def assert_named(call, path, *words):
    """The error is one of the kit's own, names the file, and says what to do."""
    with pytest.raises(OWN) as caught:
        call()
    error, text = caught.value, str(caught.value)
    assert not isinstance(error, BARE), f"bare: {error!r}"
    assert path.name in text, f"names no file: {text}"
    assert any(word in text for word in words or REMEDIES), f"names no remedy: {text}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An edit's file, made once."""
    from conftest import build_tiny_world

    return full_edit(build_tiny_world()).save(tmp_path_factory.mktemp("edit") / "blob.safetensors")


@pytest.mark.parametrize("kind", [*ANY, *EDITS])
def test_edits(whole, tmp_path, kind):
    path = tmp_path / "blob.safetensors"
    path.write_bytes({**ANY, **EDITS}[kind](whole.read_bytes()))
    assert_named(lambda: Edit.load(path), path)


def test_every_byte_of_an_edit_counts(whole, tmp_path):
    """One bit changed at 300 places, header and tensors: none is taken, none is bare."""
    data, path = whole.read_bytes(), tmp_path / "blob.safetensors"
    n = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*range(0, n, max(1, n // 200)), *range(n, len(data), (len(data) - n) // 100)]
    assert len(places) >= 300
    for where in places:
        path.write_bytes(flip(data, where))
        assert_named(lambda: Edit.load(path), path)


def test_folders_missing_files_and_permissions(tmp_path, monkeypatch):
    folder = tmp_path / "thesis"
    folder.mkdir()
    readers = {
        "edit": Edit.load, "judge": judge.load_judge, "layer": judge_sd.load_judge,
        "images": images.load_pictures, "table": tables.read_csv,
    }  # fmt: skip
    nowhere, below = tmp_path / "nowhere.safetensors", tmp_path / "file" / "edit.safetensors"
    below.parent.write_text("a file")
    for read in readers.values():
        assert_named(lambda read=read: read(folder), folder, *REMEDIES)
        assert_named(lambda read=read: read(nowhere), nowhere)
        assert_named(lambda read=read: read(below), below)
        for wrong in (None, 3, "", "a\0b"):
            with pytest.raises(ValueError, match="path is"):
                read(wrong)

    def denied(*given, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    for read in readers.values():
        path = tmp_path / "secret.safetensors"
        assert_named(lambda read=read, path=path: read(path), path, "permissions")


# --- images that are kept


IMAGES = {
    **ANY,
    "floats": lambda d: made({"images": torch.rand(2, 3, 16, 16)}),
    "seven for two": lambda d: made({"images": torch.zeros(7, 3, 16, 16).byte()}),
    "another size": lambda d: made({"images": torch.zeros(2, 3, 8, 8).byte()}),
    "under another name": lambda d: made({"pictures": torch.zeros(2, 3, 16, 16).byte()}),
    "grey": lambda d: made({"images": torch.zeros(2, 1, 16, 16).byte()}),
    "question lost": lambda d: with_metadata(d, lambda m: m.pop("asked")),
    "digest lost": lambda d: with_metadata(d, lambda m: m.pop("digest")),
    "all metadata lost": lambda d: with_header(
        {k: v for k, v in header(d)[0].items() if k != "__metadata__"}, header(d)[1]
    ),
}


def made(tensors: dict, **metadata) -> bytes:
    """A safetensors file in memory."""
    from safetensors.torch import save

    return save(tensors, metadata or None)


@pytest.mark.parametrize("kind", IMAGES)
def test_kept_images_are_sampled_again(tiny_world, cache, kind):
    ask = [tiny_world, ["church", "dog"], [0, 1]]
    good = images.base_images(*ask, **FAST)
    (path,) = cache.glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(IMAGES[kind](data))
    with pytest.warns(UserWarning, match=rf"{path.name}.*again"):
        assert torch.equal(images.base_images(*ask, **FAST), good)
    assert path.read_bytes() == data, "the damaged file stays"


def test_another_question_s_answer_is_not_taken(tiny_world, cache):
    """Two whole files, exchanged: each says what it answers."""
    base = {p: images.base_images(tiny_world, [p], [0], **FAST) for p in ("church", "dog")}
    a, b = sorted(cache.glob("*.safetensors"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    for prompt, expected in base.items():
        with pytest.warns(UserWarning, match="another question"):
            assert torch.equal(images.base_images(tiny_world, [prompt], [0], **FAST), expected)


@pytest.mark.parametrize("kind", IMAGES)
def test_base_images_of_the_tables(tmp_path, kind):
    """They carry no question that is compared: a digest and a shape."""
    path = tmp_path / "base" / "church.safetensors"
    images.save_pictures(path, torch.rand(3, 3, 16, 16), {"prompt": "church"})
    path.write_bytes(IMAGES[kind](path.read_bytes()))
    if kind in ("seven for two", "another size", "all metadata lost"):
        return  # whole files of images: not told from older ones
    assert_named(lambda: images.load_pictures(path, 3), path)


# --- checkpoints


def problem() -> Problem:
    w = torch.zeros(4, requires_grad=True)
    ema = {"w": torch.zeros(4)}

    def terms(step, generator, stopped):
        return {"fit": (w - torch.randn(4, generator=generator)).pow(2).mean()}

    return Problem({"w": w}, lambda: {"w": w}, terms, {"fit": 1.0}, state=ema)


def training(path) -> list[dict]:
    return run(problem(), Training(steps=4, lr=0.1, checkpoint=str(path)), progress=False)


def regrouped(keep) -> object:
    """The checkpoint with some tensors only, as an older version without a digest wrote it."""

    def act(data: bytes) -> bytes:
        from safetensors.torch import load

        metadata = {
            k: v for k, v in header(data)[0]["__metadata__"].items()
            if k not in ("digest", "format")
        }  # fmt: skip
        return made({k: v for k, v in load(data).items() if keep(k)}, **metadata)

    return act


CHECKPOINTS = {
    **ANY,
    "an edit": lambda d: made({"delta:a": torch.zeros(1)}, format="lethe-edit-3", edit="{}"),
    "tensors of another kind": lambda d: made({"a": torch.zeros(1)}),
    "of pretraining": lambda d: made({"unet/a": torch.zeros(1)}, step="3"),
    "run of text": change("run", '"esd"'),
    "no JSON": change("run", "{"),
    "format of the future": change("format", '"lethe-checkpoint-99"'),
    "digest lost": lambda d: with_metadata(d, lambda m: m.pop("digest")),
    "older: no history": lambda d: with_metadata(
        regrouped(lambda k: True)(d), lambda m: m.pop("history")
    ),
    "older: no weights": regrouped(lambda k: not k.startswith("weight")),
    "older: no state": regrouped(lambda k: not k.startswith("state")),
    "older: no moments": regrouped(lambda k: not k.startswith("adam")),
    "older: half of the moments": regrouped(lambda k: not k.endswith("exp_avg_sq")),
    "older: moments of another leaf": lambda d: made(
        {"weight/w": torch.zeros(4), "state/w": torch.zeros(4), "adam/7.step": torch.zeros(1)},
        **{k: v for k, v in header(d)[0]["__metadata__"].items() if k not in ("digest", "format")},
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(tmp_path, kind):
    path = tmp_path / "c.safetensors"
    training(path)
    path.write_bytes(CHECKPOINTS[kind](path.read_bytes()))
    assert_named(lambda: training(path), path, "delete it to train from the beginning")


def test_a_folder_as_a_checkpoint(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        training(tmp_path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_checkpoint(tmp_path)


# --- weights of judges and of LPIPS


@pytest.fixture
def judge_file(tmp_path):
    path = tmp_path / "judge.safetensors"
    shutil.copy(judge.WEIGHTS, path)
    return path


def renamed(data: bytes, act) -> bytes:
    from safetensors.torch import load

    metadata = {k: v for k, v in header(data)[0]["__metadata__"].items() if k != "digest"}
    return made(act(load(data)), **metadata)


WEIGHTS = {
    **{k: v for k, v in ANY.items() if "bit" not in k and k != "another type of equal size"},
    "a tensor missing": lambda d: renamed(d, lambda t: dict(list(t.items())[1:])),
    "another shape": lambda d: renamed(d, lambda t: {k: v[:1].clone() for k, v in t.items()}),
    "NaN": lambda d: renamed(d, lambda t: {k: v * float("nan") for k, v in t.items()}),
}


@pytest.mark.parametrize("kind", [*WEIGHTS, "no classes", "classes no JSON", "fewer classes"])
def test_judge_weights(judge_file, kind):
    data = judge_file.read_bytes()
    more = {
        "no classes": lambda d: with_metadata(d, lambda m: m.pop("style")),
        "classes no JSON": change("thing", "["),
        "fewer classes": change("thing", '["church"]'),
    }
    judge_file.write_bytes({**WEIGHTS, **more}[kind](data))
    assert_named(lambda: judge.load_judge(judge_file), judge_file, "git checkout", "git lfs pull")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_lpips_weights(tmp_path, monkeypatch, kind):
    path = tmp_path / "alexnet.safetensors"
    path.write_bytes(WEIGHTS[kind](perceptual.WEIGHTS.read_bytes()))
    monkeypatch.setattr(perceptual, "WEIGHTS", path)
    assert_named(perceptual.load_emoji_lpips.__wrapped__, path, "git checkout", "git lfs pull")


@pytest.mark.parametrize("kind", ["empty", "cut in half", "a tensor missing", "NaN", "no names"])
def test_the_other_judge_s_layer(tmp_path, kind):
    path = tmp_path / "judge.safetensors"
    save_file({"weight": torch.rand(2, 512), "bias": torch.rand(2)}, path, {"names": '["a", "b"]'})
    no_names = {"no names": lambda d: with_metadata(d, lambda m: m.pop("names"))}
    path.write_bytes({**WEIGHTS, **no_names}[kind](path.read_bytes()))
    assert_named(lambda: judge_sd.load_judge(path), path, "trains it again")


@pytest.mark.parametrize("part", ["judge", "lpips"])
def test_shipped_weights_are_compared_with_their_manifest(tmp_path, monkeypatch, part):
    """A bit changed in a file without a digest of its own."""
    module = {"judge": judge, "lpips": perceptual}[part]
    folder = shutil.copytree(concepts.DATA / part, tmp_path / "data" / part)
    path = folder / module.WEIGHTS.name
    path.write_bytes(flip(path.read_bytes(), -2))
    monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr(module, "WEIGHTS", path)
    load = {
        "judge": lambda: judge.load_judge(path), "lpips": perceptual.load_emoji_lpips.__wrapped__,
    }[part]  # fmt: skip
    assert_named(load, path, "git checkout")


# --- manifests and drawings


MANIFESTS = {
    "missing": None,
    "empty": b"",
    "cut": b'{"a.txt": "00',
    "deep": b"[" * 100_000,
    "a list": b'["a.txt"]',
    "null": b"null",
    "no files": b"{}",
    "digests of numbers": b'{"a.txt": 3}',
    "outside": b'{"../a.txt": "00"}',
    "absolute": b'{"/a.txt": "00"}',
    "no UTF-8": b"\xff\xfe{}",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests(tmp_path, kind):
    path = tmp_path / "manifest.json"
    (tmp_path / "a.txt").write_text("a")
    if MANIFESTS[kind] is not None:
        path.write_bytes(MANIFESTS[kind])
    assert_named(lambda: verify_manifest(tmp_path), path, "git checkout")


@pytest.mark.parametrize("name", ["objects.csv", "noto.png"])
def test_drawings_are_compared_with_their_manifest(tmp_path, monkeypatch, name):
    from helpers import renders

    folder = shutil.copytree(concepts.DATA / "emoji", tmp_path / "emoji")
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    monkeypatch.setattr(concepts, "DATA", tmp_path)
    monkeypatch.setattr(renders, "DATA", tmp_path)
    load = {"objects.csv": concepts.object_table, "noto.png": renders.tiles}[name]
    assert_named(load.__wrapped__, folder / name, "git checkout")


# --- results


def cell() -> dict:
    return {
        "concepts": {}, "weight_change": 0.5, "M": 3,
        "made_with": {"base": "b", "judge": "j", "seconds": 1.0, "device": "cpu"},
    }  # fmt: skip


RESULTS = {
    "empty": lambda d: b"",
    "cut": lambda d: d[: len(d) // 2],
    "cut by its last bracket": lambda d: d.rstrip()[:-1],
    "zeros": lambda d: bytes(len(d)),
    "no UTF-8": lambda d: b"\xff\xfe" + d,
    "deep": lambda d: b"[" * 100_000,
    "a list": lambda d: b"[1, 2]",
    "null": lambda d: b"null",
    "of another kind": lambda d: b'{"images": 3}',
    "a digit changed": lambda d: d.replace(b"0.5", b"0.7"),
    "a key lost": lambda d: d.replace(b'"M": 3,', b""),
    "git-lfs pointer": lambda d: LFS,
    "pickled": lambda d: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_cells_and_reports(tmp_path, monkeypatch, kind):
    """Named by their path within the working folder: hundreds have one name."""
    monkeypatch.chdir(tmp_path)
    for folder, read in (
        ("cells", lambda path: jobs.load_json(path, "cell", jobs.AGAIN, *jobs.CELL)),
        ("reports", lambda path: jobs.report_of(path.parent)),
    ):
        path = tmp_path / folder / "esd-church-0" / "report.json"
        jobs.save_json(path, cell())
        assert read(path) == cell()
        path.write_bytes(RESULTS[kind](path.read_bytes()))
        with pytest.raises(OWN, match=rf"^{folder}/esd-church-0/report\.json .*again"):
            read(path)


def test_the_record_of_a_scale_s_options(tmp_path):
    path = tmp_path / "scale.json"
    jobs.claim({"world": "emoji"}, str(path))
    path.write_bytes(path.read_bytes()[:-9])
    assert_named(lambda: jobs.claim({"world": "emoji"}, str(path)), path)


TABLES = {
    "empty": lambda d: b"",
    "an empty line": lambda d: b"\n",
    "cut within a line": lambda d: d[:-4],
    "cut within the header": lambda d: d[:20],
    "a field too many": lambda d: d.replace(b"esd,", b"esd,x,", 1),
    "a quote left open": lambda d: d.replace(b"esd,", b'"esd,', 1),
    "no UTF-8": lambda d: d.replace(b"esd", b"\xff\xfe\xfd", 1),
    "zeros": lambda d: bytes(len(d)),
    "pickled": lambda d: pickle.dumps({"a": 1}),
    "git-lfs pointer": lambda d: LFS,
    "no value": lambda d: d.replace(b"value", b"worth"),
    "text for a value": lambda d: d.replace(b"0.25", b"a lot"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_results(tmp_path, kind):
    path, row = tmp_path / "sepme-1.csv", tables.Row("esd", "", "church", "dog", "ACC", 0, 0.25, 4)
    tables.write_csv(path, [row, row], tables.COLUMNS)
    assert len(tables.load_ours("sepme-1", tmp_path)) == 1
    path.write_bytes(TABLES[kind](path.read_bytes()))
    assert_named(lambda: tables.load_ours("sepme-1", tmp_path), path, *REMEDIES, "no table")


def test_at_least_sixty_one_kinds():
    kinds = [*ANY, *EDITS, *IMAGES, *CHECKPOINTS, *WEIGHTS, *MANIFESTS, *RESULTS, *TABLES]
    assert len(kinds) >= 61


def test_nothing_is_unpickled(tmp_path):
    """A pickle that would leave a trace: no reader runs it."""
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    archive = tmp_path / "archive.safetensors"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", path.read_bytes())
    for file in (path, archive):
        for read in (Edit.load, load_checkpoint, judge.load_judge, images.load_pictures):
            assert_named(lambda read=read, file=file: read(file), file)
    assert not trace.exists()
