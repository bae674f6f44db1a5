"""How good the base model is: the judge's verdicts on its images, by two commands.

    python data/pretrain/evaluate.py [--seeds 50] [--sampler dpm++] [--steps 12] [--guidance 5]
    python data/pretrain/evaluate.py --samplers [--seeds 50] [--sampler-seeds 10]

Both write ``evaluation.json`` and the model card, each its own part. Sampler, steps and guidance
are the world's own unless given.
The first measures bare names as prompts, ``--seeds`` images each (seeds 0, 1, ...); every style
with every object and person; held-out drawings; and guidance 1, 3, 5, 7.5 on a subset.
The second compares samplers (``COMPARED``) on bare names: styles from ``--seeds`` seeds, objects
and people from ``--sampler-seeds`` (as many unless given); and it times them beside each other.

Each part is written before the next begins: a killed run goes on. Two processes of one thread
sample 1.4 times as fast on two cores:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 data/pretrain/evaluate.py --samplers
"""

import argparse
import json
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from common import HELD_OUT, MODEL, join_processes, place_drawings, processes
from torch import Tensor

from helpers import World, concepts, load_world, sample
from helpers.denoise import SAMPLERS, Sampling
from helpers.files import complete

SCALES = (1.0, 3.0, 5.0, 7.5)  # of guidance
COMPARED = (  # label, name of the sampler, steps; the first is what the others are timed beside
    ("DDIM", "ddim", 25),
    ("DDIM", "ddim", 12),
    ("DPM-Solver++ 2M", "dpm++", 12),
    ("DPM-Solver++ 2M Karras", "dpm++ karras", 12),
    ("UniPC", "unipc", 12),
    ("Euler", "euler", 12),
    ("PNDM", "pndm", 12),
)
LABELS = {name: label for label, name, _ in COMPARED}
PAIR_SEEDS = 10_000  # the first seed of "object in the style of style": none of the bare names'
ROUNDS, TIMED = 5, 16  # timed rounds of each sampler, and the images of one


def label_of(sampler: str, steps: int) -> str:
    """How a table names a way to sample: "DPM-Solver++ 2M, 12 steps"."""
    return f"{LABELS.get(sampler, sampler)}, {steps} steps"


def verdicts(
    world: World, prompts: list[str], seeds: list[int], sampling: Sampling
) -> list[tuple[str, str]]:
    """The judge's (style, thing) for each sampled image; several processes share the sampling."""
    rank, ranks = processes()
    mine = slice(rank, None, ranks)
    how = {"steps": sampling.steps, "guidance": sampling.guidance, "sampler": sampling.sampler}
    images = sample(world, prompts[mine], seeds[mine], progress=rank == 0, **how)
    said = list(zip(world.judge.styles(images), world.judge.things(images), strict=True))
    parts: list = [said]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, said)
    whole: list = [None] * len(prompts)
    for r, part in enumerate(parts):
        whole[r::ranks] = part
    return whole


def bare_names(world: World, names: list[str], seeds: int, sampling: Sampling) -> dict[str, float]:
    """For each concept, the share of images of its bare name that the judge gives to it."""
    prompts = [name for name in names for _ in range(seeds)]
    said = verdicts(world, prompts, list(range(seeds)) * len(names), sampling)
    # a verdict is a style and a thing; no style has an object's name
    right = [prompt in verdict for prompt, verdict in zip(prompts, said, strict=True)]
    return {name: sum(right[i * seeds : (i + 1) * seeds]) / seeds for i, name in enumerate(names)}


def pairs(world: World, things: list[str], seeds: int, sampling: Sampling) -> dict:
    """Both verdicts over "object in the style of style" prompts, and each style's own share."""
    chosen = [(s, thing) for s in world.styles for thing in things for _ in range(seeds)]
    prompts = [concepts.pair_prompt(thing, style) for style, thing in chosen]
    said = verdicts(world, prompts, [PAIR_SEEDS + i for i in range(len(chosen))], sampling)
    right = [(a == style, b == thing) for (a, b), (style, thing) in zip(said, chosen, strict=True)]
    each = {}
    for name in world.styles:
        own = [style for (style, _), (asked, _) in zip(right, chosen, strict=True) if asked == name]
        each[name] = sum(own) / len(own)
    n = len(chosen)
    return {
        "style": sum(style for style, _ in right) / n,
        "thing": sum(thing for _, thing in right) / n,
        "images": n,
        "each_style": each,
    }


def held_out_drawings(world: World, n: int) -> dict[str, float]:
    """The judge on real drawings placed as in no training batch (other seed, wider variation)."""
    generator = torch.Generator().manual_seed(HELD_OUT)
    images, shown = place_drawings(n, generator, vary=1.1)

    def share(said: list[str], names: list[str], truth: Tensor) -> float:
        return sum(a == names[b] for a, b in zip(said, truth.tolist(), strict=True)) / n

    return {
        "style": share(world.judge.styles(images), concepts.style_names(), shown["style"]),
        "thing": share(world.judge.things(images), concepts.object_names(), shown["thing"]),
        "images": n,
    }


