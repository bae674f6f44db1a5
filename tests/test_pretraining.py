"""Pretraining: captions, the loop and its checkpoints, the autoencoder, and the model card."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from helpers import load_world, renders
from helpers.attention import AttentionProcessor
from helpers.checkpoint import load_checkpoint
from helpers.concepts import object_names, style_names
from helpers.denoise import SAMPLERS
from helpers.seeds import RANGES, judge_seeds, step_generator

FEW = (("DDIM", "ddim", 2), ("PNDM", "pndm", 2))
PRETRAIN = Path(__file__).resolve().parents[1] / "data" / "pretrain"
CARD = """a
<!-- figures -->
old
<!-- end of figures -->
b
<!-- samplers -->
<!-- end of samplers -->
c
"""


@pytest.fixture
def script(monkeypatch):
    """Imports a script of data/pretrain by its name, and forgets all of them afterwards."""
    monkeypatch.syspath_prepend(str(PRETRAIN))
    yield importlib.import_module
    for path in PRETRAIN.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def common(script):
    return script("common")


@pytest.fixture
def evaluate(script):
    return script("evaluate")


def test_captions_fit_their_images(common):
    style, thing, captions, fits = common.sample_captions(400, step_generator(5, 0), drop=0.1)
    assert all(fits[i, style[i], thing[i]] == 1 for i in range(400))
    empty = [i for i, caption in enumerate(captions) if not caption]
    assert 20 < len(empty) < 70  # ten per cent
    assert all(fits[i].min() == 1 for i in empty)  # they fit everything
    both = [
        i for i, caption in enumerate(captions)
        if " in the style of " in caption and fits[i].sum() == 1
    ]  # fmt: skip
    assert both and all(style_names()[style[i]] in captions[i] for i in both)


def test_a_category_fits_all_its_objects(common):
    _, _, captions, fits = common.sample_captions(3000, step_generator(6, 0), drop=0.0)
    of_people = [i for i, caption in enumerate(captions) if caption.split()[-1] == "person"]
    people = torch.tensor([name in object_names(people=True) for name in object_names()]).float()
    assert of_people and all(torch.equal(fits[i], people.expand(9, -1)) for i in of_people)


def test_captions_are_seeded_and_leave_out_the_held_out(common):
    def captions(n, seed, step):
        return common.sample_captions(n, step_generator(seed, step), drop=0.1)[2]

    assert captions(50, 7, 3) == captions(50, 7, 3) != captions(50, 7, 4)
    held_out = ("an emoji of", "a photo of", "a painting by")
    many = captions(3000, 8, 0)
    assert not any(c.startswith(held_out) or c.endswith(" style") for c in many)


def linear():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def loss_of(model, step):
    return model(torch.randn(4, 3, generator=step_generator(9, step))).pow(2).mean()


def test_the_loop_is_plain_adam_and_resumes_exactly(common, tmp_path):
    """Killed at step 4, resumed from the file of step 2: the same bits as a loop by hand."""
    rate = common.cosine(0.1, 5, warmup=2)

    def train(path, dies_at=None):
        model, optimizer = linear()

        def batch_loss(step):
            if step == dies_at:
                raise KeyboardInterrupt
            return loss_of(model, step), {"size": model.weight.abs().mean()}

        recipe = common.Recipe(5, rate, save_every=2, clip=0.1)
        common.fit(path, {"model": model}, optimizer, batch_loss, recipe)
        return model.weight.detach()

    expected, optimizer = linear()
    for step in range(5):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        loss_of(expected, step).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert torch.equal(train(a), expected.weight)
    with pytest.raises(KeyboardInterrupt):
        train(b, dies_at=3)
    assert load_checkpoint(b)[1] == {"step": 2}
    assert torch.equal(train(b), expected.weight)
    assert load_checkpoint(b)[1] == {"step": 5} and not list(tmp_path.glob("*.partial"))
    header, first, *later = (tmp_path / "b.csv").read_text().splitlines()
    assert header == "step,seconds,loss,size" and first.startswith("0,")
    assert not later  # one row in twenty steps


def test_the_learning_rate_rises_and_falls(common):
    rate = common.cosine(2.0, 100, warmup=10, floor=0.1)
    assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert rate(55) == pytest.approx(2.0 * (0.1 + 0.9 / 2)) and rate(100) == pytest.approx(0.2)


def test_what_the_loop_does_beside_the_steps(common, tmp_path):
    """Gradients come before the update, the export after the checkpoint; time ends the run."""
    seen = []
    model, optimizer = linear()
    path = tmp_path / "c.safetensors"

    def gradients():
        seen.append("gradients")
        model.weight.grad.zero_()
        model.bias.grad.zero_()

    def recipe(steps, **options):
        return common.Recipe(
            steps, lambda step: 0.0, save_every=10, gradients=gradients, export_every=2,
            after_step=lambda step: seen.append(step),
            export=lambda: seen.append(load_checkpoint(path)[1].get("step")), **options,
        )  # fmt: skip

    def fit(recipe):
        common.fit(path, {"model": model}, optimizer, lambda s: (loss_of(model, s), {}), recipe)

    before = model.weight.detach().clone()
    fit(recipe(3))
    assert seen == ["gradients", 0, "gradients", 1, None, "gradients", 2, 3]
    assert torch.equal(model.weight, before)  # a learning rate and gradients of 0
    fit(recipe(9, minutes=0.0))
    assert seen[8:] == ["gradients", 3, 4]  # one step, and its checkpoint


def test_the_unet_is_trained_in_halves(script):
    """The working copy computes as the fused attention does and hands its gradients to float32."""
    train_unet = script("train_unet")
    trainee = train_unet.Trainee()
    assert all(type(p) is AttentionProcessor for p in trainee.working.attn_processors.values())
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10, 700])
    states = torch.randn(2, 16, 256, generator=generator)
    with torch.no_grad():
        expected = trainee.master(x_t, t, states).sample  # float32 and the fused kernel
    predicted = trainee.predict(x_t, t, states)
    assert predicted.dtype == torch.float32
    assert (predicted - expected).abs().max() < 0.05 * expected.abs().max()
    predicted.pow(2).mean().backward()
    trainee.gradients()
    grads = [weight.grad for weight in trainee.master.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    assert sum(g.abs().sum() > 0 for g in grads) > 0.9 * len(grads)
    name, weight = next(iter(trainee.master.named_parameters()))
    old = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    trainee.average(1)  # between two updates
    assert torch.equal(trainee.ema.get_parameter(name), old)
    trainee.average(4)
    assert torch.allclose(trainee.ema.get_parameter(name), old + 1 - 5 / 14, atol=1e-6)


def test_a_batch_of_the_judge(script):
    """Real drawings, sampled ones, a quarter without a name, a tenth blank; seeded by its step."""
    train_judge = script("train_judge")
    sampled = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    things = torch.arange(6) + 20
    batches = train_judge.Batches(96, renders.others(), (sampled, torch.arange(6), things))
    images, labels = batches(3)
    again, _ = batches(3)
    assert images["style"].shape == images["thing"].shape == (96, 3, 64, 64)
    assert all(torch.equal(images[kind], again[kind]) for kind in images)
    assert all(0 <= x.min() and x.max() <= 1 for x in images.values())
    assert labels["style"][-9:].tolist() == [9] * 9 and labels["thing"][-9:].tolist() == [50] * 9
    assert labels["thing"][-33:-9].tolist() == [51] * 24  # what the world has no name for
    unknown = {*range(9), 10, train_judge.UNKNOWN}
    assert {*labels["style"][-33:-9].tolist()} <= unknown
    pick = labels["style"][44:63]  # of 63 that are left, 44 real ones
    assert torch.equal(labels["thing"][44:63], pick + 20)


def test_what_cannot_be_seen_is_given_another_ground(script):
    """A white drawing on white is put on grey; a black one stays."""
    scenes = script("scenes")
    alpha = torch.ones(2, 1, 64, 64)
    colour = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(-1, 3, 64, 64)
    half = (torch.arange(64) < 32).float()
    drawing = torch.cat([colour, alpha], 1) * half
    images = scenes.on_ground(drawing, torch.ones(2, 3, 64, 64))
    assert scenes.contrast(drawing, torch.ones(2, 3, 64, 64)).tolist() == pytest.approx([0, 1])
    assert images[0, :, :, 63].unique().item() == 0.5 and images[1, :, :, 63].unique().item() == 1


def test_the_certainty_of_a_judge_is_measured(script):
    """Sure of 0.9, right in 6 of 10; sure of 0.55, right in 1 of 2: (10 * 0.3 + 2 * 0.05) / 12."""
    evaluate_judge = script("evaluate_judge")
    sure = torch.tensor([0.9] * 10 + [0.55] * 2)
    right = torch.tensor([True] * 6 + [False] * 4 + [True, False])
    error = evaluate_judge.calibration_error(sure, right)
    assert error == pytest.approx((10 * 0.3 + 2 * 0.05) / 12, rel=1e-5)


def test_the_judge_is_trained_on_seeds_of_its_own(script, tmp_path, monkeypatch):
    train_judge, evaluate = script("train_judge"), script("evaluate")
    asked = {}

    def sample(world, prompts, seeds, **sampling):
        asked.update(prompts=prompts, seeds=seeds, sampling=sampling)
        return torch.full((len(prompts), 3, 4, 4), 0.5)

    monkeypatch.setattr(train_judge, "load_world", lambda *_, **__: None)
    monkeypatch.setattr(train_judge, "sample", sample)
    path, how = tmp_path / "images.safetensors", {"sampler": "ddim", "steps": 25, "guidance": 5.0}
    images, _, thing = train_judge.sample_base_images(path, 2, **how)
    n = 2 * 9 * len(object_names())
    assert images.dtype == torch.uint8 and images.unique().tolist() == [128] and len(images) == n
    assert asked["prompts"][0] == f"{object_names()[thing[0]]} in the style of {style_names()[0]}"
    assert asked["sampling"] == how
    assert asked["seeds"] == judge_seeds(n) == [1_000_000 + i for i in range(n)]  # as ever
    assert set(asked["seeds"]) <= set(range(*RANGES["judge"]))
    first, end = RANGES["evaluation"]
    assert first <= evaluate.PAIR_SEEDS < evaluate.PAIR_SEEDS + 100 * n <= end


def sampler_result(evaluate, **changes):
    labels = [evaluate.label_of(name, steps) for _, name, steps in evaluate.COMPARED]
    images = {"styles": 450, "objects": 400, "people": 100}
    row = {"styles": 0.95, "objects": 0.9994, "people": 1.0, "images": images}
    return {
        "seeds": 50, "sampler_seeds": 10, "guidance": 5.0, "dtype": "torch.float32",
        "device": "cpu", "torch": "2.8", "base": "abcd", "threads": 1,
        "seconds": {label: 4.0 / (1 + i) for i, label in enumerate(labels)},
        **{label: row for label in labels}, **changes,
    }  # fmt: skip


def test_the_table_of_samplers(evaluate):
    head, _, titles, line, *rows = evaluate.sampler_table(sampler_result(evaluate)).split("\n")
    command = "evaluate.py --samplers --seeds 50 --sampler-seeds 10 --guidance 5`"
    assert command in head and "weights `abcd`" in head and "one process of 1 thread." in head
    assert titles == "| sampler | styles | objects | people | seconds | beside DDIM, 25 steps |"
    assert len(rows) == len(evaluate.COMPARED) and {len(r.split("|")) for r in rows} == {8}
    assert line.count("|") == titles.count("|")
    assert rows[0] == "| DDIM, 25 steps | 0.950 (450) | 0.999 (400) | 1.000 (100) | 4.00 | 1.00 |"
    assert rows[2].startswith("| DPM-Solver++ 2M, 12 steps |")
    assert rows[2].endswith("| 1.33 | 0.33 |")


def test_every_sampler_has_a_label(evaluate):
    assert set(evaluate.LABELS) == set(SAMPLERS)
    assert {name for _, name, _ in evaluate.COMPARED} == set(SAMPLERS)


def test_the_figures_say_which_sampler(evaluate):
    row = {"style": 0.9, "thing": 1.0, "images": 81}
    result = {
        "seeds": 3, "sampler": "dpm++", "steps": 12, "guidance": 5.0, "dtype": "torch.bfloat16",
        "device": "cpu", "torch": "2.8", "base": "abcd", "bare_names": {"Noto": 1.0, "church": 0.5},
        "means": {"styles": 1.0, "objects": 0.5, "people": 1.0, "worst": "church",
                  "worst_accuracy": 0.5},
        "pairs": row, "held_out_drawings": row,
        **{f"guidance {scale:g}": row for scale in evaluate.SCALES},
    }  # fmt: skip
    text = evaluate.figures(result)
    head = text.split("\n")[0]
    assert head.endswith("DPM-Solver++ 2M, 12 steps, guidance 5.")
    assert "--seeds 3 --sampler dpm++ --steps 12 --guidance 5 --bf16`" in head
    assert "| bare names, 3 seeds each | 6 | 1.000 | 0.500 | 1.000 |" in text
    assert "| 7.5 | 0.900 | 1.000 | 81 |" in text
    karras = evaluate.figures({**result, "sampler": "dpm++ karras"})
    assert "--sampler 'dpm++ karras' --steps 12" in karras and "2M Karras, 12 steps" in karras


def test_either_part_keeps_the_other(evaluate, tmp_path):
    """The ordinary evaluation keeps the table of samplers, and the reverse, in both files."""
    (tmp_path / "README.md").write_text(CARD)

    def run(part, header, value):
        results = evaluate.Results(part, header, tmp_path)
        results.measure("x", lambda: value)
        results.write_card(lambda values: f"{part} {values['x']}")

    def saved():
        return json.loads((tmp_path / "evaluation.json").read_text())

    run("figures", {"seeds": 1}, 10)
    assert saved() == {"seeds": 1, "x": 10}
    run("samplers", {"seeds": 2}, 20)
    assert saved() == {"seeds": 1, "x": 10, "samplers": {"seeds": 2, "x": 20}}
    run("figures", {"seeds": 1}, 11)  # measured already
    assert saved()["x"] == 10
    run("figures", {"seeds": 3}, 30)  # another question: nothing of the old one is left
    run("samplers", {"seeds": 4}, 40)
    assert saved() == {"seeds": 3, "x": 30, "samplers": {"seeds": 4, "x": 40}}
    text = (tmp_path / "README.md").read_text()
    expected = CARD.replace("old", "figures 30")
    assert text == expected.replace("<!-- end of samplers", "samplers 40\n<!-- end of samplers")


def test_a_card_without_marks_is_refused(evaluate):
    with pytest.raises(ValueError, match="end of samplers"):
        evaluate.between_marks("<!-- samplers -->", "samplers", "text")
    shipped = (evaluate.MODEL / "README.md").read_text()
    for mark in ("figures", "samplers"):
        assert "new text" in evaluate.between_marks(shipped, mark, "new text")


class EveryOther:
    """A judge for whom every second image is a church of Twemoji, the others a dog of OpenMoji."""

    def styles(self, images):
        return [["Twemoji", "OpenMoji"][i % 2] for i in range(len(images))]

    def things(self, images):
        return [["church", "dog"][i % 2] for i in range(len(images))]

    def fingerprint(self):
        return "judge"


def test_samplers_are_compared(evaluate, tiny_world, tmp_path, monkeypatch):
    """The whole second command on a world of random weights; what is measured stays measured."""
    tiny_world.brings["judge"] = EveryOther
    (tmp_path / "README.md").write_text(CARD)
    original = evaluate.Results
    monkeypatch.setattr(evaluate, "Results", lambda *a: original(*a, folder=tmp_path))
    for name, value in {"ROUNDS": 1, "TIMED": 1, "COMPARED": FEW}.items():
        monkeypatch.setattr(evaluate, name, value)
    evaluate.compare_samplers(tiny_world, 2, 1, 5.0)
    result = json.loads((tmp_path / "evaluation.json").read_text())["samplers"]
    row = result["PNDM, 2 steps"]
    assert row["images"] == {"styles": 6, "objects": 3, "people": 2}
    assert row["styles"] == pytest.approx((0.5 + 0.5 + 0) / 3)  # Twemoji, OpenMoji, Noto
    assert row["objects"] == pytest.approx(1 / 3)  # church is first: right; castle, dog: wrong
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert "| PNDM, 2 steps | 0.333 (6) |" in (tmp_path / "README.md").read_text()

    def none(*_, **__):
        raise AssertionError("sampled again")

    monkeypatch.setattr(evaluate, "sample", none)
    evaluate.compare_samplers(tiny_world, 2, 1, 5.0)


@torch.no_grad()
def test_the_autoencoder_keeps_edges_and_colours():
    """Real drawings come back; each latent channel is near the unit variance of sampling."""
    vae = load_world("emoji").pipe.vae
    drawings = renders.tiles()[:, ::5].flatten(0, 1)
    images = renders.compose(drawings, torch.Generator().manual_seed(0))
    z = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    again = vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5
    assert (images - again).pow(2).mean() < 0.004  # of values in [0, 1]
    assert all(0.6 < s < 1.5 for s in z.std((0, 2, 3)).tolist())
    hue = (images - again).mean((2, 3))
    assert hue.abs().mean() < 0.02
