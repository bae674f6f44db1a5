"""The baselines against their equations: rollouts, targets, the teacher, anchors, logits; and the releases' defects."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_world, randomise
from diffusers import DDIMScheduler

from helpers import losses, rollouts, training, unlearn
from helpers.attention import cross_attentions
from helpers.diffusion import add_noise, coefficient, guide
from helpers.methods import METHODS, abconcept, fmn_sepme, sdd
from helpers.rollouts import branches, rollout
from helpers.training import generator_of, group_sizes, new_increments, predict, select_parameters

OWN = {
    "esd": {"rollout_steps": 3}, "sdd": {"rollout_steps": 3}, "abconcept": {"images": 2}, "fmn_sepme": {"images": 2},
}  # fmt: skip
NAMES = list(OWN)


@pytest.fixture(scope="module")
def tiny_world():
    return build_tiny_world()  # one for all tests: a method leaves the world as it was, which one of them checks


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")  # one for all tests: the tiny world is always the same


@pytest.fixture(autouse=True)
def cache(drawn, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", drawn)


def forget(world, name, concept="church", **options):
    return unlearn(
        world, concept, method=name, **{"steps": 2, "batch_size": 2, "progress": False, **OWN[name], **options}
    )


def parts_of(world, monkeypatch, name, concept="church", **options):
    """What a method hands to the loop, without the loop: its parameters, its terms and their weights."""
    got = SimpleNamespace()

    def spy(parameters, terms, weights, schedule, **_):
        got.parameters, got.weights = parameters, weights
        got.terms = lambda step: terms(step, generator_of(0, step), frozenset())
        return []

    with monkeypatch.context() as patch:
        patch.setattr(METHODS[name], "run", spy)
        forget(world, name, concept, **options)
    got.trained = {n: p for n, p in got.parameters.items() if p.requires_grad}
    return got


def gradients(got, step):
    loss = sum(got.weights[name] * value for name, value in got.terms(step).items())
    return torch.autograd.grad(loss, list(got.trained.values()), allow_unused=True)


def watch_rollout(method, monkeypatch):
    """A dict to which the method's next rollout adds what it was given and what it returned."""
    seen = {}

    def watched(world, increments, x_T, until, states, null, **options):
        x_t = rollout(world, increments, x_T, until, states, null, **options)
        seen.update(increments=increments, t=until, c=states, x_t=x_t)
        return x_t

    monkeypatch.setattr(method, "rollout", watched)
    return seen


def noise_for(world, n, seed):
    return torch.randn(n, *world.latent_shape, generator=torch.Generator().manual_seed(seed))


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_noise_level_of_x_t_is_that_of_t(tiny_world, monkeypatch, steps):
    """A network that knows the picture keeps DDIM on one line: x_t must be that picture, noised to t exactly."""
    alpha_bar = tiny_world.pipe.scheduler.alphas_cumprod
    x_0, x_T = noise_for(tiny_world, 5, 1), noise_for(tiny_world, 5, 2)
    until = torch.tensor([0, 37, 500, 998, 999])
    asked = []

    def oracle(unet, increments, x, t, states, null):
        rows = states[:, 0, 0].long()  # each row's states carry its number
        asked.extend(zip(rows.tolist(), t.tolist(), strict=True))
        a = coefficient(alpha_bar, t, x)
        eps = (x - a.sqrt() * x_0[rows]) / (1 - a).sqrt()
        return eps, eps

    monkeypatch.setattr(rollouts, "branches", oracle)
    states = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    x_t = rollout(tiny_world, {}, x_T, until, states, states[:1], steps=steps, guidance=3.0)
    eps = (x_T - alpha_bar[-1].sqrt() * x_0) / (1 - alpha_bar[-1]).sqrt()
    torch.testing.assert_close(x_t, add_noise(x_0, eps, until, alpha_bar), atol=1e-3, rtol=1e-3)
    assert torch.equal(x_t[4], x_T[4])  # t = T - 1 is the noise itself
    assert all(t > until[row] for row, t in asked)
    counts = [sum(row == i for row, _ in asked) for i in range(5)]
    assert counts == [math.ceil((999 - u) / (1000 / steps)) for u in until.tolist()]  # and not one step more


