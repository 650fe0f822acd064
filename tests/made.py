"""Small made images, and a store whose runs can be stopped in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from natlib.data import ImageSet
from natlib.records import Record, Run, RunStore
from natlib.train import DataConfig
from tests.strategies import generator

CLASSES = ("circle", "square", "line", "dot")
DATA = DataConfig("made", image_size=8, train=48, search=40, report=36, test=32)


def load(name: str = "made", split: str = "train") -> ImageSet:
    """Stand in for ``natlib.data.load``: a pattern for each class under noise, no image twice."""
    assert name == "made"
    number = {"train": 160, "test": 40}[split]
    draw = generator({"train": 1, "test": 2}[split])
    patterns = 200 * torch.rand(len(CLASSES), 3, 8, 8, generator=generator(3))
    labels = torch.arange(number) % len(CLASSES)
    images = patterns[labels] + 55 * torch.rand(number, 3, 8, 8, generator=draw)
    return ImageSet(images.to(torch.uint8), labels, CLASSES, "made", split, "made for tests")


class Stopped(Exception):
    """The run was stopped by the test."""


def run(
    folder: Path,
    kind: str,
    config: Any,
    body: Callable[[Run], dict[str, Any]],
    stop_at: int | None = None,
) -> Record:
    """Compute a record in ``folder``; with ``stop_at``, raise Stopped at that progress report.

    A checkpoint is due whenever the body asks.
    """
    store = RunStore(folder, checkpoint_seconds=0)
    with pytest.MonkeyPatch.context() as patch:
        calls = 0

        def progress(self: Run, done: float, total: float) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stopped

        patch.setattr(Run, "progress", progress)
        return store.run(kind, config, body, recipe=1, data="")


def same(a: Any, b: Any) -> bool:
    """Say whether two saved artifacts hold the same bits, on whatever device."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
            return False
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def resumed_equals_uninterrupted(
    folder: Path,
    kind: str,
    config: Any,
    body: Callable[[Run], dict[str, Any]],
    stops: tuple[int, ...],
) -> Record:
    """Stop a run several times on its way, let it finish, and compare all with a straight run."""
    straight = run(folder / "straight", kind, config, body)
    for stop in stops:
        with pytest.raises(Stopped):
            run(folder / "resumed", kind, config, body, stop)
    resumed = run(folder / "resumed", kind, config, body)
    assert resumed.provenance["resumed"] >= 1
    assert resumed.key == straight.key
    assert resumed.result == straight.result
    assert resumed.artifacts.keys() == straight.artifacts.keys()
    for name in straight.artifacts:
        assert same(resumed.load(name), straight.load(name)), name
    return straight
