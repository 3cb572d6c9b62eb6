"""Checkpoints are whole or absent, and only ours are read."""

import errno
import os
import signal
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from dpfast import checkpoint
from dpfast.errors import CheckpointError

NAMES = {"kind": "train", "fingerprint": "abc"}


def make_state(step=3):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "step": step,
        "model": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "half": torch.arange(4, dtype=torch.bfloat16),
        "other": [None, True, 1.5, "text", (1, 2), torch.float32, torch.Size([2])],
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state" / "train.pt"
    checkpoint.save(path, {"step": 1}, **NAMES)
    return path


def assert_previous_survives(path):
    assert checkpoint.load(path, **NAMES) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def test_a_state_comes_back_as_it_was(path):
    state = make_state()
    checkpoint.save(path, state, **NAMES)
    loaded = checkpoint.load(path, **NAMES)
    assert os.listdir(path.parent) == [path.name]
    torch.testing.assert_close(loaded.pop("half"), state.pop("half"), rtol=0, atol=0)
    torch.testing.assert_close(loaded.pop("model"), state.pop("model"), rtol=0, atol=0)
    assert str(loaded) == str(state)


def test_any_corrupt_byte_is_found(path):
    content = path.read_bytes()
    for place in [*range(120), *range(120, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"wrong checksum|not a checkpoint"):
            checkpoint.load(path, **NAMES)


def test_any_truncation_is_found(path):
    content = path.read_bytes()
    for size in [*range(100), *range(100, len(content), 53), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"wrong checksum|not a checkpoint"):
            checkpoint.load(path, **NAMES)


def test_foreign_and_missing_files(path):
    torch.save({"step": 1}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of dpfast"):
        checkpoint.load(path, **NAMES)
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.load(path.with_name("missing"), **NAMES)


@pytest.mark.parametrize("other", [{"kind": "pretrain"}, {"fingerprint": "abd"}])
def test_another_kind_or_fingerprint(path, other):
    with pytest.raises(CheckpointError, match=f"expected {next(iter(other))}"):
        checkpoint.load(path, **{**NAMES, **other})


@pytest.mark.parametrize("value", [np.float64(1), object(), {1, 2}, lambda: 0, np.zeros(2)])
def test_what_could_not_be_loaded_is_not_saved(path, value):
    with pytest.raises(CheckpointError, match=r"state\['deep'\]\[1\] is a "):
        checkpoint.save(path, {"deep": [0, value]}, **NAMES)
    assert_previous_survives(path)


def test_reading_runs_no_code(path, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    import hashlib
    import io

    payload = io.BytesIO()
    torch.save({"x": Evil()}, payload)
    rest = b'{"kind": "train", "fingerprint": "abc"}\n' + payload.getvalue()
    path.write_bytes(b"dpfast-checkpoint-1 " + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path, **NAMES)
    assert not (tmp_path / "pwned").exists()


def test_a_full_disk_while_writing_leaves_the_previous_file(path):
    # Every write to /dev/full fails with ENOSPC, as on a full disk.
    path.with_name(".train.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left.*previous file, if any, is intact"):
        checkpoint.save(path, make_state(), **NAMES)
    assert_previous_survives(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_later_leaves_the_previous_file(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoint.save(path, make_state(), **NAMES)
    assert_previous_survives(path)


def test_an_unusable_folder(path):
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.save(path / "inside a file" / "x", {}, **NAMES)


def test_everything_is_on_disk_before_the_name_changes(path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or real_sync(fd))
    monkeypatch.setattr(os, "replace", lambda *a: events.append("replace") or real_replace(*a))
    checkpoint.save(path, {"step": 2}, **NAMES)
    folder = path.parent
    assert events == [str(folder.parent), str(folder / f".{path.name}.tmp"), "replace", str(folder)]


def test_killed_between_writing_and_renaming(path):
    code = (
        "import os, signal, sys; from dpfast import checkpoint\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save(sys.argv[1], {'step': 2}, kind='train', fingerprint='abc')"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)])
    assert ran.returncode == -signal.SIGKILL
    assert sorted(os.listdir(path.parent)) == [".train.pt.tmp", "train.pt"]
    assert checkpoint.load(path, **NAMES) == {"step": 1}
    checkpoint.save(path, {"step": 3}, **NAMES)
    assert os.listdir(path.parent) == ["train.pt"]
    assert checkpoint.load(path, **NAMES) == {"step": 3}
