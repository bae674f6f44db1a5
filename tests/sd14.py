"""Stable Diffusion 1.4's exact shapes, by its published configurations, with random weights.

Inside ``with torch.device("meta")`` the parts have shapes and no weights.
"""

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers.worlds import EMOJI
from workflow.estimate import UNET, VAE

TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}  # fmt: skip


def build_tokenizer() -> CLIPTokenizer:
    """The emoji world's words, at Stable Diffusion's text length."""
    return CLIPTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=77)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP ViT-L/14's text encoder; which ids are special is the tokenizer's business."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    return CLIPTextModel(CLIPTextConfig(**TEXT, **special))


def build_unet(**changes) -> UNet2DConditionModel:
    """The UNet: 860 million parameters; ``sample_size`` may be changed, which changes none."""
    return UNet2DConditionModel(**{**UNET, **changes})


def build_vae() -> AutoencoderKL:
    """The VAE."""
    return AutoencoderKL(**VAE)
