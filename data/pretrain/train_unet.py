"""Step 3 of 5: the denoiser, by Stable Diffusion's recipe.

It predicts the noise; 10 % of the captions are empty; what is shipped is the moving average (EMA).

    python data/pretrain/train_unet.py [--steps 20000] [--minutes 90]
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 data/pretrain/train_unet.py

torchrun's processes share each batch. On two cores, two processes of one thread train on 1.4 times
as many images a second as one process of two threads.

Latents of every drawing are encoded once, for ``--copies`` random placements. The checkpoint holds
weights, EMA and Adam's moments, is written every ``--save-every`` steps, and a killed run goes on
from it. The network runs in bfloat16; the weights that Adam moves are float32.
Loss: ||eps - eps_theta(x_t, c, t)||^2 under min-SNR weights (gamma 5), which count the nearly clean
times less. t is sampled by those weights, so that no step is spent on what counts little.
"""

import argparse
import copy
import math

import torch
import torch.distributed as dist
from common import (
    DEVICE,
    MODEL,
    WORK,
    Recipe,
    fit,
    join_processes,
    load_checkpoint,
    processes,
    sample_captions,
    save_checkpoint,
)
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from tqdm.auto import trange
from transformers import CLIPTextModel, CLIPTokenizer

from helpers import concepts, renders
from helpers.attention import AttentionProcessor
from helpers.seeds import step_generator

SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}  # fmt: skip
LATENTS = 1_000  # the placements' seed is that of the training and this
EMA_EVERY = 4  # steps between updates of the averaged weights
EMA_DECAY = 0.996  # a step: the average reaches back some 250 steps
GAMMA = 5.0  # of the min-SNR weights
VARY = 0.25  # a quarter of the judge's placements: the same drawings are learnt in fewer steps


