"""The fuzz: every public function, every argument, and values that it was never meant for.

Public is what ``options.typed`` checks; a test holds that to include whatever a notebook calls. For
each case there must be a right result or an error that names the argument and says what to give.
A bare error of torch, diffusers, safetensors or Python is counted, and few are allowed.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import linecache
import math
import pkgutil
import sys
import traceback
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from conftest import build_tiny_world, random_edit
from diffusers.models.attention_processor import AttnProcessor
from notebook_code import NOTEBOOKS
from test_metrics import measured

import helpers
from helpers import Edit, identity, images, load_world, reader, tables
from helpers.concepts import filled, pair_prompt
from helpers.denoise import Sampling
from helpers.evaluation import attacks
from helpers.evaluation.attacks import Relearning
from helpers.evaluation.report import Protocol
from helpers.evaluation.scores import collapsed
from helpers.inversion import Inversion
from helpers.methods import METHODS, options_of
from helpers.options import in_words
from helpers.training import Problem, Training

# --- what is public


@functools.cache
def public() -> dict:
    """Every function that ``typed`` checks, by "module.name"."""
    found = {}
    for info in pkgutil.walk_packages(helpers.__path__, "helpers."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if (
                inspect.isfunction(value)
                and value.__module__ == info.name
                and hasattr(value, "typed")
            ):
                found[f"{info.name.removeprefix('helpers.')}.{name}"] = value
    return found


UNCHECKED = {  # functions that notebooks call and ``typed`` leaves alone, with the reason
    "worlds.load_world": "the gate looks at what it is given; tried below",
    "evaluation.scores.collapsed": "takes images that are not finite; tried below",
    "reader.checked_images": "is a check itself",
    "concepts.filled": "is a check itself; tried below",
    "concepts.style_names": "takes nothing",
    "concepts.pair_prompt": "joins two names; whatever reads the prompt checks it",
    "show.plain_style": "takes nothing",
    "parameters.group_sizes": "takes a world only",
    "denoise.trajectory": "runs inside ``sample`` and ``rollout``, which check",
    "methods.abconcept.caption_pairs": "part of a method: ``unlearn`` checks",
    "methods.attention.chosen_layers": "part of a method: ``unlearn`` checks",
    "methods.fmn.training_data": "part of a method: ``unlearn`` checks",
    "methods.fmn.training_pairs": "part of a method: ``unlearn`` checks",
    "methods.gcirs.term": "part of a method: ``unlearn`` checks",
    "methods.rows.moved_rows": "part of a method: ``unlearn`` checks",
    "methods.rows.held_rows": "part of a method: ``unlearn`` checks",
    "tables.is_aggregate": "takes a frame that the kit has read",
}


def called_in_notebooks() -> dict:
    """The functions of ``helpers`` that any notebook imports or takes out of a module."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        sources = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
        known = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
                module = importlib.import_module(node.module)
                known |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
        values = [*known.values()]
        for node in nodes:
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in known:
                values.append(getattr(known[node.value.id], node.attr, None))
        for value in filter(inspect.isfunction, values):
            found[f"{value.__module__}.{value.__qualname__}".removeprefix("helpers.")] = value
    return found


def test_what_a_notebook_calls_is_checked():
    """Exercises (``helpers.check``) are left out: they are made to be given wrong answers."""
    called = {n: f for n, f in called_in_notebooks().items() if not n.startswith("check.")}
    unchecked = {name for name, function in called.items() if not hasattr(function, "typed")}
    assert len(called) > 60 and unchecked <= set(UNCHECKED), unchecked - set(UNCHECKED)


# --- a call of each that works, from which one argument at a time is taken away


