"""Files that are whole when they are there."""

import pytest

from helpers.files import complete


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
