"""Files that are whole when they are there."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import SafetensorError

from helpers import Edit, checked, files
from helpers.checkpoint import save_checkpoint
from helpers.files import complete, shown
from helpers.images import save_pictures
from helpers.tables import write_csv


def test_what_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete(tmp_path / "a" / "b.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not (tmp_path / "a" / "b.json").exists()
    with complete(tmp_path / "a" / "b.json") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a" / "b.json").read_text() == "whole"
    (tmp_path / "folder" / "old").mkdir(parents=True)
    with complete(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert not (tmp_path / "folder" / "old").exists()


def test_a_file_takes_no_folder_s_place(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "years.txt").write_text("of work")
    with pytest.raises(IsADirectoryError, match="'results' is a folder"):
        with complete(tmp_path / "results") as temporary:
            temporary.write_text("a file")
    assert (tmp_path / "results" / "years.txt").read_text() == "of work"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, OSError, ValueError])
def test_what_fails_leaves_nothing(tmp_path, error):
    """File or folder; and the one that was there stays."""
    (tmp_path / "old").write_text("old")
    with pytest.raises(error), complete(tmp_path / "old") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), complete(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise error
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_a_folder_takes_no_file_s_place(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(NotADirectoryError, match="'thesis' is a file"):
        with complete(tmp_path / "thesis") as temporary:
            temporary.mkdir()
    assert (tmp_path / "thesis").read_text() == "years of work" and names(tmp_path) == ["thesis"]


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_what_is_no_name_of_a_file(tmp_path, monkeypatch, path):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises((IsADirectoryError, ValueError)):
        Edit({"a": torch.ones(1)}).save(path)
    assert names(tmp_path) == ["deep"] and names(tmp_path / "deep") == []


@pytest.mark.parametrize("path", [None, 3, "", b"bytes", "a\0b"])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="the path is"), complete(path):
        pass


def test_each_call_has_a_name_of_its_own(tmp_path):
    """Threads of one process, calls within one another: nobody publishes another's half."""
    with complete(tmp_path / "a") as one, complete(tmp_path / "a") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one" and names(tmp_path) == ["a"]

    def write(text):
        for _ in range(20):
            with complete(tmp_path / "b") as temporary:
                assert not temporary.exists()
                temporary.write_text(text * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "b").read_text())) == 1 and names(tmp_path) == ["a", "b"]


def test_a_long_name(tmp_path):
    name = "n" * 250
    with complete(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == [name]


def test_a_block_that_writes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was written for"), complete(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from helpers.files import complete
with complete(sys.argv[1] + "/a") as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_sigkill_leaves_is_removed_a_day_later_and_never_published(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-c", KILLED, str(tmp_path), root]
    assert subprocess.run(command, cwd=root).returncode == -9
    (half,) = tmp_path.iterdir()
    assert half.name.endswith(".partial")

    def write():
        with complete(tmp_path / "a") as temporary:
            temporary.write_text("whole")

    write()
    assert half.exists()  # perhaps another machine's, at work on a shared disk
    yesterday = time.time() - 2 * files.OLD
    alive = tmp_path / f"b.{os.getpid()}-1-00.partial"
    gone, old_kind = tmp_path / "c.999999999-1-00.partial", tmp_path / "d.999999999.partial"
    foreign = tmp_path / "mine.partial"
    for path in (half, alive, gone, old_kind, foreign):
        path.write_text("half")
        os.utime(path, (yesterday, yesterday))
    write()
    assert names(tmp_path) == sorted(["a", alive.name, foreign.name])
    assert (tmp_path / "a").read_text() == "whole"


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    seen, sync, replace = [], os.fsync, os.replace

    def watched(handle):
        seen.append("sync")
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append("rename"), replace(*a)))
    with complete(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert seen[:2] == ["sync", "rename"]
    seen.clear()
    with complete(tmp_path / "folder") as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text("x")
    assert seen[:3] == ["sync", "sync", "rename"]


CAUSES = {errno.ENOSPC: "no space", errno.EROFS: "read-only", errno.EACCES: "may not write"}
WRITERS = {
    "edit": lambda path: Edit({"a": torch.ones(2)}).save(path),
    "checkpoint": lambda path: save_checkpoint(path, {"w": {"a": torch.ones(2)}}, step=1),
    "images": lambda path: save_pictures(path, torch.rand(1, 3, 8, 8)),
    "LoRA": lambda path: Edit({"unet.attn2.to_k.weight": torch.ones(3, 3)}).export_lora(path),
    "result": lambda path: checked.save_json(path, {"a": 1}),
    "table": lambda path: write_csv(path, [{"a": 1.0}]),
}


@pytest.mark.parametrize("code", CAUSES)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_takes_no_more_names_the_file(tmp_path, monkeypatch, kind, code):
    """As the system says it and as safetensors wraps it; the old file stays, and no half of one."""
    path = tmp_path / "deep" / "precious.file"
    WRITERS[kind](path)
    before = path.read_bytes()

    def full(*given, **options):
        raise OSError(code, os.strerror(code), str(given[0]))

    def wrapped(tensors, name, metadata=None):
        name.write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: (os error {code})")

    monkeypatch.setattr(checked, "save_file", wrapped)
    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=rf"deep/precious\.file cannot be written: .*{CAUSES[code]}"):
        WRITERS[kind](path)
    monkeypatch.undo()
    assert path.read_bytes() == before and names(path.parent) == ["precious.file"]


def test_a_full_disk_is_one(tmp_path):
    """A device that has no room, in earnest."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    with pytest.raises(OSError, match="x cannot be written: no space is left"):
        with complete(tmp_path / "x") as temporary:
            temporary.symlink_to("/dev/full")
            with open(temporary, "w") as file:
                file.write("x" * 10_000)
    assert names(tmp_path) == []


def test_below_a_file_and_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "deep" / "a", "/proc/lethe/a"):
        with pytest.raises(OSError, match=r"a cannot be written: .*give another path"):
            with complete(path) as temporary:
                temporary.write_text("x")
        with (
            pytest.raises(OSError, match="set LETHE_CACHE"),
            complete(path, remedy="set LETHE_CACHE"),
        ):
            pass


def test_another_file_s_error_stays_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        with complete(tmp_path / "a"):
            open(tmp_path / "nowhere")
    assert "cannot be written" not in str(caught.value)


def test_paths_are_shown_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "a" / "b.json") == shown("a/b.json") == "a/b.json"
    assert shown("/elsewhere/b") == "/elsewhere/b"
