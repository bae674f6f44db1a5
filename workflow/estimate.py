"""What the papers' own setting would cost: A100 hours for each table of the scale ``paper``.

    python -m workflow.estimate        # writes data/results/paper_estimate.csv

Counted: images and trainings from the plan; passes through the UNet of one step of each method, by
a hook in the emoji world with a narrow UNet; operations of one pass at Stable Diffusion 1.4's
shapes, by torch's counter on tensors without memory. Assumed: a pass with a gradient costs three
without; ``RATE``; every training runs to its last step, which early stopping spares G-CiRs and
SepME. So hours are ESTIMATED, and an upper bound where a method stops early. Left out: text
encoder, LPIPS, judge, closed forms, and training images that only one run of ``methods`` samples.
"""

import json
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from helpers import images, load_world, unlearn
from helpers.concepts import concepts
from helpers.evaluation.attacks import InversionAttack, Relearning
from helpers.evaluation.report import canvas_pairs, probes
from helpers.methods import METHODS, module_of, options_of
from helpers.tables import RESULTS, write_csv
from helpers.worlds import World
from workflow.plan import Plan, Run

RATE = 25e12  # operations a second, our assumption for diffusers in fp32: a sixth of an A100's peak
UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512,
    "layers_per_block": 2, "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def operations() -> dict[str, float]:
    """Multiplications and additions at 512 pixels: one row through the UNet, and the decoder."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        latent, states, t = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768), torch.zeros(1)
    found = {}
    for name, part in {
        "unet": lambda: unet(latent, t, states),
        "decoder": lambda: vae.decode(latent),
    }.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part()
        found[name] = float(counter.get_total_flops())
    return found


def small_world() -> World:
    """The emoji world with a narrow UNet of random weights: the count does not depend on width."""
    world = load_world("emoji")
    narrow = {**world.unet.config, "norm_num_groups": 4, "attention_head_dim": 4}
    narrow["block_out_channels"] = [8] * len(world.unet.config.block_out_channels)
    world.pipe.unet = UNet2DConditionModel.from_config(narrow).requires_grad_(False).eval()
    return world


def quick_options(method: str, options: dict, steps: int) -> dict:
    """A run's options for counting: so many steps, two images, no early stop."""
    left_out = ("known", "anchor", "tau", "min_steps")
    quick = {k: v for k, v in options.items() if k not in left_out} | {"steps": steps}
    if "images" in quick:
        quick["images"] = 2
    if "tau" in {f.name for f in fields(module_of(method).Options)}:
        quick["tau"] = -1e9
    return {k: tuple(v) if isinstance(v, list) else v for k, v in quick.items()}


def rows_of(world: World, run: Run, steps: int) -> tuple[int, int]:
    """Rows through the UNet in a training of so many steps: without a gradient, with one."""
    counts = [0, 0]

    def count(module, given, keywords) -> None:
        sample = given[0] if given else keywords["sample"]
        counts[torch.is_grad_enabled()] += len(sample)

    stand_ins = [*world.styles[1:], *world.styles][: len(run.concepts)]
    options = quick_options(run.method, json.loads(run.options), steps)
    hook = world.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        unlearn(world, stand_ins, run.method, progress=False, **options)
    finally:
        hook.remove()
    return counts[0], counts[1]


def passes_a_step(world: World, run: Run) -> float:
    """Passes of one training step: the difference of two lengths of training.

    Passes with a gradient count three times.
    """
    # rollouts end at a random step: their mean needs more of them
    short, long = 4, 20 if METHODS[run.method]["rollouts"] else 8
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(images, "CACHE", Path(folder)):
            rows_of(world, run, 1)  # samples the images, which no later training does
            found = [rows_of(world, run, steps) for steps in (short, long)]
    return sum(weight * (b - a) for weight, a, b in zip((1, 3), *found, strict=True)) / (
        long - short
    )


