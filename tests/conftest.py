"""What tests share: a world of a few thousand random weights, built from configs, so that none needs a trained one."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers.worlds import EMOJI, World

WIDTH = 16  # of the text states


def pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """Parts put together with Stable Diffusion 1.x's noise schedule."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def build_tiny_world() -> World:
    """The emoji world's parts in miniature: cross-attention at 8x8, 4x4 and in the middle; heads differ by level."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_factor=5.0,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=(2, 4), norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=16, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    pipe = pipeline(vae, text_encoder, tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()
    return World(
        "tiny", pipe, styles=["Twemoji", "OpenMoji", "Noto"], objects=["church", "castle", "dog"],
        people=["santa claus", "old man"],
    )  # fmt: skip


def randomise(increments: dict[str, torch.Tensor], scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Fill increments with random numbers, always the same ones, as if they had been trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in increments.values():
            value.copy_(scale * torch.randn(value.shape, generator=generator))
    return increments


@pytest.fixture
def tiny_world() -> World:
    """A fresh world of random weights: a test may change it."""
    return build_tiny_world()
