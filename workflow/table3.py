"""AIzheimer's Table III with numbers: what is measured on each picture, the table, the claims.

Records are a frame with a row for each picture: method, blocks, training_seed, mass (attention to
the forgotten person), weights, judge, person, seed, and the measures of ``measured``. Notebook 06
makes them and reads them.
"""

from collections.abc import Callable

import pandas as pd
import torch
from IPython.display import Markdown
from torch import Tensor
from torch.nn import functional as F

from helpers import show
from helpers.stats import student_interval, wilson_interval
from helpers.worlds import World

METHODS = {
    "re-steering": "resteering",
    "distraction": "distraction",
    "random stimulus": "random_stimulus",
}
OVERFITTED = "distraction, over-fitted"
ROWS = [*((method, blocks) for method in METHODS for blocks in "FS"), (OVERFITTED, "F")]
GREY = 1 / 255  # a difference that nobody sees


def figure_pixels(images: Tensor) -> Tensor:
    """Which pixels stand out from the image's corners: (..., 3, H, W) -> bool (..., H, W)."""
    corners = torch.stack([images[..., y, x] for y in (0, -1) for x in (0, -1)])  # (4, ..., 3)
    return (images - corners.median(0).values[..., None, None]).abs().amax(-3) > 0.15


def outline_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - intersection over union of the figures: (...), 0 for one outline, 1 for disjoint ones."""
    a, b = figure_pixels(a), figure_pixels(b)
    return 1 - (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp_min(1)


def colour_shares(images: Tensor) -> Tensor:
    """Each of 64 coarse colours' share of the figure's pixels: (..., 3, H, W) -> (..., 64)."""
    r, g, b = (images * 3.999).long().unbind(-3)  # 0 to 3 each, (..., H, W)
    counted = F.one_hot(16 * r + 4 * g + b, 64) * figure_pixels(images)[..., None]
    counts = counted.sum((-3, -2)).float()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def colour_distance(a: Tensor, b: Tensor) -> Tensor:
    """Half the summed difference of the figures' colour shares: (...), 0 to 1."""
    return (colour_shares(a) - colour_shares(b)).abs().sum(-1) / 2


def margin(distance: Callable, images: Tensor, originals: Tensor) -> Tensor:
    """How much nearer to its original an image is than other people's are: (people, count)."""
    among = distance(originals[:, None], originals[None])  # (people, people, count)
    return among.sum(0) / (len(originals) - 1) - distance(images, originals)


def drift(images: Tensor, originals: Tensor) -> Tensor:
    """Mean absolute change of a pixel between same-seed images (..., 3, H, W): (...)."""
    return (images - originals).abs().mean((-3, -2, -1))


def recognised(world: World, people: list[str], images: Tensor) -> Tensor:
    """1 where the judge sees the person that was asked for: (people, count)."""
    return torch.stack(
        [world.judge.gives(x, person).float() for x, person in zip(images, people, strict=True)]
    )


def measured(world: World, people: list[str], images: Tensor, before: Tensor) -> dict[str, Tensor]:
    """What is measured on images (people, count, 3, H, W) of the same noises as before's."""
    return {
        "had": recognised(world, people, before),
        "given": recognised(world, people, images),
        "drift": drift(images, before),
        "colour": margin(colour_distance, images, before),
        "outline": margin(outline_distance, images, before),
    }


def records(about: dict, people: list[str], seeds: list[int], measures: dict[str, Tensor]):
    """A frame with a row for each image; about: what all of them share."""
    rows = []
    for k, person in enumerate(people):
        for i, seed in enumerate(seeds):
            values = {name: round(m[k, i].item(), 4) for name, m in measures.items()}
            rows.append({**about, "person": person, "seed": seed, **values})
    return pd.DataFrame(rows)


def pick(frame: pd.DataFrame, **where) -> pd.DataFrame:
    """The rows whose fields are among those listed."""
    for name, allowed in where.items():
        frame = frame[frame[name].isin(allowed)]
    return frame


def spread(frame: pd.DataFrame, name: str, *, digits: int = 2) -> str:
    """The mean over trainings, and their standard deviation if there are several."""
    means = frame.groupby("training_seed")[name].mean().dropna()
    more = f" ± {means.std():.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}" + more


