"""Face verification: do two images show one person? Judged in folds, as LFW prescribes."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from natlib.errors import NatlibError


@dataclass(frozen=True)
class Verification:
    """Accuracy (0..1) of each fold and the threshold, a cosine, that the other folds chose."""

    accuracies: tuple[float, ...]
    thresholds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean accuracy over the folds: LFW's figure."""
        return statistics.fmean(self.accuracies)

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: sample deviation over the root of the folds' number."""
        return statistics.stdev(self.accuracies) / math.sqrt(len(self.accuracies))


def verification(embeddings: Tensor, pairs: Tensor, same: Tensor, fold: Tensor) -> Verification:
    """Judge pairs by the cosine of their embeddings, each fold with the others' best threshold.

    ``embeddings`` float (N, D); ``pairs`` int64 (P, 2), indexes of them; ``same`` bool (P,);
    ``fold`` int64 (P,). A pair is taken for one person if its cosine reaches the threshold, which
    is the lowest of the other folds' cosines that judges most of their pairs right. Raises
    NatlibError for other shapes, indexes out of range, fewer than two folds, and an embedding of a
    pair that is zero or not finite. Source: Huang et al., 2007, Sec. IV-B.
    """
    count = len(pairs)
    if (
        embeddings.dim() != 2
        or pairs.shape != (count, 2)
        or not (same.shape == fold.shape == (count,))
    ):
        raise NatlibError(
            f"embeddings {tuple(embeddings.shape)}, pairs {tuple(pairs.shape)}, same "
            f"{tuple(same.shape)}, fold {tuple(fold.shape)} must be (N, D), (P, 2), (P,) and (P,)"
        )
    folds = torch.unique(fold).tolist()
    if len(folds) < 2:
        raise NatlibError(f"folds {folds}: a threshold comes from other folds, so two are needed")
    low, high = int(pairs.min()), int(pairs.max())
    if low < 0 or high >= len(embeddings):
        raise NatlibError(f"pairs of {low} to {high} do not index {len(embeddings)} embeddings")
    cosines = torch.cat([_cosines(embeddings, part) for part in torch.split(pairs, 256)])
    if not bool(cosines.isfinite().all()):
        first = int(cosines.isfinite().logical_not().nonzero()[0])
        raise NatlibError(f"pair {pairs[first].tolist()} has an embedding that is 0 or not finite")
    same = same.bool()
    accuracies, thresholds = [], []
    for one in folds:
        held = fold == one
        threshold = _best_threshold(cosines[~held], same[~held])
        right = (cosines[held] >= threshold) == same[held]
        accuracies.append(float(right.double().mean()))
        thresholds.append(threshold)
    return Verification(tuple(accuracies), tuple(thresholds))


def _cosines(embeddings: Tensor, pairs: Tensor) -> Tensor:
    """Cosines of pairs, float64 (P,); not finite where an embedding is zero."""
    left, right = (embeddings[pairs[:, side]].double() for side in (0, 1))
    return F.normalize(left, eps=0).mul_(F.normalize(right, eps=0)).sum(1)


def _best_threshold(cosines: Tensor, same: Tensor) -> float:
    """The lowest cosine, or infinity, from which on calling pairs the same is right most often."""
    candidates = torch.cat([torch.unique(cosines), cosines.new_tensor([torch.inf])])
    below_same = torch.searchsorted(cosines[same].sort().values, candidates)
    below_other = torch.searchsorted(cosines[~same].sort().values, candidates)
    right = below_other - below_same
    return float(candidates[(right == right.max()).nonzero()[0, 0]])
