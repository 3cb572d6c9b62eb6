"""Checkpoints that are whole or absent, and never run code when they are read.

A file is: one line with a magic word and the SHA-256 of the rest, one line of JSON (kind, fingerprint), then
``torch.save`` of the state. The checksum is compared before torch sees a byte.
"""

import hashlib
import io
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from dpfast.errors import CheckpointError, FileError
from dpfast.files import write_atomic

_MAGIC = b"dpfast-checkpoint-1 "
_CURE = "restore a copy from after the last step, or begin anew in another folder: what was spent stays spent"
_PLAIN = (torch.Tensor, str, bool, int, float, type(None), torch.Size, torch.dtype, torch.device)


def save(path: str | os.PathLike[str], state: dict[str, Any], *, kind: str, fingerprint: str) -> None:
    """Write ``state`` to ``path``; a crash at any moment leaves the previous file or the new one, whole.

    state: tensors and plain values (numbers, strings, None) in dicts, lists and tuples.
    kind: what this is ("train", "pretrain", ...); fingerprint: of the recipe or plan that it belongs to.
    Raises CheckpointError: the disk is full (the previous file is intact), or ``state`` holds something else.
    """
    _check_plain(state, "state")
    payload = io.BytesIO()
    torch.save(state, payload)
    header = json.dumps({"kind": kind, "fingerprint": fingerprint}).encode() + b"\n"
    digest = hashlib.sha256(header)
    digest.update(payload.getbuffer())
    try:
        write_atomic(path, _MAGIC + digest.hexdigest().encode() + b"\n", header, payload.getbuffer())
    except FileError as error:
        raise CheckpointError(f"checkpoint: {error}") from error


def load(path: str | os.PathLike[str], *, kind: str, fingerprint: str, content: bytes | None = None) -> dict[str, Any]:
    """The state that ``save`` wrote, tensors on the CPU.

    content: of the file, where somebody else has read it.

    Raises CheckpointError when the file is missing, damaged, no checkpoint of dpfast, or of another kind or
    fingerprint.
    """
    path = Path(path)
    header, payload = _taken_apart(path, read(path) if content is None else content)
    for name, expected in (("kind", kind), ("fingerprint", fingerprint)):
        if header.get(name) != expected:
            raise CheckpointError(
                f"checkpoint {path}: expected {name} {expected!r}, got {header.get(name)!r}: it belongs to "
                "another run or stage; use the settings it was made with, or another folder"
            )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch finds in a file that is whole, but not made by this version
        raise CheckpointError(f"checkpoint {path}: its contents cannot be read ({error}); {_CURE}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path}: expected a dict in it, got a {type(state).__name__}; {_CURE}")
    return state


def weights_fingerprint(model: torch.nn.Module) -> str:
    """sha256 over the names, shapes and values of the model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read(path: Path) -> bytes:
    """The file as it is, for ``load``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror}); nothing was changed") from error


def _taken_apart(path: Path, content: bytes) -> tuple[dict[str, Any], bytes]:
    first, _, rest = content.partition(b"\n")
    if not first.startswith(_MAGIC):
        raise CheckpointError(f"checkpoint {path}: this is not a checkpoint of dpfast, or it was cut off; {_CURE}")
    if first[len(_MAGIC) :] != hashlib.sha256(rest).hexdigest().encode():
        raise CheckpointError(f"checkpoint {path}: wrong checksum, the file is damaged; {_CURE}")
    line, _, payload = rest.partition(b"\n")
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"checkpoint {path}: expected an object of JSON in its second line; it is damaged; {_CURE}"
        )
    return header, payload


def _check_plain(value: object, where: str) -> None:
    """Refuse now what ``weights_only`` loading would refuse after the run is lost."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():  # type: ignore[attr-defined]
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (*_PLAIN, torch.nn.Parameter):
        raise CheckpointError(
            f"checkpoint: {where} is a {type(value).__module__}.{type(value).__qualname__}; "
            "expected tensors and plain numbers, strings, lists and dicts: convert it first"
        )
