"""Notebooks 07 and 08: the checks of their exercises, the panel that erases and restores, and the letters of the prose."""

import pytest
import torch

from helpers import check, nullspace, sample, widgets
from helpers.edits import Edit
from helpers.training import Schedule, new_increments, run


def correlation_slope(base, edited):
    return base / base.numel()


def stop_step(values, tau=0.0, momentum=0.9, min_steps=12):
    m = values[0]
    for n, value in enumerate(values, start=1):
        m = momentum * m + (1 - momentum) * value
        if n >= min_steps and m < tau:
            return n
    return len(values)


def eta_gradients(first, second, detach):
    L_1, L_2 = (torch.tensor(value, requires_grad=True) for value in (first, second))
    eta = L_1.abs() / L_2.abs()
    (L_1 + (eta.detach() if detach else eta) * L_2).backward()
    return L_1.grad.item(), L_2.grad.item()


def my_null_space(A, tolerance=1e-6):
    _, s, Vh = torch.linalg.svd(A.double(), full_matrices=True)
    return Vh[int((s > tolerance * s[0]).sum()) :].T


def capacity(width, length):
    return (width - 2) // (length - 1)


RIGHT = {
    "correlation_slope": [correlation_slope],
    "stop_step": [stop_step],
    "eta_gradients": [eta_gradients],
    "null_space": [
        lambda A, tolerance: nullspace.null_space(A, tolerance=tolerance),
        my_null_space,
    ],
    "capacity": [capacity],
}


def from_zero(values, tau, momentum, min_steps):
    return stop_step([0.0, *values], tau, momentum, min_steps + 1) - 1


def unsmoothed(values, tau, momentum, min_steps):
    return stop_step(values, tau, 0.0, min_steps)


def swapped(values, tau, momentum, min_steps):
    return stop_step(values, tau, 1 - momentum, min_steps)


def impatient(values, tau, momentum, min_steps):
    return stop_step(values, tau, momentum, 1)


def counted_from_zero(values, tau, momentum, min_steps):
    return stop_step(values, tau, momentum, min_steps) - 1


def sticky(values, tau, momentum, min_steps):
    """Remembers that it was below tau once."""
    return max(min_steps, stop_step(values, tau, momentum, 1))


def signed_eta(first, second, detach):
    L_1, L_2 = (torch.tensor(value, requires_grad=True) for value in (first, second))
    eta = L_1 / L_2
    (L_1 + (eta.detach() if detach else eta) * L_2).backward()
    return L_1.grad.item(), L_2.grad.item()


def svd(A):
    return torch.linalg.svd(A.double(), full_matrices=True)


