"""The baselines against their equations: rollouts, targets, the teacher, anchors, logits."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_edit, randomise
from diffusers import DDIMScheduler

from helpers import denoise, losses, training, unlearn
from helpers.attention import cross_attentions
from helpers.denoise import guided_pair, predict, rollout
from helpers.diffusion import add_noise, coefficient, guide
from helpers.methods import METHODS, abconcept, fmn_sepme, module_of, options_of
from helpers.parameters import group_sizes, select_parameters
from helpers.seeds import step_generator

NAMES = ["esd", "sdd", "abconcept", "fmn_sepme"]
pytestmark = pytest.mark.usefixtures("cache")


def quick(name, **options):
    """A method's options for tests, and the test's own."""
    return {**METHODS[name]["quick"], **options}


def problem_of(world, name, concepts=("church",), seed=0, **options):
    """What a method hands to the loop."""
    return module_of(name).problem(
        world, [*concepts], options_of(name, quick(name, **options)), seed
    )


def terms_of(problem, step=0):
    """The loss terms of one step, as the loop asks for them."""
    return problem.terms(step, step_generator(0, step), frozenset())


def noise_for(world, n, seed):
    return torch.randn(n, *world.latent_shape, generator=torch.Generator().manual_seed(seed))


# --- rollouts


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_noise_level_of_x_t_is_that_of_t(tiny_world, monkeypatch, steps):
    """A network that knows the image keeps DDIM on one line: x_t is that image, noised to t."""
    alpha_bar = tiny_world.alpha_bar
    x_0, x_T = noise_for(tiny_world, 5, 1), noise_for(tiny_world, 5, 2)
    until = torch.tensor([0, 37, 500, 998, 999])
    seen = []

    def oracle(world, delta, x, t, states, null):
        rows = states[:, 0, 0].long()  # each row's states carry its number
        seen.extend(zip(rows.tolist(), t.tolist(), strict=True))
        a = coefficient(alpha_bar, t, x)
        eps = (x - a.sqrt() * x_0[rows]) / (1 - a).sqrt()
        return eps, eps

    monkeypatch.setattr(denoise, "guided_pair", oracle)
    states = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    x_t = rollout(tiny_world, {}, x_T, until, states, states[:1], steps=steps, guidance=3.0)
    eps = (x_T - alpha_bar[-1].sqrt() * x_0) / (1 - alpha_bar[-1]).sqrt()
    wanted = add_noise(x_0, eps, until, alpha_bar)
    torch.testing.assert_close(x_t, wanted, atol=1e-3, rtol=1e-3)
    assert torch.equal(x_t[4], x_T[4])  # t = T - 1 is the noise itself
    assert all(t > until[row] for row, t in seen)
    counts = [sum(row == i for row, _ in seen) for i in range(5)]  # and not one step more:
    assert counts == [math.ceil((999 - u) / (1000 / steps)) for u in until.tolist()]


def test_a_rollout_equals_diffusers_own_ddim(tiny_world):
    config = tiny_world.pipe.scheduler.config
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    states, null = tiny_world.encode(["church", "dog"]), tiny_world.encode([""])
    x = x_T = noise_for(tiny_world, 2, 0)
    with torch.no_grad():
        for t in scheduler.timesteps[:3]:
            both = (null.expand_as(states), states)
            eps_null, eps_c = (tiny_world.unet(x, t, s).sample for s in both)
            x = scheduler.step(guide(eps_null, eps_c, 3.0), t, x).prev_sample
    until = scheduler.timesteps[3].repeat(2)
    ours = rollout(tiny_world, {}, x_T, until, states, null, steps=5, guidance=3.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)  # fp32 sums, in another order


def test_a_row_does_not_depend_on_its_neighbours_and_increments_matter(tiny_world):
    states, null = tiny_world.encode(["church", "dog", "Noto"]), tiny_world.encode([""])
    x_T, until = noise_for(tiny_world, 3, 0), torch.tensor([900, 20, 400])
    how = {"steps": 4, "guidance": 3.0}
    whole = rollout(tiny_world, {}, x_T, until, states, null, **how)
    alone = rollout(tiny_world, {}, x_T[2:], until[2:], states[2:], null, **how)
    torch.testing.assert_close(whole[2:], alone, atol=1e-4, rtol=1e-4)
    delta = {n: d.requires_grad_() for n, d in random_edit(tiny_world, group="xattn").delta.items()}
    other = rollout(tiny_world, delta, x_T, until, states, null, **how)
    assert not other.requires_grad and (other - whole).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    ("steps", "until", "said"),
    [(0, 5, "steps is 0"), (1001, 5, "1001 steps"), (4, 1000, "1000")],
)
def test_bad_rollouts(tiny_world, steps, until, said):
    null, x_T = tiny_world.encode([""]), noise_for(tiny_world, 1, 0)
    with pytest.raises(ValueError, match=said):
        rollout(tiny_world, {}, x_T, torch.tensor([until]), null, null, steps=steps, guidance=3.0)


# --- targets


def test_what_eta_means():
    """Golden values, and the convention of ESD's newer release: its eta = 2 is 1 here."""
    eps_null, eps_c = torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.0])
    assert losses.negated_guidance(eps_null, eps_c).tolist() == [-1.0, 1.0]
    assert losses.negated_guidance(eps_null, eps_c, 2.0).tolist() == [-3.0, 1.5]
    assert torch.equal(losses.negated_guidance(eps_null, eps_c, 0.0), eps_null)
    for eta in (0.5, 1.0, 3.0):
        ours = losses.negated_guidance(eps_null, eps_c, eta)
        assert torch.allclose(ours, (1 + eta) * eps_null - eta * eps_c)  # as SepME prints it
        newer_release = eps_c - (eta + 1) * (eps_c - eps_null)
        assert torch.allclose(ours, newer_release)


