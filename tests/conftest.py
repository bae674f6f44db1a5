"""What tests share: a world of a few thousand random weights, so that none needs a trained one."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers import images
from helpers.adapters import Adapter, layer_of
from helpers.edits import Edit
from helpers.guards import NegativePrompt
from helpers.parameters import parts_of, select_parameters
from helpers.worlds import EMOJI, World

WIDTH = 16  # of the text states


def pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """Parts put together with Stable Diffusion 1.x's noise schedule."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def build_tiny_world() -> World:
    """The emoji world's parts in miniature: cross-attention at 8x8, 4x4 and in the middle.

    The number of heads differs by level.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_factor=5.0,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=(2, 4), norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=16,
        block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
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


def random_edit(
    world: World, *, group: str = "kv", scale: float = 0.1, seed: int = 7, concepts=("church",)
) -> Edit:
    """An edit of random numbers, as if it had been trained: the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    delta = {
        name: scale * torch.randn(p.shape, generator=generator)
        for name, p in select_parameters(world, group).items()
    }
    base = {part: world.fingerprint(part) for part in parts_of(delta)}
    return Edit(delta, meta={"base": base, "concepts": list(concepts)})


def full_edit(world: World, *, gate: str = "always") -> Edit:
    """Everything that an edit can hold, of random numbers: increments of UNet and text encoder, an
    adapter of a linear layer of each and of a convolution, and a guard."""
    generator = torch.Generator().manual_seed(5)
    query = next(n for n, _ in world.pipe.text_encoder.named_modules() if n.endswith("q_proj"))
    key = next(n for n, _ in world.unet.named_modules() if n.endswith("attn2.to_k"))
    down, up = {}, {}
    for name in (f"text_encoder.{query}", f"unet.{key}", "unet.conv_in"):
        out, *rest = layer_of(world, name).weight.shape
        down[name] = 0.2 * torch.randn(2, *rest, generator=generator)
        up[name] = 0.2 * torch.randn(out, 2, *[1] * (len(rest) - 1), generator=generator)
    edit = random_edit(world) + random_edit(world, group="text", scale=0.02)
    adapter = Adapter(down, up, 0.5, gate, {"word": "church"})
    guards = (NegativePrompt("church", 2.0),)
    return Edit(edit.delta, [{"step": 0, "total": 1.0}], edit.meta, (adapter,), guards)


@pytest.fixture
def tiny_world() -> World:
    """A fresh world of random weights: a test may change it."""
    return build_tiny_world()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of this test's own for the images of the base model."""
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"
