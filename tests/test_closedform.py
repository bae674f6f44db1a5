"""Oracles of the closed forms: values by hand, limits, optimality, and the model itself."""

import pytest
import torch
from conftest import build_tiny_world

from helpers import closedform, unlearn
from helpers.closedform import derived_states, projected_map, retaining_projector, text_map
from helpers.methods import realera, rows, speed, uce
from helpers.parameters import select_parameters
from helpers.tables import RESULTS, read_csv
from workflow import closed_forms


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world():
    return build_tiny_world()


# --- UCE


def test_one_number_by_hand():
    """W0 = 2, c = 1, target value 0, lam 0.5: W = 2/3; with one state held besides: 6/5."""
    c, nothing = torch.ones(1, 1), torch.zeros(1, 1)
    assert 2 * text_map(c, nothing, nothing[:0]).item() == pytest.approx(2 / 3)
    assert 2 * text_map(c, nothing, c).item() == pytest.approx(6 / 5)


def test_limits_of_lam():
    old, new = normal(3, 8), normal(3, 8, seed=1)
    none = old[:0]
    one = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(text_map(old, new, none, lam=1e12), one, atol=1e-9)
    T = text_map(old, new, none, lam=1e-9)  # fewer rows than directions: reached exactly
    assert torch.allclose(old @ T.T, new, atol=1e-6)


def objective(T, W, old, new, kept, lam, erase, preserve):
    moved = (old @ T.T - new) @ W.T
    held = (kept @ T.T - kept) @ W.T
    loss = (erase * moved.pow(2).sum(1)).sum() + (preserve * held.pow(2).sum(1)).sum()
    return loss + lam * (W @ T - W).pow(2).sum()


def test_it_is_where_the_gradient_of_its_objective_vanishes():
    """For a matrix W and every weight of its own: dL/dW' = 0 at W' = W T."""
    old, new, kept, W = (
        normal(4, 6),
        normal(4, 6, seed=1),
        normal(5, 6, seed=2),
        normal(3, 6, seed=3),
    )
    erase, preserve = normal(4, seed=4).abs(), normal(5, seed=5).abs()
    T = text_map(old, new, kept, lam=0.3, erase=erase, preserve=preserve)
    W_new = (W @ T).requires_grad_()
    moved = W_new @ old.T - W @ new.T
    held = W_new @ kept.T - W @ kept.T
    loss = (erase * moved.pow(2)).sum() + (preserve * held.pow(2)).sum()
    (slope,) = torch.autograd.grad(loss + 0.3 * (W_new - W).pow(2).sum(), W_new)
    assert slope.abs().max() < 1e-10


def test_gradient_descent_ends_there():
    """W' by plain descent on the same objective, for random states at the world's own width."""
    old, new, kept, W = (
        normal(4, 6),
        normal(4, 6, seed=1),
        normal(5, 6, seed=2),
        normal(3, 6, seed=3),
    )
    goal = W @ text_map(old, new, kept, lam=0.5)
    W_new = W.clone().requires_grad_()
    optimizer = torch.optim.SGD([W_new], lr=0.01)
    for _ in range(4000):
        loss = (W_new @ old.T - W @ new.T).pow(2).sum() + 0.5 * (W_new - W).pow(2).sum()
        loss = loss + (W_new @ kept.T - W @ kept.T).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(W_new.detach(), goal, atol=1e-6)


def test_the_order_of_rows_does_not_matter():
    old, new, kept = normal(4, 6), normal(4, 6, seed=1), normal(5, 6, seed=2)
    turned = text_map(old.flip(0), new.flip(0), kept.flip(0))
    assert torch.allclose(text_map(old, new, kept), turned, atol=1e-12)


def test_moving_rows_to_themselves_moves_nothing():
    old = normal(4, 6)
    one = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(text_map(old, old, old[:0]), one, atol=1e-12)


def test_a_singular_system_says_its_rank():
    with pytest.raises(ValueError, match=r"rank 3 of width 8.*lam > 0"):
        text_map(normal(3, 8), normal(3, 8), normal(3, 8)[:0], lam=0.0)


@pytest.mark.parametrize(
    ("weights", "said"), [(torch.ones(3), "for 2 rows"), (torch.tensor([1.0, -1.0]), "negative")]
)
def test_wrong_weights_are_named(weights, said):
    with pytest.raises(ValueError, match=said):
        text_map(normal(2, 4), normal(2, 4), normal(1, 4), erase=weights)


# --- RECE


