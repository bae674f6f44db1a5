"""The judge of Stable Diffusion's images, with ResNets of random weights, offline."""

import urllib.error

import pytest
import torch
import torchvision

from helpers import concepts, judge_sd
from helpers.judge import BLANK

COLOURS = {"Van Gogh": (1.0, 0.2, 0.1), "Picasso": (0.1, 0.3, 1.0), BLANK: (0.5, 0.5, 0.5)}


@pytest.fixture
def offline(monkeypatch):
    """torchvision's networks as they are before any weights come."""
    for name in ("resnet18", "resnet50"):
        make = getattr(torchvision.models, name)

        def unweighted(weights=None, make=make):
            torch.manual_seed(0)
            return make()

        monkeypatch.setattr(torchvision.models, name, unweighted)


def images_of_colours(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = {name: 0.05 * torch.rand(n, 3, 32, 32, generator=generator) for name in COLOURS}
    return {
        name: (255 * (torch.tensor(colour).view(1, 3, 1, 1) + noise[name]).clamp(0, 1)).byte()
        for name, colour in COLOURS.items()
    }


def test_the_last_layer_learns_styles_and_the_judge_reads_it(offline, tmp_path):
    accuracy = judge_sd.train_styles(images_of_colours(10), tmp_path / "head.safetensors", lr=0.1)
    assert accuracy > 0.9  # on the three of ten that it did not see
    judge = judge_sd.load_judge(tmp_path / "head.safetensors")
    assert judge.style_names == list(COLOURS)
    images = images_of_colours(2)
    assert judge.styles(images["Picasso"] / 255) == ["Picasso", "Picasso"]
    assert judge.gives(images["Van Gogh"] / 255, "Van Gogh").all()
    assert judge.features(torch.rand(2, 3, 32, 32)).shape == (2, 512 + 2048)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.safetensors"]


def test_objects_are_imagenet_s(offline, tmp_path):
    judge_sd.train_styles(images_of_colours(4), tmp_path / "head.safetensors", epochs=1)
    judge = judge_sd.load_judge(tmp_path / "head.safetensors")
    assert len(judge.thing_names) == 1000
    categories = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert all(categories[judge.thing_names.index(name)] == name for name in judge_sd.IMAGENET)
    assert set(judge_sd.IMAGENET) == set(concepts.concepts()["stable_diffusion"]["objects"])
    assert judge.probabilities(torch.rand(1, 3, 32, 32), "thing").shape == (1, 1000)
    with pytest.raises(ValueError, match="Elon Musk"):
        judge.gives(torch.rand(1, 3, 32, 32), "Elon Musk")


def test_what_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    def offline(weights=None):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    with pytest.raises(OSError, match="go online once"):
        judge_sd.pretrained("resnet18")
    with pytest.raises(FileNotFoundError, match="make tables SCALE=paper"):
        judge_sd.load_judge(tmp_path / "none.safetensors")
