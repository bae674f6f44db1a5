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
