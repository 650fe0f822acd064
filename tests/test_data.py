"""Tests of natlib.data and of the modules behind it: files, formats, download."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as published
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from natlib import NatlibError, data, download, formats
from natlib.data import (
    ImageSet,
    augment,
    index_batches,
    load,
    load_faces,
    normalise,
    partition,
    statistics,
)
from natlib.data import imagenet_folder as folder_of

REPOSITORY = Path(data.__file__).resolve().parent.parent
REAL_ROOT = os.environ.get("NATLIB_DATA", "")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data/ folder, without NATLIB_DATA and with nothing to be had from elsewhere."""
    monkeypatch.delenv("NATLIB_DATA", raising=False)
    monkeypatch.setattr(data, "_DATA", tmp_path / "data")
    monkeypatch.setattr(data, "obtain", lambda *_: ["download failed: no network in this test"])
    data._auto.cache_clear()
    return tmp_path / "data"


@pytest.fixture
def online(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As ``home``, but the real ways to obtain data are tried."""
    monkeypatch.setattr(data, "obtain", download.obtain)
    monkeypatch.setenv("no_proxy", "*")
    return home


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_packed(root: Path, patch: pytest.MonkeyPatch, name: str = "cifar10") -> np.ndarray:
    """Write 200 + 200 packed images whose checksums natlib knows; return the training images."""
    folder = root / f"{name}-lossless"
    folder.mkdir(parents=True)
    classes = [f"class {i}" for i in range(10)]
    listing = {"classes": classes} if name == "cifar10" else {"fine": classes, "coarse": [0] * 10}
    (folder / "classes.json").write_text(json.dumps(listing))
    for seed, split in enumerate(("train", "test")):
        images, sheets = pixels(200, 32, 32, 3, seed=seed), []
        for sheet in np.split(images, 2):
            stream = io.BytesIO()
            Image.fromarray(sheet.reshape(-1, 32, 3)).save(stream, "webp", lossless=True)
            sheets.append(stream.getvalue())
        arrays = {
            "webp": np.frombuffer(b"".join(sheets), np.uint8),
            "offsets": np.cumsum([0, *map(len, sheets)]),
            "labels": np.arange(200, dtype=np.uint8) % 10,
        }
        if name == "cifar10":
            arrays["lossy"] = np.array([3, 5, 8], np.int32)
        np.savez(folder / f"{split}.npz", **arrays)
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        patch.setitem(formats._SHA256, f"{folder.name}/{file.name}", digest)
    return pixels(200, 32, 32, 3, seed=0).transpose(0, 3, 1, 2)


def make_faces(root: Path, patch: pytest.MonkeyPatch) -> np.ndarray:
    """Write 103 faces of 60 people, two sheets, with checksums that natlib knows; return them."""
    (root / "lfw-a").mkdir(parents=True)
    faces = pixels(200, 112, 112)
    faces[103:] = 0
    sheets = []
    for sheet in np.split(faces, 2):
        stream, rows = io.BytesIO(), sheet.reshape(10, 10, 112, 112).swapaxes(1, 2)
        Image.fromarray(rows.reshape(1120, 1120)).save(stream, "webp", lossless=True)
        sheets.append(stream.getvalue())
    pairs = np.array([[0, 60], [1, 102], [2, 62], [3, 4]], np.int32)
    np.savez(
        root / "lfw-a" / "lfw_a_112.npz",
        images=np.frombuffer(b"".join(sheets), np.uint8),
        offsets=np.cumsum([0, *map(len, sheets)]),
        # More people than a byte counts.
        labels=(np.arange(103) % 60 + 300).astype(np.int16),
        people=np.array([f"person {i}" for i in range(360)]),
        pairs=pairs,
        same=np.array([1, 0, 1, 0], np.uint8),
        fold=np.array([0, 0, 1, 1], np.uint8),
    )
    digest = hashlib.sha256((root / "lfw-a" / "lfw_a_112.npz").read_bytes()).hexdigest()
    patch.setitem(formats._SHA256, "lfw-a/lfw_a_112.npz", digest)
    return faces[:103, None]


def make_idx(root: Path, patch: pytest.MonkeyPatch, packed: bool = True) -> np.ndarray:
    """Write 20 + 20 images as idx files whose checksums natlib knows; return those of training."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for seed, prefix in enumerate(("train", "t10k")):
        images, labels = pixels(20, 28, 28, seed=seed), np.arange(20, dtype=np.uint8) % 10
        for stem, head, array in (
            (f"{prefix}-images-idx3-ubyte", 16, images),
            (f"{prefix}-labels-idx1-ubyte", 8, labels),
        ):
            content = bytes(head) + array.tobytes()
            patch.setitem(formats._SHA256, f"raw/{stem}", hashlib.sha256(content).hexdigest())
            if packed:
                (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / stem).write_bytes(content)
    return pixels(20, 28, 28, seed=0)


def make_published(root: Path, patch: pytest.MonkeyPatch, name: str = "cifar10") -> np.ndarray:
    """Write 20 + 20 images in torchvision's layout and tell torchvision their md5."""
    source = {"cifar10": published.CIFAR10, "cifar100": published.CIFAR100}[name]
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    sums: dict[str, str] = {}

    def dump(file: str, content: dict[str, object]) -> None:
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    for seed, (file, _) in enumerate([*source.train_list, *source.test_list]):
        dump(file, {"data": pixels(20, 3072, seed=seed), key: [i % 10 for i in range(20)]})
    dump(source.meta["filename"], {source.meta["key"]: [f"class {i}" for i in range(10)]})
    for attribute in ("train_list", "test_list"):
        listed = [[file, sums[file]] for file, _ in getattr(source, attribute)]
        patch.setattr(source, attribute, listed)
    meta = {**source.meta, "md5": sums[source.meta["filename"]]}
    patch.setattr(source, "meta", meta)
    count = len(source.train_list)
    parts = [pixels(20, 3072, seed=seed) for seed in range(count)]
    return np.concatenate(parts).reshape(-1, 3, 32, 32)


def image_set(labels: list[int], seed: int = 0) -> ImageSet:
    images = torch.from_numpy(pixels(len(labels), 1, 2, 2, seed=seed))
    return ImageSet(images, torch.tensor(labels), ("a", "b", "c"), "made", "train", "a test")


# Reading and look-up -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_packed_files_decode_to_the_images_they_were_made_of(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = make_packed(home, monkeypatch, name)
    train, test = load(name), load(name, "test")
    assert np.array_equal(train.images.numpy(), expected)
    assert train.labels.tolist() == [i % 10 for i in range(200)]
    assert train.images.is_contiguous() and train.labels.dtype == torch.int64
    assert (train.name, train.split, train.classes[9]) == (name, "train", "class 9")
    assert test.split == "test" and test.checksum != train.checksum
    assert ("3 of 200 images decoded from JPEG" in train.source) == (name == "cifar10")


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_padded_with_zeros_to_32_pixels(
    home: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    expected = make_idx(home, monkeypatch, packed)
    images = load("fashion_mnist").images
    assert images.shape == (20, 1, 32, 32)
    assert np.array_equal(images[:, 0, 2:30, 2:30].numpy(), expected)
    assert int(images.sum()) == int(expected.sum())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_layout_is_read_and_comes_before_the_packed_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_packed(home, monkeypatch, name)
    expected = make_published(home, monkeypatch, name)
    train = load(name)
    assert np.array_equal(train.images.numpy(), expected)
    assert train.labels.tolist() == [i % 20 % 10 for i in range(len(expected))]
    assert train.classes[0] == "class 0" and train.source.startswith("published files")


def test_natlib_data_comes_before_data(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_packed(home, monkeypatch)
    assert load("cifar10").source.startswith("packed")
    make_published(tmp_path / "elsewhere", monkeypatch)
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path / "elsewhere"))
    assert load("cifar10").source.startswith("published")
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(NatlibError, match=r"nowhere' is not a folder"):
        load("cifar10")


def test_a_copy_elsewhere_is_verified_even_if_its_size_and_time_are_known(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_packed(home, monkeypatch)
    load("cifar10")
    shutil.copytree(home / "cifar10-lossless", tmp_path / "copy" / "cifar10-lossless")
    file = tmp_path / "copy" / "cifar10-lossless" / "train.npz"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    damage(file, "altered")
    os.utime(file, ns=times)
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path / "copy"))
    with pytest.raises(NatlibError, match=r"copy/cifar10-lossless/train.npz is truncated or alt"):
        load("cifar10")


