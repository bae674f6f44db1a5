"""Images to train on: sampled by the base model and cached, or the user's own from a folder."""

import functools
import itertools
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torchvision.transforms import v2

from helpers.checked import load_tensors, save_tensors
from helpers.concepts import TEMPLATES, filled
from helpers.diffusion import to_latents
from helpers.files import shown
from helpers.identity import value_digest
from helpers.options import NOT_EMPTY, Above, Count, Images, Rule, Seed, Share, Whole, typed
from helpers.provenance import drawing_key
from helpers.reader import checked_images, concept_folders, folder_images, plain_name
from helpers.sampling import checked, sample, sampling_of
from helpers.seeds import folded, retain_seeds, training_seeds
from helpers.worlds import World

CACHE = Path(
    os.environ.get("LETHE_CACHE") or Path(__file__).resolve().parent.parent / "build" / "cache"
)
FORMAT = "lethe-images-1"  # of files of images
WAY_OUT = "set LETHE_CACHE to a folder that you may write to"
FACES = (  # AIzheimer's references [7] and [8]
    "vishesh1412/celebrity-face-image-dataset",
    "anku5hk/5-faces-dataset",
)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit numbers, as a file holds them."""
    return (images * 255).round().byte().contiguous()


def as_stored(images: Tensor) -> Tensor:
    """Images in [0, 1], rounded to 8 bits: what a file would give back."""
    return to_bytes(images).float() / 255


def save_pictures(path: str | Path, images: Tensor, asked: dict | None = None) -> None:
    """Write images in [0, 1] as 8-bit numbers, with the question that they answer and a digest."""
    metadata = {"format": FORMAT}
    if asked is not None:
        metadata["asked"] = json.dumps(asked, sort_keys=True)
    save_tensors(path, {"images": to_bytes(images)}, metadata, remedy=WAY_OUT)


def load_pictures(
    path: str | Path, n: int | None = None, asked: dict | None = None, *,
    remedy: str = "remove it, and it is made again",
) -> Tensor:  # fmt: skip
    """Images that ``save_pictures`` wrote, 8-bit numbers (n, 3, H, W).

    n: how many there must be, at least; asked: the question that they must answer.
    FileNotFoundError, or ValueError names the file, what is wrong, and the remedy.
    """
    tensors, metadata = load_tensors(path, "file of images", remedy, signed=[FORMAT])
    images = tensors.get("images")
    right = images is not None and images.dtype == torch.uint8 and images.ndim == 4
    if not right or images.shape[1] != 3 or len(images) < (n or 1) or 0 in images.shape:
        found = "none" if images is None else f"{images.dtype}, {tuple(images.shape)}"
        wanted = f"{n or 'some'} of three channels of 8-bit numbers"
        raise ValueError(f"{shown(path)} holds other images ({found}; want {wanted}): {remedy}")
    if asked is not None and metadata.get("asked") != json.dumps(asked, sort_keys=True):
        raise ValueError(f"{shown(path)} answers another question: {remedy}")
    return images


@functools.cache
def _writable(folder: Path) -> Path:
    """The folder, or, with one warning, another one of this user's where it cannot be written."""
    home = os.path.expanduser("~")
    private = os.environ.get("XDG_CACHE_HOME") or (home != "~" and f"{home}/.cache")
    for chosen in [folder, *([Path(private) / "lethe"] if private else [])]:
        try:
            chosen.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=chosen):
                pass
        except OSError:
            continue
        break
    else:
        chosen = Path(tempfile.mkdtemp(prefix="lethe-"))  # nobody else can have made it
    if chosen != folder:
        warnings.warn(
            f"images cannot be kept in {shown(folder)}, so they are kept in {shown(chosen)}: "
            f"{WAY_OUT}",
            stacklevel=3,
        )
    return chosen


def cache_folder() -> Path:
    """Where the base's images are kept: ``CACHE``, or, if that cannot be written, a folder of this
    user's own."""
    return CACHE if CACHE.is_dir() and os.access(CACHE, os.W_OK) else _writable(CACHE)


@typed
def base_images(
    world: World, prompts: list[str], seeds: list[Seed], *, hide: list[list[int]] | None = None,
    progress: bool = False, **sampling,
) -> Tensor:  # fmt: skip
    """What the base model samples, kept on disk under a name that depends on all that makes it.

    hide: for each prompt, token positions whose cross-attention is zero meanwhile; sampling: as in
    ``sample``. Returns (n, 3, H, W) in [0, 1], stored as 8-bit numbers, so that the first call
    returns what later calls will read. The weights count as they stand now. A damaged file is
    sampled again, with a warning; so are images that cannot be kept. RuntimeError inside
    ``world.applied``: the images would be the edited model's, and be kept as the base's.
    """
    if world.is_edited:
        raise RuntimeError(
            "base_images inside `with world.applied(...)` would keep the edited model's images as "
            "the base's: leave the block first, or use sample"
        )
    how = sampling_of(world, sampling)
    checked(world, prompts, seeds, None, hide)
    asked = drawing_key(world, prompts, seeds, how, hide)
    path = cache_folder() / f"{value_digest(asked)[:24]}.safetensors"
    if path.exists():
        try:
            again = "it is made again"
            return load_pictures(path, len(prompts), asked, remedy=again).float() / 255
        except (ValueError, OSError) as error:
            warnings.warn(str(error), stacklevel=2)
    images = sample(world, prompts, seeds, hide=hide, progress=progress, **asdict(how))
    try:
        save_pictures(path, images, asked)
    except OSError as error:
        warnings.warn(f"these images are not kept, since {error}", stacklevel=2)
    return as_stored(images)