def table(frame: pd.DataFrame, people: list[str], name: str, *, digits: int = 2) -> Markdown:
    """Table III for one measure: a row for each way of training, a column for each person.

    The last column is the attention to the first, forgotten, person. For the judge's verdicts
    ("given") the forgotten person has Wilson's 95 % interval too.
    """
    lines = []
    for method, blocks in [("original", ""), *ROWS]:
        row = pick(frame, method=[method], blocks=[blocks])
        cells = [spread(pick(row, person=[p]), name, digits=digits) for p in people]
        if name == "given":
            given = pick(row, person=people[:1])[name]
            low, high = wilson_interval(given.mean(), len(given)) if len(given) else (0.0, 1.0)
            cells[0] += f" ({low:.2f} to {high:.2f})"
        lines.append([f"{method} {blocks}".strip(), *cells, spread(row, "mass")])
    count, trainings = frame["seed"].nunique(), frame["training_seed"].nunique()
    caption = f"{count} images in each cell, trainings: {trainings}"
    return show.table([name, *people, "attention"], lines, caption)


def by_seed(frame: pd.DataFrame, name: str, **where) -> Tensor:
    """A measure's mean for each training and sampling seed: (trainings, seeds), NaN for none."""
    trainings = sorted(frame[frame["method"] != "original"]["training_seed"].unique())
    seeds = sorted(frame["seed"].unique())
    means = pick(frame, **where).pivot_table(name, "training_seed", "seed", "mean")
    return torch.tensor(means.reindex(index=trainings, columns=seeds).to_numpy())


def verdict(d: Tensor, *, possible: bool = True) -> tuple[str, str]:
    """d (trainings, seeds), positive where a claim is right: its mean with interval, and a word.

    "holds" if Student's 95 % interval over drawing seeds lies above zero, the mean is at least one
    grey level (1/255) and every training agrees; "does not hold" if all that is so below zero; else
    "cannot be told here".
    """
    images, trainings = (m[~m.isnan()] for m in (d.nanmean(0), d.nanmean(1)))
    if len(images) < 2:
        return "fewer than two seeds to compare", "cannot be told here"
    middle, low, high = student_interval(images)
    possible = possible and abs(middle) >= GREY
    holds = possible and low > 0 and bool((trainings > 0).all())
    fails = possible and high < 0 and bool((trainings < 0).all())
    word = "holds" if holds else "does not hold" if fails else "cannot be told here"
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]", word


def claims(frame: pd.DataFrame, people: list[str]) -> list[tuple[str, str, Tensor, bool]]:
    """The paper's sentence, our measure of it, the differences d, whether the measure applies.

    people: the forgotten one, the one who looks alike, the others. d (trainings, seeds) is positive
    where the sentence is right. The over-fitted run counts unless it lost half of the others.
    """
    kept, others, methods, fitted = people[1:], people[2:], list(METHODS), [OVERFITTED]
    of = {m: by_seed(frame, "drift", method=[m], person=kept) for m in methods}
    full, skipped = (by_seed(frame, "drift", method=methods, blocks=[b]) for b in "FS")
    near = by_seed(frame, "drift", method=fitted, person=people[1:2])
    near = near - by_seed(frame, "drift", method=fitted, person=others)
    alike = by_seed(frame, "drift", method=methods, person=people[1:2])
    unlike = {"method": methods, "person": others}
    lost = by_seed(frame, "had", **unlike) - by_seed(frame, "given", **unlike)
    bystanders = pick(frame, method=fitted, person=others)
    alive = bool(bystanders["given"].mean() >= bystanders["had"].mean() / 2 > 0)
    gone = {"method": methods, "person": people[:1], "had": [1], "given": [0]}
    colour, outline = (by_seed(frame, name, **gone) for name in ("colour", "outline"))
    looking = (of["re-steering"] + of["distraction"]) / 2
    three = "drift of the three kept"
    return [
        (
            "distraction keeps more than re-steering", f"{three}, difference",
            of["re-steering"] - of["distraction"], True,
        ),
        (
            "random stimulus spills over", f"{three}, against the mean of the two",
            of["random stimulus"] - looking, True,
        ),
        (
            "unlike people stay almost unchanged", "0.1 minus the accuracy that they lose",
            0.1 - lost, True,
        ),
        (
            "the look-alike changes more than the unlike", "drift of all six rows, difference",
            alike - by_seed(frame, "drift", **unlike), True,
        ),
        ("S stays closer to the original", "drift of all four, F minus S", full - skipped, True),
        ("over-fitting hits the look-alike first", "its drift minus the others'", near, alive),
        ("colours remain", "margin of forgotten pictures", colour, True),
        ("outlines remain", "margin of forgotten pictures", outline, True),
    ]  # fmt: skip


def verdicts(frame: pd.DataFrame, people: list[str]) -> dict[str, tuple[str, str]]:
    """Claim -> what was measured, and its verdict."""
    found = {}
    for claim, what, d, possible in claims(frame, people):
        numbers, word = verdict(d, possible=possible)
        note = "" if possible else " (catastrophic: the others are lost too)"
        found[claim] = f"{what}: {numbers}{note}", word
    return found
