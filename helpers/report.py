"""Did it work? One call that draws with the base and the edited model, measures, attacks, and shows the pictures."""

import json
import time
from pathlib import Path

import diffusers
import torch
from matplotlib.figure import Figure
from torch import Tensor

from helpers import attacks, metrics, show
from helpers.edits import Edit
from helpers.files import complete
from helpers.sampling import sample
from helpers.training import drawn_images
from helpers.worlds import World

PAIR = "{thing} in the style of {style}"


def panel(world: World, erased: list[str]) -> list[str]:
    """Kept concepts to look at beside the erased: nearest neighbours, two more of their kind, two of other kinds."""
    near = [world.roles.get("neighbours", {}).get(concept) for concept in erased]
    kinds = {world.kind(concept) for concept in erased}
    left = [concept for concept in world.concepts if concept not in {*erased, *near}]
    same = [concept for concept in left if world.kind(concept) in kinds]
    other = [concept for concept in left if world.kind(concept) not in kinds]
    chosen = [*near, *same[:2], other[0], other[-1]] if other else [*near, *same[:4]]
    return [concept for concept in dict.fromkeys(chosen) if concept and concept not in erased]


def canvas_pairs(world: World, erased: list[str], every: int = 3) -> list[tuple[str, str]]:
    """(style, thing) pairs for ``metrics.unlearn_canvas``: all that hold an erased concept, and every third (or
    ``every``-th) of the others.

    Things are the nine objects of the world's roles (or its first nine) and what else is erased. Every kept style and
    thing stands in about equally many pairs.
    """
    things = [*world.roles.get("nine_objects", world.objects[:9])]
    things += [concept for concept in erased if concept not in {*world.styles, *things}]
    pairs = [(i + j, s, o) for i, s in enumerate(world.styles) for j, o in enumerate(things)]
    return [(s, o) for k, s, o in pairs if s in erased or o in erased or k % every == 0]


def share(hits: Tensor) -> dict:
    """A share with its number and 95 % interval, as every table shows it. hits: bool (n,)."""
    value = hits.float().mean().item()
    return {"value": value, "n": len(hits), "interval": metrics.interval(value, len(hits))}


def bare_names(world: World, shown: list[str], erased: list[str], before: Tensor, after: Tensor) -> dict[str, dict]:
    """Figures by concept, from equally many pictures of each bare name, in the order of ``shown``."""
    figures, n = {}, len(before) // len(shown)
    for concept, b, a in zip(shown, before.split(n), after.split(n), strict=True):
        figures[concept] = {
            "erased": concept in erased,
            "acc_before": share(world.judge.gives(b, concept)),
            "acc_after": share(world.judge.gives(a, concept)),
            "clip_before": metrics.clip_score(world, b, [concept] * n).mean().item(),
            "clip_after": metrics.clip_score(world, a, [concept] * n).mean().item(),
        }
    return figures


def canvas(
    world: World, pairs: list[tuple[str, str]], erased: list[str], before: Tensor, after: Tensor
) -> dict[str, dict]:
    """UA, IRA and CRA by erased concept, before and after; pictures with another erased concept count for none."""
    figures = {}
    for concept in erased:
        rows = [i for i, pair in enumerate(pairs) if not {*pair} & ({*erased} - {concept})]
        figures[concept] = {
            at: metrics.unlearn_canvas(world, images[rows], [pairs[i] for i in rows], concept)
            for at, images in (("before", before), ("after", after))
        }
    return figures


