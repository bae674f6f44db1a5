"""Worlds: a text-to-image model with the concepts it knows, its judge, its metrics, its sampler."""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from helpers import concepts, judge, perceptual
from helpers.denoise import Sampling
from helpers.identity import module_digest as digest
from helpers.identity import verify_manifest

EMOJI = concepts.DATA / "emoji-diffusion"
HUB = {"sd14": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b")}
PARTS = ("unet", "text_encoder")  # of a pipeline: what an edit may touch
USUAL = Sampling(steps=25, guidance=7.5, sampler="dpm++ karras")  # for Stable Diffusion


@dataclass
class World:
    """A pipeline, the bare names of its concepts, and what is read off the model.

    ``styles``, ``objects`` and ``people`` are used as prompts as they stand. ``sampling``: the
    default of ``sample``. ``brings``: how to load its "judge", "second_judge", "clip" and "lpips".
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

    @property
    def concepts(self) -> list[str]:
        """All bare names."""
        return [*self.styles, *self.objects, *self.people]

    @property
    def unet(self) -> torch.nn.Module:
        return self.pipe.unet

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
        config = self.pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def image_size(self) -> int:
        """Pixels along one side of an image."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

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

    def kind(self, concept: str) -> str:
        """'style', 'object' or 'person'; ValueError, with the nearest names, for anything else."""
        kinds = {"style": self.styles, "object": self.objects, "person": self.people}
        for kind, names in kinds.items():
            if concept in names:
                return kind
        near = difflib.get_close_matches(concept, self.concepts, n=3, cutoff=0.5)
        hint = "see world.styles, .objects and .people"
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        raise ValueError(
            f"{concept!r} is no style, object or person of the world {self.name!r}: {hint}"
        )

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Ids as sampling feeds them, padded to the full length: (n, tokens).

        ValueError for a prompt that is too long.
        """
        tokenizer = self.pipe.tokenizer
        rows = tokenizer(list(prompts)).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.text_length:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(row)} tokens, "
                    f"and this model reads {self.text_length}: shorten it"
                )
        return tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text states exactly as sampling feeds them, padding included: (n, tokens, width)."""
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"encode takes a list with at least one prompt, not {prompts!r}")
        self.token_ids(prompts)  # raises for a prompt that the pipeline would cut without an error
        return self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]

    def part(self, name: str) -> torch.nn.Module:
        """The pipeline's part "unet" or "text_encoder"."""
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}: choose from {', '.join(PARTS)}")
        return getattr(self.pipe, name)

    def parameters(self, names: Iterable[str] | None = None) -> dict[str, torch.nn.Parameter]:
        """Every parameter that an edit may touch, by its full name ("unet.conv_in.bias").

        names: only these, looked up one by one, which spares a walk over the whole network; a name
        that the world lacks is left out.
        """
        if names is not None:
            found = {name: self._parameter(name) for name in names}
            return {name: parameter for name, parameter in found.items() if parameter is not None}
        return {
            f"{part}.{name}": parameter
            for part in PARTS
            for name, parameter in self.part(part).named_parameters()
        }

    def _parameter(self, name: str) -> torch.nn.Parameter | None:
        part, _, rest = name.partition(".")
        try:
            return self.part(part).get_parameter(rest) if part in PARTS else None
        except AttributeError:
            return None

    def fingerprint(self, part: str = "unet") -> str:
        """A short digest of one part's base weights: edits carry it, so that none is applied to
        another base.

        It is computed once, from the weights rounded to half precision, so that one edit fits the
        fp32 world on a CPU and the fp16 world on a GPU. Inside ``applied`` it is still the base's.
        """
        if part not in self._digests:
            if self._applied:
                raise RuntimeError("an edit is applied: take the fingerprint before that")
            self._digests[part] = digest(self.part(part))
        return self._digests[part]

    @property
    def is_edited(self) -> bool:
        """Whether an edit is applied now."""
        return self._applied > 0

    @contextlib.contextmanager
    def applied(self, edit, *, transfer: bool = False) -> Iterator["World"]:
        """Apply an edit for the length of a ``with`` block: its increments, adapters and guards.

        On exit, by an exception or not, the weights are the old ones to the bit, and hooks and
        guards are gone. ``applied(None)`` is the base. transfer: accept an edit of another base
        whose parameters have the same names and shapes. ValueError for an edit that does not fit.
        """
        if edit is None:
            yield self
            return
        edit.require_fit(self, transfer=transfer)
        with contextlib.ExitStack() as stack:
            self._applied += 1
            stack.callback(setattr, self, "_applied", self._applied - 1)
            stack.callback(setattr, self, "guards", self.guards)
            self.guards = (*self.guards, *edit.guards)
            stack.enter_context(self._increments(edit.delta))
            for adapter in edit.adapters:
                stack.enter_context(adapter.attached(self))
            yield self

    @contextlib.contextmanager
    def _increments(self, delta: dict[str, Tensor]) -> Iterator[None]:
        """theta + delta, summed in fp32 and cast last, in theta's place; theta is kept as it is."""
        parameters = self.parameters(delta)
        base = {name: parameters[name].data for name in delta}
        try:
            for name, increment in delta.items():
                theta = base[name]
                edited = torch.empty_like(theta)
                increment = increment.to(theta.device)
                if theta.dtype == torch.float32:
                    torch.add(theta, increment, out=edited)
                else:
                    edited.copy_(theta.float() + increment)
                parameters[name].data = edited
            yield
        finally:
            for name, theta in base.items():
                parameters[name].data = theta

    @contextlib.contextmanager
    def batch_of(self, prompts: list[str] | None) -> Iterator[None]:
        """Say which prompt each row of the batch has, for adapters that are gated by it."""
        outer, self.rows = self.rows, prompts
        try:
            yield
        finally:
            self.rows = outer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading without progress bars and advice on precision, so that notebooks stay clean."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.enable_progress_bar()
            library.set_verbosity(level)


