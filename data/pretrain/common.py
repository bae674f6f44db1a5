"""What the pretraining scripts share: options, drawings, captions, one training loop, paths.

Checkpoints are those of ``helpers.checkpoint``; the ones that earlier versions wrote can be read.
"""

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import trange

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from helpers import concepts, renders  # noqa: E402
from helpers.checkpoint import (  # noqa: E402
    load_checkpoint,
    moments,
    restore_moments,
    save_checkpoint,
)

MODEL = ROOT / "data" / "emoji-diffusion"  # what the kit ships
WORK = Path(os.environ.get("LETHE_WORK", ROOT / "build" / "pretrain"))  # never committed
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT = 987_654  # seed of the placements that no network is trained on
LOG_EVERY = 20  # steps between two rows of losses


def arguments(description: str, **defaults: float | str) -> argparse.Namespace:
    """The command line's options, each with its default and of its default's type."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def join_processes(backend: str, **options) -> None:
    """Join the other processes, if torchrun started several."""
    if "RANK" in os.environ:
        dist.init_process_group(backend, **options)


def processes() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def place_drawings(
    n: int, generator: torch.Generator, *, vary: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images of n random drawings at random places.

    Returns (n, 3, 64, 64) in [0, 1], and the indices of what each shows: "style" and "thing".
    """
    sizes = renders.tiles().shape[:2]
    style, thing = (torch.randint(size, (n,), generator=generator) for size in sizes)
    images = renders.compose(renders.tiles()[style, thing], generator, vary=vary)
    return images, {"style": style, "thing": thing}


def sample_captions(
    n: int, generator: torch.Generator, *, drop: float
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """n training captions, and which images fit them.

    drop: the share of empty captions, which classifier-free guidance needs.
    Returns for each caption the indices of the style and the object to show, (n,) both; the
    captions; and a mask (n, styles, objects) that is 1 where an image of that style and object
    would fit the caption (the positives of contrastive training).
    """
    weights = concepts.concepts()["captions"]["weights"]
    kinds, table, styles = list(weights), concepts.object_table(), concepts.style_names()
    kind = torch.multinomial(
        torch.tensor(list(weights.values())), n, replacement=True, generator=generator
    ).tolist()
    style = torch.randint(len(styles), (n,), generator=generator)
    thing = torch.randint(len(table), (n,), generator=generator)
    uniform = torch.rand(n, 3, generator=generator).tolist()
    captions, fits = [], torch.zeros(n, len(styles), len(table))
    for i, (s, o, (u, bare, dropped)) in enumerate(
        zip(style.tolist(), thing.tolist(), uniform, strict=True)
    ):
        what, caption = kinds[kind[i]], ""
        if dropped < drop:
            what = "empty"
        else:
            caption = caption_of(what, styles[s], table[o], u, bare)
        fits[i, [s] if what in ("both", "style") else slice(None)] = 1.0
        if what not in ("style", "empty"):
            fits[i] *= same_object(what, o)
        captions.append(caption)
    return style, thing, captions, fits


def caption_of(kind: str, style: str, row: dict, u: float, bare: float) -> str:
    """One caption of a kind that ``concepts.toml`` weighs, for a style and an object's row.

    u in [0, 1) chooses among synonyms and templates; bare, as likely, between the bare name and
    the templates.
    """
    book, name = concepts.concepts()["captions"], row["name"]
    if kind == "category":
        name = row["category"]
    elif kind == "synonym" and row["synonyms"]:
        name = row["synonyms"][int(u * len(row["synonyms"]))]
    templates = book[kind if kind in ("both", "style") else "object"]
    if kind in ("style", "object") and bare < book["bare_share"]:
        templates = templates[:1]
    return templates[int(u * len(templates))].format(o=name, s=style)


def same_object(kind: str, thing: int) -> Tensor:
    """1 for each object that a caption of this kind about ``thing`` names, else 0: (objects,)."""
    table = concepts.object_table()
    if kind == "category":
        return torch.tensor([float(r["category"] == table[thing]["category"]) for r in table])
    return torch.eye(len(table))[thing]


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
            seconds = f"{time.time() - self.start:.0f}"
            writer.writerow([step, seconds, *(f"{v:.5f}" for v in values.values())])


def cosine(peak: float, steps: int, warmup: int, floor: float = 0.05) -> Callable[[int], float]:
    """The learning rate by step: linear warm-up, then half a cosine down to ``floor`` of the peak.

    peak * (floor + (1 - floor) * (1 + cos(pi * share)) / 2), share: how much is done since warm-up
    """

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * share)).item())
        return peak * (floor + (1 - floor) * fall)

    return rate


@dataclass(frozen=True)
class Recipe:
    """How long and how fast ``fit`` trains, and what it does beside the steps."""

    steps: int
    rate: Callable[[int], float]  # step -> learning rate
    save_every: int  # steps between checkpoints
    clip: float | None = None  # largest norm of the gradient
    minutes: float = math.inf  # stop after so many, as if the last step were done
    gradients: Callable[[], None] = lambda: None  # right after the backward pass
    after_step: Callable[[int], None] = lambda step: None
    export: Callable[[], None] = lambda: None  # at the end, and every so many steps
    export_every: int | None = None


def fit(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
    batch_loss: Callable[[int], tuple[Tensor, dict[str, Tensor]]], recipe: Recipe,
) -> None:  # fmt: skip
    """Train modules in place, going on from the checkpoint ``path``.

    batch_loss: step -> the loss of its batch, and by name what else to log. Losses go to a CSV
    beside the checkpoint. Of several processes the first writes; ``batch_loss`` and
    ``recipe.gradients`` share the work.
    """
    start = resume(path, modules, optimizer)
    first, begin = processes()[0] == 0, time.time()
    log = Log(path.with_suffix(".csv"))
    bar = trange(
        start, recipe.steps, initial=start, total=recipe.steps, desc=path.stem, mininterval=10,
        disable=not first,
    )  # fmt: skip
    for step in bar:
        loss, others = batch_loss(step)
        update(optimizer, loss, step, recipe)
        recipe.after_step(step)
        if first and step % LOG_EVERY == 0:
            values = {name: value.item() for name, value in {"loss": loss, **others}.items()}
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            log.write(step, **values)
        done = step + 1
        last = done == recipe.steps or out_of_time(begin, recipe.minutes)
        if first and (last or done % recipe.save_every == 0):
            groups = {name: module.state_dict() for name, module in modules.items()}
            save_checkpoint(path, {**groups, "optimizer": moments(optimizer)}, step=done)
        if first and (last or (recipe.export_every and done % recipe.export_every == 0)):
            recipe.export()
        if last:
            break


def resume(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Take modules and Adam's moments from a checkpoint, if there is one: the steps done so far."""
    saved, metadata = load_checkpoint(path)
    if saved:
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        restore_moments(optimizer, saved.get("optimizer", {}))
    return metadata.get("step", 0)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, recipe: Recipe) -> None:
    """One step of the optimizer: learning rate, gradients, clipping, Adam."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    optimizer.zero_grad()
    loss.backward()
    recipe.gradients()
    if recipe.clip is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
    optimizer.step()


def out_of_time(begin: float, minutes: float) -> bool:
    """Whether so many minutes have passed since ``begin``; the first process's clock counts."""
    if math.isinf(minutes):
        return False
    over = torch.tensor(float(time.time() - begin > 60 * minutes), device=DEVICE)
    if processes()[1] > 1:
        dist.broadcast(over, 0)
    return bool(over)
