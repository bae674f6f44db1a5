"""Checks of the notebook on the papers' tables: rank correlation, and the verdict on a claim."""

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


def verdict(mine) -> None:
    """``verdict(d)``, what follows for a claim from one difference for each training seed."""
    answer = mine([0.1, 0.1, 0.2])
    if untouched(answer, "verdict"):
        return
    words = {"holds", "does not hold", "cannot be told here"}
    cases = {
        (0.5, 0.6, 0.55): ("holds", "the mean is far above its half-width"),
        (-0.5, -0.6, -0.55): ("does not hold", "the interval lies below zero"),
        (0.1, 0.1, 0.2): (
            "cannot be told here",
            "all are positive, but t for two degrees of freedom is 4.3",
        ),
        (0.3, -0.3, 0.01): ("cannot be told here", "the seeds do not agree"),
        (0.6,): ("cannot be told here", "one seed has no spread"),
        (0.2, 0.2, 0.2): ("holds", "three equal differences have an interval of no width"),
        (0.05, 0.06, 0.12, 0.1): (
            "holds",
            "with four seeds t is 3.2: divide by k - 1, and by the root of k",
        ),
        (0.02, 0.03, 0.07): ("cannot be told here", "the spread is too large for three seeds"),
    }
    for d, (word, why) in cases.items():
        got = mine(list(d))
        assert got in words, f"you answer {got!r}: expected one of {', '.join(sorted(words))}"
        assert got == word, f"for d = {list(d)} you say {got!r}: expected {word!r}, {why}"
    passed("verdict", "A claim needs a sign that the next training would repeat.")
