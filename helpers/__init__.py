"""Lethe's helpers: a world, a method, an edit, and what it forgot."""

from helpers.edits import Edit
from helpers.methods import unlearn
from helpers.sampling import sample
from helpers.worlds import World, load_world

__all__ = ["Edit", "World", "load_world", "sample", "unlearn"]