WRONG = {
    "correlation_slope": [
        lambda base, edited: base,  # the sum's
        lambda base, edited: edited / base.numel(),  # with respect to the base
        lambda base, edited: (base + edited) / base.numel(),
        lambda base, edited: 2 * (base * edited).mean() * base / base.numel(),  # the square's
        lambda base, edited: base / len(base),
    ],
    "stop_step": [from_zero, unsmoothed, swapped, impatient, counted_from_zero, sticky],
    "eta_gradients": [
        lambda first, second, detach: eta_gradients(first, second, True),  # always detached
        lambda first, second, detach: eta_gradients(first, second, False),  # never
        lambda first, second, detach: eta_gradients(second, first, detach)[::-1],  # upside down
        lambda first, second, detach: eta_gradients(first, second, detach)[::-1],  # the wrong way round
        signed_eta,
    ],
    "null_space": [
        lambda A, tolerance: svd(A)[2][len(A) :].T,  # rows counted, not the rank
        lambda A, tolerance: svd(A)[2][:, int((svd(A)[1] > tolerance * svd(A)[1][0]).sum()) :],  # columns of Vh
        lambda A, tolerance: svd(A)[2][int((svd(A)[1] > tolerance).sum()) :].T,  # an absolute tolerance
        lambda A, tolerance: svd(A)[2][int((svd(A)[1] > 0).sum()) :].T,  # exact zeros
        lambda A, tolerance: 2 * my_null_space(A, tolerance),
        lambda A, tolerance: my_null_space(A, tolerance).T,
        lambda A, tolerance: torch.linalg.svd(A)[2][int((svd(A)[1] > tolerance * svd(A)[1][0]).sum()) :].T,  # in fp32
        lambda A, tolerance: nullspace.normalised_rref(A),  # the same space, not perpendicular
    ],
    "capacity": [
        lambda width, length: width // length,
        lambda width, length: (width - 1) // (length - 1),  # the space is empty
        lambda width, length: (width - 1) / (length - 1),
        lambda width, length: width // (length - 1),
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_checks_accept_right_answers_and_greet_an_untouched_stub(name, capsys):
    for right in RIGHT[name]:
        getattr(check, name)(right)
        assert "right" in capsys.readouterr().out
    for nothing in (None, ...):
        getattr(check, name)(lambda *_, nothing=nothing: nothing)
        assert "not yet" in capsys.readouterr().out


@pytest.mark.parametrize("name, wrong", [(n, w) for n, answers in WRONG.items() for w in answers])
def test_checks_reject_plausible_wrong_answers(name, wrong):
    with pytest.raises(AssertionError, match=r"\w"):
        getattr(check, name)(wrong)


@pytest.mark.parametrize(
    ("tau", "momentum", "min_steps"), [(0.0, 0.6, 1), (0.0, 0.9, 2), (-0.2, 0.5, 7), (0.5, 0.9, 1)]
)
def test_the_stop_of_exercise_2_is_the_loops(tau, momentum, min_steps):
    values = [1.0, 0.7, 0.2, -0.4, -0.3, -0.8, -0.5, -0.9]
    x = torch.zeros((), requires_grad=True)
    watched = {"stop_below": {"L": tau}, "momentum": momentum, "min_steps": min_steps}
    schedule = Schedule(steps=len(values), decay="constant", **watched)

    def terms(step, generator, stopped):
        return {"L": values[step] + 0 * x}

    history = run({"x": x}, terms, {"L": 1.0}, schedule, progress=False)
    assert len(history) == stop_step(values, tau, momentum, min_steps)


@pytest.fixture
def edits(tiny_world) -> dict[str, Edit]:
    """Two edits of random numbers, large enough to change every picture."""
    found = {}
    for i, name in enumerate(("Noto", "Twemoji")):
        generator = torch.Generator().manual_seed(i)
        delta = {n: torch.randn(v.shape, generator=generator) for n, v in new_increments(tiny_world.unet, "kv").items()}
        found[name] = Edit(delta, meta={"base": tiny_world.fingerprint()})
    return found


def pictures(figure) -> list[torch.Tensor]:
    return [torch.as_tensor(ax.images[0].get_array().data) for ax in figure.axes]


def test_merged_adds_what_is_named(edits):
    assert widgets.merged(edits, []) is None
    both = widgets.merged(edits, ["Noto", "Twemoji"])
    assert all(torch.equal(both.delta[n], edits["Noto"].delta[n] + edits["Twemoji"].delta[n]) for n in both.delta)
    with pytest.raises(ValueError, match="no edit for church: choose from Noto, Twemoji"):
        widgets.merged(edits, ["Noto", "church"])


def test_the_figure_shows_the_base_and_the_chosen_sum(tiny_world, edits):
    chosen = {"seed": 3, "guidance": 2.0, "steps": 2}
    same = pictures(widgets.erasure_figure(tiny_world, edits, "church", **chosen))
    assert torch.equal(same[0], same[1])
    figure = widgets.erasure_figure(tiny_world, edits, "church", erased=("Twemoji", "Noto"), **chosen)
    assert [ax.get_title() for ax in figure.axes] == ["base", "erased: Twemoji, Noto"]
    base, edited = pictures(figure)
    assert torch.equal(base, same[0]) and not torch.allclose(edited, base, atol=1e-3)
    drawn = sample(tiny_world, ["church"], [3], edits["Twemoji"] + edits["Noto"], 2, 2.0, progress=False)
    assert torch.equal(edited, drawn[0].permute(1, 2, 0))


def test_the_panel_redraws_the_figure_of_the_plain_call(tiny_world, edits):
    panel = widgets.erasure_panel(tiny_world, edits, "church", erased=("Noto",), guidance=2.0, steps=2)
    (noto, twemoji), (words, seeds, scale), said, picture = (getattr(c, "children", c) for c in panel.children)

    def plain(prompt="church", **options) -> bytes:
        return widgets.png(widgets.erasure_figure(tiny_world, edits, prompt, steps=2, **options))

    assert noto.value and not twemoji.value and said.value == ""
    assert picture.value == plain(erased=["Noto"], guidance=2.0)
    noto.value = False
    assert picture.value == plain(guidance=2.0)
    twemoji.value = True
    seeds.value = 5
    scale.value = 3.0
    words.value = "dog"
    shown = picture.value
    assert shown == plain("dog", erased=["Twemoji"], seed=5, guidance=3.0)
    words.value = "dog " * 40  # longer than the text length
    assert "shorten it" in said.value and picture.value == shown
    words.value = "dog"
    assert said.value == "" and picture.value == shown