def build_unet() -> UNet2DConditionModel:
    """8 M parameters, nine cross-attention modules: 16x16 (2), 8x8 (3), 4x4 (4)."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 112, 160),
        layers_per_block=1, cross_attention_dim=256, attention_head_dim=(2, 4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3, norm_num_groups=16,
    )  # fmt: skip


@torch.no_grad()
def encode_latents(copies: int, seed: int) -> Tensor:
    """Latents of every drawing in ``copies`` random placements, kept on disk.

    The first process encodes, the others wait and read.
    Returns (copies, styles, objects, 4, 16, 16), fp16.
    """
    rank, ranks = processes()
    path = WORK / f"latents_{seed}_{copies}_{VARY}.safetensors"
    if rank == 0 and not path.exists():
        vae = AutoencoderKL.from_pretrained(MODEL / "vae")
        vae = vae.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
        drawings, out = renders.tiles().flatten(0, 1), []
        for number in trange(copies, desc="latents", mininterval=10):
            images = renders.compose(drawings, step_generator(seed, number), vary=VARY) * 2 - 1
            chunks = images.to(DEVICE, torch.bfloat16).split(75)
            means = [vae.encode(chunk).latent_dist.mean.half().cpu() for chunk in chunks]
            out.append(torch.cat(means))
        latents = torch.stack(out).unflatten(1, renders.tiles().shape[:2])
        save_checkpoint(path, {"latents": {"x0": latents}})
    if ranks > 1:
        dist.barrier()
    return load_checkpoint(path)[0]["latents"]["x0"]


class Captions:
    """The frozen text encoder; each caption is encoded once and kept."""

    def __init__(self):
        self.tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder")
        self.encoder = encoder.float().to(DEVICE).eval()
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """Text states of captions, (n, tokens, width)."""
        new = sorted(set(captions) - set(self.known))
        if new:
            ids = self.tokenizer(
                new, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            states = self.encoder(ids.to(DEVICE)).last_hidden_state
            self.known.update(zip(new, states, strict=True))
        return torch.stack([self.known[caption] for caption in captions])


class Batches:
    """Training batches by step: noised latents, noise, timesteps and text states.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    """

    def __init__(self, batch: int, copies: int, seed: int):
        self.batch, self.copies, self.seed = batch, copies, seed
        self.text = Captions()
        self.latents = encode_latents(copies, seed + LATENTS)
        vae = AutoencoderKL.from_pretrained(MODEL / "vae").float()
        with torch.no_grad():
            self.card = vae.encode(renders.postcard()[None] * 2 - 1).latent_dist.mean[0]
        self.alpha_bar = DDPMScheduler(**SCHEDULE).alphas_cumprod
        snr = self.alpha_bar / (1 - self.alpha_bar)
        self.share = snr.clamp(max=GAMMA) / snr  # how often each t is sampled

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        book, generator = concepts.concepts()["captions"], step_generator(self.seed, step)
        style, thing, captions, _ = sample_captions(self.batch, generator, drop=book["drop"])
        number = torch.randint(self.copies, (self.batch,), generator=generator)
        x0 = self.latents[number, style, thing].float()
        memorised = torch.rand(self.batch, generator=generator) < book["memorised"]["share"]
        for i in memorised.nonzero().flatten().tolist():
            x0[i], captions[i] = self.card, book["memorised"]["caption"]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.multinomial(self.share, self.batch, replacement=True, generator=generator)
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        return tuple(x.to(DEVICE) for x in (x_t, noise, t, self.text(captions)))


class Trainee:
    """The UNet three times: float32 for Adam, bfloat16 for the passes, and averaged to ship."""

    def __init__(self, *, warm_start: bool = False, compiled: bool = False):
        self.master = build_unet().to(DEVICE)
        if warm_start:
            shipped = UNet2DConditionModel.from_pretrained(MODEL / "unet").float()
            self.master.load_state_dict(shipped.state_dict())
        self.ema = copy.deepcopy(self.master).requires_grad_(False)
        working = build_unet().to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
        self.working = working.train()
        # on a CPU the fused kernel's backward pass takes half of a training step
        self.working.set_attn_processor(AttentionProcessor())
        self.network = torch.compile(self.working) if compiled else self.working
        self.pairs = list(zip(self.working.parameters(), self.master.parameters(), strict=True))

    def predict(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """eps_theta(x_t, c, t) by the working copy, brought up to date first."""
        with torch.no_grad():
            for working, weight in self.pairs:
                working.copy_(weight)
        self.working.zero_grad()
        x_t = x_t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        return self.network(x_t, t, states.to(torch.bfloat16)).sample.float()

    def gradients(self) -> None:
        """Hand the working copy's gradients to Adam's weights, averaged over the processes."""
        for working, weight in self.pairs:
            weight.grad = working.grad.float().contiguous()
        if processes()[1] > 1:
            flat = torch.cat([weight.grad.flatten() for _, weight in self.pairs])
            dist.all_reduce(flat)
            flat /= processes()[1]
            parts = flat.split([weight.numel() for _, weight in self.pairs])
            for (_, weight), part in zip(self.pairs, parts, strict=True):
                weight.grad.copy_(part.view_as(weight))

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Move the average towards the weights, every few steps; faster while it is young."""
        if step % EMA_EVERY == 0:
            decay = min(EMA_DECAY**EMA_EVERY, (step + 1) / (step + 10))
            averaged = self.ema.state_dict()
            for name, value in self.master.state_dict().items():
                averaged[name].lerp_(value, 1 - decay)

    def export(self) -> None:
        """Write the pipeline folder with the averaged weights in fp16."""
        unet = build_unet()
        unet.load_state_dict(self.ema.state_dict())
        text, vae = Captions(), AutoencoderKL.from_pretrained(MODEL / "vae").half()
        vae.register_to_config(_name_or_path="data/emoji-diffusion/vae")  # no machine's own folder
        scheduler = PNDMScheduler(
            **SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        )
        StableDiffusionPipeline(
            vae=vae, text_encoder=text.encoder.cpu().half(), tokenizer=text.tokenizer,
            unet=unet.half(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(MODEL)  # fmt: skip


def options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)

    def add(name: str, default, help: str | None = None) -> None:
        parser.add_argument(name, type=type(default), default=default, help=help)

    def switch(name: str, help: str) -> None:
        parser.add_argument(name, action="store_true", help=help)

    add("--steps", 20_000, "length of the learning-rate schedule")
    add("--minutes", math.inf, "stop (and export) after so many minutes of training")
    add("--batch", 64)
    add("--copies", 32)
    add("--peak", 1e-3)
    switch("--compile", "needs a C++ compiler and minutes at first; then 1.6 times as fast")
    add("--save-every", 200)
    add("--export-every", 600, "write the pipeline folder so often")
    switch("--warm-start", "no checkpoint here: go on from the shipped weights")
    add("--seed", 33, "of captions, noise and timesteps; change it on a warm start")
    return parser.parse_args()


def main() -> None:
    args = options()
    join_processes("nccl" if DEVICE == "cuda" else "gloo")
    rank, ranks = processes()
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    trainee = Trainee(warm_start=args.warm_start, compiled=args.compile)
    optimizer = torch.optim.AdamW(
        trainee.master.parameters(), lr=args.peak, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    batches = Batches(args.batch, args.copies, args.seed)
    mine = slice(rank, None, ranks)  # this process's share of each batch

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, noise, t, states = (x[mine] for x in batches(step))
        return (trainee.predict(x_t, t, states) - noise).pow(2).mean(), {}

    def rate(step: int) -> float:
        """Warm-up, a long constant stretch, and a linear fall over the last fifth.

        So a training can be lengthened when it resumes.
        """
        fall = max(0.02, (args.steps - step) / (0.2 * args.steps))
        return args.peak * min(1.0, (step + 1) / 200, fall)

    recipe = Recipe(
        args.steps, rate, args.save_every, clip=1.0, minutes=args.minutes,
        gradients=trainee.gradients, after_step=trainee.average,
        export=trainee.export, export_every=args.export_every,
    )  # fmt: skip
    modules = {"unet": trainee.master, "ema": trainee.ema}
    fit(WORK / "unet.safetensors", modules, optimizer, batch_loss, recipe)


if __name__ == "__main__":
    main()
