"""Step 1 of 5: the tokenizer, and a small CLIPModel trained contrastively on pictures and captions.

    python data/pretrain/train_clip.py [--steps 1500]

Its text encoder, frozen, becomes the pipeline's; the whole of it gives the emoji world's CLIP score.
"""

import json

import torch
from common import DEVICE, MODEL, WORK, arguments, draw_captions, fit, renders, seeded
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

TEXT_LENGTH, WIDTH, MERGES = 16, 256, 330
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own normalisation


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer of CLIP's form: 256 bytes, 256 bytes at a word's end, merges, and the two marks last.

    End of text has the highest id, as in CLIP: the text model pools there, and padding repeats it.
    """
    _, _, captions, _ = draw_captions(20_000, seeded(1, 0), drop=0.0)
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", continuing_subword_prefix="", show_progress=False
    )
    raw.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(raw.to_str())["model"]["merges"]][:MERGES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": TEXT_LENGTH, "projection_dim": 128,
        "pad_token_id": tokenizer.pad_token_id, **marks,
    }  # fmt: skip
    vision = {
        "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": renders.TILE, "patch_size": 8, "projection_dim": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    model.set_attn_implementation("eager")  # on a CPU the fused kernel's backward pass is several times slower
    return model


def main() -> None:
    args = arguments(__doc__, steps=1500, batch=128)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    optimizer.register_step_post_hook(lambda *_: model.logit_scale.data.clamp_(max=4.6))
    mean, std = (torch.tensor(v, device=DEVICE).view(1, 3, 1, 1) for v in (MEAN, STD))

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = seeded(11, step)
        style, thing, captions, fits = draw_captions(args.batch, generator, drop=0.0)
        images = (renders.compose(renders.tiles()[style, thing], generator).to(DEVICE) - mean) / std
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = model(input_ids=ids, pixel_values=images)
        logits = out.logits_per_text.float()  # (captions, images)
        positive = fits[:, style, thing].to(DEVICE)  # (captions, images): does picture j fit caption i?
        to_images = -(positive / positive.sum(1, keepdim=True) * F.log_softmax(logits, 1)).sum(1).mean()
        to_captions = -(positive / positive.sum(0, keepdim=True) * F.log_softmax(logits, 0)).sum(0).mean()
        right = positive.gather(1, logits.argmax(1, keepdim=True)).mean()
        return (to_images + to_captions) / 2, {"right": right}

    fit(WORK / "clip.safetensors", {"model": model}, optimizer, batch_loss, args.steps, warmup=200, save_every=250)

    model = model.eval().cpu().half()
    model.save_pretrained(MODEL / "clip")
    text = CLIPTextModel(model.config.text_config).half()
    prefix = "text_model."
    weights = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    wanted = set(text.state_dict())
    if not set(weights) <= wanted:  # transformers 5 dropped the prefix
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    text.load_state_dict(weights)
    text.save_pretrained(MODEL / "text_encoder")
    tokenizer.save_pretrained(MODEL / "tokenizer")


if __name__ == "__main__":
    main()