def kind_means(world: World, accuracy: dict[str, float]) -> dict[str, float]:
    """The mean over styles, over objects and over people of what is known of each concept."""
    kinds = {"styles": world.styles, "objects": world.objects, "people": world.people}
    return {kind: statistics.fmean(accuracy[n] for n in names) for kind, names in kinds.items()}


def time_samplers(world: World, guidance: float) -> dict[str, float]:
    """Seconds that each of ``COMPARED`` takes for 16 images: the median of five rounds.

    Each round runs every sampler once, so that whatever else the machine does slows all of them
    alike. A round before the first is not counted.
    """
    prompts = (world.concepts * TIMED)[:TIMED]
    seconds: dict[str, list[float]] = {label_of(name, steps): [] for _, name, steps in COMPARED}
    for _ in range(ROUNDS + 1):
        for _, name, steps in COMPARED:
            how = {"sampler": name, "steps": steps, "guidance": guidance, "batch_size": TIMED}
            begin = time.perf_counter()
            sample(world, prompts, list(range(TIMED)), progress=False, **how)
            seconds[label_of(name, steps)].append(time.perf_counter() - begin)
    return {label: statistics.median(times[1:]) for label, times in seconds.items()}


@dataclass
class Results:
    """``evaluation.json`` and the model card beside it: two parts, either kept when one is written.

    part: "figures" (all of the file but "samplers") or "samplers".
    """

    part: str
    header: dict  # what is measured, and with what: figures of another header are not mixed
    folder: Path = MODEL
    values: dict = field(init=False)

    def __post_init__(self):
        before = self._read()
        if self.part == "samplers":
            before = before.get("samplers", {})
        same = {name: before.get(name) for name in self.header} == self.header
        self.values = {k: v for k, v in before.items() if k != "samplers"} if same else {}
        self.values = {**self.header, **self.values}

    def _read(self) -> dict:
        path = self.folder / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def measure(self, name: str, function: Callable, *arguments) -> dict:
        """What ``function`` measures, unless an earlier run has done it; it is written at once."""
        if name not in self.values:
            self.values[name] = function(*arguments)
            self.write()
            if processes()[0] == 0:
                print(name, self.values[name], flush=True)
        return self.values[name]

    def write(self) -> None:
        """Write this part of the file; the other stays."""
        if processes()[0] > 0:
            return
        before = self._read()
        if self.part == "samplers":
            whole = {**before, "samplers": self.values}
        else:
            kept = {k: v for k, v in before.items() if k == "samplers"}
            whole = {**self.values, **kept}
        with complete(self.folder / "evaluation.json") as path:
            path.write_text(json.dumps(whole, indent=1) + "\n")

    def write_card(self, text_of: Callable[[dict], str]) -> None:
        """Put the text of this part's values between its two marks of the model card."""
        if processes()[0] == 0:
            path = self.folder / "README.md"
            path.write_text(between_marks(path.read_text(), self.part, text_of(self.values)))


def between_marks(card: str, mark: str, text: str) -> str:
    """The card with ``text`` between ``<!-- mark -->`` and ``<!-- end of mark -->``.

    ValueError for a card that does not hold each of the two once.
    """
    marks = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    if [card.count(m) for m in marks] != [1, 1]:
        raise ValueError(f"the model card wants one {marks[0]} and one {marks[1]} after it")
    before, rest = card.split(marks[0])
    return f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}"


def measured_with(values: dict, options: str) -> str:
    """How to repeat a part: the command with its options, the weights and the machine."""
    line = f"python data/pretrain/evaluate.py {options}"
    if "bfloat16" in values["dtype"]:
        line += " --bf16"
    return (
        f"Measured with `{line}` on weights `{values['base']}` "
        f"({values['dtype']}, {values['device']}, torch {values['torch']})"
    )


def figures(result: dict) -> str:
    """The figures of the model card, as Markdown."""
    names = ("bare_names", "means", "pairs", "held_out_drawings")
    accuracy, means, pair, real = (result[name] for name in names)
    bare = " | ".join(f"{means[kind]:.3f}" for kind in ("styles", "objects", "people"))
    each = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
    scales = {scale: result[f"guidance {scale:g}"] for scale in SCALES}

    def both(row: dict) -> str:
        return f"{row['images']} | {row['style']:.3f} | {row['thing']:.3f} (with people) | |"

    seeds, sampler, steps = (result[name] for name in ("seeds", "sampler", "steps"))
    guidance = f"{result['guidance']:g}"
    options = f"--seeds {seeds} --sampler {shlex.quote(sampler)} --steps {steps} "
    options += f"--guidance {guidance}"
    lines = [
        f"{measured_with(result, options)}: {label_of(sampler, steps)}, guidance {guidance}.",
        "",
        "| prompts | images | styles | objects | people |",
        "|---|---|---|---|---|",
        f"| bare names, {seeds} seeds each | {seeds * len(accuracy)} | {bare} |",
        f"| every object and person in every style | {both(pair)}",
        f"| real drawings, held-out placements | {both(real)}",
        "",
        f"The lowest single concept is “{means['worst']}” with {means['worst_accuracy']:.2f}. "
        f"Every bare name: {each}.",
        "",
        "| guidance | style | object | images |",
        "|---|---|---|---|",
        *(
            f"| {scale:g} | {row['style']:.3f} | {row['thing']:.3f} | {row['images']} |"
            for scale, row in scales.items()
        ),
    ]
    return "\n".join(lines)


