"""Checks of the notebook on the papers' tables: rank correlation."""

from helpers.check.common import passed, untouched


def rank_correlation(mine) -> None:
    """``rank_correlation(a, b)``, Spearman's."""
    answer = mine([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 40.0, 3.0])
    if untouched(answer, "rank_correlation"):
        return

    def close(got: float, expected: float, why: str) -> None:
        assert abs(float(got) - expected) < 1e-6, (
            f"you give {float(got):.3f}: expected {expected:.3f}, {why}"
        )

    neighbours = "two neighbours are exchanged, and ranks ignore how large the largest value is"
    close(answer, 0.8, neighbours)
    close(mine([1.0, 2.0, 3.0], [9.0, 4.0, 1.0]), -1.0, "for the reverse order")
    close(mine([5.0, 1.0, 3.0], [2.0, 7.0, 1.0]), -0.5, "for values that are not sorted")
    equal = mine([3.0, 5.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0])
    close(equal, 0.9486832980505138, "where equal values share their rank")
    passed("rank_correlation", "Only the order counts, and equal values share a rank.")
