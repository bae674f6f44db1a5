"""The study of attacks: whole methods are collected, and the committed file is whole."""

import pytest

from helpers.checked import save_json
from helpers.tables import RESULTS, read_csv
from workflow import attacked, study
from workflow.closed_forms import SHOWN


def result(method: str, concept: str) -> dict:
    one = {"n": 12, "before": 0.0, "after": 1.0}
    solved = {"closed-form embedding": {**one, "residual": 0.25}}
    others = {"concept inversion": {**one, "after": 0.5}, "relearning": one}
    made_with = {"base_model": "b", "judge": "j"}
    return {
        "method": method, "concept": concept, "options": {}, "attacks": solved | others,
        "made_with": made_with,
    }  # fmt: skip


def test_a_method_counts_when_all_its_concepts_were_attacked(tmp_path, monkeypatch):
    monkeypatch.setattr(attacked, "BUILD", tmp_path)
    for concept in SHOWN:
        save_json(attacked.file_of("uce", concept), result("uce", concept))
    save_json(attacked.file_of("rece", "church"), result("rece", "church"))
    rows = attacked.collect()
    assert {row.method for row in rows} == {"uce"} and len(rows) == 5 * len(SHOWN)
    church = {row.metric: row for row in rows if row.erased == "church"}
    inverted = church["ACC after concept inversion"]
    assert (inverted.value, inverted.n) == (0.5, 12) and inverted.low < 0.5 < inverted.high
    assert church["ACC"].value == 0.0
    assert church["residual of closed-form embedding"].value == 0.25


def test_an_edit_is_attacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(attacked, "BUILD", tmp_path)
    attacked.file_of("uce", "church").write_text("there")
    attacked.make(None, "uce", "church")  # no world is touched
    assert attacked.file_of("uce", "church").read_text() == "there"


def test_the_committed_study_is_whole():
    frame = read_csv(RESULTS / "attacked.csv")
    assert {"nothing", "uce", "rece", "speed"} <= set(frame.method)
    assert frame.groupby(["method", "metric"]).erased.nunique().eq(len(SHOWN)).all()
    assert frame.base_model.nunique() == frame.judge.nunique() == 1
    control = frame[
        (frame.method == "nothing") & (frame.metric == "residual of closed-form embedding")
    ]
    assert control.value.max() < 1e-3, "where nothing was erased the equations have a solution"


def test_a_table_is_made_of_what_there_is_and_of_nothing_else(tmp_path, monkeypatch):
    """An empty folder leaves the committed table alone; work that is there is not made again."""
    monkeypatch.setattr(attacked, "BUILD", tmp_path / "attacked")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["attacked", "--collect"])
    given = attacked.BUILD, attacked.collect, attacked.work, attacked.make
    with pytest.raises(SystemExit, match="holds no whole result"):
        study.run(*given)
    assert not (tmp_path / "attacked.csv").exists()
    for concept in SHOWN:
        save_json(attacked.file_of("uce", concept), result("uce", concept))
    study.run(*given)
    assert len(read_csv(tmp_path / "attacked.csv")) == 5 * len(SHOWN)
