"""The reader of pictures: files and folders of the user's own, and tensors that are handed over.

What a person sees is what is read: turned as the camera says, on white where it is transparent.
What is left out of a folder is named, with the reason. No file that only another program can draw
is opened (EPS and PostScript, which Pillow would hand to Ghostscript).
"""

import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF

from helpers.files import as_path

FOREIGN = ("EPS", "WMF", "MPEG", "GRIB", "BUFR", "HDF5", "IPTC")  # drawn by another program, or not
PHONES = (".heic", ".heif", ".hif")  # read where pillow_heif has registered itself
STILL = ("MPO", "PSD")  # further frames are previews or layers: the picture is one
TRANSPARENT = ("LA", "PA", "RGBA", "RGBa")
WHITES = (1.0, 255.0, 65535.0)  # what white is in numbers of 32 bits, as far as one can tell
REMEDY = (
    'several concepts need a folder each: images={"church": "a folder", "dog": "another"}, or one '
    "folder with a sub-folder for each, named like the concept"
)
NAMED = 12  # files named for each reason
TOLERANCE = 1e-3  # of [0, 1]: rounding of half precision
NOISE = 32.0  # no noised image goes further from 0, and no image in 0 ... 255 stays below it


def checked_images(
    images: Tensor, name: str = "images", *, size: int | None = None, noisy: bool = False
) -> Tensor:
    """The images as they are, once they are seen to be images: (n, 3, H, W), finite, in [0, 1].

    name: what an error calls them. size: the side that they must have. noisy: values may leave
    [0, 1] by as much as noise does, as those of x_t. ValueError says what is wrong and how to put
    it right: another type, another shape, whole numbers, NaN, values from 0 to 255 or -1 to 1.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"{name} is a {type(images).__name__}, want a tensor (n, 3, H, W) in [0, 1]: "
            "torch.stack a list, torch.from_numpy an array, helpers.reader.read_picture a file"
        )
    found = f"{name} of shape {tuple(images.shape)}"
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{found}: want at least one image, (n, 3, H, W), {_shape_remedy(images.shape)}"
        )
    if size is not None and images.shape[-2:] != (size, size):
        raise ValueError(
            f"{found}: want (n, 3, {size}, {size}), resize them with "
            f"torchvision.transforms.functional.resize(images, [{size}, {size}], antialias=True)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{found} holds numbers of type {images.dtype}, want floats in [0, 1]: "
            "images.float() / 255 where they are 8-bit"
        )
    low, high = (value.item() for value in images.detach().aminmax())
    if not np.isfinite([low, high]).all():
        broken = (~torch.isfinite(images.detach())).flatten(1).any(1).sum().item()
        raise ValueError(
            f"{broken} of {len(images)} {name} hold NaN or infinity: nothing can be told from "
            "them; take them out, or look where they come from (fp16 overflows, edits too strong)"
        )
    bounds = (-NOISE, NOISE) if noisy else (-TOLERANCE, 1 + TOLERANCE)
    if low < bounds[0] or high > bounds[1]:
        signed = low >= -1 - TOLERANCE and high <= 1 + TOLERANCE
        remedy = "(images + 1) / 2 if they run from -1 to 1" if signed else "divide by 255 or clamp"
        raise ValueError(f"{name} with values from {low:g} to {high:g}, want [0, 1]: {remedy}")
    return images


def _shape_remedy(shape: torch.Size) -> str:
    """How a tensor of this shape becomes one of images, as far as the shape tells."""
    if len(shape) == 3 and shape[0] == 3:
        return "one image is images[None]"
    if len(shape) == 4 and shape[-1] == 3:
        return "channels first: images.permute(0, 3, 1, 2)"
    if len(shape) == 4 and shape[1] == 1:
        return "grey ones are images.expand(-1, 3, -1, -1)"
    if len(shape) == 4 and shape[1] == 4:
        return "transparent ones on white are images[:, :3] * images[:, 3:] + 1 - images[:, 3:]"
    return "red, green and blue"


def readable_suffixes() -> set[str]:
    """The endings of files that Pillow reads here, plug-ins that registered themselves included."""
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in Image.OPEN and kind not in FOREIGN}


def read_picture(path: str | Path) -> Tensor:
    """One picture file as people see it: (3, H, W) in [0, 1], at its own size.

    Turned as its EXIF data say; what is transparent lies on white; grey of 16 bits keeps its scale,
    and in 32 bits white is the smallest of 1, 255 and 65535 that holds every value. Of an animation
    the first frame is taken, with a warning. FileNotFoundError; ValueError names a file that is
    broken, cut short, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    path = as_path(path)
    picture, frames = _read(path)
    if frames > 1:
        warnings.warn(f"{path.name} has {frames} frames: the first is taken", stacklevel=2)
    return picture


