"""What the papers' own setting would cost, before anybody pays for it: A100 hours for each table of the scale ``paper``.

    python data/scales/estimate.py        # writes data/results/paper_estimate.csv

Counted: pictures and trainings from the plan; passes through the UNet of one step of each method, by a hook in the emoji
world with a narrow UNet; operations of one pass at Stable Diffusion 1.4's shapes, by torch's counter on tensors without memory. Assumed: a
pass with a gradient costs three without; ``RATE``; every training runs to its last step, which early stopping spares G-CiRs
and SepME. So hours are ESTIMATED, and an upper bound where a method stops early. Left out: text encoder, LPIPS, judge, and training pictures that
only one run of ``methods`` draws.
"""

import inspect
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import plan
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from helpers import attacks, load_world, renders, training, unlearn
from helpers.report import canvas_pairs, panel
from helpers.tables import RESULTS, write_csv
from helpers.worlds import World

RATE = 25e12  # operations a second: a sixth of an A100's TF32 peak (156e12), our assumption for diffusers in fp32
UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512, "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TRAINED = (attacks.concept_inversion, attacks.relearn)  # attacks whose every step has a gradient


def operations() -> dict[str, float]:
    """One pass of one row through the UNet, and one picture through the decoder, at 512 pixels: multiplications and additions."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        latent, states, t = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768), torch.zeros(1)
    found = {}
    for name, part in (("unet", lambda: unet(latent, t, states)), ("decoder", lambda: vae.decode(latent))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part()
        found[name] = float(counter.get_total_flops())
    return found


def small_world() -> World:
    """The emoji world with a narrow UNet of random weights: what is counted does not depend on the width."""
    world = load_world("emoji")
    narrow = dict(world.unet.config) | {"block_out_channels": [8] * len(world.unet.config.block_out_channels)}
    narrow |= {"norm_num_groups": 4, "attention_head_dim": 4}
    world.pipe.unet = UNet2DConditionModel.from_config(narrow).requires_grad_(False).eval()
    return world


def rows_of(world: World, method: str, concepts: list[str], options: dict, steps: int) -> tuple[int, int]:
    """Rows that went through the UNet in a training of so many steps: (without gradient, with gradient)."""
    counts = [0, 0]

    def count(module, given, keywords) -> None:
        sample = given[0] if given else keywords["sample"]
        counts[torch.is_grad_enabled()] += len(sample)

    hook = world.unet.register_forward_pre_hook(count, with_kwargs=True)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k not in ("known", "anchor")}
    options |= {"steps": steps} | ({"images": 2} if "images" in options else {})
    for never in ("tau", "min_steps"):  # no early stop: the difference of two lengths must be steps
        options.pop(never, None)
    if method in ("gcirs", "sepme"):
        options |= {"tau": -1e9}
    try:
        unlearn(world, concepts, method, progress=False, **options)
    finally:
        hook.remove()
    return counts[0], counts[1]


def passes_a_step(world: World, run: plan.Run) -> float:
    """Passes of one training step, those with a gradient counted three times: the difference of two lengths of training."""
    stand_ins = [*world.styles[1:], *world.styles][: len(run.concepts)]
    short, long = 4, 20 if run.method in ("esd", "sdd") else 8  # rollouts end at a drawn step: their mean needs more
    options = json.loads(run.options)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "CACHE", Path(folder)):
        rows_of(world, run.method, stand_ins, options, 1)  # draws its pictures, which no later one does
        found = [rows_of(world, run.method, stand_ins, options, steps) for steps in (short, long)]
    return sum(weight * (b - a) for weight, a, b in zip((1, 3), *found, strict=True)) / (long - short)


def default(function, name: str) -> int:
    """What a function's option is, unless told otherwise."""
    return inspect.signature(function).parameters[name].default


def estimate(scale: str = "paper") -> list[dict]:
    """Lines of the table: what, pictures, trainings, operations, hours."""
    work, emoji, one = plan.Plan(scale), small_world(), operations()

    def guided(steps: int) -> float:
        """One guided picture."""
        return 2 * steps * one["unet"] + one["decoder"]

    drawn = guided(work.options["pictures"]["steps"])
    kinds: dict[tuple, float] = {}

    def operations_of(run: plan.Run) -> float:
        options = {name: value for name, value in json.loads(run.options).items() if name not in ("tau", "known")}
        steps = options.pop("steps")
        key = (run.method, len(run.concepts), json.dumps(options))
        if key not in kinds:
            kinds[key] = passes_a_step(emoji, run) * one["unet"]
        return kinds[key] * steps

    def line(name: str, runs: list[plan.Run], pictures: int, more: float = 0.0, each: float = drawn) -> dict:
        trained = sum(map(operations_of, runs)) + more
        hours = {"training": trained / RATE / 3600, "drawing": pictures * each / RATE / 3600}
        return {
            "what": name, "trainings": len(runs), "pictures": pictures, "training_hours": hours["training"],
            "drawing_hours": hours["drawing"], "hours": sum(hours.values()),
        }  # fmt: skip

    def of_tables(name: str, tables: list[str]) -> dict:
        asked = {
            model: counts for model, counts in work.asked(tables).items() if model
        }  # the base has a line of its own
        names = {edit.split("/")[0] for model in asked for edit in model}
        return line(name, [work.runs[name] for name in sorted(names)], sum(sum(n.values()) for n in asked.values()))

    lines = [of_tables(table, [table]) for table in work.rows]
    lines.append(of_tables("sepme-1 to sepme-8, what they share counted once", list(work.rows)))
    shared = {name: run for run in work.runs.values() if (name := work.shared_pictures(run))}
    lines.append(line("the base's pictures", [], sum(work.base_counts().values())))
    prepared = sum(len(run.concepts) * json.loads(run.options)["images"] for run in shared.values())
    lines.append(line("training pictures", [], prepared, each=guided(default(training.drawn_images, "steps"))))
    lines.append(line("the judge's training pictures", [], (len(work.styles) + 1) * work.options["judge_images"]))
    world = World(scale, SimpleNamespace(), **renders.concepts()["stable_diffusion"])
    n, pictures = work.options["report"]["n"], 0
    looks = default(attacks.relearn, "steps") // default(attacks.relearn, "every") + 1
    drawn_by_attacks = 2 + looks  # sets of n pictures: one for each embedding found, and relearning's looks
    for run in work.reports.values():
        erased = list(run.concepts)
        pictures += n * len({*erased, *panel(world, erased)}) + len(canvas_pairs(world, erased))
        pictures += drawn_by_attacks * n * (run.seed in work.options["report"]["attack_seeds"])
    rows = sum(default(attack, "steps") * default(attack, "batch_size") for attack in TRAINED)
    attacked = (
        3 * one["unet"] * rows * sum(r.seed in work.options["report"]["attack_seeds"] for r in work.reports.values())
    )
    lines.append(line("methods", list(work.reports.values()), pictures, attacked))
    lines.append(
        {"what": "all", **{k: sum(row[k] for row in lines[len(work.rows) :]) for k in lines[0] if k != "what"}}
    )
    return lines


if __name__ == "__main__":
    print({name: f"{value / 1e12:.2f}e12 operations" for name, value in operations().items()})
    write_csv(Path(RESULTS) / "paper_estimate.csv", estimate())
