"""The ImageNet folder, here a tiny generated one: streaming, accuracy, training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from natlib import NatlibError, data, imagenet
from natlib.export import convert, load_network
from natlib.genotype import Genotype
from natlib.imagenet import ImageNet, ImageNetConfig, accuracy, crop_box, train_imagenet
from natlib.macro import ImageNetMacro, MacroConfig
from natlib.network import CellNetwork
from tests.made import resumed_equals_uninterrupted, run
from tests.strategies import chain, generator

CLASSES = ("n01440764", "n01443537", "n01484850")
SIZE = 32
GENOTYPE = Genotype(
    chain("conv_3x3", "skip_connect", "conv_1x1"), chain("max_pool_3x3", "conv_1x1", "skip_connect")
)
CONFIG = ImageNetConfig(
    MacroConfig(channels=4, cells=3, classes=3, image_size=SIZE), GENOTYPE, seed=0, epochs=2,
    batch=8, lr=0.05,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """30 training and 12 val images of three classes, each of one colour under a pattern."""
    root = tmp_path / "data" / "imagenet"
    draw = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 90, (40 + 7 * i, 60 - 3 * i, 3), dtype=np.uint8)
                pixels[:, :, label] += 150
                file = root / split / name / f"{name}_{i}.JPEG"
                Image.fromarray(pixels).save(file, quality=95)
    grey = np.full((50, 50), 70, np.uint8)
    Image.fromarray(grey).save(root / "val" / CLASSES[0] / "grey.JPEG")
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data, "_DATA", tmp_path / "none")
    monkeypatch.setattr(imagenet.os, "cpu_count", lambda: 1)
    return root


def batches(split: str = "train", seed: int = 0, workers: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(ImageNet(split, 8, SIZE, workers).epoch(generator(seed)))


# Streaming -----------------------------------------------------------------------------------


def test_an_epoch_is_shuffled_whole_batches_of_random_crops(folder: Path) -> None:
    train = ImageNet("train", 8, SIZE)
    assert (train.steps, train.classes, len(train.files)) == (3, CLASSES, 30)
    found = batches()
    assert [x.shape for x, _ in found] == [(8, 3, SIZE, SIZE)] * 3
    x, labels = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
    assert x.dtype == torch.float32 and labels.dtype == torch.int64
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() != sorted(labels.tolist())
    assert int(labels.bincount().max()) <= 10
    # Each class has its colour, so no image has lost its label.
    pixels = x * imagenet.STD[:, None, None] + imagenet.MEAN[:, None, None]
    assert torch.equal(pixels.mean((2, 3)).argmax(1), labels)


def test_an_epoch_follows_its_generator_alone_however_many_workers(folder: Path) -> None:
    before = torch.get_rng_state()
    first, again, spread, other = batches(), batches(), batches(workers=2), batches(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for (x, y), (again_x, again_y), (spread_x, spread_y) in zip(first, again, spread, strict=True):
        assert torch.equal(x, again_x) and torch.equal(y, again_y)
        assert torch.equal(x, spread_x) and torch.equal(y, spread_y)
    assert not torch.equal(first[0][0], other[0][0])


def test_central_crops_are_torchvisions(folder: Path) -> None:
    val = ImageNet("val", 5, 28)
    x, labels = (torch.cat(part) for part in zip(*val.central(), strict=True))
    theirs = transforms.Compose([
        transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(),
        transforms.Normalize(imagenet.MEAN.tolist(), imagenet.STD.tolist()),
    ])  # fmt: skip
    assert len(x) == 13
    for image, label, (path, expected) in zip(x, labels, val.files, strict=True):
        assert int(label) == expected
        torch.testing.assert_close(image, theirs(Image.open(path).convert("RGB")))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 1000))
def test_crops_lie_in_the_image_with_the_published_shapes(w: int, h: int, seed: int) -> None:
    left, top, right, bottom = crop_box(w, h, generator(seed))
    assert 0 <= left < right <= w and 0 <= top < bottom <= h
    if min(w, h) >= 100 and 0.5 < w / h < 2:
        wide, high = right - left, bottom - top
        # Rounding to whole pixels moves both a little.
        assert wide * high / (w * h) > 0.078
        assert 0.73 < wide / high < 1.37


def test_crops_are_spread_as_torchvisions() -> None:
    draw, image = generator(), torch.empty(3, 300, 400)
    ours = [crop_box(400, 300, draw) for _ in range(4000)]
    theirs = [
        transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        for _ in range(4000)
    ]
    mine = np.array([((r - x) * (b - y), (r - x) / (b - y), x, y) for x, y, r, b in ours])
    other = np.array([(h * w, w / h, x, y) for y, x, h, w in theirs])
    scale = mine.std(0) / math.sqrt(len(mine))
    assert (np.abs(mine.mean(0) - other.mean(0)) < 6 * scale).all()
    assert np.abs(mine.std(0) / other.std(0) - 1).max() < 0.06


def test_images_are_mirrored_half_the_time() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :, 0] = 4 * np.arange(64)[None]
    image = Image.fromarray(pixels)
    views = [np.asarray(imagenet._training_view(image, 16, seed)) for seed in range(200)]
    falls = sum(int(v[8, 0, 0]) > int(v[8, -1, 0]) for v in views)
    assert 70 < falls < 130


def no_image(file: Path) -> None:
    file.write_bytes(b"no image")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-400])


@pytest.mark.parametrize("damage", [no_image, truncated])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(
    damage: Callable[[Path], None], workers: int, folder: Path
) -> None:
    for split in ("train", "val"):
        damage(folder / split / CLASSES[1] / f"{CLASSES[1]}_2.JPEG")
    with pytest.raises(NatlibError, match=rf"train/{CLASSES[1]}/{CLASSES[1]}_2\.JPEG is no image"):
        list(ImageNet("train", 30, SIZE, workers).epoch(generator()))
    with pytest.raises(NatlibError, match=rf"val/{CLASSES[1]}/{CLASSES[1]}_2\.JPEG is no image"):
        list(ImageNet("val", 8, SIZE, workers).central())


def test_the_checksum_is_that_of_names_and_sizes(folder: Path) -> None:
    first = ImageNet("val", 1).checksum()
    assert ImageNet("val", 1).checksum() == first
    file = folder / "val" / CLASSES[2] / f"{CLASSES[2]}_0.JPEG"
    file.rename(file.with_name("other.JPEG"))
    second = ImageNet("val", 1).checksum()
    truncated(file.with_name("other.JPEG"))
    assert len({first, second, ImageNet("val", 1).checksum()}) == 3


def test_what_is_no_imagenet_folder_is_refused(folder: Path) -> None:
    with pytest.raises(NatlibError, match=r"'test' is not one of 'train', 'val'"):
        ImageNet("test", 8)
    with pytest.raises(NatlibError, match="batch 0 is not allowed"):
        ImageNet("val", 0)
    with pytest.raises(NatlibError, match=r"batch 31 gives no batch: .*train holds 30 images"):
        next(ImageNet("train", 31).epoch(generator()))
    (folder / "val" / "n99").mkdir()
    with pytest.raises(NatlibError, match=r"imagenet/val holds no classes of images: .*n99"):
        ImageNet("val", 8)
    (folder / "train").rename(folder / "training")
    with pytest.raises(NatlibError, match=r"imagenet/train holds no classes"):
        ImageNet("train", 8)


# Accuracy and training -----------------------------------------------------------------------


def test_accuracy_counts_the_first_and_the_first_five(folder: Path) -> None:
    network = CellNetwork(CONFIG.macro, genotype=GENOTYPE).eval()
    val = ImageNet("val", 5, SIZE)
    with torch.no_grad():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in val.central())
    assert accuracy(network, val) == (right / 13, 1.0)
    six = CellNetwork(replace(CONFIG.macro, classes=6), genotype=GENOTYPE).eval()
    with pytest.raises(NatlibError, match=r"classes = 6 of the network; .*val holds 3"):
        accuracy(six, val)


def test_training_learns_and_stopped_and_resumed_equals_uninterrupted(
    folder: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=4)
    record = resumed_equals_uninterrupted(tmp_path, "imagenet", config, train_imagenet, (4, 8))
    losses = record.result["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert record.result["accuracy_5"] == 1.0
    assert 0 <= record.result["accuracy"] <= 1


def test_the_published_macro_trains_with_its_auxiliary_head_and_is_exported(
    folder: Path, tmp_path: Path
) -> None:
    macro = ImageNetMacro(channels=4, cells=3, classes=3)
    config = replace(CONFIG, macro=macro, epochs=1)
    record = run(tmp_path, "imagenet", config, train_imagenet)
    assert any(name.startswith("auxiliary") for name in record.load("weights"))
    convert(str(record.path), tmp_path / "net.pt")
    again = load_network(tmp_path / "net.pt")
    assert accuracy(again, ImageNet("val", 8))[0] == record.result["accuracy"]


def test_smoothing_reaches_the_loss(folder: Path, tmp_path: Path) -> None:
    losses = {
        s: run(
            tmp_path / str(s), "imagenet", replace(CONFIG, epochs=1, smoothing=s), train_imagenet
        )
        for s in (0.0, 0.5)
    }
    assert losses[0.0].result["losses"] != losses[0.5].result["losses"]


def test_classes_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, macro=replace(CONFIG.macro, classes=1000))
    with pytest.raises(NatlibError, match=r"classes = 1000 of the network; .*train holds 3"):
        run(tmp_path, "imagenet", config, train_imagenet)
    (folder / "val" / CLASSES[1]).rename(folder / "val" / "n99")
    with pytest.raises(NatlibError, match=rf"differ in classes: \['{CLASSES[1]}', 'n99'\]"):
        run(tmp_path, "imagenet", CONFIG, train_imagenet)
