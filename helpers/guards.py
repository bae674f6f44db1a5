"""Guards: forgetting while sampling. A guard changes no weight, so it is no defence against whoever
holds the weights: attacks and tables say so."""

from dataclasses import asdict, dataclass

from torch import Tensor

from helpers.denoise import predict
from helpers.options import check_options, made

GUARDS: dict[str, type["Guard"]] = {}  # files name a guard, they hold no code


@dataclass(frozen=True)
class Guard:
    """A wrapper of the denoiser; each method's default leaves sampling as it is.

    A subclass is a frozen dataclass of options that JSON can hold, checked by their annotations;
    defining it registers its name.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        GUARDS[cls.__name__] = cls

    def __post_init__(self):
        check_options(self)

    def states(self, world, prompts: list[str] | None, states: Tensor) -> Tensor:
        """Text states (b, tokens, width) to sample from."""
        return states

    def latents(self, world, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """x_t (b, c, h, w) before the prediction at timestep t."""
        return x_t

    def eps(
        self, world, x_t: Tensor, t: Tensor, eps_null: Tensor, eps_c: Tensor, eps: Tensor
    ) -> Tensor:
        """The noise to remove (b, c, h, w); ``eps``: what guidance and earlier guards made."""
        return eps

    def described(self) -> dict:
        """Name and options, ready for JSON."""
        return {"name": type(self).__name__, "options": asdict(self)}


def guard_from(description: dict) -> Guard:
    """The inverse of ``Guard.described``. ValueError for a guard that is not registered, or for
    options that it does not take."""
    given = description if isinstance(description, dict) else {}
    name, options = given.get("name"), given.get("options")
    if not isinstance(name, str) or name not in GUARDS:
        raise ValueError(f"unknown guard {name!r}: choose from {', '.join(GUARDS)}")
    if not isinstance(options, dict):
        raise ValueError(f"the options of {name} are {options!r}: give a dict of its fields")
    return made(GUARDS[name], options, name)


@dataclass(frozen=True)
class NegativePrompt(Guard):
    """Guidance away from a phrase, at every step.

    eps <- eps - strength (eps_concept - eps_null), as in ``diffusion.steer_away``.
    Source: our reading of the NOT operator of Liu et al., composable diffusion models.
    """

    phrase: str = ""
    strength: float = 5.0

    def eps(self, world, x_t, t, eps_null, eps_c, eps):
        with world.batch_of([self.phrase]):  # gated adapters see the phrase as any prompt
            states = world.encode([self.phrase]).float().expand(len(x_t), -1, -1)
        with world.batch_of([self.phrase] * len(x_t)):
            eps_concept = predict(world, {}, x_t, t, states)
        return eps - self.strength * (eps_concept - eps_null)
