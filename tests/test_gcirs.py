"""G-CiRs: the loss by hand, eta's gradient, one network for two models, early stop."""

import pytest
import torch
from conftest import random_edit

from helpers import losses, unlearn
from helpers.denoise import predict
from helpers.methods import gcirs, options_of
from helpers.parameters import select_parameters
from helpers.seeds import step_generator

FAST = {"images": 2, "steps": 3, "batch_size": 2, "tau": -1e9}
pytestmark = pytest.mark.usefixtures("cache")


def forget(world, concept="church", **options):
    return unlearn(world, concept, "gcirs", progress=False, **{**FAST, **options})


def problem_of(world, concepts, seed=0, **options):
    """What G-CiRs hands to the loop."""
    return gcirs.problem(world, concepts, options_of("gcirs", {**FAST, **options}), seed)


def terms_of(problem, step=0, stopped=frozenset()):
    return problem.terms(step, step_generator(0, step), stopped)


def test_correlation_by_hand():
    base = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    edited = torch.tensor([[2.0, 1.0], [5.0, -1.0]])
    assert losses.correlation(base, edited).item() == (2 - 2 + 0 - 3) / 4


def test_balance_by_hand_and_unknown_variant():
    first, product = torch.tensor([3.0, 4.0]), torch.tensor([0.0, -10.0])
    assert losses.balance(first, product).item() == pytest.approx(5 / 10)
    assert losses.balance(first, product, variant="scalar").item() == pytest.approx(3.5 / 5)
    with pytest.raises(ValueError, match="'ratio'"):
        losses.balance(first, product, variant="ratio")


def test_printed_eta_gives_the_second_concept_no_gradient_unless_detached():
    x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    (x.mean().abs() / y.mean().abs() * y.mean()).backward()  # eta_2 L_2 as printed
    assert abs(y.grad.item()) < 1e-7 and x.grad.item() == 1  # zero but for rounding
    y.grad = None
    (losses.balance(x, y, variant="scalar") * y.mean()).backward()
    assert y.grad.item() == pytest.approx(2 / 5)


def test_one_batch_equals_four_passes(tiny_world):
    """Conditional and unconditional in one batch, base and edited in one network: as in four."""
    edited = random_edit(tiny_world, group="xattn", scale=0.05).delta
    x = torch.randn(3, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 400, 990])
    c, null = tiny_world.encode(["church", ""])
    for delta in ({}, edited):
        eps = [predict(tiny_world, delta, x, t, s.expand(3, -1, -1)) for s in (c, null)]
        ours = gcirs.delta_eps(tiny_world, delta, x, t, c, null)
        assert torch.allclose(ours, eps[0] - eps[1], atol=1e-5)


def test_the_first_value_is_the_base_correlated_with_itself(tiny_world):
    problem = problem_of(tiny_world, ["church"])
    assert set(problem.leaves) == set(select_parameters(tiny_world, "xattn"))
    found = gcirs.Correlations(tiny_world, ["church"], options_of("gcirs", FAST), 0)
    seed = torch.randint(2**31, (1,), generator=step_generator(0, 0)).item()
    _, _, base = found.batch("church", torch.Generator().manual_seed(seed))
    values = terms_of(problem)
    assert torch.isclose(values["correlation of church"], base.pow(2).mean(), rtol=1e-5)
    assert values["norm"] == 0 and problem.weights["norm"] == 3e-5


def test_the_correlation_falls_and_the_run_stops_at_tau(tiny_world):
    options = {"steps": 60, "lr": 1e-2}
    free = forget(tiny_world, **options)
    values = [row["correlation of church"] for row in free.history]
    assert len(values) == 60
    assert values[-1] < 0 < values[0]  # unbounded below: nothing holds it at zero
    stopped = forget(tiny_world, **options, tau=0.0)
    assert 12 <= len(stopped.history) < 60 and stopped.norm() < free.norm()
    statistic = [row["statistics"]["correlation of church"] for row in stopped.history]
    assert statistic[-1] < 0 and min(statistic[11:-1], default=0) >= 0


