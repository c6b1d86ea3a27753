"""Checks made before work is spent, and files that appear whole."""

import os
import stat

import pytest

from sdv_jax.data.files import check_writable, replacing
from sdv_jax.errors import UserError


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [
        ("none/a.mp4", "does not exist"),
        ("file/a.mp4", "is a file, not a folder"),
        (".", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            check_writable(tmp_path / path, what="video")


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: os.open(tmp_path / "x" / "y", os.O_CREAT))
    with pytest.raises(UserError, match="no permission to write"):
        check_writable(tmp_path / "a.mp4", what="video")


def test_the_file_appears_at_the_end_with_ordinary_permissions(tmp_path):
    with replacing(tmp_path / "a.txt", what="text") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists() and temporary.suffix == ".txt" and temporary.parent == tmp_path
    plain = tmp_path / "b.txt"
    plain.touch()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_contents_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    told, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: told.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: told.append("named") or replace(*names))
    with replacing(tmp_path / "a.txt", what="text") as temporary:
        temporary.write_text("12345")
    assert told == [5, "named"]


def test_an_error_keeps_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt", what="text") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