def test_a_rollout_equals_diffusers_own_ddim(tiny_world):
    scheduler = DDIMScheduler.from_config(tiny_world.pipe.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    states, null = tiny_world.encode(["church", "dog"]), tiny_world.encode([""])
    x = x_T = noise_for(tiny_world, 2, 0)
    with torch.no_grad():
        for t in scheduler.timesteps[:3]:
            eps_null, eps_c = (tiny_world.unet(x, t, s).sample for s in (null.expand_as(states), states))
            x = scheduler.step(guide(eps_null, eps_c, 3.0), t, x).prev_sample
    until = scheduler.timesteps[3].repeat(2)
    torch.testing.assert_close(rollout(tiny_world, {}, x_T, until, states, null, steps=5, guidance=3.0), x)


def test_a_row_does_not_depend_on_its_neighbours_and_increments_matter(tiny_world):
    states, null = tiny_world.encode(["church", "dog", "Noto"]), tiny_world.encode([""])
    x_T, until = noise_for(tiny_world, 3, 0), torch.tensor([900, 20, 400])
    whole = rollout(tiny_world, {}, x_T, until, states, null, steps=4, guidance=3.0)
    alone = rollout(tiny_world, {}, x_T[2:], until[2:], states[2:], null, steps=4, guidance=3.0)
    torch.testing.assert_close(whole[2:], alone)
    edited = randomise(new_increments(tiny_world.unet))
    other = rollout(tiny_world, edited, x_T, until, states, null, steps=4, guidance=3.0)
    assert not other.requires_grad and (other - whole).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(("steps", "until", "said"), [(0, 5, "0 steps"), (1001, 5, "1001 steps"), (4, 1000, "1000")])
def test_bad_rollouts(tiny_world, steps, until, said):
    null = tiny_world.encode([""])
    with pytest.raises(ValueError, match=said):
        rollout(
            tiny_world, {}, noise_for(tiny_world, 1, 0), torch.tensor([until]), null, null, steps=steps, guidance=3.0
        )


# --- targets ----------------------------------------------------------------------------------------------------------


def test_what_eta_means():
    """Golden values, and the convention of ESD's newer release: its eta = 2 is 1 here."""
    eps_null, eps_c = torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.0])
    assert losses.negated_guidance(eps_null, eps_c).tolist() == [-1.0, 1.0]
    assert losses.negated_guidance(eps_null, eps_c, 2.0).tolist() == [-3.0, 1.5]
    assert torch.equal(losses.negated_guidance(eps_null, eps_c, 0.0), eps_null)
    for eta in (0.5, 1.0, 3.0):
        ours = losses.negated_guidance(eps_null, eps_c, eta)
        assert torch.allclose(ours, (1 + eta) * eps_null - eta * eps_c)  # as SepME prints it
        assert torch.allclose(ours, eps_c - (eta + 1) * (eps_c - eps_null))  # as the newer release computes it


def test_alignment_by_hand_and_no_gradient_in_the_target():
    eps_hat, target = torch.tensor([1.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.0], requires_grad=True)
    loss = losses.alignment(eps_hat, target)
    loss.backward()
    assert loss.item() == 2.5 and eps_hat.grad.tolist() == [1.0, 2.0] and target.grad is None


def test_logit_difference_by_hand():
    layers = [torch.tensor([1.0, 3.0]).view(1, 1, 2, 1), torch.tensor([2.0]).view(1, 1, 1, 1)]
    assert losses.logit_difference(layers).item() == 9.0  # (1 + 9) / 2 + 4
    with pytest.raises(ValueError, match="no attention maps"):
        losses.logit_difference([])


# --- groups -----------------------------------------------------------------------------------------------------------


def test_paper_names_of_groups(tiny_world):
    unet = tiny_world.unet
    layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    expected = {f"{n}.{p}" for n, m in layers if "attn2" not in n for p, _ in m.named_parameters()}
    assert set(select_parameters(unet, "ESD-u")) == expected
    assert set(select_parameters(unet, "ESD-x")) == {n for n, _ in unet.named_parameters() if "attn2" in n}
    assert set(select_parameters(unet, "ESD-x-strict")) == set(select_parameters(unet, "kv"))
    blocks = len(cross_attentions(unet))
    rows = {row["name"]: row for row in group_sizes(unet)}
    assert rows["ESD-x"]["tensors"] == 5 * blocks and rows["ESD-x-strict"]["tensors"] == 2 * blocks  # 80, 32 of SD's 16
    for name, row in rows.items():
        assert row["parameters"] == sum(p.numel() for p in select_parameters(unet, name).values())


