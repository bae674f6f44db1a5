"""Step 4 of 5: the two judges.

    python data/build_emoji.py --others build/pretrain/others     # needs npm, once
    python data/pretrain/train_judge.py [--steps 1500] [--seed 44] [--seeds 2] [--warm-start 1]
    python data/pretrain/train_judge.py --second 1 --seed 46 [--steps 4000] [--warm-start 1]

The first is trained by the papers' protocol: it sees images of the very model that is later edited,
from seeds that no evaluation uses (the judge's range in ``helpers.seeds``), beside real drawings.
The second sees real drawings alone, has another architecture and another seed: a witness.

Both see drawings as a person would still know them (``scenes.py``): on dark, saturated and textured
grounds, small, turned, in pairs, partly covered, inverted, darkened. What the world has no name
for is "something else": icons that ``others.csv`` lists, plain shapes, drawings cut to pieces. What
shows nothing is "blank". The classifier of things sees most images recoloured and blurred: an edit
that only changes a church's colour must not pass for one that forgot it. A label that cannot be
known is left out (the style of a drawing that was cut to pieces).
At the end the temperature of each softmax is fitted on scenes of other seeds.
"""

from pathlib import Path

import torch
from common import (
    DEVICE,
    WORK,
    Recipe,
    arguments,
    cosine,
    fit,
    load_checkpoint,
    place_drawings,
    save_checkpoint,
)
from scenes import (
    blanks,
    blur,
    covered,
    lit,
    recolour,
    scenes,
    shapes,
    shuffled,
    smears,
    soften,
)
from torch import Tensor
from torch.nn import functional as F

from helpers import concepts, load_world, renders, sample
from helpers.images import to_bytes
from helpers.judge import (
    BLANK,
    ELSE,
    SECOND,
    WEIGHTS,
    Classifier,
    Judge,
    Witness,
    load_judge,
    save_judge,
)
from helpers.seeds import judge_seeds, step_generator

SEED, SECOND_SEED = 44, 46  # the first steps' and the new networks'
FITTED = 10_000_000  # the first step whose scenes only temperatures are fitted on
PEAK = 2e-3  # learning rate
UNKNOWN = -100  # a label that is left out of the loss
OTHERS = WORK / "others"