def test_what_is_not_offered_is_refused_with_what_is() -> None:
    with pytest.raises(NatlibError, match=r"'cifar'.*'auto', 'cifar10', 'cifar100', 'fashion_m"):
        load("cifar")
    with pytest.raises(NatlibError, match=r"'val'.*'train', 'test'"):
        load("cifar10", "val")


def test_faces_come_with_their_pairs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_faces(home, monkeypatch)
    # Decoded, then from the cache.
    for faces in (load_faces(), load_faces()):
        assert np.array_equal(faces.images.images.numpy(), expected)
        assert faces.images.labels.tolist() == [i % 60 + 300 for i in range(103)]
        assert faces.images.classes[359] == "person 359" and faces.images.name == "lfw"
        assert faces.pairs.tolist() == [[0, 60], [1, 102], [2, 62], [3, 4]]
        assert faces.same.tolist() == [True, False, True, False]
        assert faces.fold.tolist() == [0, 0, 1, 1]
        left, right = faces.images.labels[faces.pairs].T
        assert torch.equal(left == right, faces.same)


def test_sets_without_a_download_say_where_to_put_them(online: Path) -> None:
    for name, folder, get in (("lfw", "lfw-a", load_faces), ("imagenet", "imagenet", folder_of)):
        with pytest.raises(NatlibError) as caught:
            get()
        assert str(caught.value) == (
            f"data set '{name}' cannot be had: not in data/; torchvision has no download of it. "
            f"Either set NATLIB_DATA to a folder that holds {folder}, or put that folder under "
            f"{online}."
        )
        with pytest.raises(NatlibError, match=rf"'{name}' is not one of .*load_faces.*imagenet"):
            load(name)
    (online / "imagenet").mkdir()
    assert folder_of() == online / "imagenet"


