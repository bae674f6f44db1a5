"""What was forgotten and what was retained: the metrics, from ``helpers.evaluation``."""

from helpers.evaluation.memory import m_score, presence
from helpers.evaluation.report import report
from helpers.evaluation.scores import (
    accuracy,
    accuracy_interval,
    clip_score,
    collapsed,
    drift,
    fid,
    lpips_distance,
    no_concept,
    roughness,
    style_diversity,
    unlearn_canvas,
)
from helpers.stats import student_interval, wilson_interval

__all__ = [
    "accuracy", "accuracy_interval", "clip_score", "collapsed", "drift", "fid", "lpips_distance",
    "m_score", "no_concept", "presence", "report", "roughness", "student_interval",
    "style_diversity", "unlearn_canvas", "wilson_interval",
]  # fmt: skip