def plain_call(world, folder: Path) -> dict:
    """Arguments by their names, the same for every function but for ``OTHERS``."""
    torch.manual_seed(0)
    pictures, latents = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    states = world.encode(["church", "dog"])
    return {
        "world": world, "edit": random_edit(world), "unet": world.unet, "concept": "church",
        "concepts": ["church", "dog"], "prompts": ["church", "dog"], "prompt": "church",
        "phrase": "church", "seeds": [0, 1], "seed": 0, "progress": False, "images": pictures,
        "a": pictures, "b": pictures, "references": pictures, "image": pictures[0],
        "latents": latents, "x_T": latents, "until": torch.tensor([500, 900]),
        "null": states[:1], "steps": 2,
        "x_t": latents, "x_0": latents, "x": latents, "v": latents,
        "like": latents, "eps": latents, "eps_hat": latents, "noise": latents + 1,
        "eps_null": latents, "eps_c": latents + 1, "eps_concept": latents - 1, "base": latents,
        "edited": latents + 1, "eps_target": latents, "x_0_hat": latents, "x_0_tilde": latents,
        "t": torch.tensor([5, 6]), "alpha_bar": world.alpha_bar, "alpha_bar_t": 0.5,
        "alpha_bar_prev": 0.7, "eta": 0.5, "guidance": 2.0, "strength": 1.0, "states": states,
        "delta": {}, "end": True, "columns": [[1], [1]], "guided": True, "gamma": 1.0,
        "matrices": [(torch.eye(16), torch.eye(16))], "generator": torch.Generator(),
        "embeddings": states[0, :1], "tokens": 1, "start": "dog", "norm": 1.0, "pull": 0.5,
        "maps": [torch.rand(2, 2, 4, 3)], "first": latents, "product": latents,
        "tensors": {"w": latents},
        "differences": [latents], "weights": torch.ones(2), "A": torch.rand(3, 8), "share": 0.5,
        "n": 4, "step": 0, "group": "kv", "method": "esd", "given": {}, "size": 16, "count": 2,
        "copies": 1, "means": torch.randn(3, 4), "std": 0.5, "score": latents, "tau": 0.1,
        "features_a": torch.rand(8, 3), "features_b": torch.rand(8, 3), "values": [0.1, 0.2],
        "pairs": [("Noto", "dog"), ("Twemoji", "church")], "style": "Noto", "name": "church",
        "without": ["church"], "each": 2, "layer": "up_blocks.2.attentions.1", "head": ["a"],
        "path": folder / "table.csv",
        "text": (), "repeats": 1, "variant": "paper",
    }  # fmt: skip


ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
SHORT = {"steps": 1, "images": 1}  # for what trains
OTHERS = {  # by function: what differs from ``plain_call``, and the options to be quick
    "attention.concept_mask": {"prompts": ["church", "a church"], "templates": None},
    "attention.find_tokens": {"prompts": ["church", "a church"]},
    "attention.processors": {"layers": None, "make": lambda name: AttnProcessor()},
    "attention.token_maps": {"A": torch.rand(2, 2, 16, 5)},
    "attention.record": {"layers": None, "columns": None},
    "attention.zeroed": {"layers": None},
    "closedform.text_map": {"old": ROWS, "new": ROWS + 1, "kept": ROWS - 1},
    "closedform.retaining_projector": {"rows": ROWS},
    "closedform.projected_map": {
        "old": ROWS, "new": ROWS + 1, "fixed": ROWS - 1, "projector": torch.eye(8),
    },
    "diffusion.coefficient": {"t": 5},
    "diffusion.mixture_score": {"x": torch.randn(5, 4)},
    "evaluation.attacks.concept_inversion": {"sampling": {"steps": 1}, **SHORT},
    "evaluation.attacks.closed_form_embedding": {"sampling": {"steps": 1}},
    "evaluation.attacks.relearn": {"sampling": {"steps": 1}, **SHORT},
    "evaluation.attacks.run_all": {"sampling": {"steps": 1}},
    "evaluation.memory.m_score": {"steps": 1, "seeds": (0,)},
    "evaluation.report.report": {
        "n": 1, "unnamed": 2, "attack": False, "sampling": {"steps": 1}, "lpips_size": 32,
    },
    "evaluation.scores.drift": {"steps": 1, "size": 32},
    "evaluation.scores.lpips_distance": {"size": 32},
    "images.base_images": {"steps": 1},
    "images.concept_latents": {"images": 1},
    "images.photographs": {"person": "someone", "datasets": ("a/set",)},
    "inversion.invert": {"steps": 1},
    "losses.random_stimulus": {"noise": None},
    "sampling.sample_each": {"steps": 1},
    "schematic.schematic": {"changed": ["keys"], "read": ["attention"]},
    "show.strips": {"rows": {"base": {"church": torch.rand(2, 3, 16, 16)}}},
    "losses.balance": {"variant": "scalar"},
    "methods.catalogue": {"path": Path(helpers.__file__).parent.parent / "data/methods.toml"},
    "methods.unlearn": {"steps": 1},
    "methods.sepme.erase_separably": {
        "energy": 0.9, **SHORT, "concepts": ["Twemoji", "Noto"], "protect": (),
    },
    "parameters.select_parameters": {"within": None},
    "sampling.sample": {"steps": 1},
    "seeds.measured_seeds": {"what": "seeds"},
    "show.accuracies": {"rows": {"esd": {"church": (0.1, 0.0, 0.2)}}},
    "show.coloured": {"maps": [torch.rand(4, 4)]},
    "show.finding": {"sentence": "It is gone.", "holds": True, "figures": {"church": 0.1}},
    "show.grid": {"columns": 2, "titles": ["a", "b"], "rows": ["c"]},
    "show.heat": {"maps": torch.rand(2, 4, 4), "titles": ["a", "b"]},
    "show.short_name": {"layer": "up_blocks.2.attentions.1.transformer_blocks.0.attn2"},
    "show.table": {"rows": [["b"]]},
    "tables.caution": {},
    "tables.compare_with_paper": {"name": "sepme-1"},
    "tables.load_ours": {"name": "sepme-1"},
    "tables.paper_claims": {"name": "sepme-1"},
    "tables.paper_table": {"name": "sepme-1"},
    "tables.write_csv": {"rows": [{"a": 1}], "columns": ["a"]},
    "widgets.tradeoff_figure": {"steps": 1},
    "widgets.tradeoff_panel": {"steps": 1},
    "widgets.erasure_figure": {"steps": 1},
    "widgets.erasure_panel": {"steps": 1},
}  # fmt: skip