def source_of(name: str) -> tuple[str, str | None]:
    """Where a world's weights are: a hub id or folder, and its revision. ValueError for neither."""
    if name == "emoji":
        verify_manifest(EMOJI)
        return str(EMOJI), None
    source, revision = HUB.get(name, (name, None))
    if Path(source).is_dir():
        if not (Path(source) / "model_index.json").exists():
            raise ValueError(
                f"the folder {source!r} holds no model_index.json: "
                "give the folder of a diffusers pipeline"
            )
    elif name not in HUB and "/" not in source:
        raise ValueError(
            f"unknown world {name!r}: choose 'emoji', 'sd14', "
            "a hub id such as 'owner/model', or a folder"
        )
    return source, revision


def load_pipeline(source: str, revision: str | None) -> StableDiffusionPipeline:
    """The pipeline as its files have it. OSError at once, with the remedy, if it cannot be had."""
    try:
        with quiet():
            return StableDiffusionPipeline.from_pretrained(
                source, revision=revision, safety_checker=None, requires_safety_checker=False
            )
    except OSError as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise OSError(
            f"the weights of {source!r} are neither cached here nor reachable{offline}: "
            "go online once, or use load_world('emoji'), which needs no network"
        ) from error


def load_clip(source: str | Path) -> CLIPModel:
    """A CLIPModel in fp32 on the CPU."""
    with quiet():
        model = CLIPModel.from_pretrained(source)
    return model.float().eval().requires_grad_(False)


def knowledge(name: str) -> dict:
    """What a world knows and brings besides its pipeline: names, roles, sampler, judge, metrics."""
    if name != "emoji":
        brings = {
            "clip": lambda: load_clip("openai/clip-vit-base-patch16"),
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
    name: str = "emoji", *, device: str | None = None, dtype: torch.dtype | None = None, judge=None
) -> World:
    """Load ``"emoji"`` (committed, offline), ``"sd14"``, a hub id, or a folder with a Stable
    Diffusion 1.x/2.x pipeline.

    Weights are fp32 on a CPU and fp16 on a GPU unless ``dtype`` says otherwise. judge: one of your
    own, in place of the world's. ValueError for an unknown name or a damaged file; OSError at once
    when the hub would be needed and cannot be had.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    source, revision = source_of(str(name))
    pipe = load_pipeline(source, revision)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    known = knowledge(str(name))
    if judge is not None:
        known["brings"] = {**known["brings"], "judge": lambda: judge}
        known["brings"].pop("second_judge", None)  # it is no witness beside a judge of one's own
    world = World(str(name) if name in ("emoji", *HUB) else source, pipe, **known)
    for part in PARTS:
        world.fingerprint(part)  # once, before a narrower type could round the weights
    with quiet():
        world.pipe = pipe.to(device, dtype)
    return world