def test_the_state_that_undoes_by_hand():
    """W_sd = 2, W' = 2/3, gamma 0.1: c' = 2.449, and W' c' = 1.6327, most of 2."""
    W, W_new = torch.full((1, 1), 2.0), torch.full((1, 1), 2 / 3)
    again = derived_states(torch.ones(1, 1, 1), [(W, W_new)], gamma=0.1)
    assert again.item() == pytest.approx(2.4490, abs=1e-4)
    assert (2 / 3) * again.item() == pytest.approx(1.6327, abs=1e-4)
    step = text_map(again[0].double(), torch.zeros(1, 1), torch.zeros(0, 1), lam=0.1)
    assert (2 / 3) * step.item() == pytest.approx(0.01093, abs=1e-5)


def test_an_unedited_model_gives_the_state_back():
    c, W = normal(2, 3, 5).float(), normal(9, 5).float()
    assert torch.allclose(derived_states(c, [(W, W)], gamma=1e-12), c, atol=1e-5)


# --- SPEED


def test_the_projected_map_leaves_its_retain_set_and_the_fixed_rows():
    old, new, kept, fixed = (
        normal(4, 12),
        normal(4, 12, seed=1),
        normal(5, 12, seed=2),
        normal(2, 12),
    )
    P = retaining_projector(kept)
    step = projected_map(old, new, fixed, P) - torch.eye(12, dtype=torch.float64)
    assert (kept @ step.T).abs().max() < 1e-10 and (fixed @ step.T).abs().max() < 1e-10
    assert (old @ step.T).abs().max() > 0.1


def test_the_projected_map_is_the_best_of_its_kind():
    """Any other increment D P with D P F = 0 is worse: the gradient vanishes in what is free."""
    old, new, kept, fixed = (
        normal(4, 12),
        normal(4, 12, seed=1),
        normal(5, 12, seed=2),
        normal(2, 12),
    )
    P, W = retaining_projector(kept), normal(3, 12, seed=7)
    one = torch.eye(12, dtype=torch.float64)
    D = (W @ (projected_map(old, new, fixed, P) - one)).requires_grad_()
    loss = (W @ old.T + D @ P @ old.T - W @ new.T).pow(2).sum() + (D @ P).pow(2).sum()
    (slope,) = torch.autograd.grad(loss, D)
    free = one - torch.linalg.pinv(fixed @ P) @ (fixed @ P)  # directions that leave P F alone
    assert (slope @ P @ free).abs().max() < 1e-10


def test_less_energy_leaves_more_room():
    kept = normal(11, 12) * torch.logspace(0, -3, 12, dtype=torch.float64)
    ranks = [retaining_projector(kept, energy=e).trace().item() for e in (0.9, 0.99, None)]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="null space is empty"):
        retaining_projector(normal(12, 12))


# --- RealEra


def test_neighbours_keep_the_norm_and_their_band():
    e = normal(3, 64)
    near = realera.cone(e, 5, (0.6, 0.8), torch.Generator().manual_seed(1))
    e = e.repeat_interleave(5, 0)
    cosine = torch.nn.functional.cosine_similarity(near, e)
    assert torch.allclose(near.norm(dim=1), e.norm(dim=1), atol=1e-6)
    assert cosine.min() > 0.6 - 1e-6 and cosine.max() < 0.8 + 1e-6


def test_one_neighbour_on_the_axis_is_uce(world):
    options = realera.Options(near=(1.0, 1.0), neighbours=1, beta=0.0)
    mine = realera.solve(world, ["church"], options, 0)
    theirs = uce.solve(world, ["church"], uce.Options(), 0)
    for name, value in theirs.delta.items():
        assert torch.allclose(mine.delta[name], value, atol=1e-4)


def test_mining_without_a_beyond_set_shrinks_every_direction():
    """lam / (lam + |e|^2 (1 - s^2) / (d - 1)), in the limit of many neighbours: 0.578 here."""
    d, s, lam = 64, 0.8, 0.5
    e = torch.zeros(1, d, dtype=torch.float64)
    e[0, 0] = 8.0  # |e|^2 = 64
    near = realera.cone(e, 20000, (s, s), torch.Generator().manual_seed(0))
    T = text_map(near, torch.zeros_like(near), e[:0], lam=lam, erase=1 / len(near))
    wanted = lam / (lam + 64 * (1 - s**2) / (d - 1))
    assert wanted == pytest.approx(0.578, abs=1e-3)
    assert T.diagonal()[1:].mean().item() == pytest.approx(wanted, abs=5e-3)


# --- in a world


def test_every_key_and_value_matrix_is_multiplied_by_one_map(world):
    edit = unlearn(world, "church", "uce", progress=False)
    options = uce.Options()
    old, new = rows.moved_rows(world, ["church"], options)
    T = text_map(old, new, rows.held_rows(world, ["church"], options))
    matrices = select_parameters(world, "kv")
    assert set(edit.delta) == set(matrices)
    for name, W in matrices.items():
        wanted = W.detach().double() @ (T - torch.eye(len(T), dtype=T.dtype))
        assert torch.allclose(edit.delta[name].double(), wanted, atol=1e-5)


