"""Whether tables made again are the committed ones: rows within and outside their tolerances, other rows, other tables."""

import compare
import pytest

from helpers.tables import RESULTS


def row(metric: str, value, n=8, method="ESD", **more) -> dict:
    return {"method": method, **more, "metric": metric, "value": str(value), "n": str(n)}


def test_differences_and_tolerances():
    """A share may move by one of its eight pictures, a weight change by 2 %, drift within its interval."""
    names = [f"method {i}" for i in range(3)]
    committed = [row("ACC", 0.5, method=m) for m in names] + [row("weight change", 100, "", m) for m in names]
    committed += [row("LPIPS", 0.0), row("ACC", 1.5, erased="sum", evaluated="erased - kept")]
    committed += [row("drift", 2.0, low=1.5, high=2.5, method=m) for m in names]
    for one in committed:
        one.update({"erased": "x", "evaluated": "x", "low": "", "high": ""} | one)
    names = ("method", "erased", "evaluated", "metric", "value", "n", "low", "high")
    committed = [{k: one[k] for k in names} for one in committed]
    values = [0.5, 0.625, 0.75, 100, 101.9, 97.9, 0.0009, -3, 1.6, 2.4, 2.6]
    made = [{**old, "value": str(value)} for old, value in zip(committed, values, strict=True)]
    found = compare.compare(made, committed)
    assert found["ACC"] == {"figures": 3, "equal": 1, "mean": pytest.approx(0.125), "greatest": 0.25, "outside": 1}
    assert found["weight change"]["outside"] == 1 and found["weight change"]["greatest"] == pytest.approx(2.1)
    assert found["LPIPS"]["outside"] == 0 and found["drift"]["outside"] == 1
    assert {f["outside"] for f in compare.compare(committed, committed).values()} == {0}


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="other rows"):
        compare.compare([row("ACC", 0.5)], [row("ACC", 0.5), row("ACC", 0.5, method="FMN")])


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
