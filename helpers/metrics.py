"""What was forgotten and what was kept: each figure of the tables, one function."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def accuracy(world, images: Tensor, concept: str) -> float:
    """ACC: the share of pictures that the judge gives to a style, object or person.

    images (n, 3, H, W) in [0, 1]. Returns a number in [0, 1]. ValueError for an unknown concept or no pictures.
    Source: SepME, section 4.1. Of 4 pictures, 3 given to "church": ACC = 0.75.
    """
    if len(images) == 0:
        raise ValueError("accuracy needs at least one picture")
    world.kind(concept)
    return world.judge.gives(images, concept).float().mean().item()


def interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n pictures.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p -+ z sqrt(p (1 - p)/n) it stays inside [0, 1] and has a width at p = 0 and 1, where erasing ends up.
    ValueError for n < 1 or a share outside [0, 1]. Source: Wilson 1927. share 0.5, n 10: (0.237, 0.763).
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"share {share} of n {n}: want a share in [0, 1] and n >= 1")
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@torch.no_grad()
def clip_score(world, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine between a picture's and its prompt's CLIP embedding, by the world's own CLIPModel: (n,), in [-1, 1].

    images (n, 3, H, W) in [0, 1], one prompt for each. ValueError when their numbers differ.
    Source: Hessel et al., CLIPScore, without its factor 2.5 and its cut at zero.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts: give one prompt for each picture")
    model = world.clip
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    resized = images.float().cpu()
    if resized.shape[-1] != size:
        resized = F.interpolate(resized, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    ids = world.token_ids(prompts)
    output = model(input_ids=ids, pixel_values=(resized - mean) / std)  # embeddings come normalised
    return (output.text_embeds * output.image_embeds).sum(1)