def test_the_order_of_concepts_does_not_matter(world):
    a, b = (
        unlearn(world, names, "uce", progress=False)
        for names in (["church", "dog"], ["dog", "church"])
    )
    for name, value in a.delta.items():
        assert torch.allclose(value, b.delta[name], atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "places"),
    [("last", [1]), ("end", [2]), ("after", [1, 2, 3]), ("all", [0, 1, 2, 3])],
)
def test_the_rows_of_a_name(world, tokens, places):
    found = rows.positions(world, "church", "church", tokens)
    length = world.text_length
    assert found == (places if tokens in ("last", "end") else list(range(places[0], length)))


def test_the_release_takes_bos_for_nothing(world):
    options = uce.Options(tokens="last", prompts="names", retain="none")
    old, new = rows.moved_rows(world, ["church"], options)
    empty = world.encode([""])[0].double()
    assert len(old) == 1 and torch.equal(new[0], empty[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"anchor": "church"}, "the anchor of 'church'"),
        ({"anchor": "Church "}, "the anchor of 'church'"),
        ({"retain": ("dog", "church")}, "retain holds 'church'"),
        ({"retain": ("chapel",)}, "chapel"),
        ({"lam": 0.0, "retain": "none", "prompts": "names"}, "singular"),
    ],
)
def test_what_cannot_be_is_named(world, options, said):
    with pytest.raises(ValueError, match=said):
        unlearn(world, "church", "uce", progress=False, **options)


def test_speed_holds_the_rows_that_an_unheld_edit_would_move_most():
    """The filter by hand: T moves the first axis only, W answers it by 2, the other by 1."""
    T, gram = torch.diag(torch.tensor([0.5, 1.0])).double(), torch.diag(torch.tensor([4.0, 1.0]))
    kept = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 1.0]]).double()
    moves = speed.influence(T, gram.double(), kept)
    assert moves.tolist() == [1.0, 0.0, 4.0]  # 4 (r_1 / 2)^2
    assert (moves > moves.mean()).tolist() == [False, False, True]


def test_speed_s_noise_lies_where_the_matrices_answer_least():
    gram = torch.diag(torch.tensor([9.0, 0.1, 4.0, 0.2])).double()
    assert speed.least_answered(gram, rank=2).allclose(
        torch.diag(torch.tensor([0.0, 1, 0, 1])).double()
    )


@pytest.mark.parametrize("options", [{"filtered": True}, {"augmented": 2}])
def test_speed_refines_its_retain_set(world, options):
    """The filter takes rows away; noisy copies join the rows and differ from them by P_min only."""
    chosen = speed.Options(**options)
    moved, kept = (
        rows.moved_rows(world, ["church"], chosen),
        rows.held_rows(world, ["church"], chosen),
    )
    found = speed.refined(world, moved, kept, chosen, 0)
    if chosen.filtered:
        assert 0 < len(found) < len(kept)
    else:
        assert len(found) == 3 * len(kept) and found[: len(kept)].equal(kept)
        noise = found[len(kept) : 2 * len(kept)] - kept
        assert torch.linalg.matrix_rank(noise) == speed.WEAKEST
    edit = unlearn(world, "church", "speed", progress=False, **options)
    again = unlearn(world, "church", "speed", progress=False, **options)
    assert all(edit.delta[name].equal(again.delta[name]) for name in edit.delta)


def test_nothing_here_is_left_untested():
    assert {n for n in vars(closedform) if n.endswith(("_map", "_states", "_projector"))} == {
        "text_map", "projected_map", "derived_states", "retaining_projector",
    }  # fmt: skip


# --- the rule by which the defaults were chosen


def test_the_balance_counts_what_the_empty_prompt_does_not_draw():
    row = {"left": 0.3, "pairs": 0.1, "kept": 0.95, "chance": 0.3}
    assert closed_forms.balance(row) == pytest.approx(2 * 0.95 * 0.95 / 1.9)
    worse = closed_forms.balance({**row, "chance": 0.0})
    assert worse == pytest.approx(2 * 0.8 * 0.95 / 1.75)


def test_the_defaults_are_what_the_rule_chose():
    """Of the committed trials: the last setting within 0.01 of the best mean H."""
    trials = read_csv(RESULTS / "closed_forms_choose.csv", text=["setting"])
    assert set(trials["concept"]).isdisjoint(closed_forms.SHOWN)
    chosen = {}
    for method, rows_ in trials.groupby("method", sort=False):
        H = rows_.groupby("setting", sort=False)["H"].mean()
        chosen[method] = H[H >= H.max() - 0.01].index[-1]
    default = uce.Options()
    assert chosen["uce"] == f"{default.tokens} {default.prompts}"
    assert chosen["speed"] == str(speed.Options().energy)
    assert not speed.Options().filtered and not speed.Options().augmented
