"""Worlds: a text-to-image model with the concepts it knows, its judge, its metrics, its sampler."""

import contextlib
import copy
import difflib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from helpers import concepts, judge, perceptual
from helpers.denoise import Sampling
from helpers.gate import (
    CLIP,
    EMOJI,
    HUB,
    load_clip,
    load_pipeline,
    place_of,
    quiet,
    require_plain,
    source_of,
    unwrapped,
)  # fmt: skip
from helpers.identity import module_digest as digest
from helpers.identity import verify_manifest
from helpers.options import NOT_EMPTY, typed
from helpers.undo import surely, undoing

PARTS = ("unet", "text_encoder")  # of a pipeline: what an edit may touch
FUSED = (".to_qkv.", ".to_kv.")  # copies that diffusers leaves behind when it takes them apart
PROBED = 64  # matrices of a network that tell whether its weights have changed
USUAL = Sampling(steps=25, guidance=7.5, sampler="dpm++ karras")  # for Stable Diffusion


@dataclass
class World:
    """A pipeline, the bare names of its concepts, and what is read off the model.

    ``styles``, ``objects`` and ``people`` are used as prompts as they stand; a world keeps lists of
    its own. ``sampling``: the default of ``sample``. ``brings``: how to load the world's "judge",
    "second_judge", "clip" and "lpips". ``scheduler``: the folder's own, which exports give back.
    ``lock``: held while a thread applies an edit, samples or trains, so that a second one waits.
    """

    name: str
    pipe: StableDiffusionPipeline
    styles: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    people: list[str] = field(default_factory=list)
    roles: dict = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    brings: dict[str, Callable] = field(default_factory=dict, repr=False)
    guards: tuple = field(default=(), repr=False)  # of the edits applied now
    rows: list[str] | None = field(default=None, repr=False)  # prompts of the batch, if known
    _applied: int = field(default=0, repr=False)  # how many edits are applied now
    _digests: dict[str, str] = field(default_factory=dict, repr=False)
    _probes: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    scheduler: object = field(default=None, repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __post_init__(self):
        self.styles, self.objects, self.people = map(list, (self.styles, self.objects, self.people))
        self.roles, self.brings = copy.deepcopy(self.roles), dict(self.brings)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict) -> None:  # a lock cannot be copied: a copy has its own
        self.__dict__ |= {**state, "lock": threading.RLock()}

    @property
    def concepts(self) -> list[str]:
        """All bare names."""
        return [*self.styles, *self.objects, *self.people]

    @property
    def unet(self) -> torch.nn.Module:
        """The UNet, without the wrapper of ``torch.compile``."""
        return unwrapped(self.pipe.unet)

    @property
    def device(self) -> torch.device:
        return self.pipe.unet.device

    @property
    def alpha_bar(self) -> Tensor:
        """The noise schedule, (T,), on the world's device."""
        return self.pipe.scheduler.alphas_cumprod.to(self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        return self.pipe.unet.config.in_channels, self._side, self._side

    @property
    def _side(self) -> int:
        size = self.pipe.unet.config.sample_size
        return size if isinstance(size, int) else size[0]  # a pair of equal numbers

    @property
    def image_size(self) -> int:
        """Pixels along one side of an image."""
        return self._side * self.pipe.vae_scale_factor

    @property
    def text_length(self) -> int:
        """Tokens in a prompt, BOS and EOS included."""
        return self.pipe.tokenizer.model_max_length

    def _bring(self, what: str, remedy: str):
        if what not in self.brings:
            raise ValueError(f"the world {self.name!r} has no {what}: {remedy}")
        return self.brings[what]()

    @cached_property
    def judge(self):
        """The classifier of this world's images."""
        return self._bring("judge", "use load_world('emoji'), or load_world(..., judge=...)")

    @cached_property
    def second_judge(self):
        """The witness beside the judge, which shares nothing with it; None if there is none."""
        return self._bring("second_judge", "") if "second_judge" in self.brings else None

    @cached_property
    def clip(self):
        """The world's CLIPModel, fp32 on the CPU."""
        return self._bring("clip", "use a world of load_world")

    @cached_property
    def lpips(self) -> perceptual.Perceptual:
        """The world's LPIPS network, with its name."""
        return self._bring("lpips", "use a world of load_world")

    @typed
    def kind(self, concept: str) -> str:
        """'style', 'object' or 'person'; ValueError, with the nearest names, for anything else."""
        kinds = {"style": self.styles, "object": self.objects, "person": self.people}
        for kind, names in kinds.items():
            if concept in names:
                return kind
        near = difflib.get_close_matches(concept, self.concepts, n=3, cutoff=0.5)
        hint = "choose from world.styles, .objects and .people"
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}? Give one of its names"
        raise ValueError(
            f"{concept!r} is no style, object or person of the world {self.name!r}: {hint}"
        )

    @typed(prompts=NOT_EMPTY)
    def written(self, prompts: list[str]) -> list[str]:
        """Prompts as the pipeline reads them: an embedding of several vectors is written out.

        ``pipe.load_textual_inversion`` keeps the vectors of "<it>" as "<it>", "<it>_1", "<it>_2".
        ValueError for what is no text.
        """
        tokenizer = self.pipe.tokenizer
        if any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):
            return self.pipe.maybe_convert_prompt(prompts, tokenizer)
        return prompts

    @typed
    def word_ids(self, text: str) -> list[int]:
        """A text's tokens as they stand in a prompt, without BOS and EOS."""
        written = self.written([text])[0]  # an embedding of several vectors has several tokens
        return self.pipe.tokenizer(written, add_special_tokens=False).input_ids

    @typed(prompts=NOT_EMPTY)
    def token_ids(self, prompts: list[str]) -> Tensor:
        """Ids as sampling feeds them, padded to the full length: (n, tokens).

        ValueError for a prompt that is too long.
        """
        tokenizer, prompts = self.pipe.tokenizer, self.written(prompts)
        rows = tokenizer(prompts).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.text_length:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(row)} tokens, "
                    f"and this model reads {self.text_length}: shorten it"
                )
        return tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids

    @typed(prompts=NOT_EMPTY)
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text states exactly as sampling feeds them, padding included: (n, tokens, width)."""
        self.token_ids(prompts)  # raises for a prompt that the pipeline would cut without an error
        with self.lock:
            return self.pipe.encode_prompt(prompts, self.device, 1, False)[0]

    def part(self, name: str) -> torch.nn.Module:
        """The pipeline's part "unet" or "text_encoder", out of ``torch.compile``'s wrapper."""
        if not isinstance(name, str) or name not in PARTS:
            raise ValueError(f"unknown part {name!r}: choose from {', '.join(PARTS)}")
        return unwrapped(getattr(self.pipe, name))

    def parameters(self, names: Iterable[str] | None = None) -> dict[str, torch.nn.Parameter]:
        """Every parameter that an edit may touch, by its full name ("unet.conv_in.bias").

        names: only these, looked up one by one, which spares a walk over the whole network; a name
        that the world lacks is left out. ValueError for a network that is compiled in pieces.
        """
        if names is not None:
            found = {name: self._parameter(name) for name in names}
            return {name: parameter for name, parameter in found.items() if parameter is not None}
        found = {
            f"{part}.{name}": parameter
            for part in PARTS
            for name, parameter in self.part(part).named_parameters()
            if not any(copied in name for copied in FUSED)
        }
        pieces = [name for name in found if "_orig_mod" in name]
        if pieces:
            raise ValueError(
                f"a piece of a network is wrapped by torch.compile ({pieces[0]}): compile the "
                "whole one, `pipe.unet = torch.compile(pipe.unet)`, or none"
            )
        return found

    def _parameter(self, name: str) -> torch.nn.Parameter | None:
        part, _, rest = name.partition(".")
        try:
            return self.part(part).get_parameter(rest) if part in PARTS else None
        except AttributeError:
            return None

    @typed
    def fingerprint(self, part: str = "unet") -> str:
        """A short digest of one part's base weights: edits carry it, so that none is applied to
        another base.

        It is computed once, from the weights rounded to half precision, so that one edit fits the
        fp32 world on a CPU and the fp16 world on a GPU. Inside ``applied`` it is still the base's.
        It is computed again when the weights have changed since (a LoRA that was fused, say), as
        a few numbers of some matrices tell. ValueError if a LoRA is loaded beside them.
        """
        if self._applied:
            if part not in self._digests:
                raise RuntimeError("an edit is applied: take the fingerprint before that")
            return self._digests[part]
        require_plain(self.pipe)
        with self.lock:
            if part not in self._digests or not self._is_as_probed(part):
                self._digests[part] = digest(self.part(part))
                self._probe(part)
            return self._digests[part]

    def _probe(self, part: str) -> None:
        """Keep a few numbers of some matrices of a part, to see later whether they have changed."""
        matrices = [n for n, p in self.part(part).named_parameters() if p.ndim == 2]
        names = matrices[:: max(1, len(matrices) // PROBED)]
        self._probes[part] = {n: probed(self._parameter(f"{part}.{n}")) for n in names}

    def _is_as_probed(self, part: str) -> bool:
        """Whether those numbers are still the same, up to a rounding of all weights since."""
        for name, before in self._probes.get(part, {}).items():
            parameter = self._parameter(f"{part}.{name}")
            if parameter is None:
                return False
            if not torch.equal(probed(parameter), before.to(parameter.dtype)):
                return False
        return True

    @property
    def is_edited(self) -> bool:
        """Whether an edit is applied now."""
        return self._applied > 0

    @contextlib.contextmanager
    def applied(self, edit, *, transfer: bool = False) -> Iterator["World"]:
        """Apply an edit for the length of a ``with`` block: its increments, adapters and guards.

        On exit, by an exception or Ctrl-C or not, the weights are the old ones to the bit, and
        hooks and guards are gone. ``applied(None)`` is the base. A second thread waits until the
        block is left. transfer: accept an edit of another base whose parameters have the same names
        and shapes. ValueError for an edit that does not fit, or a pipeline with a LoRA loaded.
        """
        with self.lock:
            if edit is None:
                yield self
                return
            if not hasattr(edit, "require_fit"):
                raise ValueError(
                    f"the edit is {edit!r:.80}, a {type(edit).__name__}: give what unlearn returns,"
                    " or Edit.load(path)"
                )
            require_plain(self.pipe)
            edit.require_fit(self, transfer=transfer)
            hooks = [pair for adapter in edit.adapters for pair in adapter.hooks(self)]
            undo = self._undo(edit.delta, hooks)
            try:
                try:
                    self._apply(edit, hooks)
                    yield self
                finally:
                    surely(undo)
            finally:  # once more, for a Ctrl-C in the instant before the first began
                surely(undo)

    def _apply(self, edit, hooks: list[tuple]) -> None:
        """theta + delta, summed in fp32 and cast last, in theta's place; hooks and guards too."""
        self._applied += 1
        self.guards = (*self.guards, *edit.guards)
        for name, parameter in self.parameters(edit.delta).items():
            theta, increment = parameter.data, edit.delta[name]
            increment = increment.to(theta.device)
            edited = torch.empty_like(theta)
            if theta.dtype == torch.float32:
                torch.add(theta, increment, out=edited)
            else:
                edited.copy_(theta.float() + increment)
            parameter.data = edited
        for layer, hook in hooks:
            layer.register_forward_hook(hook)

    def _undo(self, delta: Iterable[str], hooks: list[tuple]) -> Callable[[], None]:
        """What sets the world to how it is now; it may be called again and again."""
        applied, guards = self._applied, self.guards
        parameters = self.parameters(delta)
        base = {name: parameter.data for name, parameter in parameters.items()}

        def undo() -> None:
            for name, theta in base.items():
                parameters[name].data = theta
            unhook(hooks)
            self.guards, self._applied = guards, applied  # last: until then it is edited

        return undo

    @contextlib.contextmanager
    def batch_of(self, prompts: list[str] | None) -> Iterator[None]:
        """Say which prompt each row of the batch has, for adapters that are gated by it."""
        with undoing(functools.partial(setattr, self, "rows", self.rows)):
            self.rows = prompts
            yield


