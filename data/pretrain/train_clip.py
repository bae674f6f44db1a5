"""Step 1 of 5: the tokenizer, and a small CLIPModel trained contrastively on images and captions.

    python data/pretrain/train_clip.py [--steps 1500]

Its text encoder, frozen, becomes the pipeline's. The whole CLIPModel gives the emoji world's CLIP
score.
"""

import json

import torch
from common import DEVICE, MODEL, WORK, Recipe, arguments, cosine, fit, sample_captions
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from helpers import renders
from helpers.seeds import step_generator

SEED, TOKENIZER_SEED = 11, 1
PEAK = 1e-3  # learning rate
TEXT_LENGTH, WIDTH, MERGES = 16, 256, 330
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own normalisation
STD = (0.26862954, 0.26130258, 0.27577711)


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer of CLIP's form: 256 bytes, 256 bytes at a word's end, merges, BOS, EOS.

    EOS has the highest id, as in CLIP: the text model pools there, and padding repeats it.
    """
    _, _, captions, _ = sample_captions(20_000, step_generator(TOKENIZER_SEED, 0), drop=0.0)
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", continuing_subword_prefix="",
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(raw.to_str())["model"]["merges"]][:MERGES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), BOS, EOS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel of three layers on either side, at random weights."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 128, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": renders.TILE, "patch_size": 8,
        "projection_dim": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # on a CPU the fused kernel's backward pass is several times slower
    model.set_attn_implementation("eager")
    return model


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """CLIP's loss where several images fit one caption: each positive has an equal share.

    L = -1/2 mean_i sum_j p_ij log softmax_j(logits) - 1/2 mean_j sum_i p_ij log softmax_i(logits),
    p: the positives, normalised to 1 over the axis that is summed

    logits, positive (captions, images), positive 1 where image j fits caption i, else 0. A scalar.
    Source: Radford et al., CLIP, Figure 3; several positives as in Khosla et al., supervised
    contrastive learning, Eq. 2.
    """
    to_images = positive / positive.sum(1, keepdim=True) * F.log_softmax(logits, 1)
    to_captions = positive / positive.sum(0, keepdim=True) * F.log_softmax(logits, 0)
    return (-to_images.sum(1).mean() - to_captions.sum(0).mean()) / 2


def train(tokenizer: CLIPTokenizer, steps: int, batch: int) -> CLIPModel:
    """Train, or go on from the checkpoint; every random choice is seeded by its step."""
    model = build_model(tokenizer).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.02)
    optimizer.register_step_post_hook(lambda *_: model.logit_scale.data.clamp_(max=4.6))
    mean, std = (torch.tensor(v, device=DEVICE).view(1, 3, 1, 1) for v in (MEAN, STD))

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(SEED, step)
        style, thing, captions, fits = sample_captions(batch, generator, drop=0.0)
        images = renders.compose(renders.tiles()[style, thing], generator)
        images = (images.to(DEVICE) - mean) / std
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        with torch.autocast(DEVICE, torch.bfloat16):
            out = model(input_ids=ids.input_ids.to(DEVICE), pixel_values=images)
        logits = out.logits_per_text.float()  # (captions, images)
        positive = fits[:, style, thing].to(DEVICE)  # (captions, images): does image j fit i?
        right = positive.gather(1, logits.argmax(1, keepdim=True)).mean()
        return contrastive_loss(logits, positive), {"right": right}

    recipe = Recipe(steps, cosine(PEAK, steps, warmup=200), save_every=250)
    fit(WORK / "clip.safetensors", {"model": model}, optimizer, batch_loss, recipe)
    return model.eval().cpu().half()


def save(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Write the whole model, and its text encoder and tokenizer as the pipeline's parts."""
    model.save_pretrained(MODEL / "clip")
    text = CLIPTextModel(model.config.text_config).half()
    prefix = "text_model."
    weights = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    if not set(weights) <= set(text.state_dict()):  # transformers 5 dropped the prefix
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    text.load_state_dict(weights)
    text.save_pretrained(MODEL / "text_encoder")
    tokenizer.save_pretrained(MODEL / "tokenizer")


def main() -> None:
    args = arguments(__doc__, steps=1500, batch=128)
    tokenizer = build_tokenizer()
    save(train(tokenizer, args.steps, args.batch), tokenizer)


if __name__ == "__main__":
    main()
