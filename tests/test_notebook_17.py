"""Notebook 17: its closed form gives the text states that the kit's attack gives."""

import torch
from conftest import random_edit
from notebook_code import functions
from torch import Tensor

from helpers import Edit, attacks
from helpers.parameters import select_parameters


def test_undoing_in_closed_form(tiny_world):
    names = {"world": tiny_world, "torch": torch, "Edit": Edit, "Tensor": Tensor}
    names |= {"select_parameters": select_parameters}
    undo = functions("17", "undo", **names)["undo"]
    edit, c = random_edit(tiny_world), tiny_world.encode(["church"])
    theirs = attacks.closed_form_states(tiny_world, edit, c)
    assert torch.allclose(undo(edit, c), theirs, atol=1e-5)
