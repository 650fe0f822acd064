"""Ways to obtain a data set where none is on this machine, within a bounded time.

A set comes whole or not at all: everything is fetched and unpacked in ``.incoming`` beside the
place it is for, then moved there at once. A way that failed is remembered for an hour, in
``cache/unreachable.json``, so that the notebooks of a run do not each wait for it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from natlib.files import read_json, write_json

# A download ends after _PATIENCE seconds in which fewer than _PROGRESS bytes came: a dead or
# hanging connection costs _PATIENCE seconds in all, and a slow one cannot hold up a notebook.
_PATIENCE = 10.0
_PROGRESS = 5 << 20
_APT_PATIENCE = 60.0
_REMEMBERED = 3600.0

# A process of its own, because nothing else bounds a name look-up. It ends when its standard
# input does, which is when its parent is gone.
_FETCH = """
import json, os, shutil, sys, threading, urllib.request
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
for name, address in json.loads(sys.argv[1]).items():
    with urllib.request.urlopen(address) as reply, open(name, "wb") as file:
        shutil.copyfileobj(reply, file)
"""

DOWNLOADED = ("cifar10", "cifar100", "fashion_mnist")
"""The data sets that :func:`obtain` may bring: the others are published for download nowhere."""

_DEBIAN_PACKAGE = "dataset-fashion-mnist"


class _Failed(Exception):
    """A way to obtain a data set failed, for the reason that it carries."""


def obtain(name: str, layout: str, data: Path) -> list[str]:
    """Bring the data set ``name`` to ``data``/``layout``, and return what failed on the way.

    The caller holds the lock of the cache, and looks for the folder afterwards: it is there, whole,
    if one way worked.
    """
    if name not in DOWNLOADED:
        return ["torchvision has no download of it"]
    ways = {"download": _download}
    if name == "fashion_mnist":
        ways["Debian package"] = _unpack_debian
    reasons = []
    for way, bring in ways.items():
        try:
            _attempt(name, way, bring, layout, data)
            break
        except _Failed as failed:
            reasons.append(f"{way} failed: {failed}")
    return reasons


def _attempt(
    name: str, way: str, bring: Callable[[str, Path, Path], None], layout: str, data: Path
) -> None:
    log = data / "cache" / "unreachable.json"
    past = read_json(log) if log.exists() else {}
    key = f"{name}, {way}"
    if key in past and 0 <= time.time() - past[key]["time"] < _REMEMBERED:
        raise _Failed(
            f"{past[key]['reason']} (tried within the last hour; to try again, delete "
            f"data/cache/{log.name})"
        )
    incoming = data / ".incoming"
    # The lock is held, so what lies there was left by a process that was killed.
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    try:
        (incoming / layout).parent.mkdir(exist_ok=True)
        bring(name, incoming, incoming / layout)
        (data / layout).parent.mkdir(exist_ok=True)
        os.replace(incoming / layout, data / layout)
    except _Failed as failed:
        write_json(log, {**past, key: {"time": time.time(), "reason": str(failed)}})
        raise
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _download(name: str, incoming: Path, target: Path) -> None:
    """Download the files that torchvision names, check their md5, and unpack them."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    if name == "fashion_mnist":
        mirror = datasets.FashionMNIST.mirrors[0]
        files = {file: (mirror + file, md5) for file, md5 in datasets.FashionMNIST.resources}
    else:
        source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        files = {source.filename: (source.url, source.tgz_md5)}
    addresses = json.dumps({file: address for file, (address, _) in files.items()})
    _watch([sys.executable, "-I", "-c", _FETCH, addresses], incoming, _PATIENCE)
    for file, (_, md5) in files.items():
        if not check_integrity(incoming / file, md5):
            raise _Failed(f"what came as {file} is not the published file")
        if name == "fashion_mnist":
            target.mkdir(exist_ok=True)
            os.replace(incoming / file, target / file)
        else:
            extract_archive(str(incoming / file), str(incoming))


def _unpack_debian(name: str, incoming: Path, target: Path) -> None:
    """Download the Debian package of Fashion-MNIST and unpack it; neither needs root."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise _Failed(f"{program} is not installed")
    apt = ["apt-get", "-q", "-o", "Acquire::Retries=0"]
    for scheme in ("http", "https"):
        apt += ["-o", f"Acquire::{scheme}::Timeout={_PATIENCE:.0f}"]
    try:
        _watch([*apt, "download", _DEBIAN_PACKAGE], incoming, _APT_PATIENCE)
    except _Failed:
        # A new machine has no package lists yet: get them, and leave the system's as they are.
        (incoming / "lists" / "partial").mkdir(parents=True)
        apt += ["-o", f"Dir::State::Lists={incoming / 'lists'}", "-o", "APT::Sandbox::User=root"]
        apt += ["-o", f"Dir::Cache={incoming / 'packages'}"]
        _watch([*apt, "update"], incoming, _APT_PATIENCE)
        _watch([*apt, "download", _DEBIAN_PACKAGE], incoming, _APT_PATIENCE)
    for package in incoming.glob("*.deb"):
        _watch(["dpkg-deb", "-x", package.name, "unpacked"], incoming, _APT_PATIENCE)
    target.mkdir()
    for file in (incoming / "unpacked").rglob("*-ubyte.gz"):
        os.replace(file, target / file.name)


def _watch(command: Sequence[str], folder: Path, patience: float) -> None:
    """Run ``command`` in ``folder``; end it when the folder grows by too little for too long."""
    with (
        open(folder / "log", "w+") as log,
        subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            size, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.05)
                if (now := _size(folder)) >= size + _PROGRESS:
                    size, since = now, time.monotonic()
                elif time.monotonic() - since > patience:
                    raise _Failed(f"no answer, or too slow a one, within {patience:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            log.seek(0)
            said = [line.strip() for line in log if line.strip()]
            raise _Failed(said[-1] if said else f"{command[0]} ended with {process.returncode}")


def _size(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, file)).st_size
    return total
