"""The one loop: its updates against plain Adam, its hooks, early stop, clipping, and resume."""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from conftest import build_tiny_world
from PIL import Image

from helpers import methods, training, unlearn
from helpers.checkpoint import load_checkpoint
from helpers.methods import METHODS, module_of, options_of
from helpers.options import Share
from helpers.training import Problem, Training, accumulated, backward, run

TRAINED = [name for name in METHODS if METHODS[name]["kind"] == "trained"]


def problem(n=6, weights=None, **more):
    """A least-squares problem with noise drawn from the step's generator."""
    w = torch.zeros(n, requires_grad=True)

    def terms(step, generator, stopped):
        target = torch.arange(n) + 0.1 * torch.randn(n, generator=generator)
        return {"fit": (w - target).pow(2).mean(), "size": w.pow(2).mean()}

    return Problem({"w": w}, lambda: {"w": w}, terms, weights or {"fit": 1.0, "size": 0.5}, **more)


def trained(found, options=None, **more):
    """The history of a problem; its leaves have moved."""
    return run(found, options or Training(steps=5, lr=0.1), progress=False, **more)


def dying(found, at):
    """The same problem, killed when the terms of a step are asked for."""

    def terms(step, generator, stopped):
        if step == at:
            raise KeyboardInterrupt
        return found.terms(step, generator, stopped)

    return replace(found, terms=terms)


def test_equals_plain_adam():
    ours = problem()
    trained(ours, Training(steps=5, lr=0.1, decay="constant", clip=None))
    theirs = problem()
    optimizer = torch.optim.Adam([theirs.leaves["w"]], lr=0.1)
    for step in range(5):
        values = theirs.terms(step, torch.Generator().manual_seed(step), frozenset())
        optimizer.zero_grad()
        (values["fit"] + 0.5 * values["size"]).backward()
        optimizer.step()
    assert torch.equal(ours.leaves["w"], theirs.leaves["w"])