def _read(path: Path) -> tuple[Tensor, int]:
    """``read_picture``, and how many frames the file has."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: give the path of a picture")
    Image.init()
    kinds = [kind for kind in Image.OPEN if kind not in FOREIGN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=kinds) as file:
                frames = 1 if file.format in STILL else getattr(file, "n_frames", 1)
                return _upright(file), frames
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path.name} is not a readable image: give one that Pillow reads"
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.3g} million pixels"
        raise ValueError(f"{path.name} has more than {limit}: make it smaller") from error
    except Exception as error:  # Pillow's plug-ins raise errors of many kinds for damaged files
        text = path.suffix.lower() in (".png", ".apng") and "text" in str(error).lower()
        why = "more text than Pillow reads: save it without its metadata" if text else error
        raise ValueError(f"{path.name} cannot be read: {why}") from error


def _upright(file: Image.Image) -> Tensor:
    """An open picture as a tensor (3, H, W) in [0, 1], turned as its EXIF data say."""
    bits = str(file.tile[0][3]) if file.tile and file.format == "PNG" else ""  # such as "L;4"
    white = 65535 if file.format in ("PNG", "PPM", "JPEG2000") else None  # of mode "I"
    if file.format == "TIFF" and file.mode == "I;16":
        white = 2 ** file.tag_v2.get(258, (16,))[0] - 1  # BitsPerSample: 12 or 16
    file.load()
    clear = file.info.get("transparency")  # of a PNG: in the file's own bits, not in Pillow's
    if isinstance(clear, tuple) and max(clear) > 255:
        file.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int) and bits in ("L;2", "L;4"):
        file.info["transparency"] = clear * (85 if bits == "L;2" else 17)
    upright = ImageOps.exif_transpose(file)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        return _deep_grey(upright, white)
    if upright.mode in TRANSPARENT or upright.info.get("transparency") is not None:
        rgba = TF.to_tensor(upright.convert("RGBA"))  # (4, H, W)
        return rgba[:3] * rgba[3:] + (1 - rgba[3:])
    return TF.to_tensor(upright.convert("RGB"))


def _deep_grey(picture: Image.Image, white: float | None) -> Tensor:
    """Grey in more than 8 bits as (3, H, W) in [0, 1]. ValueError for values without a scale."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16"):
        white = white or 65535
    elif picture.mode == "F" or white is None:
        whites = WHITES if picture.mode == "F" else WHITES[1:]
        white = next((w for w in whites if 0 <= values.min() <= values.max() <= w), None)
    if white is None:
        low, high = values.min(), values.max()
        raise ValueError(f"grey values from {low:g} to {high:g}: scale them to 0 ... 1")
    clear = picture.info.get("transparency")
    shown = values / white if clear is None else np.where(values == clear, 1.0, values / white)
    return torch.from_numpy(shown).float().clamp(0, 1).expand(3, -1, -1)


def fitted(picture: Tensor, size: int) -> Tensor:
    """A picture (3, H, W) at the model's size: shorter side resized (antialias), centre cropped.

    Returns (3, size, size) in [0, 1]. The aspect is kept.
    """
    small = TF.resize(picture, [size], antialias=True)
    return TF.center_crop(small, [size, size]).clamp(0, 1)