def sample_base_images(path: Path, seeds: int, **sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Images of every object and person in every style, ``seeds`` each, kept on disk.

    Returns (n, 3, H, W) uint8, and the indices of styles and objects, (n,) both.
    """
    if not path.exists():
        world = load_world("emoji")
        styles, things = concepts.style_names(), concepts.object_names()
        pairs = [
            (s, o) for _ in range(seeds) for s in range(len(styles)) for o in range(len(things))
        ]
        prompts = [concepts.pair_prompt(things[o], styles[s]) for s, o in pairs]
        images = sample(world, prompts, judge_seeds(len(pairs)), **sampling)
        style, thing = torch.tensor(pairs).T
        saved = {"images": to_bytes(images), "style": style, "thing": thing}
        save_checkpoint(path, {"sampled": saved})
    sampled = load_checkpoint(path)[0]["sampled"]
    return sampled["images"], sampled["style"], sampled["thing"]


class Batches:
    """Training batches by step: images and labels of either classifier, "style" and "thing".

    sampled: the base model's images and their labels, or None for the second judge. Of a batch, a
    quarter is what the world has no name for, a tenth is blank; the rest is real drawings, but for
    three in ten of it that are sampled images.
    """

    def __init__(self, batch: int, others: dict[str, Tensor], sampled=None, seed: int = SEED):
        self.sampled, self.seed, self.batch = sampled, seed, batch
        sets = [style["set"] for style in concepts.concepts()["styles"]]
        self.others = torch.cat(list(others.values()))
        self.other_styles = torch.cat(
            [
                torch.full((len(x),), sets.index(name) if name in sets else len(sets) + 1)
                for name, x in others.items()
            ]
        )
        styles, things = len(sets), len(concepts.object_names())
        self.blank = {"style": styles, "thing": things}
        self.other = {"style": styles + 1, "thing": things + 1}

    def real(self, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Real drawings: a quarter placed as the world was trained on, the others in scenes."""
        few = n // 4
        plain, shown = place_drawings(few, generator, vary=1.2)
        sizes = renders.tiles().shape[:2]
        style, thing = (torch.randint(k, (n - few,), generator=generator) for k in sizes)
        wild = scenes(renders.tiles()[style, thing], renders.tiles()[style, thing], generator)
        labels = {"style": [shown["style"], style], "thing": [shown["thing"], thing]}
        return torch.cat([plain, wild]), {kind: torch.cat(x) for kind, x in labels.items()}

    def strange(self, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What the world has no name for: icons, plain shapes, drawings cut to pieces."""
        few = n // 6
        pick, beside = torch.randint(len(self.others), (2, n - 2 * few), generator=generator)
        icons = scenes(self.others[pick], self.others[beside], generator)
        near = renders.compose(self.others[pick], generator, vary=1.2)
        close = torch.rand(len(pick), 1, 1, 1, generator=generator) < 0.5
        images = [
            torch.where(close, near, icons),
            shapes(few, generator),
            shuffled(self.real(few, generator)[0], generator),
        ]
        style = self.other_styles[pick].where(close.flatten(), UNKNOWN)  # two sets side by side
        unknown = torch.full((few,), UNKNOWN)
        labels = {
            "style": torch.cat([style, torch.full((few,), self.other["style"]), unknown]),
            "thing": torch.full((n,), self.other["thing"]),
        }
        return torch.cat(images), labels

    def __call__(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = step_generator(self.seed, step)
        quarter, tenth = self.batch // 4, self.batch // 10
        rest = self.batch - quarter - tenth
        drawn = rest if self.sampled is None else rest * 7 // 10
        images, labels = self.real(drawn, generator)
        images = [soften(images, generator)]
        if self.sampled is not None:
            pixels, *known = self.sampled
            pick = torch.randint(len(pixels), (rest - drawn,), generator=generator)
            images.append(pixels[pick].float() / 255)
            for kind, indices in zip(("style", "thing"), known, strict=True):
                labels[kind] = torch.cat([labels[kind], indices[pick]])
        strange, unnamed = self.strange(quarter, generator)
        nothing = [blanks(tenth // 2, generator), smears(tenth - tenth // 2, generator)]
        images = torch.cat([*images, strange])
        labels = {
            kind: torch.cat([x, unnamed[kind], torch.full((tenth,), self.blank[kind])])
            for kind, x in labels.items()
        }
        changed = {
            "style": lit(covered(images, generator), generator, invert=0.03),
            "thing": lit(
                blur(recolour(covered(images, generator), generator), generator), generator
            ),
        }
        return {kind: torch.cat([x, *nothing]) for kind, x in changed.items()}, labels


def started(names: dict[str, list[str]], second: bool, warm: bool) -> dict[str, torch.nn.Module]:
    """Both classifiers: new ones, or (warm) the shipped ones with a row for each new class."""
    torch.manual_seed(SECOND_SEED if second else 0)
    build = Witness if second else Classifier
    nets = {kind: build(len(classes)) for kind, classes in names.items()}
    if warm:
        old = load_judge(SECOND if second else WEIGHTS)
        for kind, before in (("style", old.style_names), ("thing", old.thing_names)):
            weights = getattr(old, kind).state_dict()
            for part, rows in nets[kind].state_dict().items():
                if rows.shape != weights[part].shape:  # of the last layer: classes are appended
                    weights[part] = torch.cat([weights[part], rows[len(before) :]])
            nets[kind].load_state_dict(weights)
    return {kind: net.to(DEVICE, memory_format=torch.channels_last) for kind, net in nets.items()}


def train(batches: Batches, steps: int, *, second: bool, warm: bool, path: Path) -> Judge:
    """Train both classifiers, or go on from the checkpoint."""
    names = {
        "style": [*concepts.style_names(), BLANK, ELSE],
        "thing": [*concepts.object_names(), BLANK, ELSE],
    }
    nets = started(names, second, warm)
    peak = PEAK / 2 if warm else PEAK
    parameters = [p for net in nets.values() for p in net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.02)
    half = DEVICE != "cpu" or torch.cpu._is_amx_tile_supported()  # bfloat16 is slow elsewhere

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batches(step)
        labels = {kind: indices.to(DEVICE) for kind, indices in labels.items()}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            logits = {
                kind: net(images[kind].to(DEVICE, memory_format=torch.channels_last)).float()
                for kind, net in nets.items()
            }
        loss = sum(
            F.cross_entropy(logits[k], labels[k], label_smoothing=0.05, ignore_index=UNKNOWN)
            for k in nets
        )
        right = {k: (logits[k].argmax(1) == labels[k]).float().mean() for k in nets}
        return loss, right

    recipe = Recipe(steps, cosine(peak, steps, warmup=50), save_every=100)
    fit(path, nets, optimizer, batch_loss, recipe)
    nets = {
        kind: net.cpu().eval().to(memory_format=torch.contiguous_format)
        for kind, net in nets.items()
    }
    temperature = {kind: fitted(net, batches, kind) for kind, net in nets.items()}
    return Judge(nets["style"], nets["thing"], names["style"], names["thing"], temperature)


@torch.no_grad()
def fitted(net: torch.nn.Module, batches: Batches, kind: str, steps: int = 12) -> float:
    """The temperature that makes the log-likelihood of batches of other seeds the largest."""
    logits, labels = [], []
    for step in range(FITTED, FITTED + steps):
        images, known = batches(step)
        keep = known[kind] != UNKNOWN
        logits.append(net(images[kind][keep]))
        labels.append(known[kind][keep])
    z, y = torch.cat(logits), torch.cat(labels)
    candidates = torch.linspace(0.3, 2.0, 171)
    losses = torch.stack([F.cross_entropy(z / t, y) for t in candidates])
    return round(candidates[losses.argmin()].item(), 2)


def main() -> None:
    args = arguments(
        __doc__, steps=1500, batch=96, seeds=2, sampler="dpm++", sampling_steps=12, guidance=5.0,
        warm_start=0, second=0, seed=SEED,
    )  # fmt: skip
    others = renders.others("training", OTHERS)
    if args.second:
        batches, name, target = Batches(args.batch, others, seed=args.seed), "second", SECOND
    else:
        how = {"sampler": args.sampler, "steps": args.sampling_steps, "guidance": args.guidance}
        stem = "_".join(map(str, ("judge_images", args.seeds, *how.values())))
        sampled = sample_base_images(WORK / f"{stem}.safetensors", args.seeds, **how)
        batches, name, target = Batches(args.batch, others, sampled, args.seed), "judge", WEIGHTS
    judge = train(
        batches, args.steps, second=bool(args.second), warm=bool(args.warm_start),
        path=WORK / f"{name}.safetensors",
    )  # fmt: skip
    save_judge(judge, target)


if __name__ == "__main__":
    main()
