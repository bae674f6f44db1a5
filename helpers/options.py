"""Options and arguments: one check, from their annotations, which converts a value or refuses it.

``int``, ``float``, ``bool``, ``str``, ``Literal``, ``X | None``, ``list``, ``tuple`` and ``dict``
of these, ``Path``, ``Tensor`` and classes are understood. A range or another rule stands beside
the type: ``Annotated[float, Above(0)]``. What passes is plain, so that JSON can hold it: numbers of
NumPy, numbers of tensors without a dimension and text such as "1e-4" become Python's numbers, 2.0
becomes 2 where a whole number is wanted, and a ``Path`` becomes text. Neither True nor NaN is a
number. Everything else is refused at once by a ValueError that says what to give.
"""

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from helpers.reader import checked_images

# --- rules, which stand in ``Annotated``


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy besides its type: in words, and as a test."""

    words: str
    allows: Callable[[Any], bool]

    def holds(self, value) -> bool:
        """Whether the value satisfies the rule; of a tensor, every number, and one at least."""
        found = torch.as_tensor(self.allows(value))
        return found.numel() > 0 and bool(found.all())


def AtLeast(bound: float) -> Rule:
    """A number that is the bound or more."""
    return Rule(f"{bound} or more", lambda value: value >= bound)


def Above(bound: float) -> Rule:
    """A number that is more than the bound."""
    return Rule(f"more than {bound}", lambda value: value > bound)


def Below(bound: float) -> Rule:
    """A number that is less than the bound."""
    return Rule(f"less than {bound}", lambda value: value < bound)


def Between(low: float, high: float) -> Rule:
    """A number from low to high, both included."""
    return Rule(f"{low} to {high}", lambda value: (value >= low) & (value <= high))


@dataclass(frozen=True, eq=False)
class OneOf:
    """One of the known names, which may still grow."""

    known: Mapping

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.known)}"


def check_template(template: str, name: str = "template", *, whole: bool = False) -> str:
    """The template as it is, once it is seen to mark the concept's place by {c} and no other way.

    whole: a prompt without any place is accepted too. ValueError for what is no text, a missing
    {c}, or braces that mean nothing.
    """
    if not isinstance(template, str):
        raise ValueError(
            f"{name} is {in_words(template)}: give text such as 'a picture of a {{c}}'"
        )
    if "{c}" not in template and not whole:
        raise ValueError(f"{name} {template!r} lacks {{c}}: write {{c}} where the name goes")
    if set("{}") & set(template.replace("{c}", "")):
        raise ValueError(f"{name} {template!r} has braces beside {{c}}: take them out")
    return template


WHOLE_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NOT_EMPTY = Rule("not empty", lambda value: len(value) > 0)
DISTINCT = Rule("none of them twice", lambda values: len({*values}) == len(values))
FINITE = Rule("finite", lambda value: torch.isfinite(torch.as_tensor(value)))
ONE_EACH = Rule(
    "one for each row",
    lambda t: not isinstance(t, Tensor) or (t.ndim < 2 and torch.isfinite(t).all()),
)
WHOLE = Rule(
    "of whole numbers, one for each row",
    lambda t: not isinstance(t, Tensor) or (t.ndim < 2 and t.dtype in WHOLE_TYPES),
)


def Dims(*counts: int) -> Rule:
    """A tensor of so many dimensions, each of them more than 0; or a list of such tensors."""

    def allows(value) -> bool:
        tensors = [value] if isinstance(value, Tensor) else value
        return all(t.ndim in counts and 0 not in t.shape for t in tensors)

    return Rule(f"with {' or '.join(map(str, counts))} dimensions, none of them empty", allows)


def Finite(count: int) -> Rule:
    """A tensor of so many dimensions, each of them more than 0, that holds finite floats only."""

    def allows(value: Tensor) -> bool:
        good = value.ndim == count and value.numel() > 0 and value.is_floating_point()
        return good and bool(torch.isfinite(value).all())

    return Rule(f"of floats, with {count} dimensions, none empty, all of it finite", allows)


Count = Annotated[int, AtLeast(1)]
Whole = Annotated[int, AtLeast(0)]
Weight = Annotated[float, AtLeast(0)]  # of a loss
Positive = Annotated[float, Above(0)]
Share = Annotated[float, Between(0, 1)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
Seeds = Annotated[tuple[Seed, ...], NOT_EMPTY]
Template = Annotated[str, check_template]  # a prompt with {c} where the concept's name goes
Prompt = Annotated[str, functools.partial(check_template, whole=True)]  # the same, {c} or not
Names = Annotated[tuple[str, ...], DISTINCT]
NO_NUL = Rule("a name that a file can have", lambda path: bool(str(path)) and "\0" not in str(path))
File = Annotated[str | Path, NO_NUL]
FileName = Annotated[str, NO_NUL]  # as JSON keeps it: a Path becomes text
# images to train on: how many the base model samples, or a folder of the user's own, or one for
# each concept
Folder = Annotated[str, Rule("the folder of your images", lambda path: bool(path.strip()))]
Images = Count | Folder | dict[str, Folder]


# --- one value


def in_words(value) -> str:
    """A value in a few words, for a message."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + " ... " + text[-15:]


