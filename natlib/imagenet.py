"""ImageNet, streamed from its folder of JPEG files: batches, accuracy, training from scratch.

The whole set does not fit in memory, so images are decoded batch by batch, by worker processes
where there are cores to spare. What is drawn for an image depends on nothing but its own seed, so
the number of workers changes no bit, and training resumes at each epoch's beginning.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from natlib import data
from natlib.cost import network_cost
from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.macro import BlockMacro, Macro
from natlib.network import CellNetwork
from natlib.published import PrintedCost, printed_costs
from natlib.records import Record, Run, RunStore
from natlib.search import settings
from natlib.train import device, fit, stream

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
"""Mean and deviation per channel (red, green, blue) of ImageNet's pixels from 0 to 1."""


def crop_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw the box (left, top, right, bottom) of a random resized crop.

    Its area is uniform in 8 % to 100 % of the image, its shape log-uniform in 3:4 to 4:3; after ten
    draws that do not fit, it is the largest central box within those shapes. Source: Szegedy et
    al., 2015, Sec. 6.
    """
    for _ in range(10):
        area, shape, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = (0.08 + 0.92 * area) * width * height
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x * (width - wide + 1)), int(y * (height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _training_view(image: Image, size: int, seed: int) -> Image:
    """A random crop at ``size`` × ``size``, mirrored half the time."""
    from PIL import Image as pillow

    generator = torch.Generator().manual_seed(seed)
    box = crop_box(*image.size, generator)
    image = image.crop(box).resize((size, size), pillow.Resampling.BILINEAR)
    if float(torch.rand((), generator=generator)) < 0.5:
        image = image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
    return image


def _evaluation_view(image: Image, size: int) -> Image:
    """The central ``size`` × ``size`` pixels of the image whose short side is 256/224 of that."""
    from torchvision.transforms import functional

    image = functional.resize(image, [round(size * 256 / 224)])
    cropped: Image = functional.center_crop(image, [size, size])
    return cropped


class _Views(Dataset[tuple[Tensor, int]]):
    """Decoded images: uint8 (3, size, size) and label; seeded crops, or central without seeds."""

    def __init__(
        self, files: Sequence[tuple[str, int]], size: int, seeds: Tensor | None = None
    ) -> None:
        self.files, self.size, self.seeds = files, size, seeds

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np
        from PIL import Image as pillow

        path, label = self.files[index]
        try:
            with pillow.open(path) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise NatlibError(f"{path} is no image, or truncated: {error}") from error
        if self.seeds is None:
            view = _evaluation_view(image, self.size)
        else:
            view = _training_view(image, self.size, int(self.seeds[index]))
        return torch.from_numpy(np.array(view)).permute(2, 0, 1), label


class ImageNet:
    """A split of the ImageNet folder (``data.imagenet_folder``) as a stream of batches.

    ``split`` is "train" or "val", ``batch`` images at a time, square ones of side ``size``. Batches
    are normalised float32 (B, 3, size, size) in channels-last memory with int64 labels (B,), on the
    compute device. ``workers`` processes decode; by default one for each core but two. ``classes``
    are the names of the class folders, sorted: labels index them. ``folder`` takes the place of
    the found one. Raises NatlibError for another
    split, a batch below 1, and a folder that is missing or has a class without images.
    """

    def __init__(
        self,
        split: str,
        batch: int,
        size: int = 224,
        workers: int | None = None,
        folder: Path | None = None,
    ) -> None:
        from torchvision.datasets import ImageFolder

        if split not in ("train", "val"):
            raise NatlibError(f"split {split!r} is not one of 'train', 'val'")
        self.folder = (folder or data.imagenet_folder()) / split
        try:
            found = ImageFolder(str(self.folder))
        except FileNotFoundError as error:
            raise NatlibError(f"{self.folder} holds no classes of images: {error}") from error
        self.files: list[tuple[str, int]] = found.samples
        self.classes: tuple[str, ...] = tuple(found.classes)
        if batch < 1:
            raise NatlibError(f"batch {batch!r} is not allowed: it must be at least 1")
        self.batch, self.size = batch, size
        self.workers = max(0, (os.cpu_count() or 1) - 2) if workers is None else workers

    @property
    def steps(self) -> int:
        """Whole batches, which are an epoch."""
        return len(self.files) // self.batch

    def checksum(self) -> str:
        """SHA-256 of the files' names and sizes (not of their contents, which takes an hour)."""
        digest = hashlib.sha256()
        for path, _ in self.files:
            name = Path(path).relative_to(self.folder)
            digest.update(f"{name} {os.path.getsize(path)}\n".encode())
        return digest.hexdigest()

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over ``steps`` batches: images shuffled, each a random crop, mirrored or not.

        The order and the images' seeds are drawn at the first batch. Raises NatlibError where there
        are fewer images than a batch, and for a file that is no image, naming it.
        """
        if not self.steps:
            raise NatlibError(
                f"batch {self.batch} gives no batch: {self.folder} holds {len(self.files)} images"
            )
        order = torch.randperm(len(self.files), generator=generator)
        seeds = torch.randint(2**62, (len(self.files),), generator=generator)
        views = _Views(self.files, self.size, seeds)
        yield from self._batches(views, order.tolist(), drop_last=True)

    def central(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over all images in order, each resized and cropped at the centre.

        Raises NatlibError for a file that is no image, naming it.
        """
        views = _Views(self.files, self.size)
        yield from self._batches(views, range(len(self.files)), drop_last=False)

    def _batches(
        self, views: _Views, order: Sequence[int], drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        where = device()
        loader: Iterable[Any] = DataLoader(
            views,
            self.batch,
            sampler=order,
            num_workers=self.workers,
            drop_last=drop_last,
            # Else the loader draws from the global generator.
            generator=torch.Generator().manual_seed(0),
            # From pinned memory a transfer goes on beside the computation.
            pin_memory=where.type == "cuda",
        )
        for images, labels in loader:
            images, labels = (t.to(where, non_blocking=True) for t in (images, labels))
            yield data.normalise(images, MEAN, STD), labels


@torch.no_grad()
def accuracy(network: CellNetwork, images: ImageNet) -> tuple[float, float]:
    """Share (0..1) of central crops whose class is the network's first, and among its first five.

    Raises NatlibError if network and images differ in their number of classes.
    """
    _require_classes(network.macro.classes, images)
    first = five = 0
    for x, labels in images.central():
        best = network(x).topk(min(5, len(images.classes))).indices == labels[:, None]
        first += int(best[:, 0].sum())
        five += int(best.sum())
    return first / len(images.files), five / len(images.files)


def _require_classes(classes: int, images: ImageNet) -> None:
    if classes != len(images.classes):
        raise NatlibError(
            f"classes = {classes} of the network; {images.folder} holds {len(images.classes)}"
        )


@dataclass(frozen=True)
class ImageNetConfig:
    """Training a standalone network on the ImageNet folder from scratch.

    SGD with momentum, cosine learning rate from ``lr`` to ``lr_last``, gradient norm clipped to
    ``clip``; ``smoothing``, ``auxiliary`` and ``drop_path`` as in ``TrainConfig``. Images have the
    side ``macro.image_size``. Defaults are the published settings; the epochs were 250. Source:
    NAT, Sec. 5.1.
    """

    macro: Macro
    genotype: Genotype
    seed: int
    epochs: int
    batch: int = 128
    lr: float = 0.1
    lr_last: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 3e-5
    clip: float = 5.0
    smoothing: float = 0.1
    auxiliary: float = 0.4
    drop_path: float = 0.0


def train_imagenet(run: Run) -> dict[str, Any]:
    """Train an ``ImageNetConfig`` from scratch; body of records of kind "imagenet".

    Returns ``accuracy`` and ``accuracy_5`` (0..1) on the val split, the mean training loss of each
    epoch, params and MAdds. The trained weights are the artifact "weights". Resumes at the last
    epoch that a checkpoint holds. Raises NatlibError for a corrupt image, for classes that are not
    the network's or differ between the splits, and if training diverges.
    """
    return _train(run, data.imagenet_folder())


def _train(run: Run, folder: Path) -> dict[str, Any]:
    config: ImageNetConfig = run.config
    train, val = (
        ImageNet(s, config.batch, config.macro.image_size, folder=folder) for s in ("train", "val")
    )
    _require_classes(config.macro.classes, train)
    if train.classes != val.classes:
        differ = sorted({*train.classes} ^ {*val.classes})
        raise NatlibError(f"{train.folder} and {val.folder} differ in classes: {differ[:5]}")
    network, losses = fit(run, train)
    first, five = accuracy(network, val)
    run.save_artifact("weights", network.state_dict())
    cost = network_cost(config.genotype, config.macro)
    return {
        "accuracy": first,
        "accuracy_5": five,
        "losses": losses,
        "params": cost.params,
        "madds": cost.madds,
    }


@dataclass(frozen=True)
class TrialConfig(ImageNetConfig):
    """A trial of the pipeline on made-up images of noise: both numbers cover the ten classes."""

    train_images: int = 16
    test_images: int = 10


def try_pipeline(run: Run) -> dict[str, Any]:
    """Train on a made-up folder of JPEG files; body of records of kind "imagenet_trial".

    Shows that reading, training and judging work, and nothing else: returns what ``train_imagenet``
    returns without the accuracies, for noise has no classes, and the ``classes`` and ``seconds``.
    """
    from PIL import Image as pillow

    config: TrialConfig = run.config
    draw = stream(config.seed, "images")
    with tempfile.TemporaryDirectory(prefix="nat-") as made:
        for split, number in (("train", config.train_images), ("val", config.test_images)):
            for i in range(number):
                folder = Path(made) / split / f"n{i % config.macro.classes:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                high, wide = torch.randint(200, 400, (2,), generator=draw).tolist()
                pixels = torch.randint(256, (high, wide, 3), dtype=torch.uint8, generator=draw)
                pillow.fromarray(pixels.numpy()).save(folder / f"{i}.JPEG")
        found = _train(run, Path(made))
    kept = {name: found[name] for name in ("losses", "params", "madds")}
    return {**kept, "classes": config.macro.classes, "seconds": run.wall_seconds}


@dataclass(frozen=True)
class Trained:
    """Networks on ImageNet: rows that print costs, a record a seed each; ``trial`` without images.

    ``lacking`` says in words why there are no images, "" where there are.
    """

    rows: list[PrintedCost]
    records: list[list[Record]]
    trial: list[Record]
    lacking: str


def study(
    networks: Sequence[str], seeds: Sequence[int], training: Mapping[str, Any], trial: bool
) -> Trained:
    """Train the published networks of these architectures on ImageNet, with ``training``.

    With ``trial``, or without the images, each is run once on made-up images instead, for one epoch
    and with ten classes. Raises NatlibError on settings that ``ImageNetConfig`` lacks.
    """
    rows = [
        r for r in printed_costs()
        if r.network and r.dataset == "ImageNet" and r.architecture in networks
    ]  # fmt: skip
    lacking = "this scale has no images of ImageNet" if trial else ""
    if not trial:
        try:
            data.imagenet_folder()
        except data.Absent as error:
            lacking = str(error)
    store = RunStore.default()
    configs = []
    for row in rows:
        assert row.network is not None
        genotype, macro = row.network
        kind = TrialConfig if lacking else ImageNetConfig
        given = {**training, **({"epochs": 1, "batch": 8} if lacking else {})}
        if lacking:
            macro = replace(macro, classes=10)
        if isinstance(macro, BlockMacro):
            given["auxiliary"] = 0.0
        configs += [
            settings(kind, {"macro": macro, "genotype": genotype, "seed": seed, **given})
            for seed in (seeds[:1] if lacking else seeds)
        ]
    if lacking:
        made = store.run_many("imagenet_trial", configs, try_pipeline, recipe=2, data="", workers=1)
        return Trained(rows, [], made, lacking)
    # Both parts: one trains, the other measures.
    digest = " ".join(ImageNet(part, 1).checksum() for part in ("train", "val"))
    found = store.run_many("imagenet", configs, train_imagenet, recipe=1, data=digest, workers=1)
    n = len(seeds)
    return Trained(rows, [found[i : i + n] for i in range(0, len(found), n)], [], "")