def test_seeds_give_each_run_its_own_noise():
    ends = []
    for seed in (0, 0, 1):
        found = problem()
        trained(found, seed=seed)
        ends.append(found.leaves["w"].detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_history_logs_terms_apart_and_the_statistic():
    history = trained(problem(), Training(steps=4, lr=0.1))
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    m = history[0]["total"]
    for row in history[1:]:
        m = 0.9 * m + 0.1 * row["total"]
        assert math.isclose(row["statistics"]["total"], m, rel_tol=1e-6)
    for row in history:
        assert math.isclose(row["total"], row["fit"] + 0.5 * row["size"], rel_tol=1e-5)


def test_zero_steps_change_nothing():
    found = problem()
    assert trained(found, Training(steps=0)) == []
    assert torch.equal(found.leaves["w"], torch.zeros(6))


def test_early_stop_counts_updates():
    found = problem(weights={"fit": 1.0, "size": 0.0}, stop_below={"fit": 1e9}, min_steps=7)
    assert len(trained(found, Training(steps=50, lr=0.5))) == 7


def test_the_statistic_s_momentum_is_the_problem_s():
    history = trained(problem(momentum=0.5), Training(steps=2, lr=0.1))
    expected = 0.5 * (history[0]["total"] + history[1]["total"])
    assert math.isclose(history[1]["statistics"]["total"], expected, rel_tol=1e-6)


def test_a_stopped_term_rests_while_another_goes_on():
    """Two terms, each with its own weights: the first stops at once, the second never does."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def terms(step, generator, stopped):
        every = {"a": a.pow(2).mean(), "b": b.pow(2).mean()}
        return {name: value for name, value in every.items() if name not in stopped}

    found = Problem(
        {"a": a, "b": b}, dict, terms, {"a": 1.0, "b": 1.0}, stop_below={"a": 1e9, "b": -1.0},
        min_steps=3,
    )  # fmt: skip
    history = trained(found, Training(steps=10, lr=0.01, decay="constant"))
    assert len(history) == 10 and history[-1]["stopped"] == ["a"] and "a" not in history[3]
    assert a[0].item() == pytest.approx(0.97, abs=1e-4)  # Adam: lr a step, of three steps
    assert b[0].item() == pytest.approx(0.90, abs=1e-3)


def test_clipping_clips():
    """Adam forgets a gradient's scale but for its epsilon, 1e-8: a tiny one moves nothing."""
    moved = {}
    for clip in (None, 1e-12):
        found = problem()
        history = trained(found, Training(steps=1, lr=0.1, clip=clip))
        moved[clip] = found.leaves["w"].abs().sum().item()
        assert ("grad_norm" in history[0]) == (clip is not None)
    assert moved[1e-12] < 0.01 * moved[None]


def test_gradients_do_not_pile_up_unless_asked():
    seen = {}
    for accumulate in (False, True):
        w = torch.zeros(1, requires_grad=True)
        grads = seen.setdefault(accumulate, [])
        w.register_post_accumulate_grad_hook(lambda p, grads=grads: grads.append(p.grad.item()))
        found = Problem({"w": w}, dict, lambda step, g, stopped, w=w: {"a": w.sum()}, {"a": 1.0})
        trained(found, Training(steps=3, lr=1e-9, clip=None, accumulate_grads=accumulate))
    assert seen == {False: [1.0, 1.0, 1.0], True: [1.0, 2.0, 3.0]}


def test_a_leaf_that_a_step_does_not_touch_rests():
    """Even where gradients pile up: what a step adds nothing to gets none."""
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    leaves = {"a": a, "b": b}
    for gradients in (backward, accumulated):
        gradients({"x": (a + b).sum()}, {"x": 2.0}, leaves)
        loss = gradients({"x": (3 * a).sum()}, {"x": 2.0}, leaves)
        assert loss.item() == 12.0 and b.grad is None
        assert a.grad.tolist() == ([6.0] * 2 if gradients is backward else [8.0] * 2)
        a.grad = b.grad = None


def test_nan_stops_with_the_step():
    w = torch.zeros(1, requires_grad=True)
    terms = lambda step, g, stopped: {"a": w.sum() * (float("nan") if step == 2 else 1.0)}  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 2"):
        trained(Problem({"w": w}, dict, terms, {"a": 1.0}))


# --- the places to hook in


def test_gradients_may_be_masked():
    """What a mask leaves out stays as it was, to the bit; the rest is trained (ANT, SalUn)."""
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])

    def masked(terms, weights, leaves):
        loss = backward(terms, weights, leaves)
        for leaf in leaves.values():
            leaf.grad *= mask
        return loss

    found, plain = problem(gradients=masked), problem()
    start = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for each in (found, plain):
        each.leaves["w"].data.copy_(start)
        trained(each, Training(steps=8, lr=0.1))
    w = found.leaves["w"].detach()
    assert torch.equal(w[mask == 0], start[mask == 0])
    assert ((w - start)[mask == 1].abs() > 0.1).all()
    assert not torch.equal(plain.leaves["w"][mask == 0], start[mask == 0])


def test_gradients_are_told_the_terms_apart_with_their_weights():
    """Surgery on the gradient of one term needs the terms themselves (DoCo)."""
    seen = []

    def of_fit_only(terms, weights, leaves):
        seen.append((sorted(terms), dict(weights)))
        return backward({"fit": terms["fit"]}, weights, leaves)

    found, plain = problem(gradients=of_fit_only), problem(weights={"fit": 1.0, "size": 0.0})
    history = trained(found)
    trained(plain)
    assert seen == [(["fit", "size"], {"fit": 1.0, "size": 0.5})] * 5
    assert torch.equal(found.leaves["w"], plain.leaves["w"])
    assert history[-1]["size"] > 0  # logged nevertheless


def test_after_step_is_told_how_many_updates_were_made():
    asked, at = [], []
    found = problem()

    def after(done):
        asked.append(done)
        at.append(found.leaves["w"][1].item())  # after the update, not before

    found.after_step = after
    assert len(trained(found)) == 5 and asked == [1, 2, 3, 4, 5]
    assert at[0] != 0.0 and at[-1] == found.leaves["w"][1].item()


@pytest.mark.parametrize("answer", [None, False])
def test_after_step_may_change_the_leaves(answer):
    """A proximal step, or a norm that is pulled: the next step starts from there."""
    found = problem()

    @torch.no_grad()
    def clamp(done):
        found.leaves["w"].clamp_(max=0.15)
        return answer

    found.after_step = clamp
    history = trained(found, Training(steps=5, lr=0.1, decay="constant"))
    assert len(history) == 5 and found.leaves["w"].max() == torch.tensor(0.15)


def test_after_step_may_end_the_run():
    asked = []
    found = problem(after_step=lambda done: asked.append(done) or done == 3)
    history = trained(found, Training(steps=50))
    assert [row["step"] for row in history] == [0, 1, 2] and asked == [1, 2, 3]


