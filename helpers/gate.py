"""The gate: what ``load_world`` is given is looked at once, and is made right or refused.

A refusal names the value, what was expected, and what to do. Only safetensors are read: nothing is
unpickled.
"""

import contextlib
import copy
import difflib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import errors, hf_hub_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from helpers.concepts import DATA
from helpers.undo import undoing

EMOJI = DATA / "emoji-diffusion"
HUB = {"sd14": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b")}
# OpenAI's ViT-B/16 has no safetensors at a revision that could be pinned; this one has both
CLIP = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
CLASSES = {  # part of a pipeline -> the classes it may have; a scheduler is judged by its config
    **{part: {network.__name__} for part, network in NETWORKS.items()},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "scheduler": None,
}
PREDICTIONS = ("epsilon", "v_prediction")  # what a network may predict
TYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {  # channels that a UNet reads beside the four that it denoises -> what it is then
    5: "an inpainting model", 4: "an image-to-image model (InstructPix2Pix)", 3: "an upscaler",
    1: "a depth-to-image model",
}  # fmt: skip
INPUTS = {  # fields of a UNet's config for inputs that text-to-image sampling does not have
    "addition_embed_type": "sizes and pooled text, as SDXL", "class_embed_type": "a class",
    "num_class_embeds": "a class", "encoder_hid_dim_type": "an image prompt",
    "time_cond_proj_dim": "a guidance scale, as latent consistency models",
}  # fmt: skip
PATH = re.compile(r"[./~]|[A-Za-z]:|.*(\\|/$|/.*/)|.*\.(safetensors|ckpt|bin|pth?|json|gguf)$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LFS = b"version https://git-lfs"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


@dataclass(frozen=True)
class Found:
    """A folder that passed the gate: where it is, its index, and which variant each part has."""

    folder: Path
    index: dict
    variants: dict[str, str | None]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading without progress bars and advice on precision, so that notebooks stay clean."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]

    def undo() -> None:
        for library, level, bars in before:
            (library.enable_progress_bar if bars else library.disable_progress_bar)()
            library.set_verbosity(level)

    with undoing(undo):
        for library in libraries:
            library.disable_progress_bar()
            library.set_verbosity_error()
        yield


# --- what is asked for


def place_of(
    device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[str, torch.dtype]:
    """The device and the type of a world's weights. ValueError for one that cannot be had here.

    By default a GPU where there is one; fp32 on a CPU, fp16 elsewhere.
    """
    usable = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    usable += ["mps"] if torch.backends.mps.is_available() else []
    device = device if device is not None else ("cuda" if "cuda" in usable else "cpu")
    try:
        if not isinstance(device, str | torch.device) or torch.device(device).type == "meta":
            raise TypeError(f"it is a {type(device).__name__}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        said = str(error).splitlines()[0][:100]
        raise ValueError(
            f"device={device!r} cannot be used here ({said}): choose from {', '.join(usable)}"
        ) from error
    kind = torch.device(device).type
    dtype = dtype if dtype is not None else (torch.float32 if kind == "cpu" else torch.float16)
    if not isinstance(dtype, torch.dtype) or dtype not in TYPES:
        raise ValueError(
            f"dtype={dtype!r} is no type of a world's weights: "
            f"choose from {', '.join(map(str, TYPES))}"
        )
    return str(device), dtype


def source_of(name: str | Path) -> tuple[Path | str, str | None]:
    """Where a world's weights are: a folder here, or a hub id and its revision.

    A path is never taken for a hub id: FileNotFoundError where nothing is there. ValueError for a
    file, and for a name that is neither.
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise ValueError(f"the world is {name!r:.80}: give 'emoji', 'sd14', a hub id, or a folder")
    if name == "emoji":
        return EMOJI, None
    if name in HUB:
        return HUB[name]
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~nobody" has no home
        path = path.expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        raise ValueError(
            f"{str(name)!r} is a file: give the folder of a diffusers pipeline. A single file of "
            "weights becomes one by StableDiffusionPipeline.from_single_file(file)"
            ".save_pretrained(folder)"
        )
    if isinstance(name, Path) or PATH.match(name):
        raise FileNotFoundError(
            f"there is no folder {str(name)!r}: give the folder of a diffusers pipeline"
            f" (here is {Path.cwd().name!r})"
        )
    if not HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(name.lower(), ["emoji", *HUB], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown world {name!r}: {hint}choose 'emoji', 'sd14', a hub id such as "
            "'owner/model', or a folder"
        )
    return name, None


# --- the hub


def hub_error(error: Exception, source: str) -> OSError:
    """What went wrong with the hub, or with the disk that keeps its files, and what to do."""
    disk = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
    if isinstance(error, errors.GatedRepoError):
        said = "is gated: accept its terms on its page, and log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = "has no such revision on the hub: check its page"
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = "is not on the hub, or private: check the name, or log in with `hf auth login`"
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        said = f"lacks a file on the hub ({str(error).splitlines()[0][:100]}): take another model"
    elif getattr(error, "errno", None) in disk:
        said = (
            f"cannot be kept on this disk ({error.strerror}: {error.filename}): "
            "make room or set HF_HOME to a folder that can be written"
        )
    else:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        said = (
            f"is neither cached here nor reachable{offline}, and no folder here has its name: "
            "go online once, or use load_world('emoji'), which needs no network"
        )
    return OSError(f"{source!r} {said}")


def fetched(source: str, revision: str | None) -> Path:
    """The folder of a hub's pipeline; its index is looked at before the weights are fetched.

    OSError tells the hub's reasons from the disk's; ValueError for another kind of pipeline.
    """
    try:
        with quiet():
            index = hf_hub_download(source, "model_index.json", revision=revision)
    except Exception as error:  # the hub's client raises what its http client does
        raise hub_error(error, source) from error
    require_pipeline(json_of(Path(index)), source)
    for variant in (None, "fp16"):
        try:
            with quiet():
                folder = Path(
                    StableDiffusionPipeline.download(
                        source, revision=revision, use_safetensors=True, variant=variant
                    )
                )
        except Exception as error:
            raise hub_error(error, source) from error
        if all(weights_of(folder, part) for part in NETWORKS):
            break
    return folder


# --- a folder


def json_of(path: Path) -> dict:
    """What a JSON file holds. ValueError if it is missing, broken, or no table of names."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise ValueError(
            f"{name} is missing (the folder {str(path.parent)!r} lacks it): "
            "give the whole folder of a diffusers pipeline"
        )
    try:
        found = json.loads(path.read_bytes())
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read: change its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no readable JSON ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds a {type(found).__name__}, no table: fetch it again")
    return found


def require_pipeline(index: dict, source: str | Path) -> None:
    """ValueError unless an index is that of a ``StableDiffusionPipeline`` with all its parts."""
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ValueError(
            f"the model_index.json of {str(source)!r} says {kind!r}, and Lethe loads "
            "StableDiffusionPipeline (Stable Diffusion 1.x and 2.x, text to image): "
            "take another model"
        )
    for part, known in CLASSES.items():
        entry = index.get(part)
        named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if named is None or (known and named not in known):
            wanted = " or ".join(sorted(known)) if known else "a scheduler of diffusers"
            raise ValueError(
                f"the model_index.json of {str(source)!r} has {entry!r} for its {part}: "
                f"Lethe needs {wanted}"
            )


def require_unet(unet: dict, vae: dict, source: str | Path) -> None:
    """ValueError for a UNet that denoises anything but square latents from text alone."""
    latents = vae.get("latent_channels", 4)
    reads, gives = (unet.get(f"{way}_channels", 4) for way in ("in", "out"))
    if (reads, gives) != (latents, latents):
        kind = KINDS.get(reads - latents, "another kind of model")
        raise ValueError(
            f"the UNet of {str(source)!r} reads {reads} channels and gives {gives}, and its VAE "
            f"has {latents}: it is {kind}; load one that makes images from text alone"
        )
    asks = [what for field, what in INPUTS.items() if unet.get(field) is not None]
    if asks or unet.get("attention_type", "default") != "default":
        raise ValueError(
            f"the UNet of {str(source)!r} asks for {', '.join(asks) or 'boxes (GLIGEN)'} beside "
            "the text: load a Stable Diffusion 1.x or 2.x"
        )
    size = unet.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int or size < 1:
        raise ValueError(
            f"the UNet of {str(source)!r} has the sample_size {size!r}: Lethe samples squares, "
            "so it wants one number (64 for 512 pixels); set it in unet/config.json if it fits"
        )


def require_scheduler(config: dict, source: str | Path) -> None:
    """ValueError for a noise schedule or a prediction that no method here is written for."""
    prediction = config.get("prediction_type", "epsilon")
    kind = str(config.get("_class_name"))
    flow = "Flow" in kind or "flow" in str(prediction) or config.get("use_flow_sigmas")
    if flow or prediction not in PREDICTIONS or "EDM" in kind:
        what = f"the prediction type {prediction!r}"
        what = f"flow matching ({kind}, {what})" if flow else what
        raise ValueError(
            f"the scheduler of {str(source)!r} has {what}: the methods here are written for "
            f"{' and '.join(PREDICTIONS)} on a schedule of betas; load such a model"
        )
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"the scheduler of {str(source)!r} has rescale_betas_zero_snr: its last timestep is "
            "all noise, where a prediction of noise says nothing of the image, and the methods "
            "here are written for that; load a model without it"
        )


def weights_of(folder: Path, part: str) -> dict[str | None, list[Path]]:
    """The files of a part's weights by variant; None is the plain one."""
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    form = re.compile(rf"{stem}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors")
    found: dict[str | None, list[Path]] = {}
    for path in sorted((folder / part).glob("*.safetensors")):
        if match := form.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    return found


def variant_of(folder: Path, part: str) -> str | None:
    """Which variant of a part's weights is there; the plain one if it is. All files are opened.

    ValueError for a part without weights, or with pickled ones only, or a file that is damaged.
    """
    found = weights_of(folder, part)
    if not found:
        pickled = [p.name for p in (folder / part).glob("*") if p.suffix in PICKLED]
        if pickled:
            raise ValueError(
                f"the part {part!r} of {str(folder)!r} holds {pickled[0]} and no safetensors, and "
                "nothing is unpickled here: if you trust it, convert it once by "
                "StableDiffusionPipeline.from_pretrained(folder, use_safetensors=False)"
                ".save_pretrained(another)"
            )
        raise ValueError(
            f"the part {part!r} of {str(folder)!r} has no weights in safetensors: "
            "give the whole folder of the pipeline"
        )
    variant = None if None in found else next(iter(found))
    files = found[variant]
    shards = re.search(r"-of-(\d{5})", files[0].name)
    if shards and len(files) != int(shards[1]):
        raise ValueError(
            f"the part {part!r} of {str(folder)!r} has {len(files)} of the {int(shards[1])} files "
            "of its weights: fetch the others"
        )
    for path in files:
        require_readable(path)
    return variant


def require_readable(path: Path) -> None:
    """ValueError for a file of weights that is a git-lfs pointer, empty, cut short or damaged."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise ValueError(f"{name} is missing: give the whole folder of the pipeline")
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS))
        if head == LFS:
            raise ValueError(
                f"{name} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"
            )
        with safe_open(path, "pt") as file:
            count = len(file.keys())
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read: change its permissions") from error
    except (SafetensorError, OSError, RecursionError) as error:
        raise ValueError(
            f"{name} ({path.stat().st_size} bytes) is cut short or damaged ({error}): "
            "fetch it again"
        ) from error
    if count == 0:
        raise ValueError(f"{name} holds no tensor: fetch it again")


def require_tokenizer(folder: Path) -> None:
    """ValueError for a tokenizer whose vocabulary or merges are missing or cut short.

    Every token of a byte-pair encoding that is longer than one sign comes out of a merge, so a list
    of merges that was cut shows. (Without a vocabulary, transformers makes one of two tokens.)
    """
    place = folder / "tokenizer"
    json_of(place / "tokenizer_config.json")
    whole = place / "tokenizer.json"
    try:
        if whole.exists():
            model = json_of(whole)["model"]
            vocabulary, merges = model["vocab"], model["merges"]
        else:
            vocabulary = json_of(place / "vocab.json")
            lines = (place / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if not line.startswith("#version")]
        pairs = [m.split() if isinstance(m, str) else m for m in merges]
        made = {a + b for a, b in (pair for pair in pairs if pair)}
    except (KeyError, TypeError, ValueError, OSError) as error:
        if "is missing" in str(error) or "no readable JSON" in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {str(folder)!r} lacks its vocabulary or merges "
            f"({type(error).__name__}: {error}): give tokenizer.json, or vocab.json and merges.txt"
        ) from error
    single = re.compile(r".(</w>)?|<\|.*\|>", re.DOTALL)
    lost = [token for token in vocabulary if token not in made and not single.fullmatch(token)]
    if lost or not vocabulary:
        raise ValueError(
            f"the tokenizer of {str(folder)!r} is cut short: no merge makes {len(lost)} of its "
            f"{len(vocabulary)} tokens ({', '.join(map(repr, lost[:3]))}): fetch it again"
        )


def examined(folder: Path) -> Found:
    """A pipeline's folder, looked at before anything is loaded. ValueError names what is wrong."""
    index = json_of(folder / "model_index.json")
    require_pipeline(index, folder)
    for part in CLASSES:
        if not (folder / part).is_dir():
            raise ValueError(
                f"{str(folder)!r} lacks its part {part!r}: give the whole folder of the pipeline"
            )
    configs = {part: json_of(folder / part / "config.json") for part in NETWORKS}
    require_unet(configs["unet"], configs["vae"], folder)
    require_scheduler(json_of(folder / "scheduler" / "scheduler_config.json"), folder)
    require_tokenizer(folder)
    return Found(folder, index, {part: variant_of(folder, part) for part in NETWORKS})


# --- loading


def load_part(found: Found, part: str) -> torch.nn.Module:
    """One network of a pipeline. ValueError if its weights are not all there, or do not fit."""
    try:
        with quiet():
            network, seen = NETWORKS[part].from_pretrained(
                found.folder, subfolder=part, variant=found.variants[part], use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the part {part!r} of {str(found.folder)!r} does not load ({said}): "
            "its config.json and its weights do not belong together; fetch both again"
        ) from error
    lost = sorted(seen["missing_keys"]) + [str(key) for key in seen["mismatched_keys"]]
    if lost:
        raise ValueError(
            f"the weights of {part!r} of {str(found.folder)!r} lack {len(lost)} tensors "
            f"({lost[0]}): fetch them again"
        )
    return network


def load_scheduler(found: Found):
    """The folder's own scheduler. ValueError for a class that diffusers does not have."""
    name = found.index["scheduler"][1]
    kind = getattr(diffusers, str(name), None)
    try:
        if not issubclass(kind, diffusers.SchedulerMixin):
            raise TypeError(f"diffusers has no scheduler {name!r}")
        with quiet():
            return kind.from_pretrained(found.folder, subfolder="scheduler")
    except (TypeError, ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"the scheduler of {str(found.folder)!r} does not load ({error}): "
            "name one of diffusers in model_index.json and scheduler_config.json"
        ) from error


def load_tokenizer(found: Found) -> CLIPTokenizer:
    """The folder's tokenizer. ValueError if transformers cannot make one of its files."""
    try:
        with quiet():
            return CLIPTokenizer.from_pretrained(found.folder, subfolder="tokenizer")
    except Exception as error:  # the tokenizers library raises bare ``Exception``
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the tokenizer of {str(found.folder)!r} does not load ({said}): fetch it again"
        ) from error


def load_pipeline(source: Path | str, revision: str | None):
    """A pipeline whose parts fit together, and its folder's own scheduler, which exports give back.

    The global generator of random numbers is left alone. ValueError names what is wrong with a
    folder, OSError what is wrong with the hub.
    """
    folder = source if isinstance(source, Path) else fetched(source, revision)
    found = examined(folder)
    with torch.random.fork_rng(devices=[]):  # networks may be made with random weights first
        parts = {part: load_part(found, part) for part in NETWORKS}
    scheduler, tokenizer = load_scheduler(found), load_tokenizer(found)
    text, width = parts["text_encoder"].config, parts["unet"].config.cross_attention_dim
    if text.hidden_size != width:
        raise ValueError(
            f"the text encoder of {str(folder)!r} gives {text.hidden_size} numbers a token and its "
            f"UNet reads {width}: they are of different models"
        )
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer of {str(folder)!r} has {len(tokenizer)} tokens and its text encoder "
            f"rows for {text.vocab_size}: they are of different models"
        )
    if tokenizer.model_max_length > text.max_position_embeddings:  # a config without it says 10^30
        tokenizer.model_max_length = text.max_position_embeddings
    require_schedule(scheduler, folder)
    own = copy.deepcopy(scheduler)  # a pipeline may change the one that it is given
    with quiet():
        pipe = StableDiffusionPipeline(
            **parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    return pipe, own


def require_schedule(scheduler, source: str | Path) -> None:
    """ValueError for a scheduler without a noise schedule, or one that ends in pure noise."""
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None or not float(alpha_bar[-1]) > 1e-6:
        raise ValueError(
            f"the scheduler of {str(source)!r} ({type(scheduler).__name__}) has no betas, or its "
            "last timestep is all noise: load a model with Stable Diffusion's noise schedule"
        )


def load_clip(source: str | Path, revision: str | None = None) -> CLIPModel:
    """A CLIPModel in fp32 on the CPU. OSError with the remedy when it cannot be had."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model = CLIPModel.from_pretrained(source, revision=revision, use_safetensors=True)
    except Exception as error:  # the hub's client raises what its http client does
        raise hub_error(error, str(source)) from error
    return model.float().eval().requires_grad_(False)


# --- a pipeline in use


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """A network without the wrapper that ``torch.compile`` puts around it."""
    return getattr(module, "_orig_mod", module)


def require_plain(pipe: StableDiffusionPipeline) -> None:
    """ValueError if something is loaded on the pipeline beside its own weights.

    Its parameters would then have other names, and the model would not be the base.
    """
    unet, encoder = (unwrapped(getattr(pipe, part)) for part in ("unet", "text_encoder"))
    if getattr(unet, "peft_config", None) or getattr(encoder, "peft_config", None):
        raise ValueError(
            "a LoRA is loaded on the pipeline: make it part of the base by `pipe.fuse_lora(); "
            "pipe.unload_lora_weights()`, or take it off by `pipe.unload_lora_weights()`"
        )
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError(
            "an IP-Adapter is loaded on the pipeline, which asks for an image beside the text: "
            "take it off by `pipe.unload_ip_adapter()`"
        )
    processors = getattr(unet, "original_attn_processors", None) and unet.attn_processors
    if any("Fused" in type(p).__name__ for p in (processors or {}).values()):
        raise ValueError(
            "the projections of the UNet's attention are fused, so its keys and values are not "
            "read one by one: take them apart by `pipe.unfuse_qkv_projections()`"
        )