class Bench:
    """A world, a folder, and the arguments of every public function."""

    def __init__(self, folder: Path):
        self.world, self.folder = measured(build_tiny_world()), folder
        self.plain = plain_call(self.world, folder)
        tables.write_csv(folder / "table.csv", [{"a": 1.0}])
        edit = self.plain["edit"]
        self.plain["frame"] = tables.read_csv(folder / "table.csv")
        maps = {"up": [torch.rand(1, 2, 16, 3)]}
        widget = {"maps": maps, "titles": {1: "church"}, "layer": "up", "step": 0}
        self.others = {
            **OTHERS,
            "training.run": {"training": Training(steps=1), "checkpoint": folder / "c.safetensors"},
            "widgets.attention_figure": widget,
            "widgets.attention_panel": widget,
        }
        for name in ("erasure_figure", "erasure_panel"):
            self.others[f"widgets.{name}"] |= {"edits": {"church": edit}}
        for name in ("tradeoff_figure", "tradeoff_panel"):
            self.others[f"widgets.{name}"] |= {"edits": {0.0: edit, 1.0: edit}}

    def arguments(self, name: str, function) -> dict:
        """Arguments of a call that works: what is needed, and what may be left out as well."""
        own, plain = self.others.get(name, {}), self.plain
        known = inspect.signature(function).parameters
        given = {n: plain[n] for n in known if n in plain} | own
        if name == "training.run":
            given["problem"] = little_problem()
        return given