def report(
    world: World, edit: Edit, *, n: int = 8, seed: int = 0, kept: list[str] | None = None, every: int = 3,
    size: int | None = None, attack: bool = True, drawing: dict | None = None, folder: str | Path | None = None,
    progress: bool = True,
) -> dict:  # fmt: skip
    """Did it work? Every figure of one edit, and a contact sheet: before and after from the same seeds.

    n: pictures of each bare name; their seeds begin at 10 000 * seed. kept: concepts to compare (default ``panel``).
    every: the larger, the fewer pairs of kept styles and things (``canvas_pairs``). size: of LPIPS. attack: run the
    three attacks on each erased concept. drawing: ``sample``'s steps and guidance, if other than its own, as
    {"steps": 25}. folder: write ``report.json`` and ``sheet.png`` there. The base's pictures are kept on disk between
    calls, and both models' are rounded to 8 bits, as in a file. Returns a dict ready for JSON, but for ``"sheet"``, a
    Matplotlib figure:

    concepts[c]: ACC (value, n, interval), CLIP score, LPIPS; canvas[c]: UA, IRA, CRA, both before and after; drift,
    fid, collapsed: over the pictures that hold no erased concept; weight_change; attacks[c][name]; made_with.
    ValueError for an edit that does not say what it erases, an unknown concept, n or every < 1; errors of
    ``lpips_network``.
    """
    start, drawing = time.time(), drawing or {}
    erased = list(edit.meta.get("concepts", []))
    if not erased or n < 1 or every < 1:
        raise ValueError(
            f"erased concepts {erased}, n {n} and every {every}: want names in edit.meta['concepts'], n and every >= 1"
        )
    metrics.lpips_network(world.name == "emoji")  # missing weights are reported before anything is drawn
    shown = list(dict.fromkeys([*erased, *(panel(world, erased) if kept is None else kept)]))
    for concept in shown:
        world.kind(concept)
    pairs, bare = canvas_pairs(world, erased, every), n * len(shown)
    prompts = [concept for concept in shown for _ in range(n)]
    prompts += [PAIR.format(style=style, thing=thing) for style, thing in pairs]
    seeds = [10_000 * seed + i for i in [*range(n)] * len(shown) + [*range(n, n + len(pairs))]]
    before = drawn_images(world, prompts, seeds, **drawing)
    after = (sample(world, prompts, seeds, edit=edit, progress=progress, **drawing) * 255).round() / 255
    seconds = {"drawing": round(time.time() - start, 1)}

    distance = metrics.lpips_distance(world, before, after, size=size)
    held = [{name} for name in prompts[:bare]] + [{*pair} for pair in pairs]
    retained = torch.tensor([not names & {*erased} for names in held])
    features = [world.judge.features(images[retained]) for images in (before, after)]
    concepts = bare_names(world, shown, erased, before[:bare], after[:bare])
    for concept, part in zip(shown, distance[:bare].split(n), strict=True):
        concepts[concept]["lpips"] = part.mean().item()
    result = {
        "concepts": concepts,
        "canvas": canvas(world, pairs, erased, before[bare:], after[bare:]),
        "drift": {
            "name": metrics.lpips_name(world),
            "size": size or world.image_size,
            "value": distance[retained].mean().item(),
            "std": distance[retained].std().item(),
            "n": int(retained.sum()),
        },
        "fid": {"name": "FID (judge features)", "value": metrics.fid(*features), "n": int(retained.sum())},
        "collapsed": {
            "retained": share(metrics.collapsed(after[retained])),
            "erased": share(metrics.collapsed(after[~retained])),
        },
        "weight_change": {"value": metrics.weight_change(edit), "M": edit.M},
        "attacks": {},
    }
    for concept in erased if attack else []:
        known = concepts[concept]["acc_after"]["value"]
        done = attacks.every(
            world, edit, concept, seeds=seeds[:n], before=known, seed=seed, drawing=drawing, progress=progress
        )
        result["attacks"][concept] = {one.name: one.figures() for one in done}
    seconds["all"] = round(time.time() - start, 1)
    result["made_with"] = {
        "world": world.name,
        "base": world.fingerprint(),
        "judge": world.judge.fingerprint(),
        "edit": edit.meta,
        "n": n,
        "seed": seed,
        "drawing": drawing,
        "device": str(world.device),
        "seconds": seconds,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    sheet = contact_sheet(result, before, after, n)
    if folder is not None:
        write(Path(folder), result, sheet)
    return {**result, "sheet": sheet}


def contact_sheet(result: dict, before: Tensor, after: Tensor, n: int, *, columns: int = 4) -> Figure:
    """``report``'s pictures: a row for each concept, the base's left, the edited model's right; scores below."""
    k = min(n, columns)
    rows, images = [], []
    for i, (concept, figures) in enumerate(result["concepts"].items()):
        images += [before[i * n : i * n + k], after[i * n : i * n + k]]
        said = f"ACC {figures['acc_before']['value']:.2f} to {figures['acc_after']['value']:.2f}"
        rows.append(f"{concept}{' (erased)' if figures['erased'] else ''}\n{said}\nLPIPS {figures['lpips']:.2f}")
    titles = ["before", *[""] * (k - 1), "after", *[""] * (k - 1)]
    figure = show.grid(torch.cat(images), columns=2 * k, titles=titles, rows=rows)
    drift, change = result["drift"], result["weight_change"]
    lines = [
        f"kept pictures: {drift['name']} at {drift['size']} px {drift['value']:.3f}, n = {drift['n']};  "
        f"{result['fid']['name']} {result['fid']['value']:.2f};  "
        f"collapsed {result['collapsed']['retained']['value']:.2f};  "
        f"||delta||_1 / M = {change['value']:.3g}, M = {change['M']}"
    ]
    for concept, figures in result["canvas"].items():
        lines.append(
            f"{concept}: " + ", ".join(f"{name} {figures['after'][name]:.2f}" for name in ("UA", "IRA", "CRA"))
        )
    for concept, done in result["attacks"].items():
        for name, figures in done.items():
            said = f"{concept}, {name}: ACC {figures['before']:.2f} to {figures['after']:.2f}, n = {figures['n']}"
            steps = figures.get("back_after")
            lines.append(said if steps is None else f"{said}, back after {steps} steps")
    figure.text(0.01, -0.01, "\n".join(lines), fontsize=8, va="top")
    return figure


def write(folder: Path, result: dict, sheet: Figure) -> None:
    """Both files under temporary names, then renamed: a reader never finds half a report."""
    with complete(folder / "report.json") as text, complete(folder / "sheet.png") as picture:
        text.write_text(json.dumps(result, indent=1) + "\n")
        sheet.savefig(picture, format="png", bbox_inches="tight")
