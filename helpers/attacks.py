"""Does it come back? The attacks, from ``helpers.evaluation``."""

from helpers.evaluation.attacks import (
    Attack,
    InversionAttack,
    Relearning,
    closed_form_embedding,
    closed_form_states,
    concept_inversion,
    keys_and_values,
    relearn,
    run_all,
)

__all__ = [
    "Attack", "InversionAttack", "Relearning", "closed_form_embedding", "closed_form_states",
    "concept_inversion", "keys_and_values", "relearn", "run_all",
]  # fmt: skip
