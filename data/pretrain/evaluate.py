"""The base model's bars, by one command: what the judge says of what the model draws.

    python data/pretrain/evaluate.py [--seeds 50]      # prints the tables and writes evaluation.json and the model card
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 data/pretrain/evaluate.py        # two cores draw 1.4 times as fast so

Bare names as prompts, ``--seeds`` pictures each (seeds 0, 1, ...); every style with every object and person; held-out
drawings; and the effect of guidance 1, 3, 5, 7.5 on a subset. Numbers of one part are written before the next begins.
"""

import argparse
import json
import os
import platform
from datetime import timedelta

import torch
import torch.distributed as dist
from common import MODEL, place_drawings, renders
from torch import Tensor

from helpers import load_world, sample
from helpers.worlds import World

SCALES = (1.0, 3.0, 5.0, 7.5)  # of guidance


def verdicts(world: World, prompts: list[str], seeds: list[int], steps: int, guidance: float) -> list[tuple[str, str]]:
    """What the judge says of each drawn picture, (style, thing); several processes share the drawing."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank, None, ranks)
    images = sample(world, prompts[mine], seeds[mine], steps=steps, guidance=guidance, progress=rank == 0)
    said = list(zip(world.judge.styles(images), world.judge.things(images), strict=True))
    parts: list = [said]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, said)
    whole: list = [None] * len(prompts)
    for r, part in enumerate(parts):
        whole[r::ranks] = part
    return whole


def bare_names(world: World, seeds: int, steps: int, guidance: float) -> dict[str, float]:
    """The share of each concept's pictures, drawn from its bare name, that the judge gives to it."""
    prompts = [concept for concept in world.concepts for _ in range(seeds)]
    said = verdicts(world, prompts, list(range(seeds)) * len(world.concepts), steps, guidance)
    right = [prompt in verdict for prompt, verdict in zip(prompts, said, strict=True)]  # no style has an object's name
    return {c: sum(right[i * seeds : (i + 1) * seeds]) / seeds for i, c in enumerate(world.concepts)}


def pairs(world: World, seeds: int, steps: int, guidance: float, things: list[str]) -> dict[str, float]:
    """Both verdicts over "object in the style of style" prompts, with each style's own share."""
    chosen = [(style, thing) for style in world.styles for thing in things for _ in range(seeds)]
    prompts = [f"{thing} in the style of {style}" for style, thing in chosen]
    said = verdicts(world, prompts, [10_000 + i for i in range(len(chosen))], steps, guidance)
    right = [(a == style, b == thing) for (a, b), (style, thing) in zip(said, chosen, strict=True)]
    each = {}
    for name in world.styles:
        mine = [style for (style, _), (asked, _) in zip(right, chosen, strict=True) if asked == name]
        each[name] = sum(mine) / len(mine)
    n = len(chosen)
    return {
        "style": sum(s for s, _ in right) / n,
        "thing": sum(t for _, t in right) / n,
        "images": n,
        "each_style": each,
    }


def held_out_drawings(world: World, n: int) -> dict[str, float]:
    """The judge on real drawings placed as no training batch was (other seeds, wider variation)."""
    generator = torch.Generator().manual_seed(987_654)
    images, shown = place_drawings(n, generator, vary=1.1)

    def share(said: list[str], names: list[str], truth: Tensor) -> float:
        return sum(a == names[b] for a, b in zip(said, truth.tolist(), strict=True)) / n

    return {
        "style": share(world.judge.styles(images), renders.style_names(), shown["style"]),
        "thing": share(world.judge.things(images), renders.object_names(), shown["thing"]),
        "images": n,
    }


def card(result: dict) -> str:
    """The figures of one evaluation as Markdown, for the model card."""
    by_scale = {scale: result[f"guidance {scale:g}"] for scale in SCALES}
    accuracy, means, pair, real = (result[k] for k in ("bare_names", "means", "pairs", "held_out_drawings"))
    lines = [
        f"Measured with `python data/pretrain/evaluate.py --seeds {result['seeds']}` on weights `{result['base']}` "
        f"({result['dtype']}, {result['device']}, torch {result['torch']}), DDIM, {result['steps']} steps, "
        f"guidance {result['guidance']:g}.",
        "",
        "| prompts | pictures | styles | objects | people |",
        "|---|---|---|---|---|",
        f"| bare names, {result['seeds']} seeds each | {result['seeds'] * len(accuracy)} | {means['styles']:.3f} | "
        f"{means['objects']:.3f} | {means['people']:.3f} |",
        f"| every object and person in every style | {pair['images']} | {pair['style']:.3f} | {pair['thing']:.3f} "
        "(with people) | |",
        f"| real drawings, held-out placements | {real['images']} | {real['style']:.3f} | {real['thing']:.3f} "
        "(with people) | |",
        "",
        f"The lowest single concept is “{means['worst']}” with {means['worst_accuracy']:.2f}. "
        f"Every bare name: {', '.join(f'{name} {value:.2f}' for name, value in accuracy.items())}.",
        "",
        "| guidance | style | object | pictures |",
        "|---|---|---|---|",
        *(f"| {g:g} | {r['style']:.3f} | {r['thing']:.3f} | {r['images']} |" for g, r in by_scale.items()),
    ]
    return "\n".join(lines)


def write_card(result: dict) -> None:
    """Put the figures between the two marks of the model card."""
    path = MODEL / "README.md"
    before, rest = path.read_text().split("<!-- figures -->")
    after = rest.split("<!-- end of figures -->")[1]
    path.write_text(f"{before}<!-- figures -->\n{card(result)}\n<!-- end of figures -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--pair-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--bf16", action="store_true", help="draw in bfloat16: faster on some CPUs, for a quick look")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    first = not dist.is_initialized() or dist.get_rank() == 0
    world = load_world("emoji", dtype=torch.bfloat16 if args.bf16 else None)
    path = MODEL / "evaluation.json"
    result = {
        "seeds": args.seeds, "steps": args.steps, "guidance": args.guidance, "dtype": str(world.unet.dtype),
        "torch": torch.__version__, "device": str(world.device), "machine": platform.machine(),
        "base": world.fingerprint(), "judge": world.judge.fingerprint(),
    }  # fmt: skip

    if path.exists():  # a run that was cut off goes on, if it measured the same thing
        before = json.loads(path.read_text())
        if {name: before.get(name) for name in result} == result:
            result = before

    def measure(name: str, function, *arguments) -> dict:
        if name not in result:
            result[name] = function(world, *arguments)
            if first:
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(name, result[name], flush=True)
        return result[name]

    drawing, every = (args.steps, args.guidance), [*world.objects, *world.people]
    measure("held_out_drawings", held_out_drawings, 2000)
    measure("pairs", pairs, args.pair_seeds, *drawing, every)
    accuracy = measure("bare_names", bare_names, args.seeds, *drawing)
    for scale in SCALES:
        measure(f"guidance {scale:g}", pairs, 1, args.steps, scale, world.roles["nine_objects"])
    means = {
        kind: sum(accuracy[name] for name in names) / len(names)
        for kind, names in (("styles", world.styles), ("objects", world.objects), ("people", world.people))
    }
    worst = min(accuracy, key=accuracy.get)
    result["means"] = {**means, "worst": worst, "worst_accuracy": accuracy[worst]}
    if first:
        path.write_text(json.dumps(result, indent=1) + "\n")
        write_card(result)


if __name__ == "__main__":
    main()
