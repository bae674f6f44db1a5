"""Did it work? One call samples from base and edited model, measures, attacks, and shows."""

import itertools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from matplotlib.figure import Figure
from torch import Tensor

from helpers import show
from helpers.checked import signed
from helpers.concepts import pair_prompt
from helpers.edits import Edit
from helpers.evaluation import attacks
from helpers.evaluation.scores import (
    clip_score,
    collapsed,
    fid,
    lpips_distance,
    no_concept,
    style_diversity,
    unlearn_canvas,
)
from helpers.files import complete
from helpers.images import as_stored, base_images
from helpers.options import DISTINCT, Count, File, Seed, Whole, check_options, made, typed
from helpers.provenance import base_parts, device_of, versions
from helpers.sampling import sample, sampling_of
from helpers.seeds import attack_seeds, report_seeds
from helpers.stats import student_interval, wilson_interval
from helpers.worlds import World

UNNAMED = 5000  # of a report's seeds, those of unnamed prompts begin here


@dataclass(frozen=True)
class Protocol:
    """What a report measures."""

    n: Count = 8  # images of each bare name
    seed: Seed = 0  # image seeds begin at 10 000 * seed
    # retained ones to look at (default ``probes``)
    probe_concepts: Annotated[list[str], DISTINCT] | None = None
    unnamed: Whole = 36  # images of objects' bare names: which styles do they come out in?
    thin: Count = 3  # of the pairs without an erased concept, every so many-th is measured
    lpips_size: Count | None = None  # pixels; None: the world's own
    attack: bool = True  # run the three attacks on each erased concept
    sampling: dict = field(default_factory=dict)  # ``sample``'s options, as {"steps": 12}

    def __post_init__(self):
        check_options(self)
        report_seeds(self.seed, self.n)  # these refuse a seed that has no images of its own
        if self.attack:
            attack_seeds(self.seed, 0)


@dataclass(frozen=True)
class Evidence:
    """The prompts of one report, and both models' images of them from the same seeds."""

    erased: list[str]
    names: list[str]  # bare names, erased ones first
    pairs: list[tuple[str, str]]  # (style, thing)
    seeds: list[int]
    before: Tensor  # (n * names + pairs, 3, H, W)
    after: Tensor
    n: int

    @property
    def bare(self) -> slice:
        """The rows of bare names, n of each."""
        return slice(0, self.n * len(self.names))

    @property
    def paired(self) -> slice:
        """The rows of pairs."""
        return slice(self.n * len(self.names), None)

    @property
    def retained(self) -> Tensor:
        """The rows that hold no erased concept: bool."""
        held = [{name} for name in self.names for _ in range(self.n)]
        held += [{*pair} for pair in self.pairs]
        return torch.tensor([not names & {*self.erased} for names in held])


def probes(world: World, erased: list[str]) -> list[str]:
    """Retained concepts to look at: neighbours, two more of their kind, two of other kinds."""
    near = [world.roles.get("neighbours", {}).get(concept) for concept in erased]
    kinds = {world.kind(concept) for concept in erased}
    left = [concept for concept in world.concepts if concept not in {*erased, *near}]
    same = [concept for concept in left if world.kind(concept) in kinds]
    other = [concept for concept in left if world.kind(concept) not in kinds]
    chosen = [*near, *same[:2], other[0], other[-1]] if other else [*near, *same[:4]]
    return [concept for concept in dict.fromkeys(chosen) if concept and concept not in erased]


def canvas_pairs(world: World, erased: list[str], thin: int = 3) -> list[tuple[str, str]]:
    """(style, thing) pairs for ``unlearn_canvas``: all with an erased concept, ``thin``-th others.

    Things are the nine objects of the world's roles (or its first nine) and what else is erased.
    Every retained style and thing stands in about equally many pairs.
    """
    things = [*world.roles.get("nine_objects", world.objects[:9])]
    things += [concept for concept in erased if concept not in {*world.styles, *things}]
    pairs = [(i + j, s, o) for i, s in enumerate(world.styles) for j, o in enumerate(things)]
    return [(s, o) for k, s, o in pairs if s in erased or o in erased or k % thin == 0]


def gather(world: World, edit: Edit, protocol: Protocol, progress: bool) -> Evidence:
    """Sample everything that a report looks at; the base's images are cached on disk."""
    erased, n = edit.erased, protocol.n
    chosen = probes(world, erased) if protocol.probe_concepts is None else protocol.probe_concepts
    names = list(dict.fromkeys([*erased, *chosen]))
    for concept in names:
        world.kind(concept)
    pairs = canvas_pairs(world, erased, protocol.thin)
    prompts = [name for name in names for _ in range(n)]
    prompts += [pair_prompt(thing, style) for style, thing in pairs]
    own = report_seeds(protocol.seed, n + len(pairs))
    seeds = own[:n] * len(names) + own[n:]
    before = base_images(world, prompts, seeds, **protocol.sampling)
    after = sample(world, prompts, seeds, edit, progress=progress, **protocol.sampling)
    return Evidence(erased, names, pairs, seeds, before, as_stored(after), n)