# --- every baseline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_edit_and_the_world_is_unchanged(tiny_world, name):
    before = {n: p.detach().clone() for n, p in tiny_world.unet.named_parameters()}
    a, b, other = (forget(tiny_world, name, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.delta[n], b.delta[n]) for n in a.delta)
    assert any(not torch.equal(a.delta[n], other.delta[n]) for n in a.delta) and a.norm() > 0
    assert all(torch.equal(p, before[n]) for n, p in tiny_world.unet.named_parameters())
    group = "kv" if name == "abconcept" else "xattn"
    assert set(a.delta) == set(select_parameters(tiny_world.unet, group))
    assert forget(tiny_world, name, steps=0).norm() == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_the_same_draw(tiny_world, monkeypatch, name):
    got = parts_of(tiny_world, monkeypatch, name)
    before = {key: value.item() for key, value in got.terms(0).items()}
    schedule = training.Schedule(steps=15, lr=5e-3, decay="constant")
    training.run(got.parameters, lambda *_: got.terms(0), got.weights, schedule, progress=False)
    after = {key: value.item() for key, value in got.terms(0).items()}
    key = "logits" if name == "fmn_sepme" else "alignment"
    assert 0 < after[key] < 0.9 * before[key]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_step_do_not_depend_on_the_step_before(tiny_world, monkeypatch, name):
    got = parts_of(tiny_world, monkeypatch, name)
    fresh = gradients(got, 1)
    seen = {}
    for accumulate in (False, True):
        kept = seen.setdefault(accumulate, [])
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, n=n, kept=kept: kept.append((n, p.grad.clone())))
            for n, p in got.trained.items()
        ]
        schedule = training.Schedule(steps=2, lr=1e-12, clip=None, accumulate_grads=accumulate)
        for p in got.trained.values():
            p.grad = None
        training.run(got.parameters, lambda step, *_: got.terms(step), got.weights, schedule, progress=False)
        for hook in hooks:
            hook.remove()
    reached = {n: g for n, g in zip(got.trained, fresh, strict=True) if g is not None}
    assert len(seen[False]) == 2 * len(reached) and any(g.abs().max() > 0 for g in reached.values())
    second, piled = (dict(seen[accumulate][len(reached) :]) for accumulate in (False, True))
    assert all(torch.allclose(second[n], g, rtol=1e-3, atol=1e-7) for n, g in reached.items())
    assert not all(torch.allclose(piled[n], g, rtol=1e-3, atol=1e-7) for n, g in reached.items())


@pytest.mark.parametrize("name", NAMES)
def test_resume_gives_the_same_edit(tiny_world, tmp_path, monkeypatch, name):
    options = {"steps": 5, "batch_size": 1}
    whole = forget(tiny_world, name, **options)
    real, calls = training.run, []

    def dies(parameters, terms, *rest, **options):
        def dying(step, *more):
            calls.append(step)
            if step == 3:
                raise KeyboardInterrupt
            return terms(step, *more)

        return real(parameters, dying, *rest, save_every=2, **options)

    file = str(tmp_path / "run.safetensors")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(METHODS[name], "run", dies)
        forget(tiny_world, name, checkpoint=file, **options)
    again = forget(tiny_world, name, checkpoint=file, **options)
    assert calls == [0, 1, 2, 3] and all(torch.equal(again.delta[n], whole.delta[n]) for n in whole.delta)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        *((name, {"group": "attention"}, "unknown group.*'attention'.*ESD-x") for name in NAMES),
        ("esd", {"variant": "draft"}, "'draft' of ESD"),
        ("esd", {"rollout_steps": 0}, "0 steps"),
        ("sdd", {"ema": 1.0}, r"ema is 1\.0"),
        ("abconcept", {"variant": "draft"}, "'draft' of AbConcept"),
        ("abconcept", {"target": "mean"}, "'mean'"),
        ("abconcept", {"variant": "sepme-code", "target": "noise"}, "no noise-based"),
        ("abconcept", {"prior": -1.0}, r"prior is -1\.0"),
        ("abconcept", {"images": 0}, "images is 0"),
        ("abconcept", {"anchor": "church"}, "anchor of 'church' is 'church'"),
        ("abconcept", {"anchor": {"dog": "cat"}}, "anchor of 'church' is None"),
        ("fmn_sepme", {"template": "a painting"}, "'a painting'"),
    ],
)
def test_bad_input(tiny_world, name, options, said):
    with pytest.raises(ValueError, match=said):
        forget(tiny_world, name, **options)


