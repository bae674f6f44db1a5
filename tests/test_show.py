"""What a figure of the kit shows, as far as it is text."""

import pytest

from helpers import show


def test_a_table_keeps_its_columns():
    made = show.table(["what", "|w|"], [("a", 1.5), ("sum of |w|", "")], "two rows")
    assert made.data.splitlines() == [
        r"| what | \|w\| |",
        "| --- | --- |",
        "| a | 1.5 |",
        r"| sum of \|w\| |  |",
        "",
        "two rows",
    ]
    with pytest.raises(ValueError, match="has 1 cells: want 2"):
        show.table(["a", "b"], [("only one",)])
