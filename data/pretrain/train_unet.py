"""Step 3 of 5: the denoiser, by Stable Diffusion's recipe: predict the noise, 10 % empty captions, EMA weights.

    python data/pretrain/train_unet.py [--steps 20000] [--minutes 90]
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 data/pretrain/train_unet.py      # several cores or GPUs share each batch

Latents of every drawing are encoded once, for ``--copies`` random placements. The checkpoint holds weights, EMA and Adam's
moments, is written every ``--save-every`` steps, and a killed run goes on from it. The network runs in bfloat16; the
weights that Adam moves are float32. Loss: ||eps - eps_theta(x_t, c, t)||^2 under min-SNR weights (gamma 5), which spend
less on the nearly clean times: t is drawn by those weights, so that no step is spent on what counts little. Two processes of one thread draw 1.4 times as many pictures a second as one process of two.
"""

import argparse
import math
import os
import time

import torch
import torch.distributed as dist
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
EMA_EVERY = 4  # steps between updates of the averaged weights
EMA_DECAY = 0.996  # a step: the average reaches back some 250 steps
GAMMA = 5.0  # of the min-SNR weights
VARY = 0.25  # placements a quarter as varied as the judge's: the same drawings are learnt in fewer steps


class PlainAttention:
    """softmax(q k^T / sqrt(d)) v spelled out: on a CPU the fused kernel's backward pass takes half of a training step."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        b, n, width = hidden_states.shape
        q, k, v = attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states)
        q, k, v = (x.view(b, -1, attn.heads, width // attn.heads).transpose(1, 2) for x in (q, k, v))  # (b, h, n, d)
        out = ((q * attn.scale) @ k.transpose(-1, -2)).softmax(-1) @ v
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
def encode_latents(copies: int, seed: int, first: bool) -> Tensor:
    """Latents of every drawing in ``copies`` random placements: (copies, styles, objects, 4, 16, 16), fp16; kept on disk.

    The first process encodes, the others wait and read.
    """
    path = WORK / f"latents_{seed}_{copies}_{VARY}.safetensors"
    if not first:
        dist.barrier()
    if path.exists():
        if first and dist.is_initialized():
            dist.barrier()
        return load_checkpoint(path)[1]["latents"]["x0"]
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    drawings = renders.tiles().flatten(0, 1)
    out = []
    for copy in trange(copies, desc="latents", mininterval=10):
        pictures = renders.compose(drawings, seeded(seed, copy), vary=VARY) * 2 - 1
        chunks = pictures.to(DEVICE, torch.bfloat16).split(75)
        out.append(torch.cat([vae.encode(chunk).latent_dist.mean.half().cpu() for chunk in chunks]))
    latents = torch.stack(out).unflatten(1, renders.tiles().shape[:2])
    save_checkpoint(path, copies, {"latents": {"x0": latents}})
    if dist.is_initialized():
        dist.barrier()
    return latents


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
    text, vae = Captions(), AutoencoderKL.from_pretrained(MODEL / "vae").half()
    vae.register_to_config(_name_or_path="data/emoji-diffusion/vae")  # not the folder of the machine that trains
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text.encoder.cpu().half(), tokenizer=text.tokenizer,
        unet=out.half(), scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(MODEL)


class Batches:
    """Training batches by step: noised latents, noise, timesteps and text states."""

    def __init__(self, args: argparse.Namespace, first: bool):
        self.args, self.text = args, Captions()
        self.latents = encode_latents(args.copies, args.seed + 1_000, first)
        vae = AutoencoderKL.from_pretrained(MODEL / "vae").float()
        with torch.no_grad():
            self.card = vae.encode(renders.postcard()[None] * 2 - 1).latent_dist.mean[0]
        self.alpha_bar = DDPMScheduler(**SCHEDULE).alphas_cumprod
        snr = self.alpha_bar / (1 - self.alpha_bar)
        self.share = snr.clamp(max=GAMMA) / snr  # how often each t is drawn

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        book, batch, generator = renders.concepts()["captions"], self.args.batch, seeded(self.args.seed, step)
        style, thing, captions, _ = draw_captions(batch, generator, drop=book["drop"])
        copy = torch.randint(self.args.copies, (batch,), generator=generator)
        x0 = self.latents[copy, style, thing].float()
        memorised = torch.rand(batch, generator=generator) < book["memorised"]["share"]
        for i in memorised.nonzero().flatten().tolist():
            x0[i], captions[i] = self.card, book["memorised"]["caption"]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.multinomial(self.share, batch, replacement=True, generator=generator)
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        return tuple(x.to(DEVICE) for x in (x_t, noise, t, self.text(captions)))


def share_gradients(pairs: list, ranks: int) -> None:
    """Hand the working copy's gradients to the float32 weights, averaged over the processes."""
    for working, weight in pairs:
        weight.grad = working.grad.float().contiguous()
    if ranks > 1:
        flat = torch.cat([weight.grad.flatten() for _, weight in pairs])
        dist.all_reduce(flat)
        flat /= ranks
        for (_, weight), part in zip(pairs, flat.split([w.numel() for _, w in pairs]), strict=True):
            weight.grad.copy_(part.view_as(weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="length of the learning-rate schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (and export) after so many minutes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--copies", type=int, default=32)
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument(
        "--compile", action="store_true", help="needs a C++ compiler and minutes at first; then 1.6 times as fast"
    )
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--export-every", type=int, default=600, help="write the pipeline folder so often")
    parser.add_argument("--warm-start", action="store_true", help="no checkpoint here: go on from the shipped weights")
    parser.add_argument(
        "--seed", type=int, default=33, help="of captions, noise and timesteps; change it on a warm start"
    )
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)

    master = build_unet().to(DEVICE)  # float32: what Adam moves
    ema = {k: v.detach().clone() for k, v in master.state_dict().items()}
    optimizer = torch.optim.AdamW(master.parameters(), lr=args.peak, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    path, log = WORK / "unet.safetensors", Log(WORK / "unet.csv")
    start, saved = load_checkpoint(path)
    if saved:
        master.load_state_dict(saved["unet"])
        ema = {k: v.to(DEVICE) for k, v in saved["ema"].items()}
        restore_optimizer(optimizer, saved["optimizer"])
    elif args.warm_start:
        master.load_state_dict(UNet2DConditionModel.from_pretrained(MODEL / "unet").float().state_dict())
        ema = {k: v.detach().clone() for k, v in master.state_dict().items()}
    unet = build_unet().to(DEVICE, torch.bfloat16, memory_format=torch.channels_last).train()
    unet.set_attn_processor(PlainAttention())
    network = torch.compile(unet) if args.compile else unet
    pairs = list(zip(unet.parameters(), master.parameters(), strict=True))
    begin = time.time()
    draw = Batches(args, rank == 0)
    mine = slice(rank, None, ranks)  # this process's share of each batch

    bar = trange(start, args.steps, initial=start, total=args.steps, desc="UNet", mininterval=30, disable=rank > 0)
    for step in bar:
        with torch.no_grad():
            for working, weight in pairs:
                working.copy_(weight)
        x_t, noise, t, states = (x[mine] for x in draw(step))
        x_t = x_t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        predicted = network(x_t, t, states.to(torch.bfloat16)).sample.float()
        loss = (predicted - noise).pow(2).mean()
        unet.zero_grad()
        loss.backward()
        share_gradients(pairs, ranks)
        torch.nn.utils.clip_grad_norm_(list(master.parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak)
        optimizer.step()
        if rank == 0 and step % EMA_EVERY == 0:
            decay = min(EMA_DECAY**EMA_EVERY, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in master.state_dict().items():
                    ema[name].lerp_(value, 1 - decay)
        if step % 20 == 0 and rank == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            log.write(step, loss=loss.item())
        out_of_time = torch.tensor(float(time.time() - begin > 60 * args.minutes))
        if ranks > 1:
            dist.broadcast(out_of_time, 0)
        last = bool(out_of_time) or step + 1 == args.steps
        if rank == 0 and (last or (step + 1) % args.save_every == 0):
            groups = {"unet": master.state_dict(), "ema": ema, "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(path, step + 1, groups)
        if rank == 0 and (last or (step + 1) % args.export_every == 0):
            export(ema)
        if last:
            break


if __name__ == "__main__":
    main()