def test_a_run_that_after_step_ended_is_not_gone_on_with(tmp_path):
    """Its last checkpoint says nothing of the end: it must not be of the step that ended it."""
    options = Training(steps=20, lr=0.1, checkpoint=tmp_path / "c.safetensors")
    first = problem(after_step=lambda done: done == 6)
    expected = trained(first, options, save_every=2)
    again = problem(after_step=lambda done: done == 6)
    assert trained(again, options, save_every=2) == expected and len(expected) == 6
    assert torch.equal(again.leaves["w"], first.leaves["w"])


# --- checkpoints


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    options = Training(steps=2, checkpoint=str(path))
    history = trained(problem(), options, save_every=2)
    with pytest.raises(ValueError, match="seed differ"):
        trained(problem(), options, seed=1)
    moved = path.rename(tmp_path / "moved.safetensors")  # under another name it is still this run's
    assert trained(problem(), replace(options, checkpoint=str(moved))) == history
    with pytest.raises(ValueError, match="holds w"):
        found = problem()
        found.leaves = {"v": found.leaves["w"]}
        trained(found, replace(options, checkpoint=moved))


OTHER = {
    "steps": 7, "lr": 0.2, "batch_size": 3, "decay": "constant", "clip": None,
    "accumulate_grads": True,
}  # fmt: skip


def test_every_option_tells_runs_apart(tmp_path):
    """The schedule, what a method adds to it, when to stop, and who the run belongs to."""
    assert OTHER.keys() | {"checkpoint"} == {field.name for field in fields(Training)}

    @dataclass(frozen=True)
    class Options(Training):
        eta: float = 1.0

    options = Options(steps=4, lr=0.1, checkpoint=tmp_path / "c.safetensors")
    identity = {"method": "esd", "concepts": ["church"], "base": {"unet": "0"}}
    trained(problem(), options, save_every=2, identity=identity)
    assert len(trained(problem(), options, identity=identity)) == 4
    for name, value in {**OTHER, "eta": 2.0}.items():
        what = "options" if name == "eta" else name
        with pytest.raises(ValueError, match=f"{what} differ.*file of its own"):
            trained(problem(), replace(options, **{name: value}), identity=identity)
    stops = {"stop_below": {"fit": 0.1}, "momentum": 0.8, "min_steps": 3}
    for name, value in stops.items():
        with pytest.raises(ValueError, match=f"{name} differ"):
            trained(problem(**{name: value}), options, identity=identity)
    others = {"method": "sdd", "concepts": ["dog"], "base": {"unet": "1"}}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"another run .*{name} differ"):
            trained(problem(), options, identity={**identity, name: value})


def test_a_finished_run_is_not_gone_on_with(tmp_path):
    """Its checkpoint stays, marked; the same run, asked for again, is trained again, all of it."""
    path = tmp_path / "c.safetensors"
    options = Training(steps=6, lr=0.1, checkpoint=str(path))
    first, again = problem(), problem()
    expected = trained(first, options, save_every=2)
    assert load_checkpoint(path)[1]["progress"] == "finished"
    seen, terms = [], again.terms
    again.terms = lambda step, *rest: seen.append(step) or terms(step, *rest)
    assert trained(again, options, save_every=2) == expected and seen == [0, 1, 2, 3, 4, 5]
    assert torch.equal(again.leaves["w"], first.leaves["w"])


@pytest.mark.parametrize("more", [{}, {"stop_below": {"fit": 1e9}, "min_steps": 3}])
def test_a_run_that_others_follow_is_kept_until_all_are_done(tmp_path, more):
    """Killed in the second: the first's result is there at once, to the bit, wherever it ended."""
    path = tmp_path / "0.safetensors"
    options = Training(steps=5, lr=0.1, checkpoint=str(path))
    first, again = problem(**more), problem(**more)
    expected = trained(first, options, last=False)
    assert load_checkpoint(path)[1]["progress"] == "ended"
    again.terms = None  # nothing is trained
    assert trained(again, options, last=False) == expected
    assert torch.equal(again.leaves["w"], first.leaves["w"])
    training.finish(path)
    assert load_checkpoint(path)[1]["progress"] == "finished"


def test_how_often_a_checkpoint_is_written_tells_no_run_from_another(tmp_path, monkeypatch):
    options = Training(steps=5, lr=0.1, checkpoint=str(tmp_path / "c.safetensors"))
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        trained(dying(problem(), 3), options)
    assert len(load_checkpoint(options.checkpoint)[1]["history"]) == 2
    assert trained(problem(), options, save_every=1) == trained(
        problem(), replace(options, checkpoint=None)
    )


