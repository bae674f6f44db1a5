"""The one training loop of the kit, the increments that it moves, and the pictures that it trains on. It knows no method.

The base weights never change: a method trains increments delta, and a forward pass uses theta + delta. So the frozen model
and the trained one are the same network, a killed run leaves the world as it was, and the result is the ``Edit`` itself.
"""

import hashlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torchvision.transforms import functional as TF
from torchvision.transforms import v2
from tqdm.auto import tqdm

from helpers.diffusion import to_latents
from helpers.edits import Edit
from helpers.files import complete
from helpers.sampling import draw_batch, sample
from helpers.worlds import World

CACHE = Path(os.environ.get("LETHE_CACHE", Path(__file__).resolve().parent.parent / "build" / "cache"))
PICTURES = (".png", ".jpg", ".jpeg")
TEMPLATES = {  # captions of the training pictures: the bare name, and the phrases people use
    "style": ("{c}", "in the style of {c}"),
    "object": ("{c}", "a picture of a {c}"),
    "person": ("{c}", "a picture of a {c}"),
}
BARE = dict.fromkeys(TEMPLATES, ("{c}",))  # the papers that train on the name alone
GROUPS = {  # sets of parameters: a pattern that their names match
    "xattn": r"attn2\.",
    "kv": r"attn2\.to_[kv]\.",
    "noxattn": r"^(?!.*(attn2\.|norm))",  # every linear layer and convolution outside cross-attention
    "unet": r"",
}
PAPER_GROUPS = {"ESD-x": "xattn", "ESD-x-strict": "kv", "ESD-u": "noxattn"}  # a paper's own name -> what it means here
GROUPS |= {name: GROUPS[group] for name, group in PAPER_GROUPS.items()}


@dataclass(frozen=True)
class Training:
    """How long and how fast to train: what the ``Options`` of every method begin with, each with defaults of its own."""

    steps: int = 60
    lr: float = 1e-4
    batch_size: int = 4
    decay: str = "cosine"  # "constant", or "cosine" to a tenth: AIzheimer's remedy against overshooting
    clip: float | None = 1.0  # largest norm of the gradient; None for no clipping
    accumulate_grads: bool = False  # the releases' missing zero_grad, for study
    checkpoint: str | Path | None = None  # a file to write now and then, and to resume from after a kill

    def __post_init__(self):
        if self.steps < 0 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(f"steps {self.steps}, batch_size {self.batch_size}, lr {self.lr}: want >= 0, >= 1 and > 0")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"unknown decay {self.decay!r}: choose 'constant' or 'cosine'")
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", str(self.checkpoint))  # a Path is welcome, JSON has none

    def schedule(self, seed: int, **stops) -> "Schedule":
        """What ``run`` follows: these options with a seed, and the fields of ``Schedule`` that say when to stop."""
        return Schedule(**{f.name: getattr(self, f.name) for f in fields(Training)}, seed=seed, **stops)


@dataclass(frozen=True)
class Schedule(Training):
    """Training options with a seed, and with what stops a run early."""

    seed: int = 0
    # tau by term (or "total"): a term stops once its statistic is below
    stop_below: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.9  # a in the statistic m = a m + (1 - a) L, started at the first value
    min_steps: int = 12  # updates before an early stop may happen

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        if self.decay == "constant":
            return self.lr
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps))))


def select_parameters(unet, group: str = "xattn", *, within: list[str] | None = None) -> dict[str, Tensor]:
    """Parameters of a named group, those of the modules ``within`` only if given. ValueError if that selects nothing."""
    if group not in GROUPS:
        raise ValueError(f"unknown group of parameters {group!r}: choose from {', '.join(GROUPS)}")
    chosen = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if re.search(GROUPS[group], name)
        and (within is None or any(name.startswith(module + ".") for module in within))
    }
    if not chosen:
        raise ValueError(f"the group {group!r} within {within} selects no parameter: name layers that exist")
    return chosen


def group_sizes(unet) -> list[dict]:
    """Which parameters a paper's name means, and how many: one row of name, group, tensors (M) and parameters for each.

    ESD-u is read as in ESD's newer release: linear layers and convolutions outside cross-attention. (Its first release
    takes the norms too, and leaves out the last convolution and the time embedding.)
    """
    rows = []
    for name, group in PAPER_GROUPS.items():
        chosen = select_parameters(unet, group).values()
        rows.append(
            {"name": name, "group": group, "tensors": len(chosen), "parameters": sum(p.numel() for p in chosen)}
        )
    return rows


