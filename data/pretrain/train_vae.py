"""Step 2 of 5: the autoencoder, 64x64 images <-> 4x16x16 latents of unit variance in every channel.

    python data/pretrain/train_vae.py [--steps 3000]

Loss: ||x - x'||_1 + ||x - x'||_2^2 + ||grad x - grad x'||_1 + 20 ||pool(x - x')||_2^2
+ 60 ||hue pool(x - x')||_2^2 + 1e-6 KL. Edges carry the styles; pool averages each latent's 4x4
pixels, and hue takes grey out. Without these two the four channels all go to edges, and frogs turn
brown. (The shipped weights saw the colour terms from step 1500 of 2050.) At the end each latent
channel is normalised inside the weights (last encoder and first decoder convolution), so that the
pipeline needs no more than one scaling factor, which is 1.
"""

import torch
from common import DEVICE, MODEL, WORK, Recipe, arguments, cosine, fit, place_drawings
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from helpers import renders
from helpers.seeds import step_generator

SEED, NORMALISING_SEED = 22, 23
PEAK = 2e-3  # learning rate


def build_vae() -> AutoencoderKL:
    """An autoencoder of two halvings, without attention, at random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[24, 48, 64], layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=renders.TILE, scaling_factor=1.0, mid_block_add_attention=False,
    )  # fmt: skip


def training_images(n: int, generator: torch.Generator) -> Tensor:
    """n training images in [-1, 1], one in fifty the memorised postcard: (n, 3, 64, 64)."""
    images, _ = place_drawings(n, generator)
    images[torch.rand(n, generator=generator) < 0.02] = renders.postcard()
    return images * 2 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, to the right and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """How far the decoded y is from x, (n, 3, H, W) both: four scalars by name."""
    mse = (x - y).pow(2).mean()
    sharp = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
    pooled = F.avg_pool2d(x - y, 4)
    hue = pooled - pooled.mean(1, keepdim=True)  # what grey does not explain
    colour = pooled.pow(2).mean() + 3 * hue.pow(2).mean()
    return {"mse": mse, "sharp": sharp, "colour": colour, "mae": (x - y).abs().mean()}


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold z -> (z - mean) / std into the convolutions on either side, for each latent channel."""
    z = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(50)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    q, p = vae.quant_conv, vae.post_quant_conv  # 1x1 convolutions: (8, 8, 1, 1), (4, 4, 1, 1)
    q.weight[:4] /= std.view(-1, 1, 1, 1)
    q.bias[:4] = (q.bias[:4] - mean) / std
    q.bias[4:] -= 2 * std.log()  # the second half is the log variance
    p.bias += (p.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    p.weight *= std.view(1, -1, 1, 1)


def main() -> None:
    args = arguments(__doc__, steps=3000, batch=16)
    vae = build_vae().to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK, weight_decay=0.0, betas=(0.9, 0.99))

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(SEED, step)
        torch.manual_seed(generator.initial_seed())  # diffusers samples latents from the global one
        x = training_images(args.batch, generator).to(DEVICE, memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.bfloat16):
            latents = vae.encode(x).latent_dist
            y = vae.decode(latents.sample()).sample.float()
        terms = reconstruction(x, y)
        loss = terms.pop("mae") + terms["mse"] + terms["sharp"] + 20 * terms["colour"]
        return loss + 1e-6 * latents.kl().mean(), terms

    recipe = Recipe(args.steps, cosine(PEAK, args.steps, warmup=100), save_every=250, clip=1.0)
    fit(WORK / "vae.safetensors", {"vae": vae}, optimizer, batch_loss, recipe)
    vae = vae.eval().cpu().to(memory_format=torch.contiguous_format)
    normalise_latents(vae, training_images(1000, step_generator(NORMALISING_SEED, 0)))
    vae.half().save_pretrained(MODEL / "vae")


if __name__ == "__main__":
    main()