def little_problem() -> Problem:
    """One leaf that is pulled to zero."""
    leaf = torch.ones(2, requires_grad=True)
    return Problem(
        {"w": leaf}, lambda: {"w": leaf}, lambda *given: {"pull": leaf.square().sum()}, {"pull": 1}
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def own_place(bench, monkeypatch):
    """Relative paths and cached images lie in the bench's folder."""
    monkeypatch.chdir(bench.folder)
    monkeypatch.setattr(images, "CACHE", bench.folder / "cache")
    (bench.folder / "faces" / "someone").mkdir(parents=True, exist_ok=True)
    fake = SimpleNamespace(dataset_download=lambda name: bench.folder / "faces")
    monkeypatch.setitem(sys.modules, "kagglehub", fake)
    for name in ("concept_inversion", "relearn"):
        short = functools.partial(getattr(attacks, name), **SHORT)
        monkeypatch.setattr(attacks, name, short)


def called(function, arguments: dict):
    """The function's result; a context is entered and left, a generator is run."""
    result = function(**arguments)
    if isinstance(result, contextlib.AbstractContextManager):
        with result as inside:
            return inside
    return list(result) if inspect.isgenerator(result) else result


@pytest.mark.parametrize("name", public())
def test_the_plain_call_works(bench, name):
    function = public()[name]
    arguments = bench.arguments(name, function)
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert set(needed) <= set(arguments), "give plain_call or OTHERS what this function needs"
    assert sound(called(function, arguments))


# --- what came of a case


def wrong_values() -> list:
    """What nobody would pass on purpose, though much of it is passed by mistake."""
    return [
        None, True, -1, 0, 1.5, math.nan, math.inf, -math.inf, 2**70, "", "nonsense", "{", b"x",
        [], {}, [None], [[]], {"a": 1}, object(), np.float64("nan"), np.array([1, 2]),
        torch.zeros(0), torch.full((2, 3, 16, 16), math.nan),
        torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), Path("nowhere"), len,
    ]  # fmt: skip


REMEDY = (
    "give", "want", "choose", "make", "load", "take", "write", "leave", "record", "divide", "need",
    "add", "look",
)  # fmt: skip


def sound(result) -> bool:
    """Whether all numbers of a result are finite (NaN stands for what a paper does not print)."""
    if isinstance(result, torch.Tensor):
        return bool(torch.isfinite(result.float()).all())
    if isinstance(result, float):
        return math.isfinite(result)
    if isinstance(result, list | tuple):
        return all(sound(one) for one in result)
    return all(sound(one) for one in result.values()) if isinstance(result, dict) else True


def verdict(call, argument: str, value) -> tuple[str, str]:
    """What came of a case, and the message: "right", "named", "unsound", "vague" or "bare".

    named: the kit itself raised it, and it holds the argument's name or the value, and a remedy.
    """
    try:
        return ("right", "") if sound(call()) else ("unsound", "a result that is not finite")
    except Exception as error:
        said = str(error)
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(last.filename, last.lineno).strip()
        ours = Path(helpers.__file__).parent in Path(last.filename).parents
        said = f"{type(error).__name__}: {said}"
        if not ours or not line.startswith("raise"):
            return "bare", f"{said} at {Path(last.filename).name}:{last.lineno}"
        inside = value if isinstance(value, dict) else ()
        words = [argument, in_words(value), str(value), repr(value)[:40], *inside]
        names = any(str(word) in said for word in words)
        return ("named" if names and any(w in said for w in REMEDY) else "vague"), said


def tried(cases) -> Counter:
    """Counts of the verdicts. AssertionError, which lists them, if more than 2 % are no good.

    cases: (name of the case, call, argument, value).
    """
    found, bad = Counter(), []
    for name, call, argument, value in cases:
        what, said = verdict(call, argument, value)
        found[what] += 1
        if what not in ("right", "named"):
            bad.append(f"{what}: {name} {argument}={in_words(value)}: {said[:160]}")
    assert len(bad) <= 0.02 * found.total(), f"{found}\n" + "\n".join(bad)
    return found


# --- the fuzz itself


def function_cases(bench, names):
    """Each function with one argument replaced by each wrong value."""
    for name in names:
        function = public()[name]
        plain = bench.arguments(name, function)
        for argument in inspect.signature(function).parameters:
            if argument in plain:
                for value in wrong_values():
                    given = {**bench.arguments(name, function), argument: value}
                    yield name, lambda f=function, g=given: called(f, g), argument, value


GROUPS = sorted({name.split(".")[0] for name in public()})
COUNTED = Counter()


@pytest.mark.parametrize("group", GROUPS)
def test_every_argument_of_every_function(bench, group):
    names = [name for name in public() if name.split(".")[0] == group]
    COUNTED.update(tried(function_cases(bench, names)))


# --- options: of every method, and of what else has some


