"""Bodies for test_records: importable by worker processes, quick to import."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from natlib import NatlibError
from natlib.records import Run


@dataclass(frozen=True)
class Inner:
    width: int = 3
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Walk:
    """A random walk of ``steps`` steps; stops with an error at step ``fail_at``."""

    seed: int = 0
    steps: int = 20
    fail_at: int = -1
    inner: Inner = Inner()


@dataclass(frozen=True)
class Marked:
    """A body's configuration that names a folder where it leaves a file for each call."""

    folder: str
    seed: int = 0
    seconds: float = 0.0


def walk(run: Run) -> dict[str, Any]:
    config: Walk = run.config
    generator = torch.Generator().manual_seed(config.seed)
    position, step = torch.zeros(3), 0
    state = run.load_checkpoint()
    if state:
        position, step = state["position"], state["step"]
        generator.set_state(state["generator"])
    while step < config.steps:
        if step == config.fail_at and not os.environ.get("TEST_NO_FAIL"):
            raise NatlibError(f"told to fail at step {step}")
        position = position + torch.randn(3, generator=generator)
        step += 1
        run.progress(step, config.steps)
        if run.checkpoint_due():
            run.save_artifact("middle", {"step": step})
            run.save_checkpoint(
                {"position": position, "step": step, "generator": generator.get_state()}
            )
    run.save_artifact("end", {"position": position})
    return {"end": position.tolist(), "threads": torch.get_num_threads()}


def mark(run: Run) -> dict[str, Any]:
    """Leave a file named after this process, with a checkpoint once, and take some time."""
    folder = Path(run.config.folder)
    seen = run.load_checkpoint()
    (folder / f"{run.config.seed}-{os.getpid()}-{time.time_ns()}").touch()
    if not seen:
        run.save_checkpoint({"seen": True})
        time.sleep(run.config.seconds)
    return {"seed": run.config.seed, "resumed": bool(seen)}


def fail_on_odd(run: Run) -> dict[str, Any]:
    if run.config.seed % 2:
        raise RuntimeError(f"odd seed {run.config.seed}")
    return {"seed": run.config.seed}


def not_json(run: Run) -> dict[str, Any]:
    return {"loss": float("nan")}


def fixed(run: Run) -> dict[str, Any]:
    """What needs no training: the same anywhere."""
    return {"params": 1234, "name": run.config.names[0]}