# --- ESD and SDD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_esd_is_its_equation(tiny_world, monkeypatch, variant):
    """Restated from what the rollout returned: the target is the frozen model's, whatever the increments are."""
    got = parts_of(tiny_world, monkeypatch, "esd", variant=variant, eta=0.7)
    randomise(got.trained)
    seen = watch_rollout(METHODS["esd"], monkeypatch)
    loss = got.terms(0)["alignment"]
    with torch.no_grad():
        null = tiny_world.encode([""]).expand_as(seen["c"])
        eps_c, eps_null = (tiny_world.unet(seen["x_t"], seen["t"], states).sample for states in (seen["c"], null))
        eps_hat = predict(tiny_world.unet, got.trained, seen["x_t"], seen["t"], seen["c"])
    assert torch.isclose(loss, (eps_hat - (eps_null - 0.7 * (eps_c - eps_null))).pow(2).mean(), rtol=1e-4)
    assert torch.equal(seen["c"], tiny_world.encode(["church"]).expand_as(seen["c"]))
    assert set(seen["increments"]) == (set(got.trained) if variant == "paper" else set())


def test_sdd_returns_the_average_of_its_students(tiny_world, monkeypatch):
    """The teacher by hand: sum_k (1 - m) m^(n - k) delta_k, which also draws; the target is the student's own."""
    students, teachers, real = [], [], training.run

    def watched(parameters, terms, *rest, **options):
        names = [n for n in parameters if not n.startswith("teacher.")]

        def watching(*args):
            students.append({n: parameters[n].detach().clone() for n in names})
            values = terms(*args)
            teachers.append({n: parameters[f"teacher.{n}"].clone() for n in names})
            return values

        history = real(parameters, watching, *rest, **options)
        students.append({n: parameters[n].detach().clone() for n in names})
        return history

    monkeypatch.setattr(sdd, "run", watched)
    edit = forget(tiny_world, "sdd", steps=4, ema=0.75)
    for n, taught in edit.delta.items():
        average = sum(0.25 * 0.75 ** (4 - k) * students[k][n] for k in range(1, 5))
        torch.testing.assert_close(taught, average)
        torch.testing.assert_close(teachers[1][n], 0.25 * students[1][n])
    assert edit.norm() > 0


def test_sdd_is_its_equation(tiny_world, monkeypatch):
    got = parts_of(tiny_world, monkeypatch, "sdd", concept=["church", "dog"])
    randomise(got.trained)
    seen = watch_rollout(sdd, monkeypatch)
    loss = got.terms(0)["alignment"]
    joined = tiny_world.encode(["church, dog"])
    assert torch.equal(seen["c"], joined.expand_as(seen["c"]))
    assert all(seen["increments"][n].data_ptr() == got.parameters[f"teacher.{n}"].data_ptr() for n in got.trained)
    pick = torch.randint(2, (2,), generator=generator_of(0, 0))
    c = tiny_world.encode(["church", "dog"])[pick]
    with torch.no_grad():
        eps_null, eps_c = branches(tiny_world.unet, got.trained, seen["x_t"], seen["t"], c, tiny_world.encode([""]))
    assert torch.isclose(loss, (eps_c - eps_null).pow(2).mean(), rtol=1e-4)


# --- AbConcept and SepME's own baselines ------------------------------------------------------------------------------


def test_caption_pairs_differ_by_the_name_alone(tiny_world):
    pairs = abconcept.caption_pairs
    assert pairs(tiny_world, "church", "castle", 3) == [
        ("church", "castle"), ("a picture of a church", "a picture of a castle"), ("church", "castle"),
    ]  # fmt: skip
    assert pairs(tiny_world, "santa claus", "", 2) == [("santa claus", ""), ("a picture of a santa claus", "")]
    assert pairs(tiny_world, "Noto", "", 4) == [
        ("Noto", ""), ("church in the style of Noto", "church"),
        ("Noto", ""), ("castle in the style of Noto", "castle"),
    ]  # fmt: skip
    assert pairs(tiny_world, "Noto", "OpenMoji", 2)[1] == (
        "church in the style of Noto",
        "church in the style of OpenMoji",
    )