def test_several_concepts_stop_one_by_one(tiny_world):
    edit = forget(tiny_world, ["church", "santa claus"], steps=16, tau=(1e9, -1e9))
    last = edit.history[-1]
    assert last["stopped"] == ["correlation of church"] and len(edit.history) == 16
    assert "correlation of church" not in last and "correlation of santa claus" in last


def test_what_stopped_changes_no_other_concepts_batch(tiny_world):
    problem = problem_of(tiny_world, ["church", "Noto"], eta="scalar")
    whole = terms_of(problem, 5)
    rest = terms_of(problem, 5, frozenset({"correlation of church"}))
    assert set(whole) - set(rest) == {"correlation of church"}
    assert torch.equal(whole["correlation of Noto"], rest["correlation of Noto"])


def test_both_etas_scale_the_gradient_and_not_the_value(tiny_world):
    values, gradients = {}, {}
    for eta in ("tensor-norm", "scalar"):
        problem = problem_of(tiny_world, ["church", "Noto"], eta=eta)
        terms = terms_of(problem)
        values[eta] = {name: value.item() for name, value in terms.items()}
        leaves = list(problem.leaves.values())
        for concept in ("church", "Noto"):
            term = terms[gcirs.term(concept)]
            parts = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
            gradient = torch.cat([g.flatten() for g in parts if g is not None])
            gradients.setdefault(concept, []).append(gradient)
    assert values["tensor-norm"] == values["scalar"]
    assert torch.equal(*gradients["church"])  # eta_1 is 1
    by_norm, by_ratio = gradients["Noto"]
    scale = by_norm.norm() / by_ratio.norm()
    assert abs(scale - 1) > 0.01
    torch.testing.assert_close(by_norm, scale * by_ratio, atol=1e-6, rtol=1e-3)


def test_fixed_triples_compute_the_base_once(tiny_world):
    """Rows that go through the network without a gradient: twice five in the first step only."""
    problem, rows = problem_of(tiny_world, ["church"], fixed_triples=5), []

    def count(module, given):
        if not torch.is_grad_enabled():
            rows[-1] += len(given[0])

    hook = tiny_world.unet.register_forward_pre_hook(count)
    values = []
    for step in (0, 1, 2, 0):
        rows.append(0)
        values.append(terms_of(problem, step)["correlation of church"].item())
    hook.remove()
    assert rows == [2 * 5, 0, 0, 0]
    assert values[0] == values[3] and len(set(values)) == 3  # picked anew, of the same triples


def test_fixed_triples_are_fixed_by_the_runs_seed(tiny_world):
    """Forty steps of two see five triples of image, noise and t, and no other."""
    options = options_of("gcirs", {**FAST, "fixed_triples": 5})
    found, again = (gcirs.Correlations(tiny_world, ["church"], options, 3) for _ in range(2))
    seen = [found.batch("church", step_generator(3, step)) for step in range(40)]
    assert len({x.sum().item() for x_t, _, _ in seen for x in x_t}) == 5
    last = again.batch("church", step_generator(3, 39))
    assert all(torch.equal(a, b) for a, b in zip(last, seen[39], strict=True))


def test_what_the_releases_states_set_unless_told_otherwise():
    assert not options_of("gcirs", {}).accumulate_grads
    for variant in gcirs.VARIANTS:
        assert options_of("gcirs", {"variant": variant}).accumulate_grads
        told = options_of("gcirs", {"variant": variant, "accumulate_grads": False})
        assert not told.accumulate_grads


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lam": -1.0}, "lam is"),
        ({"eta": "mean"}, "unknown eta 'mean'"),
        ({"fixed_triples": 0}, "fixed_triples is 0"),
        ({"tau": (0.0, 0.0)}, "2 values"),
    ],
)
def test_bad_input(tiny_world, options, said):
    with pytest.raises(ValueError, match=said):
        forget(tiny_world, **options)