def new_increments(unet, group: str = "xattn", *, within: list[str] | None = None) -> dict[str, Tensor]:
    """Zeros for every parameter of a group, fp32, ready to be trained: parameter name -> increment of its shape."""
    chosen = select_parameters(unet, group, within=within)
    return {name: torch.zeros_like(p, dtype=torch.float32).requires_grad_(True) for name, p in chosen.items()}


def predict(unet, increments: dict[str, Tensor], x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """eps_{theta + delta}(x_t, c, t): the noise that the network with the increments predicts.

    Merged in fp32, cast last; gradients reach the increments. x_t (b, c, h, w), t (b,), states (b, tokens, width) ->
    (b, c, h, w), fp32. With an empty dict of increments it is the base model.
    """
    base = dict(unet.named_parameters())
    merged = {name: (base[name].float() + delta).to(base[name].dtype) for name, delta in increments.items()}
    return functional_call(unet, merged, (x_t.to(unet.dtype), t, states.to(unet.dtype))).sample.float()


def finished(
    world: World, delta: dict[str, Tensor], history: list[dict], *, method: str, concepts: list[str], options, seed: int,
    start: float, parts: dict[str, float] | None = None,
) -> Edit:  # fmt: skip
    """The ``Edit`` of a training that began at ``start`` (of ``time.time``), with everything needed to make it again.

    parts: the seconds of each part of the work, where the method tells them apart.
    """
    meta = {
        "method": method, "concepts": concepts, "options": asdict(options), "seed": seed, "base": world.fingerprint(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}, "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    if parts:
        meta["parts"] = {name: round(seconds, 2) for name, seconds in parts.items()}
    return Edit({name: value.detach().float().cpu() for name, value in delta.items()}, history, meta)


def generator_of(seed: int, step: int) -> torch.Generator:
    """One generator for each step, so that a resumed run draws what the uninterrupted run would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def run(
    parameters: dict[str, Tensor],
    terms: Callable[[int, torch.Generator, frozenset[str]], dict[str, Tensor]],
    weights: dict[str, float],
    schedule: Schedule,
    *,
    save_every: int = 20,
    progress: bool = True,
) -> list[dict]:
    """Train ``parameters`` in place on the weighted sum of loss terms, and return the history, one dict a step.

    L = sum_k weights[k] * terms(step, generator, stopped)[k]; Adam; zero_grad each step unless ``accumulate_grads``.
    Early stop: m = a m + (1 - a) L_k for each watched term, m_0 its first value, tested after the update once
    ``min_steps`` updates are done. A term below its tau is stopped: ``terms`` is told so and may leave it out, and what
    only it trains then rests. The run ends when every watched term has stopped, or after ``steps``.
    The schedule's checkpoint is written every ``save_every`` steps; a run whose file is there goes on from it, bit for bit.
    FloatingPointError names the step at which a term is NaN or infinite; ValueError for a checkpoint of another run.
    Several processes: gradients are averaged.
    """
    accelerator = Accelerator(cpu=next(iter(parameters.values())).device.type == "cpu")
    tensors = list(parameters.values())
    optimizer = torch.optim.Adam(tensors, lr=schedule.lr)
    history: list[dict] = []
    checkpoint = Path(schedule.checkpoint) if schedule.checkpoint else None
    if checkpoint and checkpoint.exists():
        history = _resume(checkpoint, parameters, optimizer, schedule)
    statistics: dict[str, float] = dict(history[-1]["statistics"]) if history else {}
    stopped = frozenset(history[-1]["stopped"]) if history else frozenset()
    bar = tqdm(total=schedule.steps, initial=len(history), desc="training", disable=not progress, leave=False)
    with bar:
        for step in range(len(history), schedule.steps):
            if stopped and stopped == set(schedule.stop_below):
                break
            values = terms(step, generator_of(schedule.seed, step), stopped)
            loss = sum(weights[name] * value for name, value in values.items())
            row = {"step": step, **{name: value.item() for name, value in values.items()}, "total": loss.item()}
            if not all(math.isfinite(v) for v in row.values()):
                raise FloatingPointError(f"the loss at step {step} is not finite ({row}): lower the learning rate")
            if not schedule.accumulate_grads:
                optimizer.zero_grad()  # sets None: Adam leaves alone what no term trains any more
            piled = [(tensor, tensor.grad, tensor.grad._version) for tensor in tensors if tensor.grad is not None]
            accelerator.backward(loss)
            for tensor, grad, version in piled:
                if tensor.grad is grad and grad._version == version:
                    tensor.grad = None  # nothing was added: what no term trains any more rests here too
            if accelerator.num_processes > 1:
                for tensor in tensors:
                    if tensor.grad is not None:
                        tensor.grad = accelerator.reduce(tensor.grad, "mean")
            if schedule.clip is not None:
                row["grad_norm"] = torch.nn.utils.clip_grad_norm_(tensors, schedule.clip).item()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.step()
            for name in {"total", *schedule.stop_below} & set(row):
                m = statistics.get(name, row[name])
                statistics[name] = schedule.momentum * m + (1 - schedule.momentum) * row[name]
            if step + 1 >= schedule.min_steps:
                stopped |= {name for name, tau in schedule.stop_below.items() if statistics[name] < tau}
            history.append({**row, "statistics": dict(statistics), "stopped": sorted(stopped)})
            bar.update()
            bar.set_postfix(loss=f"{row['total']:.3g}")
            if checkpoint and accelerator.is_main_process and len(history) % save_every == 0:
                _checkpoint(checkpoint, parameters, optimizer, history, schedule)
    return history


def _checkpoint(path: Path, parameters: dict[str, Tensor], optimizer, history: list[dict], schedule: Schedule) -> None:
    state = optimizer.state_dict()["state"]
    moments = {f"adam.{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}
    weights = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    grads = {f"grad.{name}": value.grad for name, value in parameters.items() if value.grad is not None}
    tensors = {name: value.cpu().contiguous() for name, value in {**moments, **weights, **grads}.items()}
    metadata = {"history": json.dumps(history), "schedule": json.dumps(asdict(schedule))}
    with complete(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _resume(path: Path, parameters: dict[str, Tensor], optimizer, schedule: Schedule) -> list[dict]:
    with safe_open(path, "pt") as file:
        history = json.loads(file.metadata()["history"])
        theirs, ours = json.loads(file.metadata()["schedule"]), asdict(schedule)
        differing = [name for name in ours if name != "checkpoint" and theirs.get(name) != ours[name]]
        if differing:
            raise ValueError(
                f"{path.name} is the checkpoint of another run (its {', '.join(differing)} differ): "
                "delete it, or give this run a file of its own"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "adam":
            i, key = rest.split(".", 1)
            state.setdefault(int(i), {})[key] = value
            continue
        if rest not in parameters:
            raise ValueError(
                f"{path.name} holds {rest}, which this run does not train: delete it or choose another file"
            )
        if kind == "weight":
            parameters[rest].data.copy_(value)
        else:
            parameters[rest].grad = value.to(parameters[rest].device)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return history


def drawn_images(
    world: World, prompts: list[str], seeds: list[int], *, guidance: float = 5.0, steps: int = 25,
    hidden: list[list[int]] | None = None,
) -> Tensor:  # fmt: skip
    """What the base model draws, kept on disk under a name that depends on the weights and everything asked.

    hidden: for each prompt, positions whose cross-attention is zero while drawing. Returns (n, 3, H, W) in [0, 1].
    Stored as 8-bit, so the first call returns what later calls will read.
    """
    asked = {"base": world.fingerprint(), "prompts": prompts, "seeds": seeds, "guidance": guidance, "steps": steps}
    if hidden is not None:
        asked["hidden"] = hidden
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    path = CACHE / f"{name}.safetensors"
    if not path.exists():
        if hidden is None:
            images = sample(world, prompts, seeds, steps=steps, guidance=guidance, progress=False)
        else:
            parts = [slice(i, i + 16) for i in range(0, len(prompts), 16)]
            drawn = [draw_batch(world, prompts[p], seeds[p], steps, guidance, hidden[p]) for p in parts]
            images = torch.cat(drawn).float().cpu()
        with complete(path) as temporary:
            save_file({"images": (images * 255).round().byte()}, temporary)
    return load_file(path)["images"].float() / 255


def training_seeds(seed: int, n: int) -> list[int]:
    """The seeds of the n training pictures of a run: far from those that anything is measured on."""
    return [500_000 + 1000 * seed + i for i in range(n)]


def captions(world: World, concepts: list[str], count: int, templates: dict = TEMPLATES) -> tuple[list[str], list[str]]:
    """``count`` captions for each concept, the templates of its kind in turn, and the concept that each caption holds."""
    forms = {concept: templates[world.kind(concept)] for concept in concepts}
    prompts = [forms[c][i % len(forms[c])].format(c=c) for c in concepts for i in range(count)]
    return prompts, [c for c in concepts for _ in range(count)]


def concept_latents(
    world: World, concepts: list[str], images: str | int, seed: int, *, templates: dict = TEMPLATES
) -> tuple[Tensor, list[str], list[str]]:
    """Training latents of concepts: (n, c, h, w) fp32, their captions, and the concept that each caption holds.

    images: how many the base model draws for each concept (cached on disk), or a folder of the user's own pictures.
    templates: captions by kind of concept, used in turn.
    """
    if isinstance(images, int):
        prompts, owners = captions(world, concepts, images, templates)
        pictures = drawn_images(world, prompts, training_seeds(seed, len(prompts)))
    else:
        folder = folder_images(images, world.image_size)
        prompts, owners = captions(world, concepts, len(folder), templates)
        pictures = folder.repeat(len(concepts), 1, 1, 1)
    return torch.cat([to_latents(world, part) for part in pictures.split(16)]).float(), prompts, owners


def kept_latents(world: World, without: list[str], *, each: int = 1) -> tuple[Tensor, list[str]]:
    """What a model is to keep: latents (n, c, h, w) of all concepts but those ``without``, and their bare names.

    Drawn by the base model once for all concepts and kept on disk, so that every method and concept shares them.
    """
    names = [name for name in world.concepts for _ in range(each)]
    pictures = drawn_images(world, names, [400_000 + i for i in range(len(names))])
    rows = [i for i, name in enumerate(names) if name not in without]
    latents = torch.cat([to_latents(world, part) for part in pictures[rows].split(16)]).float()
    return latents, [names[i] for i in rows]


def folder_images(folder: str | Path, size: int) -> Tensor:
    """The user's own pictures: JPEG and PNG in a folder, sorted by name, shorter side resized, centre cropped.

    Returns (n, 3, size, size) in [0, 1]. An unreadable file is skipped with a warning that names it; ValueError if
    the folder is missing or none is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}: give a folder of JPEG or PNG pictures")
    images = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        try:
            picture = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError):
            warnings.warn(f"{path.name} is not a readable picture and was skipped", stacklevel=2)
            continue
        small = TF.resize(TF.to_tensor(picture), [size], antialias=True)  # the shorter side; the aspect is kept
        images.append(TF.center_crop(small, [size, size]))
    if not images:
        raise ValueError(f"the folder {folder.name!r} holds no readable picture ({', '.join(PICTURES)})")
    return torch.stack(images).clamp(0, 1)


def augmented(
    images: Tensor, copies: int, *, flip: bool = True, crop: float = 0.8, colour: float = 0.1, seed: int = 0
) -> Tensor:
    """New views of pictures: mirrored or not, cropped to a random square and resized back, colours shifted.

    images (n, ..., 3, H, W) in [0, 1]: what belongs to one row, a pair of pictures say, changes alike. crop: the smallest
    share of the area that is kept; colour: the largest relative change of brightness, contrast and saturation (1 and 0:
    none). Returns (copies * n, ..., 3, H, W), the originals not among them. ValueError for fewer than one copy.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}: give at least 1, or leave the pictures as they are")
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.RandomResizedCrop(images.shape[-2:], scale=(crop, 1.0), ratio=(1.0, 1.0)),
            v2.ColorJitter(brightness=colour, contrast=colour, saturation=colour),
        ]
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(seed)
        return torch.stack([change(row) for _ in range(copies) for row in images]).clamp(0, 1)
