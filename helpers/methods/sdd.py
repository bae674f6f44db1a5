"""SDD: the concept's prompt is taught the model's own unconditional prediction (Kim et al.).

Objective: L = mean || eps_{theta + delta}(x_t, c, t) - sg[eps_{theta + delta}(x_t, null, t)] ||^2;
x_t is sampled from noise down to a random t by a teacher, the exponential moving average of the
student, and the teacher is what is returned. Near ESD at eta = 0, but the target moves with the
student.

Fidelity: ``code``, the release, whose pseudo-code agrees for one concept; for several, the
release's order: x_t from the prompt that joins all names, the loss on one name a row. (SepME states
the target with the frozen model.) Two things differ: the release takes t anywhere in the DDIM step
at which it stops, here t is the noise level of x_t; and its weight decay of 1e-4 is left out, since
lr times that is nothing in 50 steps.
"""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.denoise import predict, rollout
from helpers.options import AtLeast, Below, Count, Positive, Whole
from helpers.parameters import Dense, Group
from helpers.training import Problem, Training
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of SDD, each default with its reason."""

    # m of the teacher. What is left of its start, 0.97^50 = 0.22, is the release's 0.999^1500 =
    # 0.22
    ema: Annotated[float, AtLeast(0), Below(1)] = 0.97  # 0: the teacher is the student
    group: Group = "xattn"  # all of cross-attention, as the release trains
    guidance: float = 3.0  # of the rollout: the release's
    rollout_steps: Count = (
        5  # DDIM steps over the whole schedule; the release's 50 take ten times as long
    )
    steps: Whole = 50  # the release's 1500, of one image each, would take minutes
    lr: Positive = (
        5e-4  # the release's 1e-5 is for a network a hundred times as large, 30 times the steps
    )
    batch_size: Count = 2  # one t each; twice as many cost nearly twice the rollouts
    decay: Literal["constant", "cosine"] = "cosine"
    clip: Positive | None = 1.0  # the release's


@torch.no_grad()
def follow(teacher: dict[str, Tensor], student: dict[str, Tensor], ema: float) -> None:
    """The teacher's update, in place: delta_teacher <- m delta_teacher + (1 - m) delta_student."""
    for name, value in teacher.items():
        value.lerp_(student[name], 1 - ema)


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """The student is trained; the increments are the teacher's."""
    student = Dense(world, options.group).leaves
    teacher = {n: torch.zeros_like(v, requires_grad=False) for n, v in student.items()}
    states, null = world.encode(concepts).float(), world.encode([""]).float()
    batch = options.batch_size
    joined = world.encode([", ".join(concepts)]).float().expand(batch, -1, -1)
    nulls = null.expand(batch, -1, -1)
    length = len(world.alpha_bar)
    how = {"steps": options.rollout_steps, "guidance": options.guidance}
    timings = {"rollout": 0.0}

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        c = states[torch.randint(len(states), (batch,), generator=generator)]  # (b, tokens, width)
        t = torch.randint(length, (batch,), generator=generator).to(world.device)
        x_T = torch.randn((batch, *world.latent_shape), generator=generator).to(world.device)
        start = time.perf_counter()
        x_t = rollout(world, teacher, x_T, t, joined, null, **how)
        timings["rollout"] += time.perf_counter() - start
        with torch.no_grad():
            target = predict(world, student, x_t, t, nulls)
        return {"alignment": losses.alignment(predict(world, student, x_t, t, c), target)}

    return Problem(
        student, lambda: teacher, terms, {"alignment": 1.0}, state=teacher, timings=timings,
        after_step=lambda done: follow(teacher, student, options.ema),
    )  # fmt: skip
