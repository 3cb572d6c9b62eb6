"""Files are whole or absent, damaged JSON has a cure, a lock is one process's."""

import errno
import fcntl
import json
import math
import os
from pathlib import Path

import pytest

from dpfast.errors import CheckpointError, FileError
from dpfast.files import lock, make_folder, read_json, remove, sync, write_atomic, write_json


def test_parts_of_every_kind_are_written_in_order(tmp_path):
    path = tmp_path / "new folder" / "x"
    write_atomic(path, "a\u00e9", b"b", memoryview(b"c"))
    assert path.read_bytes() == b"a\xc3\xa9bc"
    assert os.listdir(path.parent) == ["x"]


def test_a_failed_write_is_no_matter_of_checkpoints_and_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "x", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"cannot write .*No space left.*Make room") as caught:
            write_atomic(tmp_path / "x", "new")
    assert not isinstance(caught.value, CheckpointError)
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.inf, "b": [1.5, {"c": (2, math.inf)}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "inf", "b": [1.5, {"c": [2, "inf"]}]}
    assert read_json(tmp_path / "x.json", cure="")["a"] == "inf"


@pytest.mark.parametrize("content", ["", '{"a": ', b"\xff\xfe", None])
def test_json_that_cannot_be_read_is_named_with_its_cure(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        write_atomic(path, content)
    with pytest.raises(FileError, match=r"results\.json (is damaged|cannot be read).*; delete it"):
        read_json(path, cure="delete it")


def test_a_lock_is_held_once_and_let_go_with_the_file(tmp_path, monkeypatch):
    first, second = (os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(first, tmp_path)
    assert not lock(second, tmp_path)
    os.close(first)
    assert lock(second, tmp_path)
    os.close(second)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(FileError, match="local disk"):
        lock(0, tmp_path)


def test_remove_takes_files_folders_and_nothing(tmp_path):
    write_atomic(tmp_path / "a" / "b", "x")
    for path in (tmp_path / "a" / "b", tmp_path / "a", tmp_path / "none"):
        remove(path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def synced(monkeypatch):
    """Every path that is put on stable storage meanwhile."""
    fsync, paths = os.fsync, []

    def watched(fd):
        paths.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    return paths


def test_a_folder_is_made_with_those_above_it_and_each_name_is_synced(tmp_path, synced):
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a/b/c").is_dir()
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")]
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [str(tmp_path / "a/b")]  # who made it may have been killed before that


def test_a_folder_of_ones_own_below_one_that_others_may_not_read(tmp_path, monkeypatch):
    """As homes often are: mode 711."""
    folder = tmp_path / "home/mine"
    folder.mkdir(parents=True)
    opened = os.open

    def refusing(path, *arguments, **options):
        if Path(path) == folder.parent:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr("os.open", refusing)
    write_atomic(folder / "x", "whole")
    assert (folder / "x").read_text() == "whole"


@pytest.mark.parametrize(("number", "cure"), [(errno.ENOSPC, "Make room"), (errno.EACCES, "Change its permissions")])
def test_a_failed_write_says_what_to_do(number, cure, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(FileError, match=rf"{os.strerror(number)}; .* {cure}, then run again"):
        write_atomic(tmp_path / "x", "whole")


def test_what_others_wrote_is_synced_with_all_it_holds(tmp_path, synced):
    (tmp_path / "model" / "part").mkdir(parents=True)
    (tmp_path / "model" / "part" / "weights").write_bytes(b"1")
    (tmp_path / "model" / "config").write_bytes(b"2")
    sync(tmp_path / "model")
    names = ("model/part/weights", "model/part", "model/config", "model", "")
    assert sorted(synced) == sorted(str(tmp_path / name).rstrip("/") for name in names)