def share(hits: Tensor) -> dict:
    """A share with its number and 95 % interval. hits: bool (n,)."""
    value = hits.float().mean().item()
    return {"value": value, "n": len(hits), "interval": wilson_interval(value, len(hits))}


def by_name(world: World, seen: Evidence, distance: Tensor) -> dict[str, dict]:
    """Values of each bare name, before and after. distance: LPIPS of all rows."""
    values, n = {}, seen.n
    parts = (x[seen.bare].split(n) for x in (seen.before, seen.after, distance))
    for concept, b, a, d in zip(seen.names, *parts, strict=True):
        values[concept] = {
            "erased": concept in seen.erased,
            "acc_before": share(world.judge.gives(b, concept)),
            "acc_after": share(world.judge.gives(a, concept)),
            **beside_the_judge(world, b, a, concept),
            "clip_before": clip_score(world, b, [concept] * n).mean().item(),
            "clip_after": clip_score(world, a, [concept] * n).mean().item(),
            "lpips": d.mean().item(),
        }
    return values


def beside_the_judge(world: World, before: Tensor, after: Tensor, concept: str) -> dict[str, dict]:
    """What keeps an ACC honest: the second judge's, and the judge's "blank", "something else"."""
    values = {}
    for at, images in (("before", before), ("after", after)):
        values[f"no_concept_{at}"] = no_concept(world, images, concept)
        if world.second_judge is not None:
            values[f"second_{at}"] = share(world.second_judge.gives(images, concept))
    return values


def canvas(world: World, seen: Evidence) -> dict[str, dict]:
    """UA, IRA and CRA by erased concept; images with another erased concept count for none."""
    values = {}
    both = {"before": seen.before[seen.paired], "after": seen.after[seen.paired]}
    for concept in seen.erased:
        others = {*seen.erased} - {concept}
        rows = [i for i, pair in enumerate(seen.pairs) if not {*pair} & others]
        pairs = [seen.pairs[i] for i in rows]
        values[concept] = {
            at: unlearn_canvas(world, images[rows], pairs, concept) for at, images in both.items()
        }
    return values


def of_no_style(world: World, edit: Edit, asked: Protocol, progress: bool) -> dict:
    """Which styles prompts come out in that name none, before and after, from the same seeds.

    Bare names of the world's nine objects (or its first nine), but for erased ones, in turn.
    """
    roles = world.roles.get("nine_objects", world.objects[:9])
    names = [name for name in roles if name not in edit.erased]
    if not asked.unnamed or not names or not world.styles:
        return {}
    prompts = [name for name, _ in zip(itertools.cycle(names), range(asked.unnamed), strict=False)]
    seeds = report_seeds(asked.seed, UNNAMED + asked.unnamed)[UNNAMED:]
    before = base_images(world, prompts, seeds, **asked.sampling)
    after = as_stored(sample(world, prompts, seeds, edit, progress=progress, **asked.sampling))
    return {
        "before": style_diversity(world, before), "after": style_diversity(world, after),
        "prompts": names,
    }  # fmt: skip


def over_retained(world: World, seen: Evidence, distance: Tensor, size: int | None) -> dict:
    """Drift and FID over the images without an erased concept, and which images collapsed."""
    retained = seen.retained
    features = [world.judge.features(x[retained]) for x in (seen.before, seen.after)]
    n = int(retained.sum())
    mean, low, high = student_interval(distance[retained])
    return {
        "drift": {
            "name": world.lpips.name, "size": size or world.image_size, "value": mean,
            "std": distance[retained].std().item(), "interval": (low, high), "n": n,
        },
        "fid": {"name": "FID (judge features)", "value": fid(*features), "n": n},
        "collapsed": {
            "retained": share(collapsed(seen.after[retained], world.judge)),
            "erased": share(collapsed(seen.after[~retained], world.judge)),
        },
    }  # fmt: skip


