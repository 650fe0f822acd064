"""Readers of the data sets' files: each file is verified by checksum before a byte is used.

Four layouts are read: torchvision's own of CIFAR-10 and CIFAR-100, the idx files of
Fashion-MNIST, and two packed ones. ``cifar10-lossless`` and ``cifar100-lossless`` hold
``train.npz`` and ``test.npz``, each with ``webp`` (lossless WebP sheets of 100 images, one below
the other), ``offsets`` (where each sheet begins and ends), ``labels`` and, where some images came
from JPEG, their indexes as ``lossy``; and ``classes.json``. ``lfw-a`` holds ``lfw_a_112.npz``:
``images`` (WebP sheets of 10 x 10 grey faces, the last filled up), ``offsets``, ``labels``,
``people`` (their names), and the verification ``pairs`` with ``same`` and ``fold``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from natlib.errors import NatlibError

_SIZE = 32
# Folders that may hold a data set, in the order of look-up: the published files come first.
LAYOUTS = {
    "cifar10": ("cifar-10-batches-py", "cifar10-lossless"),
    "cifar100": ("cifar-100-python", "cifar100-lossless"),
    "fashion_mnist": ("FashionMNIST/raw",),
    "lfw": ("lfw-a",),
    "imagenet": ("imagenet",),
}
# As sha256sum prints it. The idx files are taken after gunzip: Debian compresses the published
# contents anew, so its gz files differ from torchvision's list.
_SUMS = """
273afafdf93e3abfe93dd0e1e52c1ea0f9d8722f46bedb11aa9859b356ffbefd  cifar10-lossless/train.npz
36c4c2efa5b2c9b80007f0f93959182e5235fd06cda32ab2ea590e8dc46e233e  cifar10-lossless/test.npz
11973e49bed8e636558222185f6a0d6fe4b7e918576b5fdb693d90b18ecaf777  cifar10-lossless/classes.json
f6e06c02bba4942fa52443292b885dabcb637815150ce6ad79505f534a956d5a  cifar100-lossless/train.npz
488bb3704c403cf05f879a6d1306ad9c67c487d1f9c19d7535fb083eff3f4748  cifar100-lossless/test.npz
0112c5bf8bd0a80f969c16aaa92dc1bd41d767d617629466f1c3645a9b43f27e  cifar100-lossless/classes.json
c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888  raw/train-images-idx3-ubyte
bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9  raw/train-labels-idx1-ubyte
0bbbdf00537d3de8fbed0dcbe704f3eff36edbc8a62de4aa0b60b93593c8cb6d  lfw-a/lfw_a_112.npz
5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b  raw/t10k-images-idx3-ubyte
0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34  raw/t10k-labels-idx1-ubyte
"""
_SHA256 = {name: digest for digest, name in map(str.split, _SUMS.split("\n")[1:-1])}


class Decoded(NamedTuple):
    """Images (N, C, H, W), labels (N,), class names, the source in words, and the files read."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.integer[Any]]
    classes: Sequence[str]
    source: str
    files: Sequence[str]


def read(name: str, folder: Path, split: str) -> Decoded:
    """Return the ``split`` ("train", "test") of data set ``name`` in ``folder``, one of LAYOUTS.

    Raises NatlibError, naming the file, for one that is missing, truncated or altered.
    """
    if name == "lfw":
        return _read_faces(folder)
    if folder.name.endswith("-lossless"):
        return _read_packed(folder, split)
    return _read_idx(folder, split) if folder.name == "raw" else _read_cifar(name, folder, split)


def _require(path: Path) -> Path:
    if not path.is_file():
        raise NatlibError(f"{path} is missing: add the file, or remove its folder")
    return path


def _altered(path: Path, why: str) -> NatlibError:
    return NatlibError(
        f"{path} is truncated or altered: {why}. natlib leaves it as it is: replace it by a good "
        "copy, or remove its folder"
    )