def unhook(hooks: list[tuple[torch.nn.Module, Callable]]) -> None:
    """Take forward hooks off their layers, those too whose handle was never kept."""
    for layer, hook in hooks:
        for key, known in list(layer._forward_hooks.items()):
            if known is hook:
                del layer._forward_hooks[key]


def alone(function: Callable) -> Callable:
    """Let one thread at a time work on the world that is a function's first argument."""

    @functools.wraps(function)
    def call(world: World, *args, **kwargs):
        if not isinstance(world, World):
            raise ValueError(f"the world is {world!r:.80}: give what load_world returns")
        with world.lock:
            return function(world, *args, **kwargs)

    return call


def probed(parameter: Tensor) -> Tensor:
    """A few numbers of a matrix, spread over it, on the CPU; none where there is no memory."""
    values = parameter.detach()
    if values.is_meta:
        return values.new_empty(0, device="cpu")
    values = values.flatten()
    return values[:: max(1, len(values) // 16)].cpu()


def knowledge(name: str) -> dict:
    """What a world knows and brings besides its pipeline: names, roles, sampler, judge, metrics."""
    if name != "emoji":
        brings = {
            "clip": lambda: load_clip(*CLIP),
            "lpips": perceptual.load_alexnet_lpips,
        }
        known = concepts.concepts()["stable_diffusion"]
        return {**known, "sampling": USUAL, "brings": brings}
    return {
        "styles": concepts.style_names(),
        "objects": concepts.object_names(people=False),
        "people": concepts.object_names(people=True),
        "roles": concepts.concepts()["roles"],
        "brings": {
            "judge": judge.load_judge,
            "second_judge": judge.load_second_judge,
            "clip": lambda: load_clip(EMOJI / "clip"),
            "lpips": perceptual.load_emoji_lpips,
        },
    }


def load_world(
    name: str | Path = "emoji", *, device: str | None = None, dtype: torch.dtype | None = None,
    judge=None,
) -> World:  # fmt: skip
    """Load ``"emoji"`` (committed, offline), ``"sd14"``, a hub id, or a folder with a Stable
    Diffusion 1.x/2.x pipeline, which predicts noise or velocity.

    Weights are fp32 on a CPU and fp16 on a GPU unless ``dtype`` says otherwise. judge: one of your
    own, in place of the world's. ValueError for an unknown name, device or type, a damaged file, or
    another kind of model; OSError at once when the hub would be needed and cannot be had.
    """
    device, dtype = place_of(device, dtype)
    source, revision = source_of(name)
    if source == EMOJI:
        verify_manifest(EMOJI)
    pipe, own = load_pipeline(source, revision)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    known = knowledge(str(name))
    if judge is not None:
        known["brings"] = {**known["brings"], "judge": lambda: judge}
        known["brings"].pop("second_judge", None)  # it is no witness beside a judge of one's own
    name = str(name) if name in ("emoji", *HUB) else str(source)
    world = World(name, pipe, scheduler=own, **known)
    for part in PARTS:
        world.fingerprint(part)  # once, before a narrower type could round the weights
    with quiet():
        pipe.to(device, dtype)
    return world