def test_a_cache_of_an_older_version_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_packed(home, monkeypatch)
    first, file = load("cifar10"), home / "cache" / "cifar10-train.json"
    entry = json.loads(file.read_text())
    assert entry.pop("labels") == "|u1"
    file.write_text(json.dumps(entry))
    monkeypatch.setattr(data, "read", no_reading)
    assert torch.equal(load("cifar10").labels, first.labels)


MAKERS = {
    "lfw-a/lfw_a_112.npz": make_faces,
    "cifar10-lossless/train.npz": make_packed,
    "cifar10-lossless/classes.json": make_packed,
    "cifar-10-batches-py/data_batch_3": make_published,
    "cifar-10-batches-py/batches.meta": make_published,
    "FashionMNIST/raw/train-images-idx3-ubyte.gz": make_idx,
    "FashionMNIST/raw/train-labels-idx1-ubyte.gz": make_idx,
}


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
@pytest.mark.parametrize("file", MAKERS)
@pytest.mark.parametrize("before", [True, False], ids=["fresh", "decoded"])
def test_a_bad_file_is_named_and_left_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, file: str, how: str, before: bool
) -> None:
    name = "fashion_mnist" if "Fashion" in file else "cifar10"
    get = load_faces if "lfw" in file else partial(load, name)
    MAKERS[file](home, monkeypatch)
    if not before:
        get()
    damage(home / file, how)
    left = (home / file).read_bytes() if how != "missing" else None
    # "auto" may not walk past a broken CIFAR-10 either.
    for again in (get, get if "lfw" in file else load):
        with pytest.raises(NatlibError, match=file) as caught:
            again()
        assert ("is missing" if how == "missing" else "truncated or altered") in str(caught.value)
    assert ((home / file).read_bytes() if (home / file).exists() else None) == left


# Cache ---------------------------------------------------------------------------------------


def no_reading(*_: object) -> None:
    raise AssertionError("the files were read again")


def cache_file(home: Path) -> Path:
    return next((home / "cache").glob("cifar10-train-*.npy"))