def dataclasses_of_options() -> dict[str, type]:
    """Every dataclass that ``check_options`` converts, and a way to make one."""
    methods = {name: functools.partial(made_of_method, name) for name in METHODS}
    others = {"Sampling": Sampling, "Protocol": Protocol, "Inversion": Inversion}
    return {**methods, **others, "Relearning": Relearning, "Training": Training}


def made_of_method(name: str, **options):
    return options_of(name, options)


@pytest.mark.parametrize("name", dataclasses_of_options())
def test_every_option(name):
    """What is taken is what JSON gives back, so that an edit that cannot be saved is impossible."""
    make = dataclasses_of_options()[name]

    def case(option, value):
        made = make(**{option: value})
        taken = asdict(made)
        assert identity.plain(taken) == json.loads(json.dumps(taken)), "not what JSON gives back"
        return [v for v in taken.values() if isinstance(v, float)]

    cases = [
        (name, functools.partial(case, field.name, value), field.name, value)
        for field in fields(make()) for value in wrong_values()
    ]  # fmt: skip
    COUNTED.update(tried(cases))


@pytest.mark.parametrize("field", ["stop_below", "momentum", "min_steps"])
def test_what_stops_a_problem(field):
    def case(value):
        return dataclasses.replace(little_problem(), **{field: value}) and None

    cases = [("Problem", functools.partial(case, v), field, v) for v in wrong_values()]
    COUNTED.update(tried(cases))


# --- edits, worlds, files: methods, which ``typed`` does not check


def quiet(call):
    """The call, whose result is of no matter."""

    def called(value) -> None:
        call(value)

    return called


def method_cases(bench) -> list:
    """Methods and unchecked functions: (name, call of one value, the argument's name)."""
    world, edit = bench.world, random_edit(bench.world)
    edit.save(bench.folder / "edit.safetensors")

    def applied(value):
        with world.applied(value):
            return None

    return [
        ("load_world", quiet(load_world), "name"),
        ("load_world", quiet(lambda v: load_world(device=v)), "device"),
        ("load_world", quiet(lambda v: load_world(dtype=v)), "dtype"),
        ("World.encode", world.encode, "prompt"),
        ("World.token_ids", world.token_ids, "prompt"),
        ("World.kind", world.kind, "concept"),
        ("World.applied", applied, "edit"),
        ("World.fingerprint", world.fingerprint, "part"),
        ("Edit", Edit, "delta"),
        ("Edit.load", Edit.load, "path"),
        ("Edit.save", edit.save, "path"),
        ("Edit.export", lambda v: edit.export(world, v), "folder"),
        ("Edit.export_lora", edit.export_lora, "path"),
        ("Edit.export_lora", lambda v: edit.export_lora("lora.safetensors", rank=v), "rank"),
        ("Edit.__mul__", lambda v: (edit * v).delta, "factor"),
        ("Edit.__truediv__", lambda v: (edit / v).delta, "factor"),
        ("Edit.__add__", lambda v: (edit + v).delta, "edit"),
        ("Edit.__sub__", lambda v: (edit - v).delta, "edit"),
        ("Edit.sum", quiet(Edit.sum), "edits"),
        ("read_picture", reader.read_picture, "path"),
        ("folder_images", lambda v: reader.folder_images(v, 16), "folder"),
        ("collapsed", quiet(collapsed), "images"),
        ("filled", lambda v: filled(v, "church"), "template"),
        ("pair_prompt", lambda v: pair_prompt(v, "Noto"), "thing"),
    ]


def test_methods_of_edits_and_worlds(bench):
    cases = [
        (name, functools.partial(call, value), argument, value)
        for name, call, argument in method_cases(bench) for value in wrong_values()
    ]  # fmt: skip
    COUNTED.update(tried(cases))


# --- what may never be taken, and how much was tried


def test_two_thousand_cases_and_more_were_tried():
    """After the others, in the order of this file."""
    if not COUNTED:
        pytest.skip("run the whole file")
    print(dict(COUNTED))
    assert COUNTED.total() > 2000
    assert COUNTED["bare"] + COUNTED["vague"] + COUNTED["unsound"] <= 0.02 * COUNTED.total()
