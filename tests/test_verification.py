"""Face verification against a literal implementation, and its published baseline."""

from __future__ import annotations

import math
import os
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from natlib import NatlibError, data
from natlib.verification import verification
from tests.strategies import generator


def literal(
    embeddings: Tensor, pairs: Tensor, same: Tensor, fold: Tensor
) -> tuple[list[float], list[float]]:
    """The definition, in loops: try every cosine of the other folds, count, keep the first best."""
    cosines = []
    for i, j in pairs.tolist():
        a, b = embeddings[i].double(), embeddings[j].double()
        cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    everything = list(zip(cosines, same.tolist(), fold.tolist(), strict=True))
    accuracies, thresholds = [], []
    for one in sorted(set(fold.tolist())):
        others = [(c, s) for c, s, f in everything if f != one]
        best, most = math.nan, -1
        for threshold in [*sorted(c for c, _ in others), math.inf]:
            right = sum((c >= threshold) == s for c, s in others)
            if right > most:
                best, most = threshold, right
        own = [(c, s) for c, s, f in everything if f == one]
        accuracies.append(fmean((c >= best) == s for c, s in own))
        thresholds.append(best)
    return accuracies, thresholds


@given(st.integers(0, 10_000), st.integers(2, 10), st.floats(0, 1), st.integers(1, 40))
def test_equals_the_literal_definition(seed: int, folds: int, share: float, more: int) -> None:
    draw = generator(seed)
    count = folds + more
    embeddings = torch.randn(12, 3, generator=draw)
    # Pairs repeat, so cosines tie; no image is its own partner.
    left = torch.randint(12, (count,), generator=draw)
    right = (left + torch.randint(1, 12, (count,), generator=draw)) % 12
    pairs = torch.stack([left, right], 1)
    same = torch.rand(count, generator=draw) < share
    fold = torch.arange(count) % folds
    found = verification(embeddings, pairs, same, fold)
    accuracies, thresholds = literal(embeddings, pairs, same, fold)
    assert list(found.accuracies) == pytest.approx(accuracies)
    assert list(found.thresholds) == pytest.approx(thresholds)
    assert found.mean == pytest.approx(fmean(accuracies))
    assert found.standard_error == pytest.approx(stdev(accuracies) / math.sqrt(folds))


def test_a_fold_never_chooses_its_own_threshold() -> None:
    # Fold 0 would have no error at 0.5; fold 1, whose pairs are closer, says otherwise.
    angle = torch.tensor([0.0, 0.4, 1.2, 0.1, 0.3])
    embeddings = torch.stack([angle.cos(), angle.sin()], 1)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4]])
    same, fold = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1])
    found = verification(embeddings, pairs, same, fold)
    assert found.accuracies == (0.5, 0.5)
    assert found.thresholds == pytest.approx((math.cos(0.1), math.cos(0.4)))


def test_only_the_direction_of_an_embedding_counts() -> None:
    draw = generator()
    embeddings = torch.randn(20, 8, generator=draw)
    pairs = torch.arange(20).view(10, 2)
    same, fold = torch.arange(10) % 3 == 0, torch.arange(10) % 2
    scale = 10.0 ** torch.arange(-10, 10)[:, None]
    found = verification(embeddings, pairs, same, fold)
    scaled = verification(embeddings * scale, pairs, same, fold)
    assert scaled.accuracies == found.accuracies
    assert scaled.thresholds == pytest.approx(found.thresholds)


def test_what_cannot_be_judged_is_refused() -> None:
    good = {
        "embeddings": torch.ones(3, 2),
        "pairs": torch.tensor([[0, 1], [1, 2]]),
        "same": torch.tensor([True, False]),
        "fold": torch.tensor([0, 1]),
    }
    assert verification(**good).accuracies == (0.0, 0.0)
    zero, infinite = torch.ones(3, 2), torch.ones(3, 2)
    zero[2] = 0
    infinite[0, 1] = math.inf
    for changed, message in (
        ({"embeddings": torch.ones(3)}, r"embeddings \(3,\).* must be \(N, D\)"),
        ({"same": torch.tensor([True])}, r"same \(1,\).* must be"),
        ({"fold": torch.tensor([4, 4])}, r"folds \[4\]: .* two are needed"),
        ({"pairs": torch.tensor([[0, 1], [1, 3]])}, "0 to 3 do not index 3 embeddings"),
        ({"pairs": torch.tensor([[0, 1], [1, -1]])}, "-1 to 1 do not index 3"),
        ({"embeddings": zero}, r"pair \[1, 2\] has an embedding that is 0"),
        ({"embeddings": infinite}, r"pair \[0, 1\] has an embedding"),
    ):
        with pytest.raises(NatlibError, match=message):
            verification(**{**good, **changed})


def test_the_real_faces() -> None:
    """The pixels themselves, each image less its mean, are known to reach 63.0 % on this data."""
    if not os.environ.get("NATLIB_DATA") or not data._search("lfw"):
        pytest.skip("NATLIB_DATA names no folder with lfw-a")
    faces = data.load_faces()
    assert faces.images.images.shape == (13_233, 1, 112, 112)
    assert len(faces.images.classes) == 5_749
    assert faces.images.checksum.startswith("80c123f034c281df")
    assert faces.fold.bincount().tolist() == [600] * 10
    assert faces.fold[faces.same].bincount().tolist() == [300] * 10
    left, right = faces.images.labels[faces.pairs].T
    assert torch.equal(left == right, faces.same)
    pixels = faces.images.images.flatten(1).float()
    pixels -= pixels.mean(1, keepdim=True)
    found = verification(pixels, faces.pairs, faces.same, faces.fold)
    assert found.mean == pytest.approx(0.630, abs=0.002)
    assert 0 < found.standard_error < 0.01
