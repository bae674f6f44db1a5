"""What the pretraining scripts share: options, drawings, captions, resumable checkpoints, the training loop, paths."""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import trange

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from helpers import renders  # noqa: E402
from helpers.files import complete  # noqa: E402

MODEL = ROOT / "data" / "emoji-diffusion"  # what the kit ships
WORK = Path(os.environ.get("LETHE_WORK", ROOT / "build" / "pretrain"))  # checkpoints, never committed
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(description: str, **defaults: float) -> argparse.Namespace:
    """The command line's options, each with its default and of its default's type."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def seeded(seed: int, step: int) -> torch.Generator:
    """A generator for one step: a resumed run draws what the uninterrupted run would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def place_drawings(n: int, generator: torch.Generator, *, vary: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """n real drawings at random places, (n, 3, 64, 64) in [0, 1], and the indices of what each shows, by kind."""
    style, thing = (torch.randint(size, (n,), generator=generator) for size in renders.tiles().shape[:2])
    return renders.compose(renders.tiles()[style, thing], generator, vary=vary), {"style": style, "thing": thing}


def draw_captions(n: int, generator: torch.Generator, *, drop: float) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """n training captions and what each fits.

    Returns style indices (n,), object indices (n,) of the picture to draw, the captions, and a mask
    (n, styles, objects) that is 1 where a picture of that style and object would fit the caption (contrastive
    training's positives).
    """
    book = renders.concepts()["captions"]
    table, styles = renders.object_table(), renders.style_names()
    kinds, weights = zip(*book["weights"].items(), strict=True)
    kind = torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator).tolist()
    style = torch.randint(len(styles), (n,), generator=generator)
    thing = torch.randint(len(table), (n,), generator=generator)
    pick = torch.rand(n, 3, generator=generator).tolist()
    captions, fits = [], torch.zeros(n, len(styles), len(table))
    for i in range(n):
        s, row, (u, bare, dropped) = int(style[i]), table[int(thing[i])], pick[i]
        what = kinds[kind[i]]
        name, same = row["name"], [j == int(thing[i]) for j in range(len(table))]
        if what == "category":
            name, same = row["category"], [other["category"] == row["category"] for other in table]
        elif what == "synonym" and row["synonyms"]:
            name = row["synonyms"][int(u * len(row["synonyms"]))]
        if what in ("both", "style"):
            templates = book[what][:1] if what == "style" and bare < book["bare_share"] else book[what]
        else:
            templates = book["object"][:1] if bare < book["bare_share"] and what == "object" else book["object"]
        caption = templates[int(u * len(templates))].format(o=name, s=styles[s])
        if dropped < drop:
            what, caption = "empty", ""
        fits[i, [s] if what in ("both", "style") else slice(None)] = 1.0
        if what not in ("style", "empty"):
            fits[i] *= torch.tensor(same).float()
        captions.append(caption)
    return style, thing, captions, fits


def save_checkpoint(path: Path, step: int, groups: dict[str, dict[str, Tensor]]) -> None:
    """Write named groups of tensors to one safetensors file, under a temporary name and then renamed."""
    flat = {f"{g}/{k}": v.detach().cpu().contiguous() for g, tensors in groups.items() for k, v in tensors.items()}
    with complete(path) as temporary:
        save_file(flat, temporary, metadata={"step": str(step)})


def load_checkpoint(path: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """What ``save_checkpoint`` wrote: the step and the groups; (0, {}) when there is none yet."""
    if not path.exists():
        return 0, {}
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        return int(file.metadata()["step"]), groups


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments as a flat dict of tensors, so that they fit in safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Log:
    """One CSV of losses beside the checkpoint; seconds are of this process only."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.start = path, time.time()

    def write(self, step: int, **values: float) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "seconds", *values])
            writer.writerow([step, f"{time.time() - self.start:.0f}", *(f"{v:.5f}" for v in values.values())])


def cosine(step: int, steps: int, peak: float, warmup: int = 200, floor: float = 0.05) -> float:
    """Learning rate: linear warm-up, then half a cosine down to ``floor`` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * share)).item()))


def fit(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    batch_loss: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    steps: int,
    *,
    warmup: int,
    save_every: int,
    clip: float | None = None,
) -> None:
    """Train modules in place for ``steps`` in all, going on from the checkpoint ``path``; losses go to a CSV beside it.

    batch_loss: step -> the loss of its batch, and by name what else to log. The learning rate follows ``cosine``, the
    optimizer's own at its peak. clip: largest norm of the gradient.
    """
    start, saved = load_checkpoint(path)
    if saved:
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        restore_optimizer(optimizer, saved.get("optimizer", {}))
    log = Log(path.with_suffix(".csv"))
    bar = trange(start, steps, initial=start, total=steps, desc=path.stem, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, optimizer.defaults["lr"], warmup)
        loss, others = batch_loss(step)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        if step % 20 == 0:
            values = {name: value.item() for name, value in {"loss": loss, **others}.items()}
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            log.write(step, **values)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            groups = {name: module.state_dict() for name, module in modules.items()}
            save_checkpoint(path, step + 1, {**groups, "optimizer": optimizer_tensors(optimizer)})
