"""Provenance: what an image, an edit, a checkpoint and a result depend on, as the world stands now.

``world.fingerprint`` is taken once, at load. Weights may have been changed in place since then, so
what is written to disk names the weights that were used.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers

from helpers.denoise import Sampling
from helpers.files import shown
from helpers.identity import (
    SHORT,
    file_digest,
    module_digest,
    plain,
    tensors_digest,
    value_digest,
)
from helpers.worlds import PARTS, World

DRAWING = (*PARTS, "vae")  # the networks that make an image


def base_parts(world: World) -> dict[str, str]:
    """Part -> fingerprint of everything that makes the base model's images, as it stands now.

    The networks' weights count in half precision, so that fp32 and fp16 are one base.
    """
    renew_fingerprints(world)
    found = {part: world.fingerprint(part) for part in PARTS}
    if world.pipe.vae is not None:
        found["vae"] = module_digest(world.pipe.vae)
    described = {"scheduler": scheduler_of(world.pipe.scheduler), "tokenizer": vocabulary(world)}
    return found | {name: value_digest(value)[:SHORT] for name, value in described.items()}


def renew_fingerprints(world: World) -> None:
    """Take the world's fingerprints again if its weights were changed in place since its load.

    Not while an edit is applied; and bfloat16, which rounds more than the fingerprint does, keeps
    that of the weights it was rounded from.
    """
    if world.is_edited:
        return
    for part in PARTS:
        if world.part(part).dtype != torch.bfloat16:
            world._digests[part] = module_digest(world.part(part))


def drawing_key(
    world: World, prompts: list[str], seeds: list[int], how: Sampling, hide
) -> dict:  # fmt: skip
    """The question that a cached image answers: everything that it depends on, ready for JSON.

    Weights count exactly as they stand, LoRA layers and soft tokens among them; the scheduler as
    diffusers makes it for this sampler, with its timesteps.
    """
    scheduler = how.scheduler(world)
    return plain(
        {
            "networks": {part: network(getattr(world.pipe, part)) for part in DRAWING},
            "tokens": world.token_ids([*prompts, ""]).tolist(),  # as the vocabulary is now
            "vocabulary": value_digest(vocabulary(world)),
            "scheduler": scheduler_of(scheduler),
            "timesteps": scheduler.timesteps.tolist(),
            "noise": value_digest(world.alpha_bar.tolist()),
            "latent": list(world.latent_shape),
            "image": world.image_size,
            "device": world.device.type,
            "guards": [guard.described() for guard in world.guards],
            "prompts": list(prompts), "seeds": list(seeds), "sampling": asdict(how), "hide": hide,
        },
        "what was asked for",
    )  # fmt: skip


def network(module: torch.nn.Module) -> dict:
    """One network: its weights to the bit, its config, and what else changes what it computes."""
    switches = {
        name: {
            key: repr(getattr(layer, key))
            for key in ("scaling", "active_adapters", "disable_adapters", "merged", "s1", "b1")
            if hasattr(layer, key)
        }
        for name, layer in module.named_modules()
        if hasattr(layer, "scaling") or getattr(layer, "s1", None) is not None
    }  # LoRA's strengths (PEFT), FreeU's factors: neither is a weight
    return {
        "weights": tensors_digest(module.state_dict()),
        "config": settings(module.config),
        "switches": switches,
    }


def settings(config) -> dict:
    """A config as text, without what says where it came from."""
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    left_out = ("transformers_version", "torch_dtype", "dtype")
    return {
        key: repr(value)
        for key, value in sorted(given.items())
        if not key.startswith("_") and key not in left_out
    }


def scheduler_of(scheduler) -> dict:
    """A scheduler: its class, and every setting (the prediction type among them)."""
    return {"class": type(scheduler).__name__, **settings(scheduler.config)}


def vocabulary(world: World) -> dict:
    """What the tokenizer knows: every token with its id, those that were added, and the length."""
    tokenizer = world.pipe.tokenizer
    return {
        "tokens": tokenizer.get_vocab(),
        "added": tokenizer.get_added_vocab(),
        "length": tokenizer.model_max_length,
    }


def pictures_digest(images) -> str | None:
    """A digest of the user's own pictures: folders' files by name and content.

    images: as a method's option has it: a folder, or a folder for each concept; None for a number.
    """
    folders = images if isinstance(images, Mapping) else {"": images}
    if not all(isinstance(folder, str | Path) for folder in folders.values()):
        return None
    found = {}
    for concept, folder in folders.items():
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            try:
                found[f"{concept}/{name}"] = file_digest(path)
            except OSError:
                warnings.warn(f"{shown(path)} cannot be read and is left out", stacklevel=2)
    return value_digest(found)


def versions() -> dict[str, str]:
    """The versions of the libraries whose arithmetic a result depends on."""
    libraries = (torch, diffusers, transformers)
    return {library.__name__: library.__version__ for library in libraries}


def device_of(world: World) -> str:
    """What the world runs on: "cpu", or a GPU's name."""
    on_gpu = world.device.type == "cuda"
    return torch.cuda.get_device_name(world.device) if on_gpu else str(world.device)