def test_alignment_by_hand_and_no_gradient_in_the_target():
    eps_hat, target = torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0])
    loss = losses.alignment(eps_hat.requires_grad_(), target.requires_grad_())
    loss.backward()
    assert loss.item() == 2.5 and eps_hat.grad.tolist() == [1.0, 2.0] and target.grad is None


def test_logit_difference_by_hand():
    layers = [torch.tensor([1.0, 3.0]).view(1, 1, 2, 1), torch.tensor([2.0]).view(1, 1, 1, 1)]
    assert losses.logit_difference(layers).item() == 9.0  # (1 + 9) / 2 + 4
    with pytest.raises(ValueError, match="no attention maps"):
        losses.logit_difference([])


# --- groups


def test_paper_names_of_groups(tiny_world):
    unet, kinds = tiny_world.unet, torch.nn.Linear | torch.nn.Conv2d
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, kinds) and "attn2" not in n}
    expected = {f"unet.{n}.{p}" for n, m in layers.items() for p, _ in m.named_parameters()}
    attention = {f"unet.{n}" for n, _ in unet.named_parameters() if "attn2" in n}
    assert set(select_parameters(tiny_world, "ESD-u")) == expected
    assert set(select_parameters(tiny_world, "ESD-x")) == attention
    strict = set(select_parameters(tiny_world, "ESD-x-strict"))
    assert strict == {n for n in attention if "to_k" in n or "to_v" in n}
    blocks = len(cross_attentions(unet))
    rows = {row["name"]: row for row in group_sizes(tiny_world)}
    assert rows["ESD-x"]["tensors"] == 5 * blocks  # 80 of Stable Diffusion's 16 blocks
    assert rows["ESD-x-strict"]["tensors"] == 2 * blocks  # 32
    for name, row in rows.items():
        chosen = select_parameters(tiny_world, name).values()
        assert row["parameters"] == sum(p.numel() for p in chosen)


