"""The one training loop of the kit, and the pictures that it trains on. It knows no method."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm

from helpers.sampling import sample
from helpers.worlds import World

CACHE = Path(os.environ.get("LETHE_CACHE", Path(__file__).resolve().parent.parent / "build" / "cache"))
PICTURES = (".png", ".jpg", ".jpeg")
GROUPS = {  # what a paper's name for a set of parameters means here: parts of parameter names
    "xattn": ("attn2.",),
    "kv": ("attn2.to_k.", "attn2.to_v."),
    "unet": ("",),
}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. The defaults are those of plain, careful fine-tuning."""

    steps: int = 60
    lr: float = 1e-4
    batch_size: int = 4
    decay: str = "cosine"  # "constant", or "cosine" to a tenth: AIzheimer's remedy against overshooting
    clip: float | None = 1.0  # largest norm of the gradient; None for no clipping
    stop_below: float | None = None  # tau: stop once the momentum statistic of ``stop_on`` falls below it
    stop_on: str = "total"
    momentum: float = 0.9  # a in m = a m + (1 - a) L, started at the first value
    min_steps: int = 12  # updates before an early stop may happen
    accumulate_grads: bool = False  # the releases' missing zero_grad, for study
    seed: int = 0

    def __post_init__(self):
        if self.steps < 0 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(f"steps {self.steps}, batch_size {self.batch_size}, lr {self.lr}: want >= 0, >= 1 and > 0")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"unknown decay {self.decay!r}: choose 'constant' or 'cosine'")

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
        if any(part in name for part in GROUPS[group])
        and (within is None or any(name.startswith(module + ".") for module in within))
    }
    if not chosen:
        raise ValueError(f"the group {group!r} within {within} selects no parameter: name layers that exist")
    return chosen


def generator_of(seed: int, step: int) -> torch.Generator:
    """One generator for each step, so that a resumed run draws what the uninterrupted run would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def run(
    parameters: dict[str, Tensor],
    terms: Callable[[int, torch.Generator], dict[str, Tensor]],
    weights: dict[str, float],
    schedule: Schedule,
    *,
    checkpoint: str | Path | None = None,
    save_every: int = 20,
    progress: bool = True,
) -> list[dict]:
    """Train ``parameters`` in place on the weighted sum of loss terms, and return the history, one dict a step.

    L = sum_k weights[k] * terms(step, generator)[k]; Adam; zero_grad at every step unless ``accumulate_grads``.
    Early stop: m = a m + (1 - a) L, m_0 = L_0, tested after the update, once ``min_steps`` updates are done.
    checkpoint: a file to write every ``save_every`` steps and to go on from, bit for bit, if it is there.
    FloatingPointError names the step at which a term is NaN or infinite. Several processes: gradients are averaged.
    """
    accelerator = Accelerator(cpu=next(iter(parameters.values())).device.type == "cpu")
    tensors = list(parameters.values())
    optimizer = torch.optim.Adam(tensors, lr=schedule.lr)
    history: list[dict] = []
    statistic = None
    if checkpoint and Path(checkpoint).exists():
        history, statistic = _resume(Path(checkpoint), parameters, optimizer)
    bar = tqdm(total=schedule.steps, initial=len(history), desc="training", disable=not progress, leave=False)
    with bar:
        for step in range(len(history), schedule.steps):
            values = terms(step, generator_of(schedule.seed, step))
            loss = sum(weights[name] * value for name, value in values.items())
            row = {"step": step, **{name: value.item() for name, value in values.items()}, "total": loss.item()}
            if not all(math.isfinite(v) for v in row.values()):
                raise FloatingPointError(f"the loss at step {step} is not finite ({row}): lower the learning rate")
            if not schedule.accumulate_grads:
                optimizer.zero_grad()
            accelerator.backward(loss)
            if accelerator.num_processes > 1:
                for tensor in tensors:
                    tensor.grad = accelerator.reduce(tensor.grad, "mean")
            if schedule.clip is not None:
                row["grad_norm"] = torch.nn.utils.clip_grad_norm_(tensors, schedule.clip).item()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.step()
            watched = row[schedule.stop_on]
            statistic = (
                watched if statistic is None else schedule.momentum * statistic + (1 - schedule.momentum) * watched
            )
            history.append({**row, "statistic": statistic})
            bar.update()
            bar.set_postfix(loss=f"{row['total']:.3g}")
            done = (
                schedule.stop_below is not None
                and len(history) >= schedule.min_steps
                and statistic < schedule.stop_below
            )
            if checkpoint and accelerator.is_main_process and (len(history) % save_every == 0 or done):
                _checkpoint(Path(checkpoint), parameters, optimizer, history)
            if done:
                break
    return history


def _checkpoint(path: Path, parameters: dict[str, Tensor], optimizer, history: list[dict]) -> None:
    state = optimizer.state_dict()["state"]
    moments = {f"adam.{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}
    weights = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    grads = {f"grad.{name}": value.grad for name, value in parameters.items() if value.grad is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    tensors = {name: value.cpu().contiguous() for name, value in {**moments, **weights, **grads}.items()}
    save_file(tensors, temporary, metadata={"history": json.dumps(history)})
    os.replace(temporary, path)


def _resume(path: Path, parameters: dict[str, Tensor], optimizer) -> tuple[list[dict], float | None]:
    with safe_open(path, "pt") as file:
        history = json.loads(file.metadata()["history"])
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
    return history, history[-1]["statistic"] if history else None


def drawn_images(
    world: World, prompts: list[str], seeds: list[int], *, guidance: float = 5.0, steps: int = 25
) -> Tensor:
    """What the base model draws, kept on disk under a name that depends on the weights and everything asked.

    Returns (n, 3, H, W) in [0, 1]. Stored as 8-bit, so the first call returns what later calls will read.
    """
    asked = {"base": world.fingerprint(), "prompts": prompts, "seeds": seeds, "guidance": guidance, "steps": steps}
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    path = CACHE / f"{name}.safetensors"
    if not path.exists():
        images = sample(world, prompts, seeds, steps=steps, guidance=guidance, progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"images": (images * 255).round().byte()}, temporary)
        os.replace(temporary, path)
    return load_file(path)["images"].float() / 255


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