@pytest.mark.parametrize(
    ("options", "of"),
    [
        ({"anchor": "castle"}, "model"),
        ({"anchor": "castle", "target": "noise"}, "noise"),
        ({"anchor": "castle", "prior": 0.0}, "model"),
        ({"anchor": "picture", "variant": "sepme-code"}, "sepme"),
    ],
)
def test_abconcept_is_its_equation(tiny_world, monkeypatch, options, of):
    got = parts_of(tiny_world, monkeypatch, "abconcept", images=1, **options)  # one picture: the draw of it is known
    randomise(got.trained)
    values, generator = got.terms(0), generator_of(0, 0)
    options = abconcept.Options(images=1, **options)
    latents, captions, anchors = abconcept.training_pictures(tiny_world, ["church"], options, 0)
    torch.randint(1, (2,), generator=generator)
    noise = torch.randn((2, *latents.shape[1:]), generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    x_t = add_noise(latents.expand_as(noise), noise, t, tiny_world.pipe.scheduler.alphas_cumprod)

    def eps(increments, prompt):
        with torch.no_grad():
            return predict(tiny_world.unet, increments, x_t, t, tiny_world.encode([prompt] * 2))

    assert (captions, anchors) == ((["church picture"], ["picture"]) if of == "sepme" else (["church"], ["castle"]))
    eps_c, eps_anchor, frozen = eps(got.trained, captions[0]), eps(got.trained, anchors[0]), eps({}, anchors[0])
    target, kept = {"model": (eps_anchor, noise), "noise": (noise, noise), "sepme": (frozen, frozen)}[of]
    assert torch.isclose(values["alignment"], (eps_c - target).pow(2).mean(), rtol=1e-4)
    if options.prior == 0.0:
        assert set(values) == {"alignment"}
    else:
        assert torch.isclose(values["prior"], (eps_anchor - kept).pow(2).mean(), rtol=1e-4)
    edit = forget(tiny_world, "abconcept", images=1, anchor="castle", variant=options.variant)
    assert (edit.meta["options"]["prior"], edit.meta["options"]["group"]) == (
        (10.0, "xattn") if of == "sepme" else (1.0, "kv")
    )


def test_sepme_fmn_is_its_equation(tiny_world, monkeypatch):
    """Restated layer by layer with the increments merged into copies of the projections."""
    got = parts_of(tiny_world, monkeypatch, "fmn_sepme")
    randomise(got.trained)
    states = tiny_world.encode(["a painting of church"] * 2)
    without = tiny_world.encode(["a painting of"] * 2)
    x_t, t, queries = noise_for(tiny_world, 2, 0), torch.tensor([10, 700]), {}
    hooks = [
        attn.to_q.register_forward_hook(lambda m, a, q, n=n: queries.update({n: q}))
        for n, attn in cross_attentions(tiny_world.unet).items()
    ]
    with torch.no_grad(), fmn_sepme.logit_differences(tiny_world.unet, states, without) as differences:
        predict(tiny_world.unet, got.trained, x_t, t, states)
    for hook in hooks:
        hook.remove()
    for (n, attn), ours in zip(cross_attentions(tiny_world.unet).items(), differences, strict=True):
        W_k = attn.to_k.weight + got.trained[f"{n}.to_k.weight"].detach()
        d = W_k.shape[0] // attn.heads
        for h in range(attn.heads):
            part = slice(h * d, (h + 1) * d)
            logits = [queries[n][..., part] @ (s @ W_k.T)[..., part].transpose(1, 2) for s in (states, without)]
            torch.testing.assert_close(ours[:, h], (logits[0] - logits[1]) / math.sqrt(d), atol=1e-4, rtol=1e-3)
    same = [
        d[..., :4].abs().max() for d in differences
    ]  # start mark and the shared words: the text is read left to right
    assert max(same) < 1e-5 and min(d[..., 4:].abs().max() for d in differences) > 1e-3
    assert not any(m._forward_hooks for m in tiny_world.unet.modules())


def test_several_concepts_and_the_seconds_by_part(tiny_world):
    concepts = ["church", "Noto"]
    for name, parts in {
        "esd": {"rollout", "training"},
        "sdd": {"rollout", "training"},
        "abconcept": {"pictures", "training"},
    }.items():
        edit = forget(tiny_world, name, concept=concepts)
        assert edit.meta["concepts"] == concepts and set(edit.meta["parts"]) == parts
        assert 0 < sum(edit.meta["parts"].values()) <= edit.meta["seconds"] + 0.1
    esd = forget(tiny_world, "esd", group="ESD-u")
    assert set(esd.delta) == set(select_parameters(tiny_world.unet, "ESD-u")) and esd.norm() > 0
