"""The base model's bars, by one command: what the judge says of what the model draws.

    python data/pretrain/evaluate.py [--seeds 50]      # prints the tables and writes evaluation.json and the model card

Bare names as prompts, ``--seeds`` pictures each (seeds 0, 1, ...); every style with every object and person; held-out
drawings; and the effect of guidance 1, 3, 5, 7.5 on a subset. Numbers of one part are written before the next begins.
"""

import argparse
import json
import platform

import torch
from common import MODEL, renders
from torch import Tensor

from helpers import load_world, sample
from helpers.worlds import World


def bare_names(world: World, seeds: int, steps: int, guidance: float) -> dict[str, float]:
    """The share of each concept's pictures, drawn from its bare name, that the judge gives to it."""
    accuracy = {}
    for concept in world.concepts:
        images = sample(world, [concept] * seeds, list(range(seeds)), steps=steps, guidance=guidance)
        accuracy[concept] = world.judge.gives(images, concept).float().mean().item()
        print(f"  {concept:24s} {accuracy[concept]:.2f}", flush=True)
    return accuracy


def pairs(world: World, seeds: int, steps: int, guidance: float, things: list[str]) -> dict[str, float]:
    """Both verdicts over "object in the style of style" prompts, with each style's own share."""
    chosen = [(style, thing, seed) for style in world.styles for thing in things for seed in range(seeds)]
    prompts = [f"{thing} in the style of {style}" for style, thing, _ in chosen]
    images = sample(world, prompts, [10_000 + i for i in range(len(chosen))], steps=steps, guidance=guidance)
    right_style = [said == style for said, (style, _, _) in zip(world.judge.styles(images), chosen, strict=True)]
    right_thing = [said == thing for said, (_, thing, _) in zip(world.judge.things(images), chosen, strict=True)]
    each = {}
    for name in world.styles:
        mine = [right for right, (style, _, _) in zip(right_style, chosen, strict=True) if style == name]
        each[name] = sum(mine) / len(mine)
    n = len(chosen)
    return {"style": sum(right_style) / n, "thing": sum(right_thing) / n, "images": n, "each_style": each}


def held_out_drawings(world: World, n: int) -> dict[str, float]:
    """The judge on real drawings placed as no training batch was (other seeds, wider variation)."""
    generator = torch.Generator().manual_seed(987_654)
    style, thing = (torch.randint(size, (n,), generator=generator) for size in renders.tiles().shape[:2])
    images = renders.compose(renders.tiles()[style, thing], generator, vary=1.1)

    def share(said: list[str], names: list[str], truth: Tensor) -> float:
        return sum(a == names[b] for a, b in zip(said, truth.tolist(), strict=True)) / n

    return {
        "style": share(world.judge.styles(images), renders.style_names(), style),
        "thing": share(world.judge.things(images), renders.object_names(), thing),
        "images": n,
    }


def card(result: dict) -> str:
    """The figures of one evaluation as Markdown, for the model card."""
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
        f"| real drawings, held-out placements | {real['images']} | {real['style']:.3f} | {real['thing']:.3f} (with people) | |",
        "",
        f"The lowest single concept is “{means['worst']}” with {means['worst_accuracy']:.2f}. "
        f"Every bare name: {', '.join(f'{name} {value:.2f}' for name, value in accuracy.items())}.",
        "",
        "| guidance | style | object | pictures |",
        "|---|---|---|---|",
        *(f"| {g} | {r['style']:.3f} | {r['thing']:.3f} | {r['images']} |" for g, r in result["guidance"].items()),
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
    world = load_world("emoji", dtype=torch.bfloat16 if args.bf16 else None)
    path = MODEL / "evaluation.json"
    result = {
        "seeds": args.seeds, "steps": args.steps, "guidance": args.guidance, "dtype": str(world.unet.dtype),
        "torch": torch.__version__, "device": str(world.device), "machine": platform.machine(),
        "base": world.fingerprint(),
    }  # fmt: skip

    def keep(name: str, value: dict) -> None:
        result[name] = value
        path.write_text(json.dumps(result, indent=1) + "\n")

    keep("held_out_drawings", held_out_drawings(world, 2000))
    print("held-out drawings", result["held_out_drawings"])
    keep("pairs", pairs(world, args.pair_seeds, args.steps, args.guidance, [*world.objects, *world.people]))
    print("object in the style of style", result["pairs"])
    for guidance in (1.0, 3.0, 5.0, 7.5):
        some = pairs(world, 1, args.steps, guidance, world.roles["nine_objects"])
        keep("guidance", {**result.get("guidance", {}), str(guidance): some})
        print(
            f"guidance {guidance}: style {some['style']:.2f}, object {some['thing']:.2f} of {some['images']} pictures"
        )
    accuracy = bare_names(world, args.seeds, args.steps, args.guidance)
    keep("bare_names", accuracy)
    means = {
        kind: sum(accuracy[name] for name in names) / len(names)
        for kind, names in (("styles", world.styles), ("objects", world.objects), ("people", world.people))
    }
    worst = min(accuracy, key=accuracy.get)
    keep("means", {**means, "worst": worst, "worst_accuracy": accuracy[worst]})
    print(result["means"])
    write_card(result)


if __name__ == "__main__":
    main()
