"""Images as one uint8 tensor: look-up, checksums, splits, and augmentation in batches.

:func:`load` finds a data set in this order: the folder named by the environment variable
``NATLIB_DATA``; ``data/`` in the repository; a download of the files that torchvision names; and,
for Fashion-MNIST, the Debian package ``dataset-fashion-mnist``, which needs no root. In the first
two it looks for these folders (:mod:`natlib.formats` says what is in them):

=============  =======================================================================
cifar10        ``cifar-10-batches-py`` (torchvision's layout), ``cifar10-lossless``
cifar100       ``cifar-100-python`` (torchvision's layout), ``cifar100-lossless``
fashion_mnist  ``FashionMNIST/raw`` (the four idx files, gzipped or not)
lfw            ``lfw-a`` (:func:`load_faces`; no download)
imagenet       ``imagenet`` (:func:`imagenet_folder`; no download)
=============  =======================================================================

Files are verified once, by checksum, when they are decoded; the decoded split lies in
``data/cache`` and is mapped from there afterwards, as long as the sizes and times of all files
stay as they were. Nothing that natlib did not make is ever overwritten.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from natlib.download import DOWNLOADED, obtain
from natlib.errors import NatlibError
from natlib.files import locked, read_json, replacing, write_json
from natlib.formats import LAYOUTS, read, read_pairs

__all__ = [
    "Faces",
    "ImageSet",
    "augment",
    "imagenet_folder",
    "index_batches",
    "load",
    "load_faces",
    "normalise",
    "partition",
    "roots",
    "statistics",
]

_DATA = Path(__file__).resolve().parent.parent / "data"


def _checksum(images: Tensor, labels: Tensor) -> str:
    """Return the SHA-256 of the images' shape and pixels and of the labels (as int64)."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled set of images, whole in one tensor on the CPU.

    ``images`` is uint8 (N, C, H, W) and contiguous, ``labels`` int64 (N,) indexes into ``classes``,
    ``split`` is "train" or "test", ``source`` says in words where the files came from, and
    ``checksum`` is the SHA-256 of shape, pixels and labels, computed unless given. Pixels may be
    mapped from a file; changing them in place changes neither the file nor another set's, but makes
    the checksum wrong. Raises NatlibError for tensors of another type, shape or range.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    split: str
    source: str
    checksum: str = ""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or not images.is_contiguous():
            raise NatlibError(
                f"images must be a contiguous uint8 tensor (N, C, H, W), not {images.dtype} of "
                f"shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
            raise NatlibError(
                f"labels must be int64 of shape ({len(images)},) with at least one image, not "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise NatlibError(
                f"labels from {low} to {high} do not index the {len(self.classes)} classes"
            )
        if not self.checksum:
            object.__setattr__(self, "checksum", _checksum(images, labels))

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indexes: Tensor | Sequence[int]) -> ImageSet:
        """Return a copy of the images at ``indexes`` (whole numbers, 0 to N - 1), in that order.

        Raises NatlibError for no index, for one out of range, and for a boolean mask.
        """
        chosen = torch.as_tensor(indexes)
        if chosen.dim() != 1 or not len(chosen):
            raise NatlibError(f"indexes must be a non-empty list, not {tuple(chosen.shape)}")
        if chosen.dtype.is_floating_point or chosen.dtype == torch.bool:
            raise NatlibError(f"indexes must be whole numbers, not {chosen.dtype}")
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= len(self):
            raise NatlibError(f"indexes from {low} to {high} do not fit 0 to {len(self) - 1}")
        chosen = chosen.long()
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], checksum="")

    def resized(self, size: int) -> ImageSet:
        """Return the images at ``size`` × ``size`` pixels, each the mean of a whole block.

        The mean is rounded to the nearest level, halves up, in whole-number arithmetic. Raises
        NatlibError unless the images are square and their side is a multiple of ``size``.
        """
        number, channels, height, width = self.images.shape
        if size < 1 or height != width or height % size:
            raise NatlibError(
                f"size {size!r} is not allowed for images of {height} × {width}: it must divide "
                "the side of square images"
            )
        factor = height // size
        if factor == 1:
            return self
        images = torch.empty(number, channels, size, size, dtype=torch.uint8)
        parts = torch.split(self.images, 1024), torch.split(images, 1024)
        for part, out in zip(*parts, strict=True):
            total = torch.full(out.shape, factor * factor // 2, dtype=torch.int32)
            for row in range(factor):
                for column in range(factor):
                    total += part[:, :, row::factor, column::factor]
            out.copy_(total.div_(factor * factor, rounding_mode="floor"))
        return replace(self, images=images, checksum="")


class _Place(NamedTuple):
    """A folder that holds a data set, and where that is, in words."""

    name: str
    folder: Path
    where: str


class Absent(NatlibError):
    """A data set that cannot be had; ``why`` says so in a few words."""

    def __init__(self, name: str, why: str) -> None:
        self.why = why
        folders = " or ".join(LAYOUTS[name])
        ways = (
            f"Either set NATLIB_DATA to a folder that holds {folders}, or put that folder under "
            f"{_DATA}"
        )
        if name in DOWNLOADED:
            ways += (
                ", or run once where the download works. dataset='auto' uses CIFAR-10 where it "
                "can be had, else Fashion-MNIST"
            )
        super().__init__(f"data set {name!r} cannot be had: {why}. {ways}.")


def load(name: str = "auto", split: str = "train") -> ImageSet:
    """Return a split of a data set at 32 × 32 pixels: uint8 (N, C, 32, 32) with C = 3 or 1.

    ``name`` is "cifar10", "cifar100", "fashion_mnist" (28 × 28, zero-padded by two pixels a side),
    or "auto": CIFAR-10 where it can be had, else Fashion-MNIST, which one printed line says. The
    decision is kept for the process. ``split`` is "train" or "test". Raises NatlibError for other
    names, for a set that cannot be had, and for a missing, truncated or altered file.
    """
    if split not in ("train", "test"):
        raise NatlibError(f"split {split!r} is not one of 'train', 'test'")
    if name == "auto":
        name = _auto(os.environ.get("NATLIB_DATA", ""), _DATA)
    if name not in DOWNLOADED:
        raise NatlibError(
            f"data set {name!r} is not one of 'auto', {str(DOWNLOADED)[1:-1]} (LFW: load_faces, "
            "ImageNet: natlib.imagenet)"
        )
    return _decoded(_locate(name), split)


@dataclass(frozen=True, eq=False)
class Faces:
    """Labeled Faces in the Wild: images, and the pairs on which verification is measured.

    ``images`` are grey, uint8 (13233, 1, 112, 112), the aligned images (LFW-a) around eyes and
    mouth; their labels are people, ``classes`` the names, ``split`` is "test". ``pairs`` int64
    (6000, 2) are indexes of images, ``same`` bool (6000,) says whether they show one person,
    ``fold`` int64 (6000,) is 0 to 9 (no person is in two). Sources: Huang et al., 2007 (View 2);
    Wolf et al., 2011.
    """

    images: ImageSet
    pairs: Tensor
    same: Tensor
    fold: Tensor


def load_faces() -> Faces:
    """Return the LFW verification set.

    Raises NatlibError where it cannot be had and for a missing, truncated or altered file.
    """
    place = _locate("lfw")
    images = _decoded(place, "test")
    pairs, same, fold = (torch.from_numpy(part).long() for part in read_pairs(place.folder))
    return Faces(images, pairs, same.bool(), fold)


def imagenet_folder() -> Path:
    """Return the folder of ImageNet's images; :mod:`natlib.imagenet` streams them.

    It holds ``train`` and ``val``, each with a folder for each class (torchvision's ImageFolder).
    Raises NatlibError where it cannot be had.
    """
    return _locate("imagenet").folder


@cache
def _auto(root: str, data: Path) -> str:
    """Return the data set that "auto" stands for, and print which; the arguments key the memory."""
    try:
        place, because = _locate("cifar10"), ""
    except Absent as absent:
        place, because = _locate("fashion_mnist"), f"; CIFAR-10 cannot be had: {absent.why}"
    print(f"natlib.data: dataset 'auto' is {place.name} ({place.where}{because})")
    return place.name


def _locate(name: str) -> _Place:
    """Return where the data set is, after obtaining it if need be."""
    if place := _search(name):
        return place
    with locked(_DATA / "cache"):
        # Another process may have brought it while this one waited.
        if place := _search(name):
            return place
        failures = obtain(name, LAYOUTS[name][0], _DATA)
        if place := _search(name):
            return place
    searched = " or ".join(label for label, _ in roots())
    raise Absent(name, "; ".join([f"not in {searched}", *failures]))


def roots() -> list[tuple[str, Path]]:
    """Return the folders in which data is looked for, first to last, each with its name in words.

    Raises NatlibError if NATLIB_DATA is not a folder.
    """
    roots = [("data/", _DATA)]
    if value := os.environ.get("NATLIB_DATA", ""):
        folder = Path(value).expanduser().resolve()
        if not folder.is_dir():
            raise NatlibError(f"NATLIB_DATA={value!r} is not a folder")
        roots.insert(0, ("NATLIB_DATA", folder))
    return roots


def _search(name: str) -> _Place | None:
    for label, root in roots():
        for layout in LAYOUTS[name]:
            if (root / layout).is_dir():
                return _Place(name, root / layout, f"{layout} in {label}")
    return None


# The decoded cache ---------------------------------------------------------------------------


def _decoded(place: _Place, split: str) -> ImageSet:
    """Return the split from the decoded cache, after filling that if need be."""
    if images := _cached(place, split):
        return images
    with locked(_DATA / "cache"):
        # Another process may have decoded it while this one waited.
        if images := _cached(place, split):
            return images
        found = read(place.name, place.folder, split)
        pixels = torch.from_numpy(np.ascontiguousarray(found.images))
        labels = torch.from_numpy(found.labels.astype(np.int64))
        images = ImageSet(pixels, labels, tuple(found.classes), place.name, split, found.source)
        # Named by its content, so a file that another process has mapped never changes.
        path = _DATA / "cache" / f"{place.name}-{split}-{images.checksum[:16]}.npy"
        with replacing(path) as temporary, temporary.open("wb") as stream:
            flat = pixels.numpy().reshape(-1), np.ascontiguousarray(found.labels).view(np.uint8)
            np.save(stream, np.concatenate(flat))
        entry = {
            "folder": str(place.folder),
            "files": {file: _stamp(place.folder / file) for file in found.files},
            "cache": path.name,
            "stamp": _stamp(path),
            "shape": list(pixels.shape),
            "labels": found.labels.dtype.str,
            "classes": found.classes,
            "source": found.source,
            "checksum": images.checksum,
        }
        write_json(_DATA / "cache" / f"{place.name}-{split}.json", entry)
        return images


def _cached(place: _Place, split: str) -> ImageSet | None:
    """Return the split if it was decoded from the files as they are now, else None.

    Raises NatlibError if the size or time of the decoded file changed and its checksum is wrong.
    """
    path = _DATA / "cache" / f"{place.name}-{split}.json"
    if not path.exists():
        return None
    entry = read_json(path)
    try:
        files, mapped, shape = entry["files"], path.with_name(entry["cache"]), entry["shape"]
        changed = (stamp := _stamp(mapped)) != entry["stamp"]
        classes, source, checksum = tuple(entry["classes"]), entry["source"], entry["checksum"]
        moved = entry["folder"] != str(place.folder)
        # Caches of older versions hold bytes and do not say so.
        kind = np.dtype(entry.get("labels", "|u1"))
    except (KeyError, TypeError) as error:
        raise NatlibError(f"{path} is corrupt ({error!r}): delete it") from error
    if moved or stamp is None or files != {file: _stamp(place.folder / file) for file in files}:
        return None
    try:
        # Mapped copy-on-write: processes share the pages, and none can change the file.
        flat = np.load(mapped, mmap_mode="c", allow_pickle=False)
        end = len(flat) - shape[0] * kind.itemsize
        images = torch.from_numpy(flat[:end].reshape(shape))
        labels = torch.from_numpy(flat[end:].view(kind).astype(np.int64))
        if changed and _checksum(images, labels) != checksum:
            raise ValueError("wrong checksum")
    except (ValueError, TypeError, EOFError) as error:
        raise NatlibError(f"{mapped} is corrupt ({error}): delete it") from error
    if changed:
        write_json(path, {**entry, "stamp": stamp})
    return ImageSet(images, labels, classes, place.name, split, source, checksum)


def _stamp(path: Path) -> list[int] | None:
    """Return size and time of change, by which a file that was verified is known again."""
    if not path.is_file():
        return None
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


# Splits and batches --------------------------------------------------------------------------


def partition(images: ImageSet, sizes: Mapping[str, int], seed: int) -> dict[str, ImageSet]:
    """Cut ``images`` into disjoint parts of the given sizes, each stratified by class.

    Each class is shuffled by a generator seeded with ``seed``, the classes are interleaved in
    proportion, and the parts are consecutive pieces, in the order of ``sizes``. So each part, and
    each beginning of one, holds every class in proportion, to within two images a class. Raises
    NatlibError for a size below 1 and for sizes that add up to more than there is.
    """
    wrong = {part: size for part, size in sizes.items() if size < 1}
    if wrong or sum(sizes.values()) > len(images):
        raise NatlibError(
            f"sizes {wrong or dict(sizes)} are not allowed: each must be at least 1, all together "
            f"at most {len(images)}"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(images), generator=generator)
    # Where each image stands in its class, from 0 to 1; ties between classes fall as shuffled.
    position = torch.empty(len(images), dtype=torch.float64)
    labels = images.labels[shuffled]
    for label in range(len(images.classes)):
        own = (labels == label).nonzero()[:, 0]
        position[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    order = shuffled[position.argsort(stable=True)]
    pieces = torch.split(order[: sum(sizes.values())], list(sizes.values()))
    return {part: images.subset(piece) for part, piece in zip(sizes, pieces, strict=True)}


def statistics(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel, float32 (C,), of pixels from 0 to 1.

    The sums are whole numbers, so no thread count changes the result. Raises
    NatlibError if a channel is constant, because nothing could be divided by its deviation.
    """
    number, channels, height, width = images.images.shape
    count = number * height * width
    total, squares = torch.zeros(2, channels, dtype=torch.int64)
    for part in torch.split(images.images, 1024):
        levels = part.to(torch.int32)
        total += levels.sum(dim=(0, 2, 3))
        squares += levels.square_().sum(dim=(0, 2, 3))
    # Python's whole numbers: the products below do not fit 64 bits.
    sums = list(zip(total.tolist(), squares.tolist(), strict=True))
    mean = [plain / (255 * count) for plain, _ in sums]
    std = [math.sqrt(count * square - plain * plain) / (255 * count) for plain, square in sums]
    if 0 in std:
        raise NatlibError(f"a channel of {images.name} is constant, so its deviation is 0")
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(images / 255 - mean) / std`` as float32 (B, C, H, W) in channels-last memory.

    ``images`` is uint8 (B, C, H, W) on any device, ``mean`` and ``std`` are those of
    :func:`statistics`. Raises NatlibError for another type or shape.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise NatlibError(
            f"images must be uint8 (B, C, H, W), not {images.dtype} of {tuple(images.shape)}"
        )
    batch, channels, height, width = images.shape
    # Whole rows at a time: broadcasting over two or three channels is several times slower.
    scale = (255 * std).reciprocal().to(images.device, non_blocking=True).repeat(width)
    shift = (mean / std).to(images.device, non_blocking=True).repeat(width)
    rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    rows = rows.float().mul_(scale).sub_(shift)
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def augment(
    images: Tensor,
    generator: torch.Generator,
    pad: int = 4,
    flip: bool = True,
    cutout: int = 0,
) -> Tensor:
    """Return randomly shifted, mirrored and partly erased copies of a batch, of the same dtype.

    ``images`` is (B, C, H, W), uint8 or float, on any device; memory format is kept. Each image is
    padded with ``pad`` zeros a side and cropped to H × W at a uniform place, mirrored left to right
    with probability 1/2 if ``flip``, and loses (to zeros) a square of side ``cutout`` around a
    uniform centre, cut off at the border. Zero is zero of what is passed: black for uint8, the mean
    after :func:`normalise`. The usual recipe (DARTS, ResNet) pads with black and erases with the
    mean, so it crops before and erases after: ``augment(normalise(augment(x, g), mean, std), g,
    pad=0, flip=False, cutout=16)``. The same generator state gives the same bits: first drawn are
    vertical and horizontal shifts, then flips, then centres (rows, columns), each only where used.
    Raises NatlibError for another shape and for negative sizes.
    """
    if images.dim() != 4:
        raise NatlibError(f"images must be (B, C, H, W), not of shape {tuple(images.shape)}")
    if pad < 0 or cutout < 0:
        raise NatlibError(f"pad {pad} and cutout {cutout} must not be negative")
    batch, channels, height, width = images.shape

    def draw(high: int, *shape: int) -> Tensor:
        drawn = torch.randint(high, shape, generator=generator, device=generator.device)
        return drawn.to(images.device, non_blocking=True)

    def arange(length: int) -> Tensor:
        return torch.arange(length, device=images.device)

    if pad or flip:
        rows, columns = arange(height)[None], arange(width)[None]
        down, right = draw(2 * pad + 1, 2, batch, 1) if pad else arange(1).expand(2, batch, 1)
        if flip:
            columns = torch.where(draw(2, batch, 1) == 1, columns.flip(1), columns)
        padded = F.pad(images, (pad, pad, pad, pad)) if pad else images
        across = width + 2 * pad
        places = ((rows + down)[:, :, None] * across + (columns + right)[:, None]).flatten(1)
        if channels > 1 and images.is_contiguous(memory_format=torch.channels_last):
            # Whole pixels, which lie together, of the batch as one list.
            places += arange(batch)[:, None] * (padded.shape[2] * across)
            pixels = padded.permute(0, 2, 3, 1).reshape(-1, channels)
            chosen = pixels.index_select(0, places.flatten())
            images = chosen.view(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            places = places[:, None].expand(-1, channels, -1)
            images = padded.flatten(2).gather(2, places).view(images.shape)
    else:
        images = images.clone()
    if cutout:
        top = draw(height, batch, 1) - cutout // 2
        left = draw(width, batch, 1) - cutout // 2
        high = (arange(height) >= top) & (arange(height) < top + cutout)
        wide = (arange(width) >= left) & (arange(width) < left + cutout)
        images.masked_fill_((high[:, :, None] & wide[:, None])[:, None], 0)
    return images


def index_batches(
    n: int, batch_size: int, generator: torch.Generator, drop_last: bool = True
) -> Iterator[Tensor]:
    """Iterate over one epoch: shuffled indexes below ``n``, int64, ``batch_size`` at a time.

    The order is drawn at the call, so the generator has moved on before the first batch. The last
    batch is shorter, or left out with ``drop_last``, where ``batch_size`` does not divide ``n``.
    Raises NatlibError where that would leave no batch.
    """
    if batch_size < 1 or n < (batch_size if drop_last else 1):
        raise NatlibError(
            f"batch_size {batch_size!r} gives no batch of {n} images: allowed are 1 to {n}"
        )
    order = torch.randperm(n, generator=generator, device=generator.device)
    return iter(torch.split(order[: n - n % batch_size if drop_last else n], batch_size))