def test_everything_that_a_training_depends_on_tells_runs_apart(tiny_world, cache, tmp_path):
    """Options of the method, the world's sampling, VAE, scheduler, words, own pictures."""
    path, pictures = tmp_path / "c.safetensors", tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (16, 16), "red").save(pictures / "a.png")
    how = {"steps": 4, "batch_size": 1, "progress": False, "checkpoint": path}
    how |= {"images": str(pictures), "recon_on": "concept"}
    unlearn(tiny_world, "church", "resteering", **how)
    refused = r"c\.safetensors is the checkpoint of another run .*{} differ"

    def ask(world=tiny_world, **more):
        return unlearn(world, "church", "resteering", **{**how, **more})

    for name, value in (("lam", 0.123), ("seed", 4), ("lr", 1e-5)):
        what = "options" if name == "lam" else name
        with pytest.raises(ValueError, match=refused.format(what)):
            ask(**{name: value})
    Image.new("RGB", (16, 16), "blue").save(pictures / "a.png")
    with pytest.raises(ValueError, match=refused.format("pictures")):
        ask()
    Image.new("RGB", (16, 16), "red").save(pictures / "a.png")
    ask()
    other = build_tiny_world()
    other.sampling = replace(other.sampling, steps=3)
    with pytest.raises(ValueError, match=refused.format("sampling")):
        ask(other)
    for part in ("unet", "text_encoder", "vae"):
        other = build_tiny_world()
        next(getattr(other.pipe, part).parameters()).data.add_(0.5)
        with pytest.raises(ValueError, match=refused.format("base")):
            ask(other)
    other = build_tiny_world()
    scheduler = other.pipe.scheduler
    other.pipe.scheduler = type(scheduler).from_config(scheduler.config, beta_end=0.02)
    with pytest.raises(ValueError, match=refused.format("base")):
        ask(other)


def test_an_edit_names_the_weights_that_it_was_trained_on(tiny_world, cache):
    """Changed in place after the fingerprint was taken: the edit fits the world as it is now."""
    before = tiny_world.fingerprint()
    next(tiny_world.unet.parameters()).data.add_(0.5)
    how = {"steps": 1, "images": 1, "batch_size": 1, "progress": False}
    edit = unlearn(tiny_world, "church", "resteering", **how)
    assert edit.base["unet"] != before and edit.meta["world"]["parts"]["unet"] == edit.base["unet"]
    with tiny_world.applied(edit):
        pass
    with (
        pytest.raises(ValueError, match=r"other base|base weights"),
        build_tiny_world().applied(edit),
    ):
        pass


