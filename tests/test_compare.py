"""Whether tables made again are the committed ones: their rows, and the tolerances of values."""

import pandas as pd
import pytest

from helpers.tables import RESULTS, read_csv
from workflow import compare


def frame(*rows: dict) -> pd.DataFrame:
    """Rows of a table; what they leave unsaid is the same for all."""
    same = {"method": "ESD", "erased": "x", "evaluated": "x", "metric": "ACC"}
    same |= {"value": 0.0, "n": 8, "low": None, "high": None}
    rows = [{**same, **row} for row in rows]
    return pd.DataFrame(rows).astype({"low": float, "high": float, "value": float, "n": float})


def test_differences_and_tolerances():
    """A share may move by one image of eight, a weight change by 2 %, drift in its interval."""
    three = [{"method": f"method {i}"} for i in range(3)]
    drift = {"metric": "drift", "value": 2.0, "low": 1.5, "high": 2.5}
    committed = frame(
        *({"value": 0.5, **one} for one in three),
        *({"metric": "weight change", "value": 100, "n": None, **one} for one in three),
        {"metric": "LPIPS"},
        {"erased": "sum", "evaluated": "erased - kept", "value": 1.5},
        *({**drift, **one} for one in three),
    )
    made = committed.assign(value=[0.5, 0.625, 0.75, 100, 101.9, 97.9, 0.0009, -3, 1.6, 2.4, 2.6])
    found = compare.compare(made, committed)
    assert found.loc["ACC"].to_dict() == {
        "values": 3, "equal": 1, "mean": pytest.approx(0.125), "greatest": 0.25, "outside": 1,
    }  # fmt: skip
    assert found.loc["weight change", "outside"] == 1
    assert found.loc["weight change", "greatest"] == pytest.approx(2.1)
    assert found.loc["LPIPS", "outside"] == 0 and found.loc["drift", "outside"] == 1
    same = compare.compare(committed, committed)
    assert set(same["outside"]) == {0} and (same["equal"] == same["values"]).all()


def test_a_share_of_few_images_may_move_by_one_of_them():
    committed = frame({"value": 1 / 3, "n": 3}, {"value": 0.5, "n": 72, "method": "FMN10"})
    made = committed.assign(value=[2 / 3, 0.63])
    assert compare.compare(made, committed).loc["ACC", "outside"] == 1


def test_groups_of_the_methods_table_stand_for_themselves():
    committed = frame(
        *({"evaluated": on, "metric": "ACC", "value": 0.5} for on in ("erased", "retained"))
    )
    found = compare.compare(committed.assign(value=[1.0, 0.5]), committed)
    assert found["outside"].to_dict() == {"ACC erased": 1, "ACC retained": 0}


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="other rows"):
        compare.compare(frame({}), frame({}, {"method": "FMN"}))
    with pytest.raises(ValueError, match="other rows"):
        compare.compare(frame({}, {"method": "FMN"}), frame({}))


def test_two_folders(tmp_path, capsys):
    made, committed = tmp_path / "made", tmp_path / "committed"
    for folder in (made, committed):
        folder.mkdir()
    assert compare.main(made, committed) == 1  # nothing to compare is no success
    for name in ("sepme-6.csv", "methods.csv", "table3.csv"):  # the last is none of `make tables`
        for folder in (made, committed):
            (folder / name).write_text((RESULTS / name).read_text())
    assert compare.main(made, committed) == 0 and "sepme-6  ACC" in capsys.readouterr().out
    text = (made / "sepme-6.csv").read_text()
    seen = text.replace(",ACC,0,0", ",ACC,0,1")  # images of erased styles, all recognised
    assert not read_csv(made / "sepme-6.csv").empty and seen != text
    (made / "sepme-6.csv").write_text(seen)
    assert compare.main(made, committed) == 1
    assert "outside their tolerances" in capsys.readouterr().out
    (made / "sepme-6.csv").unlink()
    assert compare.main(made, committed) == 1
    assert f"missing: {made}/sepme-6.csv" in capsys.readouterr().out
