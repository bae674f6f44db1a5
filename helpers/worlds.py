"""Worlds: a text-to-image model with the concepts that it knows and the judge that recognises them."""

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from helpers import renders

DATA = renders.DATA
EMOJI = DATA / "emoji-diffusion"
HUB = {"sd14": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b")}


@dataclass
class World:
    """A pipeline, the bare names of its concepts, and what is read off the model rather than written down.

    ``styles``, ``objects`` and ``people`` are used as prompts as they stand.
    """

    name: str
    pipe: StableDiffusionPipeline
    styles: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    people: list[str] = field(default_factory=list)
    roles: dict = field(default_factory=dict)
    _base: str | None = field(default=None, repr=False)  # the base's fingerprint while an edit is applied

    @property
    def concepts(self) -> list[str]:
        return [*self.styles, *self.objects, *self.people]

    @property
    def unet(self) -> torch.nn.Module:
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        return self.pipe.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        config = self.pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def image_size(self) -> int:
        """Pixels along one side of a picture."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    @property
    def text_length(self) -> int:
        """Tokens in a prompt, the marks of its start and end included."""
        return self.pipe.tokenizer.model_max_length

    @cached_property
    def judge(self):
        """The classifier of this world's pictures; only the emoji world ships one."""
        from helpers.judge import load_judge

        if self.name != "emoji":
            raise ValueError(f"the world {self.name!r} has no judge yet: only load_world('emoji') ships one")
        return load_judge()

    @cached_property
    def clip(self):
        """The world's CLIPModel, fp32 on the CPU: the emoji world's own, and openai's base model for Stable Diffusion."""
        from transformers import CLIPModel

        source = EMOJI / "clip" if self.name == "emoji" else "openai/clip-vit-base-patch16"
        with quiet():
            model = CLIPModel.from_pretrained(source)
        return model.float().eval().requires_grad_(False)

    def kind(self, concept: str) -> str:
        """'style', 'object' or 'person'; ValueError, with the nearest names, for anything else."""
        for kind, names in (("style", self.styles), ("object", self.objects), ("person", self.people)):
            if concept in names:
                return kind
        near = difflib.get_close_matches(concept, self.concepts, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see world.styles, .objects and .people"
        raise ValueError(f"{concept!r} is no style, object or person of the world {self.name!r}: {hint}")

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Ids as sampling feeds them, padded to the full length: (n, tokens). ValueError for a prompt that is too long."""
        tokenizer = self.pipe.tokenizer
        rows = tokenizer(list(prompts)).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.text_length:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(row)} tokens, and this model reads {self.text_length}: shorten it"
                )
        return tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text states exactly as sampling feeds them, padding included: (n, tokens, width)."""
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"encode takes a list with at least one prompt, not {prompts!r}")
        self.token_ids(prompts)  # raises for a prompt that the pipeline would cut without an error
        return self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]

    def fingerprint(self) -> str:
        """A short digest of the UNet's base weights: edits carry it, so that none is applied to another base.

        Inside ``with world.applied(...)`` it is still the base's, so that edits can be nested.
        """
        if self._base is not None:
            return self._base
        digest = hashlib.sha256()
        for name, value in sorted(self.pipe.unet.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @contextlib.contextmanager
    def applied(self, edit) -> Iterator["World"]:
        """Add an edit's increments to the UNet for the length of a ``with`` block; the old weights come back to the bit."""
        parameters = dict(self.pipe.unet.named_parameters())
        edit.check(self)
        kept = {name: parameters[name].detach().clone() for name in edit.delta}
        outer, self._base = self._base, self.fingerprint()
        try:
            with torch.no_grad():
                for name, increment in edit.delta.items():  # merged in fp32, cast last
                    merged = kept[name].float() + increment.to(kept[name].device)
                    parameters[name].copy_(merged.to(kept[name].dtype))
            yield self
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)
            self._base = outer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading without progress bars and advice on precision: a world loads in seconds, and notebooks stay clean."""
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


def check_manifest(folder: Path) -> None:
    """Compare every file with ``manifest.json`` (SHA-256); ValueError names what is missing or changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"{folder.name}/{name} is missing: run `git checkout -- data/{folder.name}`")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(
                f"{folder.name}/{name} is not the file that was committed (its SHA-256 differs): "
                f"run `git checkout -- data/{folder.name}`"
            )


def load_world(name: str = "emoji", *, device: str | None = None, dtype: torch.dtype | None = None) -> World:
    """Load ``"emoji"`` (committed, offline), ``"sd14"``, a hub id, or a folder that holds a Stable Diffusion 1.x/2.x pipeline.

    Weights are fp32 on a CPU and fp16 on a GPU unless ``dtype`` says otherwise. Sampling uses DDIM.
    ValueError for an unknown name or a damaged file; OSError at once when the hub would be needed and cannot be had.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    source, revision = HUB.get(str(name), (str(name), None))
    if name == "emoji":
        check_manifest(EMOJI)
        source = str(EMOJI)
    elif Path(source).is_dir():
        if not (Path(source) / "model_index.json").exists():
            raise ValueError(
                f"the folder {source!r} holds no model_index.json: give the folder of a diffusers pipeline"
            )
    elif name not in HUB and "/" not in source:
        raise ValueError(f"unknown world {name!r}: choose 'emoji', 'sd14', a hub id such as 'owner/model', or a folder")
    try:
        with quiet():
            pipe = StableDiffusionPipeline.from_pretrained(
                source, revision=revision, safety_checker=None, requires_safety_checker=False
            )
    except OSError as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise OSError(
            f"the weights of {source!r} are neither cached here nor reachable{offline}: go online once, "
            "or use load_world('emoji'), which needs no network"
        ) from error
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    with quiet():
        pipe = pipe.to(device, dtype)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    if name == "emoji":
        known = {
            "styles": renders.style_names(),
            "objects": renders.object_names(people=False),
            "people": renders.object_names(people=True),
            "roles": renders.concepts()["roles"],
        }
    else:
        known = renders.concepts()["stable_diffusion"]
    return World(name if name in ("emoji", *HUB) else source, pipe, **known)