@typed
def report(
    world: World, edit: Edit, *, folder: File | None = None, progress: bool = True, **protocol
) -> dict:
    """Did it work? Every value of one edit, and a contact sheet: before and after, same seeds.

    folder: write ``report.json`` and ``sheet.png`` there. protocol: fields of ``Protocol``. Both
    models' images are rounded to 8 bits, as in a file. Returns a dict ready for JSON, but for
    ``"sheet"``, a Matplotlib figure:

    concepts[c]: ACC (value, n, interval), the second judge's, the judge's shares of "blank" and
    "something else", CLIP score, LPIPS; canvas[c]: UA, IRA, CRA; unnamed: the styles of prompts
    that name none, and how many (``style_diversity``); all of these before and after;
    drift, fid, collapsed: over the images that hold no erased concept; weight_change;
    attacks[c][name]; made_with.
    ValueError for an edit that erases nothing, an unknown concept, n or thin < 1; errors of
    ``world.lpips``.
    """
    start, asked = time.time(), made(Protocol, protocol, "report")
    sampling_of(world, asked.sampling)  # a wrong option is refused before any work
    if not edit.erased:
        raise ValueError(
            f"the edit's concepts are {edit.concepts}: it erases nothing, so there is nothing to "
            "report; give names in edit.meta['concepts']"
        )
    world.lpips  # noqa: B018  missing weights are reported before anything is sampled
    seen = gather(world, edit, asked, progress)
    seconds = {"sampling": round(time.time() - start, 1)}
    distance = lpips_distance(world, seen.before, seen.after, size=asked.lpips_size)
    result = {
        "concepts": by_name(world, seen, distance),
        "canvas": canvas(world, seen),
        "unnamed": of_no_style(world, edit, asked, progress),
        **over_retained(world, seen, distance, asked.lpips_size),
        "weight_change": {"value": edit.norm(), "M": edit.M},
        "attacks": {},
    }
    for concept in seen.erased if asked.attack else []:
        found = attacks.run_all(
            world, edit, concept, seeds=seen.seeds[: seen.n], seed=asked.seed, progress=progress,
            before=result["concepts"][concept]["acc_after"]["value"], sampling=asked.sampling,
        )  # fmt: skip
        result["attacks"][concept] = {attack.name: attack.values() for attack in found}
    seconds["all"] = round(time.time() - start, 1)
    result["made_with"] = provenance(world, edit, asked, seconds)
    sheet = contact_sheet(result, seen)
    if folder is not None:
        write(Path(folder), result, sheet)
    return {**result, "sheet": sheet}


def provenance(world: World, edit: Edit, asked: Protocol, seconds: dict) -> dict:
    """What a report was made with, and in how many seconds."""
    return {
        "world": world.name,
        "base": world.fingerprint(),
        "base_parts": base_parts(world),
        "judge": world.judge.fingerprint(),
        "second_judge": world.second_judge and world.second_judge.fingerprint(),
        "lpips": world.lpips.name,
        "edit": edit.meta,
        "n": asked.n,
        "seed": asked.seed,
        "sampling": asdict(sampling_of(world, asked.sampling)),
        "protocol": {k: v for k, v in asdict(asked).items() if k != "sampling"},
        "device": device_of(world),
        "seconds": seconds,
        "versions": versions(),
    }


def contact_sheet(result: dict, seen: Evidence, *, columns: int = 4) -> Figure:
    """A row for each concept, the base's images left, the edited model's right; scores below."""
    k, n = min(seen.n, columns), seen.n
    rows, images = [], []
    for i, (concept, values) in enumerate(result["concepts"].items()):
        images += [x[i * n : i * n + k] for x in (seen.before, seen.after)]
        acc = f"ACC {values['acc_before']['value']:.2f} to {values['acc_after']['value']:.2f}"
        if "second_after" in values:
            second = [values[f"second_{at}"]["value"] for at in ("before", "after")]
            acc += f"\n2nd judge {second[0]:.2f} to {second[1]:.2f}"
        empty = [f"{name} {part:.2f}" for name, part in values["no_concept_after"].items() if part]
        acc = "\n".join([acc, *empty])
        mark = " (erased)" if values["erased"] else ""
        rows.append(f"{concept}{mark}\n{acc}\nLPIPS {values['lpips']:.2f}")
    titles = ["before", *[""] * (k - 1), "after", *[""] * (k - 1)]
    figure = show.grid(torch.cat(images), columns=2 * k, titles=titles, rows=rows)
    figure.text(0.01, -0.01, "\n".join(score_lines(result)), fontsize=8, va="top")
    return figure


def score_lines(result: dict) -> list[str]:
    """A report's values in a few lines of text, for below its sheet."""
    drift, change = result["drift"], result["weight_change"]
    lines = [
        f"retained images: {drift['name']} at {drift['size']} px {drift['value']:.3f}, "
        f"n = {drift['n']};  {result['fid']['name']} {result['fid']['value']:.2f};  "
        f"collapsed {result['collapsed']['retained']['value']:.2f};  "
        f"||delta||_1 / M = {change['value']:.3g}, M = {change['M']}"
    ]
    if result["unnamed"]:
        before, after = (result["unnamed"][at]["value"] for at in ("before", "after"))
        lines.append(f"effective number of styles of unnamed prompts {before:.1f} to {after:.1f}")
    for concept, values in result["canvas"].items():
        scores = ", ".join(f"{name} {values['after'][name]:.2f}" for name in ("UA", "IRA", "CRA"))
        lines.append(f"{concept}: {scores}")
    for concept, found in result["attacks"].items():
        for name, v in found.items():
            line = f"{concept}, {name}: ACC {v['before']:.2f} to {v['after']:.2f}, n = {v['n']}"
            back = v.get("back_after")
            lines.append(line if back is None else f"{line}, back after {back} steps")
    return lines


def write(folder: Path, result: dict, sheet: Figure) -> None:
    """Both files under temporary names, then renamed: a reader never finds half a report."""
    with complete(folder / "report.json") as text, complete(folder / "sheet.png") as picture:
        text.write_text(json.dumps(signed(result), indent=1) + "\n")
        sheet.savefig(picture, format="png", bbox_inches="tight")