# --- every baseline


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained(tiny_world, name):
    group = "kv" if name == "abconcept" else "xattn"
    problem, chosen = problem_of(tiny_world, name), set(select_parameters(tiny_world, group))
    assert set(problem.leaves) == set(problem.delta()) == chosen
    assert all(leaf.requires_grad and not leaf.any() for leaf in problem.leaves.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_the_same_sample(tiny_world, name):
    problem = problem_of(tiny_world, name)
    before = {key: value.item() for key, value in terms_of(problem).items()}
    same = replace(problem, terms=lambda *_: terms_of(problem))
    schedule = training.Training(steps=15, lr=5e-3, decay="constant")
    training.run(same, schedule, progress=False)
    after = {key: value.item() for key, value in terms_of(problem).items()}
    key = "logits" if name == "fmn_sepme" else "alignment"
    assert 0 < after[key] < 0.9 * before[key]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_step_do_not_depend_on_the_step_before(tiny_world, name):
    problem = replace(problem_of(tiny_world, name), after_step=lambda done: None)
    leaves = list(problem.leaves.values())
    fresh = torch.autograd.grad(
        training.total(terms_of(problem, 1), problem.weights), leaves, allow_unused=True
    )
    seen = {}
    for accumulate in (False, True):
        found = []

        def gradients(terms, weights, leaves, accumulate=accumulate, found=found):
            way = training.accumulated if accumulate else training.backward
            loss = way(terms, weights, leaves)
            found.append({n: p.grad.clone() for n, p in leaves.items() if p.grad is not None})
            return loss

        for leaf in leaves:
            leaf.grad = None
        schedule = training.Training(steps=2, lr=1e-12, clip=None)
        training.run(replace(problem, gradients=gradients), schedule, progress=False)
        seen[accumulate] = found
    reached = {n: g for n, g in zip(problem.leaves, fresh, strict=True) if g is not None}
    assert any(g.abs().max() > 0 for g in reached.values())
    second, piled = seen[False][1], seen[True][1]
    assert set(second) == set(piled) == set(reached)
    close = {"rtol": 1e-3, "atol": 1e-7}
    assert all(torch.allclose(second[n], g, **close) for n, g in reached.items())
    assert not all(torch.allclose(piled[n], g, **close) for n, g in reached.items())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sdd", {"ema": 1.0}, r"ema is 1\.0"),
        ("abconcept", {"target": "mean"}, "unknown target 'mean'"),
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
        problem_of(tiny_world, name, **options)


@pytest.mark.parametrize("name", ["esd", "sdd"])
def test_a_rollout_without_steps_is_refused(tiny_world, name):
    with pytest.raises(ValueError, match="steps is 0"):
        unlearn(tiny_world, "church", name, progress=False, **quick(name, rollout_steps=0))


# --- ESD and SDD


def batch_of(world, problem, states, until_by, joined=None):
    """The first step's c, t and x_t, made again from its seed; until_by: increments that sample."""
    generator = step_generator(0, 0)
    c = states[torch.randint(len(states), (2,), generator=generator)]
    t = torch.randint(1000, (2,), generator=generator)
    x_T = torch.randn((2, *world.latent_shape), generator=generator)
    null = world.encode([""])
    asked = c if joined is None else joined.expand_as(c)
    x_t = rollout(world, until_by, x_T, t, asked, null, steps=3, guidance=3.0)
    return c, t, x_t, null


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_esd_is_its_equation(tiny_world, variant):
    """The target is the frozen model's, whatever the increments are; who samples x_t differs."""
    problem = problem_of(tiny_world, "esd", variant=variant, eta=0.7)
    delta = randomise(problem.leaves)
    losses_by = {}
    for sampled_by, increments in {"paper": delta, "code": {}}.items():
        c, t, x_t, null = batch_of(tiny_world, problem, tiny_world.encode(["church"]), increments)
        with torch.no_grad():
            eps_c, eps_null = (tiny_world.unet(x_t, t, s).sample for s in (c, null.expand_as(c)))
            eps_hat = predict(tiny_world, delta, x_t, t, c)
        target = eps_null - 0.7 * (eps_c - eps_null)
        losses_by[sampled_by] = (eps_hat - target).pow(2).mean()
    ours = terms_of(problem)["alignment"]
    assert torch.isclose(ours, losses_by[variant], rtol=1e-4)
    assert not torch.isclose(losses_by["paper"], losses_by["code"], rtol=1e-3)


def test_sdd_returns_the_average_of_its_students(tiny_world):
    """The teacher by hand: sum_k (1 - m) m^(n - k) delta_k."""
    problem = problem_of(tiny_world, "sdd", ema=0.75)
    students, teachers, terms = [], [], problem.terms

    def note():
        students.append({n: v.detach().clone() for n, v in problem.leaves.items()})
        teachers.append({n: v.clone() for n, v in problem.state.items()})

    def noting(*args):
        note()
        return terms(*args)

    schedule = options_of("sdd", quick("sdd", steps=4))
    training.run(replace(problem, terms=noting), schedule, progress=False)
    note()
    for n, taught in problem.delta().items():
        average = sum(0.25 * 0.75 ** (4 - k) * students[k][n] for k in range(1, 5))
        torch.testing.assert_close(taught, average)
        torch.testing.assert_close(teachers[1][n], 0.25 * students[1][n])
        assert torch.equal(taught, problem.state[n]) and not taught.requires_grad
    assert any(taught.any() for taught in problem.delta().values())


def test_sdd_is_its_equation(tiny_world):
    """The teacher samples x_t from all names at once; the target is the student's own."""
    problem = problem_of(tiny_world, "sdd", concepts=["church", "dog"])
    student, teacher = randomise(problem.leaves), problem.state
    for n, value in teacher.items():
        value.copy_(-0.5 * student[n].detach())
    states, joined = tiny_world.encode(["church", "dog"]), tiny_world.encode(["church, dog"])
    c, t, x_t, null = batch_of(tiny_world, problem, states, teacher, joined)
    with torch.no_grad():
        eps_null, eps_c = guided_pair(tiny_world, student, x_t, t, c, null)
    loss = terms_of(problem)["alignment"]
    assert torch.isclose(loss, (eps_c - eps_null).pow(2).mean(), rtol=1e-4)


# --- AbConcept and SepME's own baselines


def test_caption_pairs_differ_by_the_name_alone(tiny_world):
    pairs = abconcept.caption_pairs
    assert pairs(tiny_world, "church", "castle", 3) == [
        ("church", "castle"),
        ("a picture of a church", "a picture of a castle"),
        ("church", "castle"),
    ]
    assert pairs(tiny_world, "santa claus", "", 2) == [
        ("santa claus", ""),
        ("a picture of a santa claus", ""),
    ]
    assert pairs(tiny_world, "Noto", "", 4) == [
        ("Noto", ""),
        ("church in the style of Noto", "church"),
        ("Noto", ""),
        ("castle in the style of Noto", "castle"),
    ]
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
def test_abconcept_is_its_equation(tiny_world, options, of):
    given = {"images": 1, **options}  # one image, so that which one is picked is known
    problem = problem_of(tiny_world, "abconcept", **given)
    delta = randomise(problem.leaves)
    values, generator = terms_of(problem), step_generator(0, 0)
    chosen = options_of("abconcept", quick("abconcept", **given))
    latents, captions, anchors = abconcept.training_set(tiny_world, ["church"], chosen, 0)
    torch.randint(1, (2,), generator=generator)
    noise = torch.randn((2, *latents.shape[1:]), generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    x_t = add_noise(latents.expand_as(noise), noise, t, tiny_world.alpha_bar)

    def eps(increments, prompt):
        with torch.no_grad():
            return predict(tiny_world, increments, x_t, t, tiny_world.encode([prompt] * 2))

    sepme = (["church picture"], ["picture"])
    assert (captions, anchors) == (sepme if of == "sepme" else (["church"], ["castle"]))
    eps_c, eps_anchor, frozen = (
        eps(delta, captions[0]), eps(delta, anchors[0]), eps({}, anchors[0]),
    )  # fmt: skip
    target, anchor_target = {
        "model": (eps_anchor, noise), "noise": (noise, noise), "sepme": (frozen, frozen),
    }[of]  # fmt: skip
    assert torch.isclose(values["alignment"], (eps_c - target).pow(2).mean(), rtol=1e-4)
    if chosen.prior == 0.0:
        assert set(values) == {"alignment"}
    else:
        error = (eps_anchor - anchor_target).pow(2).mean()
        assert torch.isclose(values["prior"], error, rtol=1e-4)


def test_what_abconcepts_variants_set_unless_told_otherwise():
    for variant, preset in {"paper": (1.0, "kv"), "sepme-code": (10.0, "xattn")}.items():
        options = options_of("abconcept", {"variant": variant})
        assert (options.prior, options.group) == preset
        options = options_of("abconcept", {"variant": variant, "prior": 2.0, "group": "ESD-u"})
        assert (options.prior, options.group) == (2.0, "ESD-u")


def test_sepme_fmn_is_its_equation(tiny_world):
    """Restated layer by layer with the increments merged into copies of the projections."""
    delta = randomise(problem_of(tiny_world, "fmn_sepme").leaves)
    states = tiny_world.encode(["a painting of church"] * 2)
    without = tiny_world.encode(["a painting of"] * 2)
    x_t, t, queries = noise_for(tiny_world, 2, 0), torch.tensor([10, 700]), {}
    layers = cross_attentions(tiny_world.unet)
    hooks = [
        attn.to_q.register_forward_hook(lambda m, a, q, n=n: queries.update({n: q}))
        for n, attn in layers.items()
    ]
    unet = tiny_world.unet
    with torch.no_grad(), fmn_sepme.logit_differences(unet, states, without) as differences:
        predict(tiny_world, delta, x_t, t, states)
    for hook in hooks:
        hook.remove()
    for (n, attn), ours in zip(layers.items(), differences, strict=True):
        W_k = attn.to_k.weight + delta[f"unet.{n}.to_k.weight"].detach()
        d = W_k.shape[0] // attn.heads
        for h in range(attn.heads):
            q, W_h = queries[n][..., h * d : (h + 1) * d], W_k[h * d : (h + 1) * d]
            ours_h, logits = ours[:, h], [q @ (s @ W_h.T).mT for s in (states, without)]
            wanted = (logits[0] - logits[1]) / math.sqrt(d)
            torch.testing.assert_close(ours_h, wanted, atol=1e-4, rtol=1e-3)
    shared = [d[..., :4] for d in differences]  # BOS and "a painting of": the text is read forwards
    assert max(d.abs().max() for d in shared) < 1e-5
    assert min(d[..., 4:].abs().max() for d in differences) > 1e-3
    assert not any(m._forward_hooks for m in tiny_world.unet.modules())


def test_several_concepts_and_the_seconds_by_part(tiny_world):
    concepts = ["church", "Noto"]
    for name in NAMES:
        edit = unlearn(tiny_world, concepts, name, progress=False, **quick(name))
        rollouts = {"rollout"} if METHODS[name]["rollouts"] else set()
        assert edit.erased == concepts and edit.norm() > 0
        assert set(edit.meta["timings"]) == {"preparation", "training"} | rollouts
        assert 0 < sum(edit.meta["timings"].values()) <= edit.meta["seconds"] + 0.1


def test_esd_trains_the_whole_unet_but_cross_attention_as_esd_u(tiny_world):
    options = quick("esd", group="ESD-u")
    edit = unlearn(tiny_world, "church", "esd", progress=False, **options)
    assert set(edit.delta) == set(select_parameters(tiny_world, "ESD-u")) and edit.norm() > 0
