"""The checks of the exercises: right answers pass, untouched stubs are greeted, wrong ones fail."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from answers import RIGHT, WRONG

from helpers import check

FILES = sorted(Path(check.__file__).parent.glob("*.py"))


def pairs(answers: dict[str, list]) -> list[tuple]:
    """(name of the check, one answer), for every answer."""
    return [(name, answer) for name, some in answers.items() for answer in some]


@pytest.mark.parametrize(("name", "right"), pairs(RIGHT))
def test_right_answers_are_accepted(name, right, capsys):
    getattr(check, name)(right)
    assert re.match(rf"(my_)?{name}: right", capsys.readouterr().out)  # or called my_null_space


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("nothing", [None, ...])
def test_an_untouched_stub_gets_a_friendly_line(name, nothing, capsys):
    getattr(check, name)(lambda *_: nothing)
    assert "not yet" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "wrong"), pairs(WRONG))
def test_plausible_wrong_answers_are_rejected(name, wrong):
    with pytest.raises(AssertionError, match=r"\w"):
        getattr(check, name)(wrong)


def test_every_check_has_answers():
    checks = {
        name
        for name, function in inspect.getmembers(check, inspect.isfunction)
        if "mine" in inspect.signature(function).parameters
    }
    assert checks == set(RIGHT) == set(WRONG) == set(check.__all__)
    assert all([*RIGHT.values(), *WRONG.values()])


def test_the_package_exports_every_check_of_its_files():
    written = {
        node.name
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and [argument.arg for argument in node.args.args] == ["mine"]
    }
    assert written == set(check.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_function_imports(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        assert not any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(function))
