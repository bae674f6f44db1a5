"""Whether tables made again are the committed ones: rows within and outside their tolerances, other rows, other tables."""

import compare
import pytest

from helpers.tables import RESULTS


def row(metric: str, value, low="", high="", method="ESD") -> dict:
    return {
        "method": method,
        "metric": metric,
        "training_seed": "0",
        "value": str(value),
        "low": str(low),
        "high": str(high),
    }


def test_differences_and_tolerances():
    committed = [
        row("ACC", 0.5, 0.2, 0.8), row("ACC", 0.5, 0.2, 0.8, "FMN"), row("ACC", 0.0, 0, 0.3, "G-CiRs"),
        row("ACC", 1.5, method="a sum"), row("weight change", 100), row("weight change", 100, method="FMN"),
    ]  # fmt: skip
    values = [0.5, 0.75, 0.375, -3, 104.9, 94.9]
    made = [{**old, "value": str(value)} for old, value in zip(committed, values, strict=True)]
    found = compare.compare(made, committed)
    assert found["ACC"] == {"figures": 3, "equal": 1, "mean": pytest.approx(0.625 / 3), "greatest": 0.375, "outside": 1}
    assert found["weight change"]["outside"] == 1 and found["weight change"]["greatest"] == pytest.approx(5.1)
    assert {f["outside"] for f in compare.compare(committed, committed).values()} == {0}


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="other rows"):
        compare.compare([row("ACC", 0.5, 0.2, 0.8)], [row("ACC", 0.5, 0.2, 0.8), row("ACC", 0.5, 0.2, 0.8, "FMN")])


def test_two_folders(tmp_path, capsys):
    made, committed = tmp_path / "made", tmp_path / "committed"
    for folder in (made, committed):
        folder.mkdir()
    assert compare.main(made, committed) == 1  # nothing to compare is no success
    for name in ("sepme-6.csv", "methods.csv", "table3.csv"):  # the last is no table of `make tables`
        for folder in (made, committed):
            (folder / name).write_text((RESULTS / name).read_text())
    assert compare.main(made, committed) == 0 and "sepme-6  ACC" in capsys.readouterr().out
    text = (made / "sepme-6.csv").read_text()
    (made / "sepme-6.csv").write_text(text.replace(",ACC,0,0", ",ACC,0,1"))  # erased pictures all seen
    assert compare.main(made, committed) == 1 and "outside their tolerances" in capsys.readouterr().out
    (made / "sepme-6.csv").unlink()
    assert compare.main(made, committed) == 1 and f"missing: {made}/sepme-6.csv" in capsys.readouterr().out
