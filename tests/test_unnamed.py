"""The study of prompts that name no style: what is trained, and the rows that are collected."""

import pytest

from helpers.checked import save_json
from helpers.tables import RESULTS, read_csv
from workflow import study, unnamed


def result(method: str, style: str, value: float, share: float) -> dict:
    return {
        "method": method, "style": style, "seed": 0, "options": {}, "value": value, "n": 36,
        "interval": (value - 1, value + 1), "shares": {"Noto": share, "Blob": 0.25},
        "made_with": {"base_model": "b", "judge": "j"},
    }  # fmt: skip


def test_each_training_gives_its_diversity_and_its_own_share_beside_the_base_s(tmp_path):
    unnamed.BUILD, before = tmp_path, unnamed.BUILD
    try:
        for method, style, value, share in (
            (unnamed.CONTROL, unnamed.CONTROL, 8.0, 0.125), ("gcirs", "Noto", 5.0, 0.5),
        ):  # fmt: skip
            save_json(unnamed.file_of(method, style, 0), result(method, style, value, share))
        base, diversity, own = unnamed.collect()
    finally:
        unnamed.BUILD = before
    assert (base.method, base.value, base.seed) == ("base", 8.0, 0)
    assert (diversity.value, diversity.base, diversity.low, diversity.high) == (5.0, 8.0, 4.0, 6.0)
    assert (own.value, own.base, own.n, own.erased) == (0.5, 0.125, 36, "Noto")
    assert own.low < 0.5 < own.high
    assert own.judge == "j"


def test_a_result_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(unnamed, "BUILD", tmp_path)
    unnamed.file_of("gcirs", "Noto", 0).write_text("there")
    unnamed.make(None, "gcirs", "Noto", 0)  # no world is touched
    assert unnamed.file_of("gcirs", "Noto", 0).read_text() == "there"


def test_the_options_are_the_tables(tmp_path):
    assert study.options_of("gcirs") == {"batch_size": 2, "images": 8}
    assert study.options_of("esd") == {}


def test_the_committed_study_is_whole():
    frame = read_csv(RESULTS / "unnamed.csv")
    assert (frame.method == "base").sum() == unnamed.SEED_SETS
    frame = frame[frame.method != "base"]
    for seed, part in frame.groupby("seed"):
        assert part.groupby(["method", "erased"]).size().eq(2).all(), seed
        counts = part.groupby("method").erased.nunique()
        assert counts.nunique() == 1, f"seed {seed} lacks styles of some methods"
    assert frame.base_model.nunique() == frame.judge.nunique() == 1
    assert frame.value.between(0, 9).all() and frame.n.eq(unnamed.IMAGES).all()


@pytest.mark.parametrize("metric", ["diversity of unnamed prompts", "share among unnamed prompts"])
def test_one_base_for_all(metric):
    frame = read_csv(RESULTS / "unnamed.csv")
    part = frame[(frame.metric == metric) & (frame.method != "base")]
    assert part.groupby("erased").base.nunique().eq(1).all()


def test_processes_share_the_work(monkeypatch):
    work = list(range(7))
    monkeypatch.setattr("sys.argv", ["unnamed"])
    assert study.part_of(work) == work
    parts = []
    for part in ("0/3", "1/3", "2/3"):
        monkeypatch.setattr("sys.argv", ["unnamed", "--part", part])
        parts += study.part_of(work)
    assert sorted(parts) == work