def caption_templates(world: World, owners: list[str], templates: dict = TEMPLATES) -> list[str]:
    """The template of each caption: those of its concept's kind, in turn."""
    turn = {owner: itertools.cycle(templates[world.kind(owner)]) for owner in owners}
    return [next(turn[owner]) for owner in owners]


@typed
def captions(
    world: World, concepts: list[str], count: Whole | dict[str, Whole], templates: dict = TEMPLATES
) -> tuple[list[str], list[str]]:
    """``count`` captions for each concept, the templates of its kind in turn, and their concepts.

    count: one number, or one for each concept. Returns the captions and, for each, the concept that
    it holds.
    """
    each = count if isinstance(count, dict) else dict.fromkeys(concepts, count)
    lacking = [concept for concept in concepts if concept not in each]
    if lacking:
        raise ValueError(f"count is {each}: give a number for {', '.join(lacking)} too")
    owners = [concept for concept in concepts for _ in range(each[concept])]
    forms = caption_templates(world, owners, templates)
    return [filled(*pair) for pair in zip(forms, owners, strict=True)], owners


def own_images(
    world: World, concepts: list[str], images: str | dict[str, str], templates: dict = TEMPLATES
) -> tuple[Tensor, list[str], list[str]]:
    """The user's own pictures of each concept, (n, 3, H, W), their captions, and whose each is.

    images: folders, as ``reader.concept_folders`` takes them. ValueError as it raises.
    """
    folders = concept_folders(images, concepts)
    pixels = {c: folder_images(folders[c], world.image_size) for c in concepts}
    counts = {concept: len(found) for concept, found in pixels.items()}
    return torch.cat(list(pixels.values())), *captions(world, concepts, counts, templates)


@typed(concepts=NOT_EMPTY)
def concept_latents(
    world: World, concepts: list[str], images: Images, seed: Seed, *,
    templates: dict = TEMPLATES,
) -> tuple[Tensor, list[str], list[str]]:  # fmt: skip
    """Training latents of concepts: (n, c, h, w) fp32, their captions, and each caption's concept.

    images: how many the base model samples for each concept (cached on disk), or the user's own, as
    ``own_images`` takes them. templates: captions by kind of concept, used in turn.
    """
    if isinstance(images, int):
        prompts, owners = captions(world, concepts, images, templates)
        pixels = base_images(world, prompts, training_seeds(seed, len(prompts)))
    else:
        pixels, prompts, owners = own_images(world, concepts, images, templates)
    return to_latents(world, pixels).float(), prompts, owners


@typed
def retain_latents(
    world: World, without: list[str], *, each: Count = 1
) -> tuple[Tensor, list[str]]:
    """The retain set: latents (n, c, h, w) of all concepts but those ``without``, and their names.

    Sampled by the base model once for all concepts and kept on disk: methods and concepts share it.
    """
    names = [name for name in world.concepts for _ in range(each)]
    pixels = base_images(world, names, retain_seeds(len(names)))
    rows = [i for i, name in enumerate(names) if name not in without]
    return to_latents(world, pixels[rows]).float(), [names[i] for i in rows]


@typed(images=Rule("with 4 dimensions or more, not empty", lambda x: x.ndim > 3))
def augmented(
    images: Tensor, copies: Count, *, flip: bool = True, crop: Annotated[Share, Above(0)] = 0.8,
    colour: Share = 0.1, seed: Seed = 0,
) -> Tensor:  # fmt: skip
    """New views: mirrored or not, cropped to a random square and resized back, colours shifted.

    images (n, ..., 3, H, W) in [0, 1]: what belongs to one row, a pair of images say, changes
    alike. crop: the smallest share of the area that remains; colour: the largest relative change
    of brightness, contrast and saturation (1 and 0: none). Returns (copies * n, ..., 3, H, W), the
    originals not among them. ValueError for fewer than one copy.
    """
    checked_images(images.flatten(0, -4))
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.RandomResizedCrop(images.shape[-2:], scale=(crop, 1.0), ratio=(1.0, 1.0)),
            v2.ColorJitter(brightness=colour, contrast=colour, saturation=colour),
        ]
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(folded(seed))
        return torch.stack([change(row) for _ in range(copies) for row in images]).clamp(0, 1)


@typed
def photographs(person: str, datasets: tuple[str, ...] = FACES) -> Path:
    """The folder of one person's photographs, fetched by kagglehub: for a method's ``images=``.

    The first of the datasets that has a folder of this name; capitals, spaces and points do not
    matter. Nothing of it is shipped: each set has a licence and terms of its own, which its page
    states. ValueError names the people there are, ModuleNotFoundError and ConnectionError the
    remedy. Source: AIzheimer, section V.
    """
    try:
        import kagglehub  # optional: the emoji world needs no photographs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "photographs are fetched by kagglehub: run `pip install kagglehub`"
        ) from error
    found: dict[str, Path] = {}
    for name in datasets:
        try:
            root = Path(kagglehub.dataset_download(name))
        except OSError as error:  # what requests raises is of this kind
            raise ConnectionError(
                f"the dataset {name!r} is neither cached here nor reachable: go online once"
            ) from error
        for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
            found.setdefault(plain_name(folder.name), folder)
        if plain_name(person) in found:
            return found[plain_name(person)]
    names = ", ".join(sorted(folder.name for folder in found.values()))
    raise ValueError(
        f"no photographs of {person!r} in {', '.join(datasets)}, whose folders are: {names}"
    )