def test_several_problems_go_on_where_they_were(tiny_world, cache, tmp_path, monkeypatch):
    """Two concepts, trained in turn; the second is interrupted, the first is not repeated."""
    folder = tmp_path / "sepme"
    how = {**METHODS["sepme"]["quick"], "steps": 2, "batch_size": 1, "progress": False}
    whole = unlearn(tiny_world, ["church", "dog"], "sepme", mode="separate", **how)
    real, runs = methods.run, []

    def interrupted(problem, *given, **options):
        runs.append(len(runs))
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(problem, *given, **options)

    monkeypatch.setattr(methods, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unlearn(tiny_world, ["church", "dog"], "sepme", mode="separate", checkpoint=folder, **how)
    assert load_checkpoint(folder / "0.safetensors")[1]["progress"] == "ended"
    monkeypatch.setattr(methods, "run", real)
    again = unlearn(
        tiny_world, ["church", "dog"], "sepme", mode="separate", checkpoint=folder, **how
    )
    assert all(torch.equal(again.delta[n], v) for n, v in whole.delta.items())
    states = [load_checkpoint(folder / f"{i}.safetensors")[1]["progress"] for i in range(2)]
    assert states == ["finished"] * 2


def test_a_checkpoint_of_another_method_or_concept_is_refused(tiny_world, cache, tmp_path):
    path = tmp_path / "c.safetensors"
    how = {"steps": 20, "images": 1, "batch_size": 1, "checkpoint": path, "progress": False}
    edit = unlearn(tiny_world, "church", "resteering", **how)
    assert path.exists()
    with pytest.raises(ValueError, match="concepts differ"):
        unlearn(tiny_world, "dog", "resteering", **how)
    with pytest.raises(ValueError, match="method"):
        unlearn(tiny_world, "church", "distraction", **{**how, "lam": edit.meta["options"]["lam"]})
    next(tiny_world.unet.parameters()).data.add_(1e-3)
    tiny_world._digests.clear()
    with pytest.raises(ValueError, match="base differ"):
        unlearn(tiny_world, "church", "resteering", **how)


@pytest.mark.parametrize("accumulate", [False, True])
def test_resume_is_bit_exact(tmp_path, accumulate):
    """Killed after step 4 (last checkpoint at 4), continued: the same bits as ten steps at once."""
    weights = {"fit": 1.0, "size": 0.1}
    options = Training(steps=10, lr=0.1, accumulate_grads=accumulate)
    saved = replace(options, checkpoint=tmp_path / "c.safetensors")
    whole = problem(weights=weights)
    expected = trained(whole, options)
    with pytest.raises(KeyboardInterrupt):
        trained(dying(problem(weights=weights), 5), saved, save_every=2)
    again = problem(weights=weights)
    assert trained(again, saved, save_every=2) == expected
    assert torch.equal(again.leaves["w"], whole.leaves["w"])


def test_resume_knows_what_has_stopped(tmp_path):
    def stops():
        return problem(stop_below={"fit": 1e9, "size": -1.0}, min_steps=3)

    options = Training(steps=8, lr=0.1, checkpoint=tmp_path / "c.safetensors")
    whole = trained(stops(), replace(options, checkpoint=None))
    with pytest.raises(KeyboardInterrupt):
        trained(dying(stops(), 5), options, save_every=2)
    seen, again = [], stops()
    terms = again.terms
    again.terms = lambda step, generator, stopped: (
        seen.append(stopped) or terms(step, generator, stopped)
    )
    assert trained(again, options) == whole
    assert seen == [frozenset({"fit"})] * 4


def averaged():
    """A problem whose increments are a moving average of its leaves, as SDD's teacher is."""
    found = problem()
    teacher = {"w": torch.zeros(6), "b": torch.zeros(1)}

    def follow(done):
        teacher["w"].lerp_(found.leaves["w"].detach(), 0.1)
        teacher["b"].add_(1.0)

    found.state, found.after_step, found.delta = teacher, follow, lambda: teacher
    return found


def test_state_is_kept_with_checkpoints(tmp_path):
    path = tmp_path / "c.safetensors"
    options = Training(steps=9, lr=0.1)
    whole = averaged()
    expected = trained(whole, options)
    with pytest.raises(KeyboardInterrupt):
        trained(dying(averaged(), 7), options, save_every=4, checkpoint=path)
    groups, metadata = load_checkpoint(path)
    assert set(groups["state"]) == {"w", "b"} and groups["state"]["b"].item() == 4.0
    assert len(metadata["history"]) == 4
    again = averaged()
    assert trained(again, options, checkpoint=path) == expected
    for name, value in whole.state.items():
        assert torch.equal(again.state[name], value) and torch.equal(again.delta()[name], value)
    assert again.state["b"].item() == 9.0


# --- options


@pytest.mark.parametrize(
    "bad", [{"steps": -1}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"decay": "step"}]
)
def test_bad_training(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        Training(**bad)


def test_the_rate_falls_to_a_tenth_or_stays():
    cosine, constant = (Training(steps=10, lr=0.2, decay=d) for d in ("cosine", "constant"))
    assert [constant.rate(step) for step in (0, 5, 10)] == [0.2] * 3
    assert cosine.rate(0) == 0.2 and cosine.rate(10) == pytest.approx(0.02)
    assert cosine.rate(5) == pytest.approx(0.11)
    rates = [cosine.rate(step) for step in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert Training(steps=0).rate(0) == Training.lr


def test_the_rate_reaches_adam(monkeypatch):
    """A gradient of one sign moves a leaf by Adam's rate at each step."""
    w = torch.zeros(1, requires_grad=True)
    at = []
    found = Problem(
        {"w": w}, dict, lambda step, g, stopped: {"a": -w.sum()}, {"a": 1.0},
        after_step=lambda done: at.append(w.item()),
    )  # fmt: skip
    options = Training(steps=6, lr=0.1, clip=None)
    trained(found, options)
    moves = [b - a for a, b in zip([0.0, *at], at, strict=False)]
    assert moves == pytest.approx([options.rate(step) for step in range(6)], rel=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_the_options_of_every_method_begin_with_those_of_training(name):
    kind = module_of(name).Options
    assert issubclass(kind, Training)
    assert [f.name for f in fields(kind)][: len(fields(Training))] == [
        f.name for f in fields(Training)
    ]
    options = options_of(name, {"steps": 7, "lr": 0.2, "checkpoint": "c.safetensors"})
    assert (options.steps, options.lr, options.checkpoint) == (7, 0.2, "c.safetensors")
    with pytest.raises(ValueError, match="steps is -1: give a whole number, 0 or more"):
        options_of(name, {"steps": -1})


def test_presets_never_overwrite_the_user_s_word():
    released = options_of("gcirs", {"variant": "code-jan"})
    assert released.accumulate_grads and not options_of("gcirs", {}).accumulate_grads
    given = {"variant": "code-jan", "accumulate_grads": False}
    assert options_of("gcirs", given).accumulate_grads is False
    kumari, sepme = (options_of("abconcept", {"variant": v}) for v in ("paper", "sepme-code"))
    assert (kumari.group, kumari.prior) == ("kv", 1.0)
    assert (sepme.group, sepme.prior) == ("xattn", 10.0)
    given = {"variant": "sepme-code", "group": "kv", "prior": 0.0}
    mine = options_of("abconcept", given)
    assert (mine.group, mine.prior) == ("kv", 0.0)
    mine = options_of("sepme", {"variant": "code-head", "penalty": "w-mean"})
    assert mine.penalty == "w-mean" and mine.accumulate_grads


@pytest.mark.parametrize("name", [n for n in METHODS if hasattr(module_of(n), "VARIANTS")])
def test_every_preset_may_be_taken_back(name):
    """Each field that a variant sets, given with its default: the default wins."""
    module = module_of(name)
    defaults = module.Options()
    for variant, presets in module.VARIANTS.items():
        chosen = options_of(name, {"variant": variant})
        for field, value in presets.items():
            assert getattr(chosen, field) == value != getattr(defaults, field)
            given = {"variant": variant, field: getattr(defaults, field)}
            assert getattr(options_of(name, given), field) == getattr(defaults, field)


def test_what_the_checks_say():
    @dataclass(frozen=True)
    class Options(Training):
        share: Share | None = 0.5

    assert Options(share=None).share is None
    with pytest.raises(ValueError, match=r"share is 1\.5: give a finite number, 0 to 1, or None"):
        Options(share=1.5)
    with pytest.raises(ValueError, match="unknown decay 'step': choose from 'constant', 'cosine'"):
        Options(decay="step")


@pytest.mark.parametrize("clip", [0, -1.0, math.nan, math.inf, "none", True])
@pytest.mark.parametrize("name", TRAINED)
def test_clipping_never_turns_or_takes_away_the_gradient(name, clip):
    with pytest.raises(ValueError, match=r"clip is .*: give a finite number, more than 0, or None"):
        options_of(name, {"clip": clip})


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"stop_below": {"fit": math.nan}}, r"stop_below\['fit'\] is nan: give a finite number"),
        ({"momentum": math.nan}, "momentum is nan: give a finite number, 0 or more, less than 1"),
        ({"momentum": -3.0}, "momentum is -3"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"min_steps": -1}, "min_steps is -1: give a whole number, 0 or more"),
    ],
)
def test_a_problem_that_could_not_stop_is_refused(stop, said):
    with pytest.raises(ValueError, match=said):
        problem(**stop)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": math.nan}, "tau is nan: give a finite number"),
        ({"tau": None}, "tau is None"),
        ({"tau": "low"}, "tau is 'low'"),
        ({"tau": [1e9, "low"]}, r"tau\[1\] is 'low': give a finite number"),
        ({"momentum": 5}, "momentum is 5"),
    ],
)
@pytest.mark.parametrize("name", ["gcirs", "sepme"])
def test_when_to_stop_is_checked_before_any_work(name, options, said):
    with pytest.raises(ValueError, match=said):
        options_of(name, options)


def test_a_list_of_taus_is_taken_as_a_tuple():
    """A list failed after twelve steps, by a bare TypeError."""
    assert options_of("gcirs", {"tau": [1e9, -1]}).taus(["church", "dog"]) == (1e9, -1.0)
    assert options_of("gcirs", {"tau": "-1e-3"}).taus(["church", "dog"]) == (-1e-3, -1e-3)