def sampler_table(result: dict) -> str:
    """The comparison of samplers, as Markdown."""
    labels = [label_of(name, steps) for _, name, steps in COMPARED]
    seconds, first = result["seconds"], result["seconds"][labels[0]]
    many, fewer, guidance = result["seeds"], result["sampler_seeds"], f"{result['guidance']:g}"
    options = f"--samplers --seeds {many} --sampler-seeds {fewer} --guidance {guidance}"
    lines = [
        f"{measured_with(result, options)}: samplers compared on bare names at guidance "
        f"{guidance}, from {many} seeds for each style and {fewer} for each object and person; "
        "the number of images stands in brackets. Seconds are those of "
        f"{TIMED} images, the median of {ROUNDS} rounds of all samplers in turn, in one process "
        f"of {result['threads']} thread{'s' if result['threads'] > 1 else ''}.",
        "",
        f"| sampler | styles | objects | people | seconds | beside {labels[0]} |",
        "|---|---|---|---|---|---|",
    ]
    for label in labels:
        row = result[label]
        shares = " | ".join(
            f"{row[kind]:.3f} ({row['images'][kind]})" for kind in ("styles", "objects", "people")
        )
        ratio = seconds[label] / first
        lines.append(f"| {label} | {shares} | {seconds[label]:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def made_with(world: World) -> dict:
    """What figures depend on besides the question."""
    return {
        "dtype": str(world.unet.dtype), "torch": torch.__version__, "device": str(world.device),
        "machine": platform.machine(), "base": world.fingerprint(),
        "judge": world.judge.fingerprint(),
    }  # fmt: skip


def evaluate(world: World, seeds: int, pair_seeds: int, sampling: Sampling) -> None:
    """The first command: how good the model is, sampled one way."""
    how = {"sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.guidance}
    header = {"seeds": seeds, "pair_seeds": pair_seeds, **how, **made_with(world)}
    results = Results("figures", header)
    things = [*world.objects, *world.people]
    results.measure("held_out_drawings", held_out_drawings, world, 2000)
    results.measure("pairs", pairs, world, things, pair_seeds, sampling)
    names = world.concepts
    accuracy = results.measure("bare_names", bare_names, world, names, seeds, sampling)
    nine = world.roles["nine_objects"]
    for scale in SCALES:
        other = replace(sampling, guidance=scale)
        results.measure(f"guidance {scale:g}", pairs, world, nine, 1, other)
    worst = min(accuracy, key=accuracy.get)
    means = {**kind_means(world, accuracy), "worst": worst, "worst_accuracy": accuracy[worst]}
    results.values["means"] = means
    results.write()
    results.write_card(figures)


def compare_samplers(world: World, seeds: int, sampler_seeds: int, guidance: float) -> None:
    """The second command: the samplers beside each other."""
    header = {
        "seeds": seeds, "sampler_seeds": sampler_seeds, "guidance": guidance,
        "threads": torch.get_num_threads(), **made_with(world),
    }  # fmt: skip
    results = Results("samplers", header)
    things = [*world.objects, *world.people]

    def shares(sampling: Sampling) -> dict:
        accuracy = bare_names(world, world.styles, seeds, sampling)
        accuracy |= bare_names(world, things, sampler_seeds, sampling)
        images = {
            "styles": len(world.styles) * seeds,
            "objects": len(world.objects) * sampler_seeds,
            "people": len(world.people) * sampler_seeds,
        }
        return {**kind_means(world, accuracy), "images": images}

    if processes()[0] == 0:  # alone, while the others wait
        results.measure("seconds", time_samplers, world, guidance)
    if dist.is_initialized():
        dist.barrier()
    for _, name, steps in COMPARED:
        results.measure(label_of(name, steps), shares, Sampling(steps, guidance, name))
    results.write_card(sampler_table)


def options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50, help="images of each bare name")
    parser.add_argument("--pair-seeds", type=int, default=1, help="images of each pair")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="default: the world's own")
    parser.add_argument("--steps", type=int, help="default: the world's own")
    parser.add_argument("--guidance", type=float, help="default: the world's own")
    parser.add_argument("--samplers", action="store_true", help="compare samplers instead")
    parser.add_argument(
        "--sampler-seeds", type=int,
        help="images of each object and person when samplers are compared; default: --seeds",
    )  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="sample in bfloat16: for a quick look")
    return parser.parse_args()


def main() -> None:
    args = options()
    join_processes("gloo", timeout=timedelta(hours=2))
    world = load_world("emoji", dtype=torch.bfloat16 if args.bf16 else None)
    given = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}
    sampling = replace(world.sampling, **{k: v for k, v in given.items() if v is not None})
    if args.samplers:
        compare_samplers(world, args.seeds, args.sampler_seeds or args.seeds, sampling.guidance)
    else:
        evaluate(world, args.seeds, args.pair_seeds, sampling)


if __name__ == "__main__":
    main()
