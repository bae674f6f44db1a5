"""The checks of the notebooks' exercises accept what is right, greet what is untouched, and reject what is wrong."""

import inspect
import re

import pytest
from answers import RIGHT, WRONG

from helpers import check


@pytest.mark.parametrize(("name", "right"), [(n, r) for n, answers in RIGHT.items() for r in answers])
def test_right_answers_are_accepted(name, right, capsys):
    getattr(check, name)(right)
    assert re.match(rf"(my_)?{name}: right", capsys.readouterr().out)  # notebook 08's own is called my_null_space


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("nothing", [None, ...])
def test_an_untouched_stub_gets_a_friendly_line(name, nothing, capsys):
    getattr(check, name)(lambda *_: nothing)
    assert "not yet" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n, answers in WRONG.items() for w in answers])
def test_plausible_wrong_answers_are_rejected(name, wrong):
    with pytest.raises(AssertionError, match=r"\w"):
        getattr(check, name)(wrong)


def test_every_checker_has_answers():
    checkers = {
        name
        for name, function in inspect.getmembers(check, inspect.isfunction)
        if not name.startswith("_") and "mine" in inspect.signature(function).parameters
    }
    assert checkers == set(RIGHT) == set(WRONG)
    assert all([*RIGHT.values(), *WRONG.values()])
