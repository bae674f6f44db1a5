"""G-CiRs: the loss by hand, eta's gradient, one network for two models, early stop, resume."""

import pytest
import torch
from conftest import randomise

from helpers import losses, unlearn
from helpers.methods import gcirs
from helpers.training import new_increments, predict

FAST = {"images": 2, "steps": 3, "batch_size": 2, "tau": -1e9, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", tmp_path)


def test_correlation_by_hand():
    base, edited = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[2.0, 1.0], [5.0, -1.0]])
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
    """Conditional and unconditional in one batch, base and edited in one network: as in four separate passes."""
    delta = randomise(new_increments(tiny_world.unet), 0.05)
    x = torch.randn(3, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 400, 990])
    c, null = tiny_world.encode(["church", ""])
    for increments in ({}, delta):
        eps = [predict(tiny_world.unet, increments, x, t, s.expand(3, -1, -1)) for s in (c, null)]
        ours = gcirs.delta_eps(tiny_world.unet, increments, x, t, c, null)
        assert torch.allclose(ours, eps[0] - eps[1], atol=1e-5)


def test_the_first_value_is_the_base_correlated_with_itself(tiny_world):
    edit = unlearn(tiny_world, "church", method="gcirs", **FAST)
    assert edit.history[0]["correlation of church"] > 0  # mean of a square
    assert set(edit.delta) == {n for n, _ in tiny_world.unet.named_parameters() if "attn2." in n}
    again = unlearn(tiny_world, "church", method="gcirs", **FAST)
    assert all(torch.equal(edit.delta[n], again.delta[n]) for n in edit.delta)


def test_the_correlation_falls_and_the_run_stops_at_tau(tiny_world):
    options = {**FAST, "steps": 60, "lr": 1e-2}
    free = unlearn(tiny_world, "church", method="gcirs", **options)
    values = [row["correlation of church"] for row in free.history]
    assert len(values) == 60 and values[-1] < 0 < values[0]  # unbounded below: nothing holds it at zero
    stopped = unlearn(tiny_world, "church", method="gcirs", **{**options, "tau": 0.0})
    assert 12 <= len(stopped.history) < 60 and stopped.norm() < free.norm()
    statistic = [row["statistics"]["correlation of church"] for row in stopped.history]
    assert statistic[-1] < 0 and min(statistic[11:-1], default=0) >= 0


def test_several_concepts_stop_one_by_one(tiny_world):
    edit = unlearn(tiny_world, ["church", "santa claus"], method="gcirs", **{**FAST, "steps": 16, "tau": (1e9, -1e9)})
    assert edit.history[-1]["stopped"] == ["correlation of church"] and len(edit.history) == 16
    assert "correlation of church" not in edit.history[-1] and "correlation of santa claus" in edit.history[-1]


def test_both_etas_scale_the_gradient_and_not_the_value(tiny_world):
    runs = {
        eta: unlearn(tiny_world, ["church", "Noto"], method="gcirs", eta=eta, **{**FAST, "steps": 2})
        for eta in ("tensor-norm", "scalar")
    }
    rows = [run.history[0] for run in runs.values()]
    assert rows[0]["correlation of Noto"] == rows[1]["correlation of Noto"]
    assert any(not torch.equal(runs["scalar"].delta[n], runs["tensor-norm"].delta[n]) for n in runs["scalar"].delta)


def test_fixed_draws_compute_the_base_once(tiny_world, monkeypatch):
    calls = []
    real = gcirs.delta_eps
    monkeypatch.setattr(
        gcirs, "delta_eps", lambda unet, inc, *rest: (calls.append(len(inc)), real(unet, inc, *rest))[1]
    )
    unlearn(tiny_world, "church", method="gcirs", draws=5, **FAST)
    assert calls.count(0) == 1 and len(calls) == 1 + FAST["steps"]


def test_resume_is_bit_exact(tiny_world, tmp_path):
    options = {**FAST, "steps": 24}
    whole = unlearn(tiny_world, "church", method="gcirs", **options)
    file = str(tmp_path / "run.safetensors")
    real, calls = gcirs.losses.mean_l1, []

    def dies(tensors):
        calls.append(1)
        if len(calls) == 22:
            raise KeyboardInterrupt
        return real(tensors)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gcirs.losses, "mean_l1", dies)
        unlearn(tiny_world, "church", method="gcirs", checkpoint=file, **options)
    again = unlearn(tiny_world, "church", method="gcirs", checkpoint=file, **options)
    assert all(torch.equal(again.delta[n], whole.delta[n]) for n in whole.delta)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lam": -1.0}, "lam is"),
        ({"eta": "mean"}, "'mean'"),
        ({"draws": 0}, "draws is 0"),
        ({"tau": (0.0, 0.0)}, "2 values"),
    ],
)
def test_bad_input(tiny_world, options, said):
    with pytest.raises(ValueError, match=said):
        unlearn(tiny_world, "church", method="gcirs", **{**FAST, **options})
