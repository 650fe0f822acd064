"""One hypothesis profile for all tests, and made images in place of a data set."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("natlib", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("natlib")

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, processes with two threads each thrash
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start
# inherits that; the tests of interrupts need the ordinary behaviour.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def made_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let the core see ``tests.made.load`` as its data, and a default store in ``tmp_path``."""
    from natlib import data, train
    from tests import made

    monkeypatch.setattr(data, "load", made.load)
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "runs"))
    for name in ("NATLIB_FRESH", "FRESH", "NATLIB_THREADS", "NATLIB_MANIFEST", "NATLIB_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    clear = train.splits.cache_clear
    clear()
    yield
    clear()