def test_the_second_load_maps_the_decoded_images(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_packed(home, monkeypatch)
    first = load("cifar10")
    monkeypatch.setattr(data, "read", no_reading)
    second = load("cifar10")
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    for field in ("classes", "name", "split", "source", "checksum"):
        assert getattr(first, field) == getattr(second, field)
    second.images.zero_()
    assert torch.equal(load("cifar10").images, first.images)


def test_a_cache_file_with_another_time_is_verified_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_packed(home, monkeypatch)
    checksum = load("cifar10").checksum
    monkeypatch.setattr(data, "read", no_reading)
    os.utime(cache_file(home), ns=(1, 1))
    assert load("cifar10").checksum == checksum
    monkeypatch.setattr(data, "_checksum", no_reading)
    assert load("cifar10").checksum == checksum


@pytest.mark.parametrize("how", ["truncated", "altered", "emptied"])
def test_a_corrupt_cache_file_is_named_and_rebuilt_once_deleted(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    make_packed(home, monkeypatch)
    checksum, cached = load("cifar10").checksum, cache_file(home)
    if how == "emptied":
        cached.write_bytes(b"")
    else:
        damage(cached, how)
    left = cached.read_bytes()
    with pytest.raises(NatlibError, match=rf"{cached.name} is corrupt .*: delete it"):
        load("cifar10")
    assert cached.read_bytes() == left
    cached.unlink()
    assert load("cifar10").checksum == checksum == data._checksum(*tensors(load("cifar10")))


def tensors(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return images.images, images.labels


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}'])
def test_a_corrupt_cache_entry_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    make_packed(home, monkeypatch)
    load("cifar10")
    (home / "cache" / "cifar10-train.json").write_text(content)
    with pytest.raises(NatlibError, match=r"cifar10-train.json is corrupt .*: delete it"):
        load("cifar10")


def test_processes_that_load_at_once_decode_once_and_agree(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_packed(home, monkeypatch)
    script = f"""
import sys, time
from pathlib import Path
from natlib import data, formats
formats._SHA256.update({formats._SHA256!r})
data._DATA = Path({str(home)!r})
read = data.read
def counted(*arguments):
    print("decoded")
    time.sleep(1)
    return read(*arguments)
data.read = counted
print("ready", flush=True)
sys.stdin.read(1)
print(data.load("cifar10").checksum)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("g")
        process.stdin.flush()
    said = [process.communicate()[0].split() for process in processes]
    assert sum(lines.count("decoded") for lines in said) == 1
    assert {lines[-1] for lines in said} == {load("cifar10").checksum}


# Obtaining -----------------------------------------------------------------------------------


def test_a_named_set_that_is_absent_is_an_error_with_the_ways_to_get_it(home: Path) -> None:
    with pytest.raises(NatlibError, match=r"NATLIB_DATA.*cifar-10-batches-py.*lossless") as caught:
        load("cifar10")
    assert "no network in this test" in str(caught.value) and str(home) in str(caught.value)


def test_auto_takes_cifar10_where_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_packed(home, monkeypatch)
    make_idx(home, monkeypatch)
    assert (load().name, load("auto", "test").name) == ("cifar10", "cifar10")
    said = capsys.readouterr().out
    assert said == "natlib.data: dataset 'auto' is cifar10 (cifar10-lossless in data/)\n"


def test_auto_falls_to_fashion_mnist_and_says_why_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_idx(home, monkeypatch)
    assert load().name == "fashion_mnist"
    monkeypatch.setattr(data, "obtain", no_reading)
    assert load("auto", "test").name == "fashion_mnist"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "fashion_mnist" in said and "no network in this test" in said


def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Have torchvision name a small archive on this machine as CIFAR-10."""
    expected = make_published(tmp_path / "server", monkeypatch)
    file = tmp_path / published.CIFAR10.filename
    with tarfile.open(file, "w:gz") as tar:
        tar.add(tmp_path / "server" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(published.CIFAR10, "url", file.as_uri())
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(published.CIFAR10, "tgz_md5", digest)
    return expected


def test_what_torchvision_names_is_downloaded_and_unpacked(
    online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = archive(tmp_path, monkeypatch)
    assert np.array_equal(load("cifar10").images.numpy(), expected)
    assert {path.name for path in online.iterdir()} == {"cache", "cifar-10-batches-py"}


def test_fashion_mnist_is_downloaded_file_by_file(
    online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_idx(tmp_path / "server", monkeypatch)
    folder = tmp_path / "server" / "FashionMNIST" / "raw"
    listed = [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in folder.iterdir()]
    monkeypatch.setattr(published.FashionMNIST, "mirrors", [folder.as_uri() + "/"])
    monkeypatch.setattr(published.FashionMNIST, "resources", listed)
    assert np.array_equal(load("fashion_mnist").images[:, 0, 2:30, 2:30].numpy(), expected)


def test_a_failed_download_leaves_nothing_and_is_not_tried_again_within_an_hour(
    online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = archive(tmp_path, monkeypatch)
    (tmp_path / published.CIFAR10.filename).write_text("<html>Please log in</html>")
    for note in ("is not the published file", "tried within the last hour"):
        with pytest.raises(NatlibError, match=note):
            load("cifar10")
        assert [path.name for path in online.iterdir()] == ["cache"]
    expected = archive(tmp_path / "again", monkeypatch)
    with pytest.raises(NatlibError, match=r"delete data/cache/unreachable\.json"):
        load("cifar10")
    log = online / "cache" / "unreachable.json"
    content = json.loads(log.read_text())
    content["cifar10, download"]["time"] -= download._REMEMBERED
    log.write_text(json.dumps(content))
    assert np.array_equal(load("cifar10").images.numpy(), expected)


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"


def test_a_hanging_connection_is_given_up(
    online: Path, monkeypatch: pytest.MonkeyPatch, silent_server: socket.socket
) -> None:
    monkeypatch.setattr(published.CIFAR10, "url", address(silent_server))
    monkeypatch.setattr(download, "_PATIENCE", 0.5)
    with pytest.raises(NatlibError, match=r"no answer, or too slow a one, within 0.5 s"):
        load("cifar10")
    assert [path.name for path in online.iterdir()] == ["cache"]


def test_a_download_goes_on_while_enough_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = "import time\nfor _ in range(12):\n f.write('x' * 1000); f.flush(); time.sleep(0.1)"
    command = [sys.executable, "-c", f"f = open('file', 'w')\n{writes}"]
    monkeypatch.setattr(download, "_PROGRESS", 500)
    download._watch(command, tmp_path, 1.0)
    assert (tmp_path / "file").stat().st_size == 12000
    monkeypatch.setattr(download, "_PROGRESS", 1 << 20)
    with pytest.raises(download._Failed, match="too slow"):
        download._watch(command, tmp_path, 0.5)


@pytest.mark.parametrize("before", ["true", "printf %1000s x > file"])
def test_a_program_that_is_given_up_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr(download, "_PROGRESS", 500)
    with pytest.raises(download._Failed, match="too slow"):
        download._watch(["sh", "-c", f"{before}; sleep 10; touch finished"], tmp_path, 0.5)
    assert not (tmp_path / "finished").exists()


def test_an_interrupted_download_leaves_nothing(
    online: Path, monkeypatch: pytest.MonkeyPatch, silent_server: socket.socket
) -> None:
    monkeypatch.setattr(published.CIFAR10, "url", address(silent_server))

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10")
    assert [path.name for path in online.iterdir()] == ["cache"]
    assert not (online / "cache" / "unreachable.json").exists()


def test_a_killed_download_ends_and_the_next_one_clears_its_remains(
    online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: socket.socket
) -> None:
    script = f"""
from pathlib import Path
import torchvision
from natlib import data
torchvision.datasets.CIFAR10.url = {address(silent_server)!r}
data._DATA = Path({str(online)!r})
data.load("cifar10")
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY) as process:
        connection, _ = silent_server.accept()
        process.kill()
    with connection:
        connection.settimeout(60)
        while connection.recv(4096):
            pass  # the request; then the end, because the downloader ended with its parent
    assert (online / ".incoming").is_dir()
    expected = archive(tmp_path, monkeypatch)
    assert np.array_equal(load("cifar10").images.numpy(), expected)
    assert not (online / ".incoming").exists()


def fake_program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_the_debian_package_is_got_even_where_there_are_no_package_lists(
    online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_idx(tmp_path / "server", monkeypatch)
    raw, programs = tmp_path / "server" / "FashionMNIST" / "raw", tmp_path / "programs"
    apt = 'case "$*" in *" update") touch lists/known;; *) '
    apt += '[ -f lists/known ] || { echo "E: Unable to locate"; exit 100; }; '
    apt += "touch dataset-fashion-mnist_1_all.deb;; esac"
    fake_program(programs, "apt-get", apt)
    fake_program(programs, "dpkg-deb", f'mkdir -p "$3/usr" && cp {raw}/*.gz "$3/usr"')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(published.FashionMNIST, "mirrors", ["file:///does/not/exist/"])
    assert np.array_equal(load("fashion_mnist").images[:, 0, 2:30, 2:30].numpy(), expected)
    assert {path.name for path in online.iterdir()} == {"cache", "FashionMNIST"}


def test_where_nothing_works_every_way_is_named(
    online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published.FashionMNIST, "mirrors", ["file:///does/not/exist/"])
    fake_program(tmp_path / "programs", "apt-get", 'echo "E: no such package"; exit 100')
    fake_program(tmp_path / "programs", "dpkg-deb", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    with pytest.raises(NatlibError, match=r"download failed: .*does/not/exist") as caught:
        load("fashion_mnist")
    assert "Debian package failed: E: no such package" in str(caught.value)
    (online / "cache" / "unreachable.json").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NatlibError, match="Debian package failed: apt-get is not installed"):
        load("fashion_mnist")


# Image sets ----------------------------------------------------------------------------------


def test_importing_takes_no_library_that_only_some_need() -> None:
    script = "import sys, natlib.data; print({'torchvision', 'PIL', 'pandas'} & {*sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout == "set()\n"


def test_the_checksum_is_that_of_the_content() -> None:
    images = image_set([0, 1, 2, 0])
    assert images.checksum == image_set([0, 1, 2, 0]).checksum
    assert images.subset([0, 1, 2, 3]).checksum == images.checksum
    others = [
        image_set([0, 1, 2, 1]),
        image_set([0, 1, 2, 0], seed=1),
        images.subset([1, 0, 2, 3]),
        images.subset([0, 1, 2]),
        images.resized(1),
        ImageSet(images.images.view(4, 1, 1, 4), *tensors(images)[1:], ("a", "b", "c"), "", "", ""),
    ]
    assert len({images.checksum, *(other.checksum for other in others)}) == 7


def test_a_subset_is_in_the_order_asked_for_and_a_copy() -> None:
    images = image_set([0, 1, 2, 0])
    chosen = images.subset(torch.tensor([2, 0]))
    assert torch.equal(chosen.images, images.images[[2, 0]]) and chosen.labels.tolist() == [2, 0]
    chosen.images.zero_()
    assert int(images.images[0].sum()) > 0


@pytest.mark.parametrize(
    ("indexes", "message"),
    [
        ([], "non-empty"),
        ([-1], "-1 to -1 do not fit 0 to 3"),
        ([1, 4], "1 to 4"),
        ([0.5], "whole numbers"),
        ([True, False, True, False], "whole numbers"),
    ],
)
def test_indexes_that_mean_nothing_are_refused(indexes: list[int], message: str) -> None:
    with pytest.raises(NatlibError, match=message):
        image_set([0, 1, 2, 0]).subset(indexes)


def test_tensors_of_another_kind_are_refused() -> None:
    good = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    for images, labels in [
        (good[0].float(), good[1]),
        (good[0][0], good[1]),
        (good[0].transpose(2, 3).expand(2, 3, 2, 2), good[1]),
        (good[0], good[1].int()),
        (good[0], good[1][:1]),
        (good[0], good[1] + 1),
        (good[0], good[1] - 1),
        (good[0][:0], good[1][:0]),
    ]:
        with pytest.raises(NatlibError):
            ImageSet(images, labels, ("a", "b"), "made", "train", "a test")


@pytest.mark.parametrize("size", [32, 16, 8, 1])
def test_resizing_is_the_mean_of_blocks_rounded_half_up(size: int) -> None:
    images = torch.from_numpy(pixels(5, 3, 32, 32))
    given_set = ImageSet(images, torch.zeros(5).long(), ("a",), "made", "train", "a test")
    factor = 32 // size
    blocks = images.numpy().reshape(5, 3, size, factor, size, factor).astype(np.int64)
    total, area = blocks.sum((3, 5)), factor**2
    expected = total // area + (total % area * 2 >= area)
    assert np.array_equal(given_set.resized(size).images.numpy(), expected)


@pytest.mark.parametrize("size", [0, -16, 5, 64])
def test_a_size_that_does_not_divide_is_refused(size: int) -> None:
    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    with pytest.raises(NatlibError, match=f"size {size} is not allowed for images of 32 × 32"):
        ImageSet(images, torch.tensor([0]), ("a",), "made", "train", "").resized(size)


# Partition, statistics, batches --------------------------------------------------------------


@given(
    st.lists(st.integers(0, 2), min_size=3, max_size=80),
    st.lists(st.floats(0.05, 1), min_size=1, max_size=4),
    st.integers(0, 2**40),
)
@example(labels=[0] * 60 + [1] * 9 + [2] * 3, shares=[0.5, 0.9], seed=0)
@example(labels=[0] * 5 + [2] * 60, shares=[1.0], seed=0)
@settings(deadline=None, max_examples=60)
def test_parts_are_disjoint_and_hold_every_class_in_proportion(
    labels: list[int], shares: list[float], seed: int
) -> None:
    mark = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    images = ImageSet(mark, torch.tensor(labels), ("a", "b", "c"), "made", "train", "a test")
    sizes = {f"part {i}": int(s * len(labels) / len(shares)) or 1 for i, s in enumerate(shares)}
    if sum(sizes.values()) > len(labels):
        with pytest.raises(NatlibError, match=f"at most {len(labels)}"):
            partition(images, sizes, seed)
        return
    parts = partition(images, sizes, seed)
    assert {name: len(part) for name, part in parts.items()} == sizes
    seen = [int(m) for part in parts.values() for m in part.images.view(-1)]
    assert len(set(seen)) == len(seen)
    for part in parts.values():
        assert part.labels.tolist() == [labels[int(m)] for m in part.images.view(-1)]
        for end in range(1, len(part) + 1):
            for label in range(3):
                fair = labels.count(label) * end / len(labels)
                assert abs(part.labels[:end].tolist().count(label) - fair) <= 2
    again = partition(images, sizes, seed)
    assert all(again[name].checksum == part.checksum for name, part in parts.items())


def test_balanced_classes_stay_balanced_and_the_seed_matters() -> None:
    images = image_set([0, 1, 2] * 40)
    state = torch.get_rng_state()
    parts = partition(images, {"train": 60, "valid": 30}, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert parts["train"].labels.bincount().tolist() == [20, 20, 20]
    assert parts["valid"].labels.bincount().tolist() == [10, 10, 10]
    other = partition(images, {"train": 60, "valid": 30}, seed=1)
    assert other["train"].checksum != parts["train"].checksum


@pytest.mark.parametrize("sizes", [{"a": 0}, {"a": -1, "b": 2}, {"a": 3, "b": 2}])
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(NatlibError, match=r"sizes .* at most 4"):
        partition(image_set([0, 1, 2, 0]), sizes, seed=0)


def test_statistics_are_those_of_the_pixels() -> None:
    images = torch.from_numpy(pixels(2100, 3, 4, 4)) // torch.tensor([1, 2, 3])[:, None, None]
    images = images.to(torch.uint8)
    made = ImageSet(images, torch.zeros(2100).long(), ("a",), "made", "train", "")
    mean, std = statistics(made)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-6)
    assert mean.dtype == std.dtype == torch.float32


def test_statistics_of_many_pixels_do_not_overflow() -> None:
    images = torch.zeros(13_000, 1, 32, 32, dtype=torch.uint8)
    images[::2] = 255
    made = ImageSet(images, torch.zeros(13_000).long(), ("a",), "made", "train", "")
    mean, std = statistics(made)
    assert mean.tolist() == std.tolist() == [0.5]
    with pytest.raises(NatlibError, match="made is constant"):
        statistics(made.subset(range(0, 10, 2)))


def test_normalised_images_are_standard_and_channels_last() -> None:
    images = torch.from_numpy(pixels(7, 3, 5, 6))
    made = ImageSet(images, torch.zeros(7).long(), ("a",), "made", "train", "")
    out = normalise(images, *statistics(made))
    values = images.numpy() / 255.0
    mean, std = (values.mean((0, 2, 3)), values.std((0, 2, 3)))
    expected = (values - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(NatlibError, match="float32"):
        normalise(out, *statistics(made))
    with pytest.raises(NatlibError, match=r"\(3, 5, 6\)"):
        normalise(images[0], *statistics(made))


@given(st.integers(1, 50), st.integers(1, 50), st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_an_epoch_holds_every_index_once(n: int, size: int, drop: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if drop and size > n:
        with pytest.raises(NatlibError, match=f"batch_size {size} gives no batch of {n}"):
            index_batches(n, size, generator, drop)
        return
    batches = index_batches(n, size, generator, drop)
    state = generator.get_state()
    seen = list(batches)
    assert torch.equal(generator.get_state(), state)
    assert all(len(batch) == size for batch in seen[: n // size])
    assert len(seen) == (n // size if drop else -(-n // size))
    indexes = torch.cat(seen)
    assert indexes.dtype == torch.int64 and len(indexes.unique()) == len(indexes)
    assert len(indexes) == (n - n % size if drop else n) and int(indexes.min()) >= 0
    assert int(indexes.max()) < n
    again = index_batches(n, size, torch.Generator().manual_seed(seed), drop)
    assert torch.equal(torch.cat(list(again)), indexes)


@pytest.mark.parametrize(("n", "size"), [(0, 1), (5, 0), (5, -1)])
def test_an_epoch_without_a_batch_is_refused(n: int, size: int) -> None:
    with pytest.raises(NatlibError, match=f"batch_size {size}"):
        index_batches(n, size, torch.Generator(), drop_last=False)


# Augmentation --------------------------------------------------------------------------------


def augment_one_by_one(
    images: torch.Tensor, generator: torch.Generator, pad: int, flip: bool, cutout: int
) -> torch.Tensor:
    """What augment is meant to do, image by image, from the same draws."""
    count, _, height, width = images.shape
    shifts = torch.zeros(2, count, 1, dtype=torch.int64)
    if pad:
        shifts = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    flips = torch.randint(2, (count, 1), generator=generator) if flip else torch.zeros(count, 1)
    if cutout:
        tops = torch.randint(height, (count, 1), generator=generator)
        lefts = torch.randint(width, (count, 1), generator=generator)
    results = []
    for i, image in enumerate(images):
        down, right = int(shifts[0, i]), int(shifts[1, i])
        padded = torch.nn.functional.pad(image, (pad, pad, pad, pad))
        image = padded[:, down : down + height, right : right + width].clone()
        if flips[i]:
            image = image.flip(2)
        if cutout:
            top, left = int(tops[i]) - cutout // 2, int(lefts[i]) - cutout // 2
            image[:, max(top, 0) : top + cutout, max(left, 0) : left + cutout] = 0
        results.append(image)
    return torch.stack(results)


@given(
    shape=st.tuples(*(st.integers(1, high) for high in (9, 4, 9, 9))),
    pad=st.integers(0, 4),
    flip=st.booleans(),
    cutout=st.integers(0, 12),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_augmenting_a_batch_is_augmenting_each_image(
    shape: tuple[int, int, int, int],
    pad: int,
    flip: bool,
    cutout: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    images = torch.from_numpy(pixels(*shape, seed=seed)).to(dtype)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        images = images.repeat_interleave(2, dim=3)[..., ::2]
    before, state = images.clone(), torch.get_rng_state()
    fast, slow = (torch.Generator().manual_seed(seed) for _ in range(2))
    out = augment(images, fast, pad=pad, flip=flip, cutout=cutout)
    assert torch.equal(out, augment_one_by_one(images, slow, pad, flip, cutout))
    assert torch.equal(fast.get_state(), slow.get_state())
    assert out.dtype == dtype and torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        assert out.is_contiguous()


def test_shifts_and_flips_are_uniform() -> None:
    images = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2], images[:, :, 2, 3] = 1, 2
    out = augment(images, torch.Generator().manual_seed(0), pad=1)
    mirrored = (out[..., :-1] == 2) & (out[..., 1:] == 1)
    share = mirrored.flatten(1).any(1).float().mean()
    assert abs(float(share) - 0.5) < 4 * 0.5 / 9000**0.5
    counts = (out == 1).sum(0)[0, 1:4, 1:4]
    assert int(counts.sum()) == 9000
    assert float((counts - 1000).abs().max()) < 4 * 1000**0.5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_on_another_device_stay_there(memory_format: torch.memory_format) -> None:
    images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    images = images.contiguous(memory_format=memory_format)
    out = augment(images, torch.Generator(), cutout=2)
    normal = normalise(out, torch.zeros(3), torch.ones(3))
    for result in (out, normal):
        assert result.device.type == "meta" and result.shape == (4, 3, 8, 8)
    assert out.is_contiguous(memory_format=memory_format)


def test_a_batch_that_cannot_be_augmented_is_refused() -> None:
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(NatlibError, match=r"\(1, 4, 4\)"):
        augment(images[0], torch.Generator())
    with pytest.raises(NatlibError, match="pad -1"):
        augment(images, torch.Generator(), pad=-1)
    with pytest.raises(NatlibError, match="cutout -2"):
        augment(images, torch.Generator(), cutout=-2)


# The real data sets --------------------------------------------------------------------------


def test_the_real_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a copy on this machine, else from the Debian package."""
    if not data._search("fashion_mnist"):
        if shutil.which("apt-get") is None:
            pytest.skip("no copy of Fashion-MNIST under NATLIB_DATA or data/, and no apt-get")
        monkeypatch.setattr(data, "_DATA", tmp_path)
        (tmp_path / "cache").mkdir()
        layout = formats.LAYOUTS["fashion_mnist"][0]
        debian: Callable[..., None] = download._unpack_debian
        download._attempt("fashion_mnist", "Debian package", debian, layout, tmp_path)
    train, test = load("fashion_mnist"), load("fashion_mnist", "test")
    assert train.images.shape == (60_000, 1, 32, 32) and test.images.shape == (10_000, 1, 32, 32)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.checksum.startswith("67c93f26a708dc22")
    assert test.checksum.startswith("49968a0fcfac5e98")
    assert train.resized(16).checksum.startswith("32e589fc2ad7")
    assert (train.classes[9], train.classes[train.labels[0]]) == ("Ankle boot", "Ankle boot")


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        ("cifar100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    ],
)
def test_the_real_cifar(name: str, mean: list[float], std: list[float]) -> None:
    if not REAL_ROOT or not data._search(name):
        pytest.skip(f"NATLIB_DATA names no folder with {name}")
    train, test = load(name), load(name, "test")
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    found = statistics(train)
    np.testing.assert_allclose(found[0], mean, atol=1e-4)
    np.testing.assert_allclose(found[1], std, atol=1e-4)
    classes = len(train.classes)
    assert train.labels.bincount().tolist() == [50_000 // classes] * classes
    assert test.labels.bincount().tolist() == [10_000 // classes] * classes
    golden = {"cifar10": ("5384d0e6", "465e34ae"), "cifar100": ("f317bded", "c4e5d0f8")}[name]
    if train.source.startswith("packed"):
        assert (train.checksum[:8], test.checksum[:8]) == golden
