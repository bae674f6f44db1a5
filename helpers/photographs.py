"""Photographs of public people for Stable Diffusion, as AIzheimer trained on them. The emoji world needs none."""

import re
from pathlib import Path

FACES = ("vishesh1412/celebrity-face-image-dataset", "anku5hk/5-faces-dataset")  # AIzheimer's references [7] and [8]


def photographs(person: str, datasets: tuple[str, ...] = FACES) -> Path:
    """The folder of one person's photographs, fetched by kagglehub and kept in its cache: for a method's ``images=``.

    The first of the datasets that has a folder of this name; capitals, spaces and points do not matter. Nothing of it is
    shipped: each set has a licence and terms of its own, which its page states. ValueError names the people there are,
    ModuleNotFoundError and ConnectionError the remedy. Source: AIzheimer, section V.
    """
    try:
        import kagglehub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("photographs are fetched by kagglehub: run `pip install kagglehub`") from error
    found: dict[str, Path] = {}
    for name in datasets:
        try:
            root = Path(kagglehub.dataset_download(name))
        except OSError as error:  # what requests raises is of this kind
            raise ConnectionError(
                f"the dataset {name!r} is neither cached here nor reachable: go online once"
            ) from error
        for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
            found.setdefault(_plain(folder.name), folder)
        if _plain(person) in found:
            return found[_plain(person)]
    names = ", ".join(sorted(folder.name for folder in found.values()))
    raise ValueError(f"no photographs of {person!r} in {', '.join(datasets)}, whose folders are: {names}")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