def folder_images(folder: str | Path, size: int) -> Tensor:
    """The pictures of one folder in the order of their names, each read and ``fitted``.

    Returns (n, 3, size, size) in [0, 1]. Hidden files are passed over; one warning names whatever
    else was left out (no pictures, sub-folders, broken files, too large ones), what was enlarged,
    and animations. ValueError for no folder, or one without a picture that can be read.
    """
    folder = _folder(folder)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size is {size!r}: want a whole number of pixels, 1 or more")
    images, notes = [], {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        reason = _no_picture(path)
        if reason:
            notes.setdefault(reason, []).append(path.name)
            continue
        try:
            picture, frames = _read(path)
            images.append(fitted(picture, size))
        except (ValueError, OSError, RuntimeError) as error:  # Runtime: of a picture 1 pixel wide
            notes.setdefault("skipped", []).append(str(error))
            continue
        if min(picture.shape[1:]) < size:
            notes.setdefault(f"enlarged to {size} pixels", []).append(path.name)
        if frames > 1:
            notes.setdefault("first frame only", []).append(path.name)
    said = "; ".join(f"{reason}: {_some(names)}" for reason, names in notes.items())
    if said:
        warnings.warn(f"images of the folder {folder.name!r}: {said}", stacklevel=2)
    if not images:
        raise ValueError(
            f"the folder {folder.name!r} holds no readable image ({said or 'it is empty'}): "
            "give one with JPEG, PNG, WebP, TIFF or other files that Pillow reads"
        )
    return torch.stack(images)


def _no_picture(path: Path) -> str:
    """Why an entry of a folder is left out before it is opened; "" for what may be a picture."""
    if path.is_dir():
        return "sub-folders left out"
    if path.suffix.lower() in readable_suffixes() and path.is_file():
        return ""
    if path.suffix.lower() in PHONES:
        return "HEIC left out (save as JPEG, or call pillow_heif.register_heif_opener() first)"
    return "no pictures, left out"


def _some(names: list[str]) -> str:
    """Names in a row, the first ones if there are many."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _folder(folder: str | Path) -> Path:
    """A folder that is there. ValueError names what was given instead."""
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise ValueError(f"the folder of images is {folder!r}: give the path of a folder")
    path = Path(folder).expanduser()
    if path.is_file():
        raise ValueError(f"{str(folder)!r} is a file: give the folder that holds the images")
    if not path.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}: give a folder of images")
    return path


def plain_name(name: str) -> str:
    """A name as it is compared: capitals, spaces, underscores and points do not matter."""
    whole = unicodedata.normalize("NFC", name).casefold()
    return re.sub(r"[\W_]", "", whole) or whole


def concept_folders(images: str | Path | Mapping, concepts: list[str]) -> dict[str, Path]:
    """The folder of each concept's own pictures.

    images: a folder of one concept's pictures; a folder with one sub-folder for each concept, named
    like it; or {"church": "a folder", "tench": "another"}. Names are compared as ``plain_name``.
    ValueError names a concept without a folder, a folder without a concept, and one folder for
    several concepts, since each of its pictures would be called by several names.
    """
    if isinstance(images, Mapping):
        found = {concept: _folder(images[_match(concept, images)]) for concept in concepts}
        beside = [name for name in images if plain_name(str(name)) not in map(plain_name, concepts)]
        if beside:
            raise ValueError(f"images names {beside}, and the concepts are {concepts}")
    else:
        folder = _folder(images)
        inside = {p.name: p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
        if len(concepts) == 1 and plain_name(concepts[0]) not in map(plain_name, inside):
            return {concepts[0]: folder}
        found = {concept: inside[_match(concept, inside)] for concept in concepts}
        beside = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
        if beside:
            warnings.warn(
                f"left out, since the sub-folders of {folder.name!r} are read: {_some(beside)}",
                stacklevel=2,
            )
    if len({path.resolve() for path in found.values()}) < len(found):
        raise ValueError(f"one folder for several of {concepts}: {REMEDY}")
    return found


def _match(concept: str, names: Iterable[str]) -> str:
    """The one name that stands for a concept. ValueError for none, or several."""
    alike = [name for name in names if plain_name(str(name)) == plain_name(concept)]
    if concept in alike:
        return concept
    if len(alike) != 1:
        which = f"{alike} could all be" if alike else f"among {sorted(map(str, names))} there is no"
        raise ValueError(f"{which} folder of {concept!r}: {REMEDY}")
    return alike[0]
