"""What the closed forms start from: rows of text states to move, where to, and rows to hold.

A concept is a set of prompts. Of each prompt some rows are taken, and each is to be read as the row
at the same place of the prompt without the concept, or with its anchor.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers.attention import find_tokens, name_tokens
from helpers.concepts import TEMPLATES, filled, object_table, pair_prompt
from helpers.edits import Edit
from helpers.options import FileName, Names, check_options
from helpers.parameters import select_parameters
from helpers.worlds import World

Row = tuple[str, str, str, str]  # a prompt, the phrase in it, its target prompt, the phrase there


@dataclass(frozen=True)
class Options:
    """What the closed forms share, each default with its reason."""

    # rows of a prompt: its concept's last token, the first EOS, all from that last token on (EOS
    # and padding have read the name, and carry most of it), or all; chosen with ``prompts`` by the
    # rule of ``workflow/closed_forms.py``
    tokens: Literal["last", "end", "after", "all"] = "after"
    # what a concept is: its bare name; the training captions too; or its pairs (style x thing) too,
    # without which an edit may lose the name of a style and keep the style
    prompts: Literal["names", "templates", "pairs"] = "pairs"
    # what takes the concept's place; "" is the prompt without it
    anchor: str | dict[str, str] = ""
    retain: Literal["none", "world"] | Names = "world"  # names to hold: none, all others, or these
    checkpoint: FileName | None = None  # of no use here: there is no training to resume

    def __post_init__(self):
        check_options(self)


def require_retained(options: Options, reason: str) -> None:
    """ValueError, with the reason, where a method cannot do without states to hold."""
    if options.retain == "none":
        raise ValueError(f"{reason}: give retain='world', or a list of names")


def anchor_of(world: World, options: Options, concept: str) -> str:
    """The anchor of one concept. ValueError if there is none, or if it is the concept itself."""
    anchor = options.anchor.get(concept) if isinstance(options.anchor, dict) else options.anchor
    if anchor is None or (anchor and anchor.strip().lower() in synonyms(concept)):
        raise ValueError(
            f"the anchor of {concept!r} is {anchor!r}: name something else, or '' for none at all"
        )
    return anchor


def synonyms(concept: str) -> set[str]:
    """A concept's name and its synonyms in ``objects.csv``, in small letters."""
    rows = [row for row in object_table() if row["name"] == concept]
    return {concept.lower(), *(word.lower() for row in rows for word in row["synonyms"])}


def prompts_of(world: World, concept: str, anchor: str, prompts: str) -> list[Row]:
    """The prompts that are a concept, each with its target and the phrases that stand in both."""
    kind = world.kind(concept)
    rows = [(concept, concept, anchor, anchor)]
    if prompts != "names":
        more = [form for form in TEMPLATES[kind] if form != "{c}"]
        rows += [
            (filled(form, concept), concept, filled(form, anchor) if anchor else "", anchor)
            for form in more
        ]
    if prompts != "pairs":
        return rows
    if kind == "style":
        pairs = [(pair_prompt(o, concept), pair_prompt(o, anchor), o) for o in things(world)]
    else:
        pairs = [(pair_prompt(concept, s), pair_prompt(anchor, s), s) for s in world.styles]
    rows += [
        (prompt, concept, target if anchor else alone, anchor) for prompt, target, alone in pairs
    ]
    return rows


def things(world: World) -> list[str]:
    """Objects and people of a world."""
    return [*world.objects, *world.people]


def held_prompts(world: World, concepts: list[str], options: Options) -> list[tuple[str, str]]:
    """Prompts to hold and the phrase from which on they count: "", retained names, their pairs.

    ValueError for a retained name that is to be forgotten, or a synonym of one.
    """
    names = {"none": [], "world": world.concepts}.get(options.retain, options.retain)
    if options.retain == "world":
        names = [name for name in names if name not in concepts]
    lost = set().union(*(synonyms(concept) for concept in concepts))
    for name in names:
        if name.lower() in lost:
            raise ValueError(f"retain holds {name!r}, which is to be forgotten: take it out")
    held = [("", ""), *((name, name) for name in names)]
    styles = [name for name in names if name in world.styles]
    if options.prompts == "pairs" and styles:
        kept = [name for name in names if name not in world.styles]
        pairs = [(thing, styles[i % len(styles)]) for i, thing in enumerate(kept)]
        held += [(pair_prompt(thing, style), style) for thing, style in pairs]
    return held


def positions(world: World, prompt: str, phrase: str, tokens: str) -> list[int]:
    """The positions of a prompt that count; for the phrase "" "last" is BOS, "after" all but it."""
    length = world.text_length
    if tokens == "all":
        return list(range(length))
    if tokens == "end":
        return [1 + len(world.word_ids(prompt))]
    if not phrase:
        return [0] if tokens == "last" else list(range(1, length))
    start, _, end = prompt.partition(phrase)
    plain = "{" not in prompt and phrase not in end
    found = name_tokens(world, f"{start}{{c}}{end}", phrase) if plain else []
    last = max(found or find_tokens(world, [prompt], phrase)[0])
    return [last] if tokens == "last" else list(range(last, length))


def moved_rows(world: World, concepts: list[str], options: Options) -> tuple[Tensor, Tensor]:
    """States to move and states to move them to, (n, width) each, float64, from the base."""
    old, new = [], []
    for concept in concepts:
        rows = prompts_of(world, concept, anchor_of(world, options, concept), options.prompts)
        before = world.encode([row[0] for row in rows]).double().cpu()
        after = world.encode([row[2] for row in rows]).double().cpu()
        for (prompt, phrase, target, there), c, c_star in zip(rows, before, after, strict=True):
            places = positions(world, prompt, phrase, options.tokens)
            own = options.tokens in ("last", "end")  # one row each, wherever it stands
            old.append(c[places])
            new.append(c_star[positions(world, target, there, options.tokens) if own else places])
    return torch.cat(old), torch.cat(new)


def held_rows(world: World, concepts: list[str], options: Options) -> Tensor:
    """States to hold, (m, width), float64; none for ``retain="none"``."""
    if options.retain == "none":
        return torch.zeros(0, world.encode([""]).shape[-1], dtype=torch.float64)
    held = held_prompts(world, concepts, options)
    states = world.encode([prompt for prompt, _ in held]).double().cpu()
    rows = [
        c[positions(world, prompt, phrase, options.tokens)]
        for (prompt, phrase), c in zip(held, states, strict=True)
    ]
    return torch.cat(rows)


def multiplied(world: World, T: Tensor, **meta) -> Edit:
    """The edit that multiplies every key and value matrix by T: increments W (T - 1)."""
    step = T - torch.eye(len(T), dtype=T.dtype)
    delta = {
        name: (W.detach().double().cpu() @ step).float()
        for name, W in select_parameters(world, "kv").items()
    }
    return Edit(delta, [], meta)
