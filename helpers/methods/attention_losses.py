"""AIzheimer's three attention losses: re-steering, distraction, random stimulus.

Objective: L = L_recon + lam * L_attn (AIzheimer, Eq. 7), with L_attn one of Eq. 4, 5, 6 on the cross-attention that the
concept's tokens get. Fidelity: the default ``variant="paper"`` is the printed equation, with a reconstruction term on
the same forward pass; our reading is that the end mark and the padding, which have read the concept, are its tokens
too, and that other concepts are reconstructed. ``variant="code"`` is what the release computes (the last token only,
other targets and sums); it has no reconstruction term: ``recon=0`` gives that.
"""

import functools
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers import losses
from helpers.attention import AttentionProcessor, concept_mask, cross_attentions, find_tokens, processors
from helpers.diffusion import noised
from helpers.edits import Edit
from helpers.training import Training, concept_latents, finished, kept_latents, new_increments, predict, run
from helpers.worlds import World

LOSSES = {
    "resteering": losses.resteering,
    "distraction": losses.distraction,
    "random_stimulus": losses.random_stimulus,
}
LAM = {  # the paper gives none; these let the gradient of L_recon hold against that of L_attn, see notebook 03
    "resteering": 0.006,
    "distraction": 0.0012,
    "random_stimulus": 0.008,
}


@dataclass(frozen=True)
class Options(Training):
    """Options of the three losses, each default with its reason."""

    variant: str = "paper"  # "paper" or "code"; for re-steering also "fmn", the squared sum
    lam: float | None = None  # weight of the attention loss; None: the method's own, out of ``LAM``
    recon: float = 1.0  # weight of the reconstruction term; the release has none (0)
    recon_on: str = "kept"  # other concepts, or the "concept" itself, whose pictures work against L_attn
    end: bool = True  # the end mark and the padding count too: they have read the name, and would go on saying it
    group: str = "xattn"  # which parameters: all of cross-attention, as the paper trains
    skip_first_and_last: bool = False  # the paper's rows S: neither trained nor counted, in execution order
    skip_as_released: bool = False  # the release's reading of "last": the middle block, for study
    images: str | int = 16  # a folder of the user's pictures, or how many the base model draws
    add_noise: bool = True  # False: the paper's Table IV, where clean latents are fed
    steps: int = 40
    lr: float = 1e-3  # the release's 2e-5 is for a network a hundred times as large
    batch_size: int = 4
    decay: str = "cosine"
    clip: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        if (self.lam or 0) < 0 or self.recon < 0:
            raise ValueError(f"lam is {self.lam} and recon {self.recon}: weights of loss terms are not negative")
        if self.recon_on not in ("kept", "concept"):
            raise ValueError(f"unknown recon_on {self.recon_on!r}: choose 'kept' or 'concept'")
        if isinstance(self.images, int) and self.images < 1:
            raise ValueError(f"images is {self.images}: training needs at least one picture")


def chosen_layers(world: World, options: Options) -> list[str]:
    """Names of the cross-attention layers that are trained and counted, in execution order."""
    layers = list(cross_attentions(world.unet))
    if options.skip_as_released:
        return [name for name in layers[1:] if not name.startswith("mid_block")]
    return layers[1:-1] if options.skip_first_and_last else layers


def token_columns(world: World, prompts: list[str], owners: list[str], options: Options) -> list[list[int]]:
    """For each prompt, the positions whose attention counts."""
    columns = []
    for prompt, owner in zip(prompts, owners, strict=True):
        if options.variant == "code":
            columns.append(find_tokens(world, [prompt], owner)[0][-1:])  # the release keeps the last token only
        else:
            columns.append(concept_mask(world, [prompt], owner, end=options.end)[0].nonzero().flatten().tolist())
    return columns


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train the chosen cross-attention on L = recon * L_recon + lam * L_attn and return the increments."""
    start = time.time()
    if options.lam is None:
        options = replace(options, lam=LAM[method])  # the edit's meta records what was used
    layers = chosen_layers(world, options)
    delta = new_increments(world.unet, options.group, within=layers)
    latents, prompts, owners = concept_latents(world, concepts, options.images, seed)
    columns = token_columns(world, prompts, owners, options)
    rehearse = options.recon > 0 and options.recon_on == "kept"
    if rehearse:
        kept_x0, kept_prompts = kept_latents(world, concepts)
        latents, prompts = torch.cat([latents, kept_x0]), [*prompts, *kept_prompts]
    states = world.encode(prompts).float()
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
    variant = "paper" if options.variant == "code" and method == "resteering" else options.variant
    attention_loss = functools.partial(LOSSES[method], variant=variant)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        n = options.batch_size
        pick = torch.randint(len(owners), (n,), generator=generator)  # the concept's pictures come first
        if rehearse:
            pick = torch.cat([pick, torch.randint(len(owners), len(latents), (n,), generator=generator)])
        x_t, t, noise = noised(latents[pick], alpha_bar, generator)
        if not options.add_noise:
            x_t = latents[pick]
        torch.manual_seed(seed * 1_000_003 + step)  # random stimulus draws its targets on the spot
        kept: list[list[Tensor]] = [[] for _ in range(n)]  # one list of layers for each picture of the concept

        def keep(A: Tensor) -> None:
            for row, i, probabilities in zip(kept, pick[:n].tolist(), A[:n].float(), strict=True):
                row.append(probabilities[None, :, :, columns[i]])  # (1, heads, pixels, n)

        with processors(world.unet, lambda name: AttentionProcessor(keep), layers):
            eps_hat = predict(world.unet, delta, x_t, t, states[pick])
        values = {"attention": torch.stack([attention_loss(maps) for maps in kept]).mean()}
        if options.recon:
            rows = slice(n, None) if rehearse else slice(None)
            values["reconstruction"] = losses.reconstruction(eps_hat[rows], noise[rows])
        return values

    weights = {"attention": options.lam, "reconstruction": options.recon}
    history = run(delta, terms, weights, options.schedule(seed), progress=progress)
    return finished(world, delta, history, method=method, concepts=concepts, options=options, seed=seed, start=start)