@dataclass
class Estimate:
    """The hours of a plan's parts."""

    plan: Plan
    world: World  # where passes are counted
    one: dict[str, float]  # ``operations``
    counted: dict[tuple, float] = field(default_factory=dict)  # passes a step, by kind of run

    def guided(self, steps: int) -> float:
        """Operations of one guided image."""
        return 2 * steps * self.one["unet"] + self.one["decoder"]

    def training(self, run: Run) -> float:
        """Operations of one training; 0 for a method that trains nothing."""
        if METHODS[run.method]["kind"] == "closed form":
            return 0.0
        options = json.loads(run.options)
        steps = options_of(
            run.method, {"steps": options["steps"]} if "steps" in options else {}
        ).steps
        alike = {k: v for k, v in options.items() if k not in ("tau", "known", "steps")}
        key = (run.method, len(run.concepts), json.dumps(alike))
        if key not in self.counted:
            self.counted[key] = passes_a_step(self.world, run)
        return self.counted[key] * self.one["unet"] * steps

    def line(self, what: str, runs: list[Run], count: int, **more: float) -> dict:
        """One line of the table: ``count`` images, at ``steps`` steps; ``extra`` operations."""
        steps = more.get("steps", self.plan.options["evaluation"]["steps"])
        training = (sum(map(self.training, runs)) + more.get("extra", 0.0)) / RATE / 3600
        sampling = count * self.guided(steps) / RATE / 3600
        return {
            "what": what, "trainings": len(runs), "pictures": count, "training_hours": training,
            "drawing_hours": sampling, "hours": training + sampling,
        }  # fmt: skip

    def of_tables(self, what: str, tables: list[str]) -> dict:
        """The line of some tables; the base's images have a line of their own."""
        needed = {m: counts for m, counts in self.plan.samples_needed(tables).items() if m}
        names = sorted({edit.split("/")[0] for model in needed for edit in model})
        count = sum(sum(counts.values()) for counts in needed.values())
        return self.line(what, [self.plan.runs[name] for name in names], count)

    def of_methods(self) -> dict:
        """The line of ``methods.csv``: reports, and attacks on some of their edits."""
        world = World(self.plan.scale, SimpleNamespace(), **concepts()["stable_diffusion"])
        wanted, runs = self.plan.options["report"], list(self.plan.reports.values())
        relearning, n, count = Relearning(), wanted["n"], 0
        # an attack's sets of n images: one for each embedding found, and relearning's looks
        sets = 2 + relearning.steps // relearning.look_every + 1
        attacked = [run for run in runs if run.seed in wanted["attack_seeds"]]
        for run in runs:
            erased = list(run.concepts)
            count += n * len({*erased, *probes(world, erased)}) + len(canvas_pairs(world, erased))
        count += sets * n * len(attacked)
        rows = sum(a.steps * a.batch_size for a in (InversionAttack(), relearning))
        extra = 3 * self.one["unet"] * rows * len(attacked)  # every step has a gradient
        return self.line("methods", runs, count, extra=extra)


def estimate(scale: str = "paper") -> list[dict]:
    """Lines of the table: what, trainings, images ("pictures"), hours of training and sampling."""
    plan = Plan(scale)
    hours = Estimate(plan, small_world(), operations())
    lines = [hours.of_tables(table, [table]) for table in plan.rows]
    whole = "sepme-1 to sepme-8, what they share counted once"
    shared = {run.shared_images: run for run in plan.runs.values() if run.shared_images}
    count = sum(len(r.concepts) * json.loads(r.options)["images"] for r in shared.values())
    classes = (len(plan.styles) + 1) * plan.options["judge"]["images"]
    together = [
        hours.of_tables(whole, list(plan.rows)),
        hours.line("the base's pictures", [], sum(plan.base_counts().values())),
        hours.line("training pictures", [], count, steps=plan.options["sampling"]["steps"]),
        hours.line("the judge's training pictures", [], classes),
        hours.of_methods(),
    ]
    columns = [column for column in together[0] if column != "what"]
    total = {"what": "all", **{c: sum(line[c] for line in together) for c in columns}}
    return [*lines, *together, total]


if __name__ == "__main__":
    print({name: f"{value / 1e12:.2f}e12 operations" for name, value in operations().items()})
    write_csv(RESULTS / "paper_estimate.csv", estimate())
