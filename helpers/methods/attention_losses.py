"""AIzheimer's three attention losses: re-steering, distraction, random stimulus.

Objective: L = L_recon + lam * L_attn (AIzheimer, Eq. 7), with L_attn one of Eq. 4, 5, 6 on the cross-attention that the
concept's tokens get. Fidelity: the default ``variant="paper"`` is the printed equation, with a reconstruction term on
the same forward pass; ``variant="code"`` is what the release computes (the last token only, other targets and sums).
The release has no reconstruction term: ``recon=0`` gives that.
"""

import functools
import time
from dataclasses import asdict, dataclass

import diffusers
import torch
from torch import Tensor

from helpers import losses
from helpers.attention import AttentionProcessor, cross_attentions, find_tokens, processors
from helpers.diffusion import add_noise, to_latents
from helpers.edits import Edit
from helpers.training import Schedule, drawn_images, folder_images, run, select_parameters
from helpers.worlds import World

LOSSES = {
    "resteering": losses.resteering,
    "distraction": losses.distraction,
    "random_stimulus": losses.random_stimulus,
}
TEMPLATES = {  # captions of the training pictures: the bare name, and the phrases people use
    "style": ("{c}", "in the style of {c}"),
    "object": ("{c}", "a picture of a {c}"),
    "person": ("{c}", "a picture of a {c}"),
}


@dataclass(frozen=True)
class Options:
    """Options of the three losses, each default with its reason."""

    variant: str = "paper"  # "paper" or "code"; for re-steering also "fmn", the squared sum
    lam: float = 0.1  # weight of the attention loss; the paper gives none
    recon: float = 1.0  # weight of the reconstruction term; the release has none (0)
    group: str = "xattn"  # which parameters: all of cross-attention, as the paper trains
    skip_first_and_last: bool = False  # the paper's rows S: neither trained nor counted, in execution order
    skip_as_released: bool = False  # the release's reading of "last": the middle block, for study
    images: str | int = 16  # a folder of the user's pictures, or how many the base model draws
    add_noise: bool = True  # False: the paper's Table IV, where clean latents are fed
    steps: int = 60
    lr: float = 1e-4
    batch_size: int = 4
    decay: str = "cosine"
    clip: float | None = 1.0
    accumulate_grads: bool = False
    checkpoint: str | None = None  # a file to resume from after a kill

    def __post_init__(self):
        if self.lam < 0 or self.recon < 0:
            raise ValueError(f"lam is {self.lam} and recon {self.recon}: weights of loss terms are not negative")
        if isinstance(self.images, int) and self.images < 1:
            raise ValueError(f"images is {self.images}: training needs at least one picture")


def chosen_layers(world: World, options: Options) -> list[str]:
    """Names of the cross-attention layers that are trained and counted, in execution order."""
    layers = list(cross_attentions(world.unet))
    if options.skip_as_released:
        return [name for name in layers[1:] if not name.startswith("mid_block")]
    return layers[1:-1] if options.skip_first_and_last else layers


def training_data(
    world: World, concepts: list[str], options: Options, seed: int
) -> tuple[Tensor, list[str], list[str]]:
    """Latents (n, c, h, w), their captions, and the concept that each caption holds."""
    prompts, owners = [], []
    count = options.images if isinstance(options.images, int) else None
    folder = None if count else folder_images(options.images, world.image_size)
    for concept in concepts:
        templates = TEMPLATES[world.kind(concept)]
        for i in range(count or len(folder)):
            prompts.append(templates[i % len(templates)].format(c=concept))
            owners.append(concept)
    if folder is not None:
        images = folder.repeat(len(concepts), 1, 1, 1)
    else:
        images = drawn_images(world, prompts, [500_000 + 1000 * seed + i for i in range(len(prompts))])
    latents = torch.cat([to_latents(world, part) for part in images.split(16)]).float()
    return latents, prompts, owners


def token_columns(world: World, prompts: list[str], owners: list[str], *, last_only: bool) -> list[list[int]]:
    """For each prompt, the positions of its concept's tokens; only the last one as the release has it."""
    found = [find_tokens(world, [p], owner)[0] for p, owner in zip(prompts, owners, strict=True)]
    return [columns[-1:] for columns in found] if last_only else found


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train the chosen cross-attention on L = recon * L_recon + lam * L_attn and return the increments."""
    start = time.time()
    layers = chosen_layers(world, options)
    parameters = select_parameters(world.unet, options.group, within=layers)
    latents, prompts, owners = training_data(world, concepts, options, seed)
    columns = token_columns(world, prompts, owners, last_only=options.variant == "code")
    states = world.encode(prompts).float()
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
    variant = "paper" if options.variant == "code" and method == "resteering" else options.variant
    attention_loss = functools.partial(LOSSES[method], variant=variant)

    def terms(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator)
        x_0 = latents[pick]
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = torch.randint(len(alpha_bar), (len(pick),), generator=generator).to(world.device)
        x_t = add_noise(x_0, noise, t, alpha_bar) if options.add_noise else x_0
        torch.manual_seed(seed * 1_000_003 + step)  # random stimulus draws its targets on the spot
        kept: list[list[Tensor]] = [[] for _ in pick]  # one list of layers for each picture

        def keep(A: Tensor) -> None:
            for row, i, probabilities in zip(kept, pick.tolist(), A, strict=True):
                row.append(probabilities[None, :, :, columns[i]])  # (1, heads, pixels, n)

        with processors(world.unet, lambda name: AttentionProcessor(keep), layers):
            eps_hat = world.unet(x_t, t, states[pick]).sample
        values = {"attention": torch.stack([attention_loss(maps) for maps in kept]).mean()}
        if options.recon:
            values["reconstruction"] = losses.reconstruction(eps_hat, noise)
        return values

    schedule = Schedule(
        steps=options.steps, lr=options.lr, batch_size=options.batch_size, decay=options.decay, clip=options.clip,
        accumulate_grads=options.accumulate_grads, seed=seed,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        weights = {"attention": options.lam, "reconstruction": options.recon}
        history = run(parameters, terms, weights, schedule, checkpoint=options.checkpoint, progress=progress)
        delta = {name: (parameter.detach() - before[name]).float().cpu() for name, parameter in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data.copy_(before[name])
    meta = {
        "method": method, "concepts": concepts, "options": asdict(options), "seed": seed, "base": world.fingerprint(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}, "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    return Edit(delta, history, meta)
