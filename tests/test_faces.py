"""Networks for face verification: who may train, what is judged, and a training from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from natlib import NatlibError, data, faces, zoo
from natlib.macro import MacroConfig
from natlib.network import CellNetwork

TRAINING = {
    "image_size": 16, "channels": 4, "cells": 3, "groups": 2, "least": 4, "epochs": 1, "batch": 8,
}  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> data.Faces:
    """Ten folds of two people, four people in no pair; four images each, two pairs a fold."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) // 4
    images = torch.randint(0, 256, (96, 1, 32, 32), generator=generator, dtype=torch.uint8)
    names = tuple(f"person {i}" for i in range(24))
    first = torch.arange(10) * 8
    pairs = torch.stack([torch.stack([first, first + 1], 1), torch.stack([first, first + 4], 1)], 1)
    same = torch.tensor([True, False]).repeat(10)
    fold = torch.arange(10).repeat_interleave(2)
    found = data.Faces(
        data.ImageSet(images, labels, names, "lfw", "test", "made"), pairs.view(-1, 2), same, fold
    )
    monkeypatch.setattr(data, "load_faces", lambda: found)
    faces._small.cache_clear()
    return found


def test_nobody_who_trains_is_in_a_pair_that_is_judged(made: data.Faces) -> None:
    parts = faces.halves(made, (0, 2, 4), least=4)
    trains = set(made.images.labels[parts.train].tolist())
    judged = set(made.images.labels[parts.judged].tolist())
    assert judged == {0, 1, 4, 5, 8, 9}
    assert trains == set(range(24)) - judged
    assert parts.labels.unique().tolist() == list(range(18))


def test_one_fold_alone_and_people_with_too_few_images_are_refused(made: data.Faces) -> None:
    with pytest.raises(NatlibError, match=r"folds \[3\] are held out together; two or more"):
        faces.halves(made, (3,), least=1)
    with pytest.raises(NatlibError, match="least = 5; nobody outside folds"):
        faces.halves(made, (0, 1), least=5)


def test_embeddings_are_the_pooled_features_of_image_and_mirror_image() -> None:
    network = CellNetwork(
        MacroConfig(4, 3, 5, 16, 1), genotype=zoo.get("DARTS"), generator=torch.Generator()
    ).eval()
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    weight, bias = network.classifier.weight.detach(), network.classifier.bias.detach()
    with torch.no_grad():
        expected = network(x) + network(x.flip(3))
    found = faces.embeddings(network, x)
    assert found.shape == (3, weight.shape[1])
    torch.testing.assert_close(found @ weight.T + 2 * bias, expected)


def test_ten_folds_are_judged_for_each_method_and_seed(
    made: data.Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path))
    cells = {"original": [zoo.get("DARTS")] * 2}
    found = faces.trained(cells, [0, 1], TRAINING, workers=1)
    assert [len(group) for group in found["original"]] == [2, 2]
    assert sum(len(r.result["accuracies"]) for r in found["original"][0]) == 10
    assert all(0 <= a <= 1 for a in faces.accuracies(found["original"]))


def test_what_is_lacking_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path))
    monkeypatch.setattr(data, "_DATA", tmp_path / "none")
    assert "lfw-a" in faces.lacks()
