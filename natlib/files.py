"""Files that other processes may read or replace at the same time: atomic writes and a lock."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from natlib.errors import NatlibError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` and put it in its place when all went well."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a folder, made if need be; the system frees it however the process ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; raises NatlibError, naming it, for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise NatlibError(f"{path} is corrupt ({error}): delete it") from error
    if not isinstance(content, dict):
        raise NatlibError(f"{path} is corrupt (it holds no JSON object): delete it")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path`` as JSON, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
