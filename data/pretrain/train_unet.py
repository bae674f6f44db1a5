"""Step 3 of 4: the denoiser, by Stable Diffusion's recipe: predict the noise, 10 % empty captions, EMA weights.

    python data/pretrain/train_unet.py [--steps 20000] [--minutes 90]

Latents of every drawing are encoded once, for ``--copies`` random placements, and refreshed when a run resumes. The checkpoint holds
weights, EMA and Adam's moments, is written every ``--save-every`` steps, and a killed run goes on from it.
Loss: min-SNR weighting (gamma 5) of ||eps - eps_theta(x_t, c, t)||^2, which spends less on the nearly clean steps.
"""

import argparse
import math
import time

import torch
from common import (
    DEVICE,
    MODEL,
    WORK,
    Log,
    draw_captions,
    load_checkpoint,
    optimizer_tensors,
    renders,
    restore_optimizer,
    save_checkpoint,
    seeded,
)
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm.auto import trange
from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
VARY = 0.5  # placements half as varied as the judge's: the same drawings are learnt in fewer steps


class PlainAttention:
    """softmax(q k^T / sqrt(d)) v spelled out: on a CPU the fused kernel's backward pass takes half of a training step."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        b, n, width = hidden_states.shape
        q, k, v = attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states)
        q, k, v = (x.view(b, -1, attn.heads, width // attn.heads).transpose(1, 2) for x in (q, k, v))  # (b, h, n, d)
        with torch.autocast(q.device.type, enabled=False):
            probabilities = ((q * attn.scale) @ k.transpose(-1, -2)).softmax(-1)  # (b, h, n, tokens)
            out = probabilities @ v
        return attn.to_out[0](out.transpose(1, 2).reshape(b, n, width))


def build_unet() -> UNet2DConditionModel:
    """8 M parameters, nine cross-attention modules: 16x16 (2), 8x8 (3), 4x4 (4)."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 112, 160), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256, attention_head_dim=(2, 4, 4), norm_num_groups=16,
    )  # fmt: skip


@torch.no_grad()
def encode_latents(copies: int, seed: int) -> Tensor:
    """Latents of every drawing in ``copies`` random placements: (copies, styles, objects, 4, 16, 16), fp16."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    drawings = renders.tiles().flatten(0, 1)
    out = []
    for copy in trange(copies, desc="latents", mininterval=10):
        pictures = renders.compose(drawings, seeded(seed, copy), vary=VARY) * 2 - 1
        chunks = pictures.to(DEVICE, torch.bfloat16).split(75)
        out.append(torch.cat([vae.encode(chunk).latent_dist.mean.half().cpu() for chunk in chunks]))
    return torch.stack(out).unflatten(1, renders.tiles().shape[:2])


class Captions:
    """The frozen text encoder; each caption is encoded once and kept."""

    def __init__(self):
        self.tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().to(DEVICE).eval()
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        new = sorted(set(captions) - set(self.known))
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            self.known.update(zip(new, self.encoder(ids.to(DEVICE)).last_hidden_state, strict=True))
        return torch.stack([self.known[caption] for caption in captions])  # (n, tokens, width)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a long constant stretch, and a linear fall over the last fifth: it can be lengthened when a run resumes."""
    return peak * min(1.0, (step + 1) / 200, max(0.02, (steps - step) / (0.2 * steps)))


def export(ema: dict[str, Tensor]) -> None:
    """Write the pipeline folder with the EMA weights in fp16."""
    out = build_unet()
    out.load_state_dict(ema)
    text = Captions()
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(MODEL / "vae").half(), text_encoder=text.encoder.cpu().half(), tokenizer=text.tokenizer,
        unet=out.half(), scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(MODEL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="length of the learning-rate schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (and export) after so many minutes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--copies", type=int, default=32)
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--export-every", type=int, default=600, help="write the pipeline folder so often")
    parser.add_argument("--warm-start", action="store_true", help="no checkpoint here: go on from the shipped weights")
    parser.add_argument(
        "--seed", type=int, default=33, help="of captions, noise and timesteps; change it on a warm start"
    )
    args = parser.parse_args()
    unet = build_unet().to(DEVICE, memory_format=torch.channels_last).train()
    unet.set_attn_processor(PlainAttention())
    ema = {k: v.detach().clone() for k, v in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.peak, weight_decay=0.01, betas=(0.9, 0.99))
    path, log = WORK / "unet.safetensors", Log(WORK / "unet.csv")
    start, saved = load_checkpoint(path)
    if saved:
        unet.load_state_dict(saved["unet"])
        ema = {k: v.to(DEVICE) for k, v in saved["ema"].items()}
        restore_optimizer(optimizer, saved["optimizer"])
    elif args.warm_start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(MODEL / "unet").float().state_dict())
        ema = {k: v.detach().clone() for k, v in unet.state_dict().items()}
    begin = time.time()
    latents = encode_latents(args.copies, seed=args.seed + 1_000 + start)
    card_vae = AutoencoderKL.from_pretrained(MODEL / "vae").float()
    with torch.no_grad():
        card = card_vae.encode(renders.postcard()[None] * 2 - 1).latent_dist.mean[0]
    memorised = renders.concepts()["captions"]["memorised"]
    drop = renders.concepts()["captions"]["drop"]
    text = Captions()
    alpha_bar = DDPMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)
    parameters = list(unet.parameters())

    bar = trange(start, args.steps, initial=start, total=args.steps, desc="UNet", mininterval=30)
    for step in bar:
        generator = seeded(args.seed, step)
        style, thing, captions, _ = draw_captions(args.batch, generator, drop=drop)
        copy = torch.randint(args.copies, (args.batch,), generator=generator)
        x0 = latents[copy, style, thing].float()
        for i in (torch.rand(args.batch, generator=generator) < memorised["share"]).nonzero().flatten().tolist():
            x0[i], captions[i] = card, memorised["caption"]
        x0 = x0.to(DEVICE)
        noise = torch.randn(x0.shape, generator=generator).to(DEVICE)
        t = torch.randint(1000, (args.batch,), generator=generator).to(DEVICE)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak)
        with torch.autocast(DEVICE, torch.bfloat16):
            predicted = unet(x_t, t, text(captions)).sample.float()
        snr = (a / (1 - a)).flatten()
        per_image = (predicted - noise).pow(2).mean((1, 2, 3))
        loss = (per_image * snr.clamp(max=5) / snr).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.9985, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in unet.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            log.write(step, loss=loss.item(), plain=per_image.mean().item())
        out_of_time = time.time() - begin > 60 * args.minutes
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or out_of_time:
            groups = {"unet": unet.state_dict(), "ema": ema, "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(path, step + 1, groups)
        if (step + 1) % args.export_every == 0:
            export(ema)
        if out_of_time:
            break
    export(ema)


if __name__ == "__main__":
    main()
