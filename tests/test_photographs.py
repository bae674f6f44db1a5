"""Photographs of people, with a stand-in for kagglehub: what can be told offline."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from helpers import training
from helpers.photographs import FACES, photographs


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """Two data sets of the published layout; returns the names that were asked for."""
    for path, colour in (("1/Celebrity Faces Dataset/Robert Downey Jr", "red"), ("2/Elon_Musk", "blue")):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (80, 60), colour).save(tmp_path / path / "001.jpg")
    asked = []

    def dataset_download(name: str) -> str:
        asked.append(name)
        return str(tmp_path / str(1 + FACES.index(name)))

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=dataset_download))
    return asked


def test_a_person_s_folder_is_found_and_read(kaggle):
    folder = photographs("Robert Downey Jr.")
    assert folder.name == "Robert Downey Jr" and kaggle == [FACES[0]]
    pixels = training.folder_images(folder, 32)
    assert pixels.shape == (1, 3, 32, 32) and pixels[0, 0].mean() > 0.9 > 0.1 > pixels[0, 2].mean()
    assert photographs("elon musk").name == "Elon_Musk" and kaggle == [FACES[0], *FACES]


def test_what_cannot_be_had_says_why(kaggle, monkeypatch):
    with pytest.raises(ValueError, match=r"no photographs of 'Taylor Swift' .* Elon_Musk, Robert Downey Jr"):
        photographs("Taylor Swift")

    def offline(name):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=offline))
    with pytest.raises(ConnectionError, match=r"celebrity-face-image-dataset.*go online once"):
        photographs("Elon Musk")
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # not installed
    with pytest.raises(ModuleNotFoundError, match="pip install kagglehub"):
        photographs("Elon Musk")