def _verified(path: Path) -> bytes:
    """Return the contents of ``path``, after gunzip, if they have the known checksum."""
    content = _require(path).read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _altered(path, str(error)) from error
    digest = hashlib.sha256(content).hexdigest()
    expected = _SHA256[f"{path.parent.name}/{path.name.removesuffix('.gz')}"]
    if digest != expected:
        raise _altered(path, f"SHA-256 {digest}, expected {expected}")
    return content


def _read_packed(folder: Path, split: str) -> Decoded:
    from PIL import Image

    files = [f"{split}.npz", "classes.json"]
    content, listing = (_verified(folder / file) for file in files)
    with np.load(io.BytesIO(content), allow_pickle=False) as packed:
        data, labels = packed["webp"].tobytes(), packed["labels"]
        bounds = pairwise(packed["offsets"].tolist())
        lossy = len(packed["lossy"]) if "lossy" in packed else 0
    sheets = [np.asarray(Image.open(io.BytesIO(data[start:end]))) for start, end in bounds]
    images = np.concatenate(sheets).reshape(-1, _SIZE, _SIZE, 3).transpose(0, 3, 1, 2)
    source = f"packed sheets {folder.name}"
    if lossy:
        source += f" ({lossy} of {len(images):,} images decoded from JPEG)"
    names = json.loads(listing)
    return Decoded(images, labels, names.get("classes") or names["fine"], source, files)


_FACES, _FACE = "lfw_a_112.npz", 112


def _read_faces(folder: Path) -> Decoded:
    from PIL import Image

    with np.load(io.BytesIO(_verified(folder / _FACES)), allow_pickle=False) as packed:
        data, labels = packed["images"].tobytes(), packed["labels"]
        bounds = pairwise(packed["offsets"].tolist())
        people = packed["people"].tolist()
    faces = []
    for start, end in bounds:
        sheet = np.asarray(Image.open(io.BytesIO(data[start:end])).convert("L"))
        rows = sheet.reshape(10, _FACE, 10, _FACE).swapaxes(1, 2)
        faces.append(rows.reshape(-1, 1, _FACE, _FACE))
    images = np.concatenate(faces)[: len(labels)]
    return Decoded(images, labels, people, f"packed sheets {folder.name}", [_FACES])


def read_pairs(folder: Path) -> tuple[npt.NDArray[np.integer[Any]], ...]:
    """Return the verification pairs in a folder that ``read`` has verified.

    They are ``pairs`` (P, 2), indexes of images; ``same`` (P,), 1 for one person; ``fold`` (P,).
    """
    with np.load(folder / _FACES, allow_pickle=False) as packed:
        return packed["pairs"], packed["same"], packed["fold"]


def _read_cifar(name: str, folder: Path, split: str) -> Decoded:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    expected = [*source.train_list, *source.test_list]
    expected.append([source.meta["filename"], source.meta["md5"]])
    for file, md5 in expected:
        if not check_integrity(_require(folder / file), md5):
            raise _altered(folder / file, f"its md5 is not {md5}")
    read = source(folder.parent, train=split == "train")
    images, labels = read.data.transpose(0, 3, 1, 2), np.array(read.targets, dtype=np.uint8)
    files = [file for file, _ in expected]
    return Decoded(images, labels, read.classes, f"published files {folder.name}", files)


def _read_idx(folder: Path, split: str) -> Decoded:
    from torchvision.datasets import FashionMNIST

    prefix = {"train": "train", "test": "t10k"}[split]
    files = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    files = [file if (folder / file).is_file() else f"{file}.gz" for file in files]
    pixels, labels = (np.frombuffer(_verified(folder / file), np.uint8) for file in files)
    images, margin = pixels[16:].reshape(-1, 1, 28, 28), ((_SIZE - 28) // 2,) * 2
    images = np.pad(images, ((0, 0), (0, 0), margin, margin))
    source = "published files FashionMNIST/raw"
    return Decoded(images, labels[8:], FashionMNIST.classes, source, files)