def near(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a question, "" for none."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


PLURALS = {int: "whole numbers", float: "numbers", str: "text", Tensor: "tensors", bool: "bools"}
SINGULARS = {
    int: "a whole number", float: "a finite number", bool: "True or False", str: "text",
    Tensor: "a torch tensor", types.NoneType: "None", Path: "a path",
}  # fmt: skip


REMEDIES = {
    "a torch tensor": "torch.as_tensor makes one", "a World": "load_world gives one",
    "an Edit": "unlearn and Edit.load give one",
}  # fmt: skip


def expected(annotation) -> str:
    """What an annotation asks for, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words = [rule.words for rule in inner[1:] if hasattr(rule, "words")]
        return ", ".join([expected(inner[0]), *words])
    if origin in (Union, types.UnionType):
        return ", or ".join(dict.fromkeys(expected(part) for part in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is not None and origin is not Callable:
        kind = "dict" if issubclass(origin, Mapping) else "list"
        of = inner[-1] if kind == "dict" else inner[0]
        of = get_args(of)[0] if get_origin(of) is Annotated else of
        return f"a {kind} of {PLURALS.get(of, 'such entries')}"
    name = getattr(annotation, "__name__", str(annotation))
    return SINGULARS.get(annotation, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def refusal(name: str, value, annotation) -> ValueError:
    """The error for a value that an annotation does not allow."""
    wanted, hint = expected(annotation), ""
    if isinstance(value, str) and "a list" in wanted:
        hint = f", as in [{value!r}]"
    for what, remedy in REMEDIES.items():
        if wanted.startswith(what) and not wanted.startswith(f"a {type(value).__name__}"):
            hint = f" ({remedy})"
    return ValueError(f"{name} is {in_words(value)}: give {wanted}{hint}")


def number(value) -> int | float | None:
    """A Python number for what stands for one, None for anything else (True among it)."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item() if value.ndim == 0 else None
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole(value) -> int | None:
    """A whole number, None for anything else."""
    value = number(value)
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if value is None or -(2**63) <= value < 2**63 else None


def real(value) -> float | None:
    """A finite number, None for anything else."""
    value = number(value)
    try:
        return float(value) if value is not None and math.isfinite(value) else None
    except OverflowError:
        return None


def truth(value) -> bool | None:
    """True or False, None for anything else."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, bool) else None


def text(value) -> str | None:
    """Text, also of a path; None for anything else."""
    return str(value) if isinstance(value, str | Path) else None


SIMPLE = {int: whole, float: real, bool: truth, str: text}
PLAIN = (  # data, which never stands for an object of the kit
    str, bytes, bool, int, float, complex, list, tuple, set, frozenset, dict, Path, Tensor,
    np.ndarray, np.generic, types.NoneType,
)  # fmt: skip
NO_LISTS = (str, bytes, set, frozenset, Mapping, np.ndarray, Tensor)


def same(value, choice) -> bool:
    """Whether a value is a choice: 1 is not True."""
    return type(value) is type(choice) and value == choice


def exact(value, annotation) -> bool:
    """Whether a value is of a type as it stands."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return exact(value, get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return any(exact(value, part) for part in get_args(annotation))
    if origin is Literal:
        return any(same(value, choice) for choice in get_args(annotation))
    if origin is not None:
        return isinstance(value, list | tuple if origin in (list, tuple) else origin)
    if annotation in (int, float):
        return isinstance(value, annotation) and not isinstance(value, bool)
    return annotation is Any or (isinstance(annotation, type) and isinstance(value, annotation))


def convert(name: str, value, annotation):
    """The value as its annotation wants it. ValueError, which names it, for one that does not fit.

    ``convert("lr", "1e-4", float)`` is 1e-4, ``convert("images", Path("mine"), str)`` is "mine".
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ruled(name, value, annotation)
    if origin in (Union, types.UnionType):
        return one_of(name, value, annotation)
    if origin is Literal:
        if not any(same(value, choice) for choice in inner):
            raise unknown_choice(name, value, inner)
        return value
    if origin is not None and origin is not Callable:
        if origin in (dict, Mapping):
            return mapped(name, value, annotation)
        return listed(name, value, annotation)
    if annotation in SIMPLE:
        found = SIMPLE[annotation](value)
        if found is None:
            raise refusal(name, value, annotation)
        return found
    return of_class(name, value, annotation)


def of_class(name: str, value, annotation):
    """A value of a class, as it is; an object that may stand for one passes, plain data never."""
    if annotation in (Any, inspect.Parameter.empty) or exact(value, annotation):
        return value
    if annotation is Callable and callable(value):
        return value
    no_stand_in = isinstance(value, PLAIN) or inspect.isroutine(value) or type(value) is object
    if annotation in (*PLAIN, Callable) or no_stand_in or inspect.isclass(value):
        raise refusal(name, value, annotation)
    return value


def unknown_choice(name: str, value, choices: Iterable) -> ValueError:
    """The error for a name that is none of the choices."""
    known = list(choices)
    hint = near(value, known) if isinstance(value, str) else ""
    what = ", ".join(map(repr, known) if isinstance(choices, tuple) else known)
    return ValueError(f"unknown {name} {in_words(value)}{hint}: choose from {what}")


def ruled(name: str, value, annotation):
    """A value of an annotated type, which satisfies the rules beside it."""
    base, *rules = get_args(annotation)
    try:
        value = convert(name, value, base)
    except ValueError as error:
        wrong_inside = not str(error).startswith(f"{name} is ")
        raise error if wrong_inside else refusal(name, value, annotation) from None
    for rule in rules:
        if isinstance(rule, OneOf) and value not in rule.known:
            raise unknown_choice(name, value, rule.known)
        if isinstance(rule, Rule) and not rule.holds(value):
            raise refusal(name, value, annotation)
        if callable(rule):
            value = rule(value, name)
    return value


def one_of(name: str, value, annotation):
    """A value of one of several types: as it stands if one of them has it, else converted."""
    members = get_args(annotation)
    for member in members:
        if exact(value, member):
            try:
                return convert(name, value, member)
            except ValueError as error:
                if str(error).startswith(f"{name} is "):
                    raise refusal(name, value, annotation) from None
                raise
    for member in members:
        try:
            return convert(name, value, member)
        except ValueError:
            pass
    raise refusal(name, value, annotation)


def listed(name: str, value, annotation) -> list | tuple:
    """A list, or a tuple where that is wanted, its entries converted. Text and sets are no lists:
    the one would be taken apart, the other has no order."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Iterable and isinstance(value, Iterator):
        value = list(value)
    array = isinstance(value, np.ndarray | Tensor)
    if array and value.ndim == 1 and inner[0] is not Tensor:
        value = value.tolist()
    sized = hasattr(value, "__len__") and hasattr(value, "__iter__")
    if not sized or isinstance(value, NO_LISTS):
        raise refusal(name, value, annotation)
    fixed = origin is tuple and inner[-1] is not ...
    if fixed and len(inner) != len(value):
        raise ValueError(f"{name} is {in_words(value)}: give {len(inner)} entries")
    kinds = inner if fixed else [inner[0]] * len(value)
    entries = enumerate(zip(value, kinds, strict=True))
    found = [convert(f"{name}[{i}]", entry, kind) for i, (entry, kind) in entries]
    return tuple(found) if origin is tuple else found


def mapped(name: str, value, annotation) -> dict:
    """A dict, its keys and values converted."""
    if not isinstance(value, Mapping):
        raise refusal(name, value, annotation)
    of_key, of_value = get_args(annotation)
    if of_value is Tensor and all(isinstance(v, Tensor) for v in value.values()):
        return value  # increments, which every step of a training passes
    return {
        convert(f"a key of {name}", k, of_key): convert(f"{name}[{k!r}]", v, of_value)
        for k, v in value.items()
    }


Pictures = Annotated[Any, checked_images]  # (n, 3, H, W) in [0, 1]


# --- options


@functools.cache
def hints(what) -> dict[str, Any]:
    """The annotations of a class or function, with their rules."""
    return get_type_hints(what, include_extras=True)


def check_options(options, *names: str) -> None:
    """Convert every field of a dataclass, or those named, in place, frozen or not.

    ValueError names a field whose value its annotation does not allow.
    """
    for field in fields(options):
        if not names or field.name in names:
            annotation = hints(type(options))[field.name]
            value = convert(field.name, getattr(options, field.name), annotation)
            object.__setattr__(options, field.name, value)


def made(cls: type, given: Mapping, what: str):
    """An options class from a dict. ValueError, with the nearest names, for an unknown option."""
    known = [field.name for field in fields(cls)]
    unknown = [name for name in given if name not in known]
    if unknown:
        said = ", ".join(f"{name}{near(name, known)}" for name in unknown)
        raise ValueError(f"{what} has no option {said}: choose from {', '.join(known)}")
    return cls(**given)


# --- arguments


class World:
    """Stands for ``worlds.World`` where that cannot be imported."""


class Edit:
    """Stands for ``edits.Edit`` where that cannot be imported."""


UNNAMED = {"world": World, "edit": Edit | None}  # arguments without annotation, by their names


def typed(function: Callable | None = None, *, same_shape: str = "", same_rows: str = "", **rules):
    """Check a function's arguments by its annotations before it runs: ``@typed``.

    same_shape: names of tensors (or lists of tensors) of one shape; same_rows: names of what has
    one row each, where it has rows. Others: a rule for the argument of that name. ``world`` and
    ``edit`` need no annotation: plain data is refused. ValueError names the argument.
    """
    if function is None:
        return functools.partial(typed, same_shape=same_shape, same_rows=same_rows, **rules)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(signature.parameters)
            raise TypeError(f"{function.__name__}: {error}; give {names}") from None
        given = bound.arguments
        for name, value in given.items():
            given[name] = argument(signature.parameters[name], value, hints(function), rules)
        require_alike({name: given[name] for name in same_shape.split() if name in given})
        require_rows({name: given[name] for name in same_rows.split() if name in given})
        return function(*bound.args, **bound.kwargs)

    call.typed = True  # the tests ask every such function what it makes of bad input
    return call


def argument(parameter: inspect.Parameter, value, annotations: dict, rules: dict[str, Rule]):
    """One argument, converted. None passes where it is the default."""
    name = parameter.name
    several = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    if several or (value is None and parameter.default is None):
        return value
    annotation = annotations.get(name, UNNAMED.get(name, Any))
    if name in rules:
        annotation = Annotated[annotation, rules[name]]
    return convert(name, value, annotation)


def shapes(value) -> list[tuple[int, ...]]:
    """The shapes of a tensor, or of several."""
    return [tuple(v.shape) for v in (value if isinstance(value, list) else [value])]


def require_alike(tensors: dict) -> None:
    """ValueError unless all tensors have one shape; None is left out."""
    found = {name: shapes(value) for name, value in tensors.items() if value is not None}
    if len({tuple(s) for s in found.values()}) > 1:
        said = " and ".join(f"{name} {', '.join(map(str, s))}" for name, s in found.items())
        raise ValueError(f"the shapes differ: {said}; give tensors of one shape")


def require_rows(values: dict) -> None:
    """ValueError unless all have as many rows; numbers and None have none."""
    with_rows = {n: v for n, v in values.items() if hasattr(v, "__len__") and getattr(v, "ndim", 1)}
    found = {name: len(value) for name, value in with_rows.items()}
    if len({*found.values()}) > 1:
        said = " and ".join(f"{name} has {n}" for name, n in found.items())
        raise ValueError(f"the numbers of rows differ: {said}; give one row for each")
