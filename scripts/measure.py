"""Instruments of bench.py: timing in turn, counted traffic, the machine's peaks, growth, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from natlib import NatlibError
from natlib.records import forkserver, peak_memory_mb, reset_peak_memory

IMPORTED = ("natlib.search", "nbformat")
"""What takes seconds: processes are forked from one that has it."""

Work = Callable[[], object]
SHORTEST = 0.02
"""Seconds: shorter work is repeated within one measurement, so that the clock does not matter."""


@dataclass(frozen=True)
class Spread:
    """Median, lower and upper quartile of ``n`` measurements."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Summarise two values or more."""
        found = list(values)
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return Spread(median, low, high, len(found))


def alternate(
    works: Mapping[str, Sequence[Work]], seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Time versions of the same list of works in turn, so that all of them meet the same machine.

    A round does the first work in every version, then the second, and so on; the versions change
    order with each round. Returns for each version the seconds that its whole list took in each
    round: ``rounds`` or more of them, until ``seconds`` have passed. Each work should have been
    done once before.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    repeats = dict.fromkeys(works, 1)
    end = time.perf_counter() + seconds
    turn = list(works)
    while time.perf_counter() < end or min(map(len, found.values())) < rounds:
        total = dict.fromkeys(works, 0.0)
        for k in range(max(map(len, works.values()))):
            for name in turn:
                total[name] += _clock(works[name][k], repeats[name])
        turn.reverse()
        needed = {n: max(1, round(SHORTEST * len(works[n]) / total[n])) for n in works}
        if any(needed[n] > 2 * repeats[n] for n in works):
            repeats = needed  # too short for the clock: this round does not count
            continue
        for name in works:
            found[name].append(total[name])
    return found


def _clock(work: Work, repeats: int) -> float:
    """Return the seconds that ``work`` takes, the mean over ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


# Traffic -------------------------------------------------------------------------------------

_UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FILLED = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_OVERWRITTEN = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}
_PICKED = {"index", "index_select", "gather", "embedding"}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes that the operations inside a ``with`` block must move.

    Each tensor that an operation reads counts once, and so does each that it writes, as if nothing
    stayed in a cache from one operation to the next and nothing was read twice within one. Views
    are free. Backward passes count too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and add what it moved."""
        out = func(*args, **(kwargs or {}))
        self.bytes += moved(func, args, kwargs or {}, out)
        return out


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that one operation reads and writes (see ``Meter``)."""
    name = func._schema.name.partition("::")[2]
    if name in _UNTOUCHED:
        return 0
    given, read, written = [], [], []
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        given += tensors
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += tensors
        if name not in _FILLED and not (changed and (argument.is_out or name in _OVERWRITTEN)):
            read += tensors
    own = {t.untyped_storage().data_ptr() for t in given}
    new = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    new = [t for t in new if t.untyped_storage().data_ptr() not in own]
    if not written and not new:
        return 0  # a view
    if name in _PICKED:
        # Of the first tensor only what is picked is read.
        read[0] = new[0]
    distinct = {(t.data_ptr(), t.shape, t.stride()): t for t in read}
    return sum(map(_size, [*distinct.values(), *written, *new]))


def _size(t: Tensor) -> int:
    """Return the bytes of a tensor, those along expanded dimensions once."""
    count = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        count *= length if stride or not length else 1
    return count * t.element_size()


def traffic(works: Iterable[Work]) -> int:
    """Do each work once; return the bytes that all together move."""
    meter = Meter()
    with meter:
        for work in works:
            work()
    return meter.bytes


# The machine's peaks -------------------------------------------------------------------------


def peaks(seconds: float, rounds: int, side: int, megabytes: int) -> dict[str, Spread]:
    """Measure what the machine reaches with the present number of threads, in G a second.

    ``matmul``: floating-point operations of a float32 matrix product of ``side`` rows (a
    multiplication and an addition are two); ``copy``: bytes read and written by copying a tensor of
    ``megabytes``, which no cache holds; ``cache``: the same with one of 512 kB, which stays there.
    """
    a, b, c = torch.rand(3, side, side)
    large, small = torch.rand(megabytes, 2**18), torch.rand(2, 2**16)
    large_to, small_to = torch.empty_like(large), torch.empty_like(small)
    works: dict[str, tuple[Work, float]] = {
        "matmul": (partial(torch.mm, a, b, out=c), 2.0 * side**3),
        "copy": (partial(large_to.copy_, large), 2.0 * large.nbytes),
        "cache": (partial(small_to.copy_, small), 2.0 * small.nbytes),
    }
    found = {}
    for name, (work, amount) in works.items():
        work()
        times = alternate({name: [work]}, seconds, rounds)[name]
        found[name] = Spread.of(amount / t / 1e9 for t in times)
    return found


# Growth --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """``y = factor * x ** exponent``, fitted; ``error`` is the exponent's standard error.

    ``error`` is None for two points. ``last`` is the exponent between the two largest x alone,
    where fixed costs weigh least.
    """

    exponent: float
    factor: float
    error: float | None
    last: float


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit a power law by least squares on logarithms.

    Raises NatlibError unless there are two points or more with different x, all above 0.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min([*x, *y]) <= 0:
        raise NatlibError(f"a power law needs pairs above 0 with different x, not {x} and {y}")
    a, b = np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64))
    spread = a - a.mean()
    slope = float(spread @ b / (spread @ spread))
    rest = b - b.mean() - slope * spread
    error = math.sqrt(rest @ rest / (len(x) - 2) / (spread @ spread)) if len(x) > 2 else None
    order = np.argsort(a)[-2:]
    last = float(np.diff(b[order])[0] / np.diff(a[order])[0])
    return PowerLaw(slope, math.exp(float(b.mean() - slope * a.mean())), error, last)


# Another process -----------------------------------------------------------------------------


class Elsewhere:
    """Works that a process of its own does, one at a time and only when asked.

    ``make`` returns the works, given ``arguments``, in that process. With ``usual_memory`` its C
    library hands freed memory back as it does by itself: natlib has that changed
    (``keep_freed_memory``), and what is measured beside it must not profit. Use it as a context
    manager.
    """

    def __init__(
        self, make: Callable[..., Sequence[Work]], *arguments: Any, usual_memory: bool = True
    ) -> None:
        context = forkserver(*IMPORTED)
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(there, make, arguments, torch.get_num_threads(), usual_memory),
            daemon=True,
        )
        self._process.start()
        there.close()
        self.works: list[Work] = [partial(self._ask, k) for k in range(self._receive())]

    def set_threads(self, count: int) -> None:
        """Compute there with ``count`` threads."""
        self._ask(-count)

    def traffic(self) -> int:
        """Return ``traffic`` of all works."""
        return self._ask("traffic")

    def begin(self, work: int) -> None:
        """Start a work there; nothing else may be asked before ``finish``."""
        self._here.send(work)

    def finish(self) -> None:
        """Wait until the work that began is done."""
        self._receive()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.join()

    def _ask(self, what: int | str) -> int:
        self._here.send(what)
        return self._receive()

    def _receive(self) -> int:
        try:
            return int(self._here.recv())
        except EOFError:
            raise NatlibError("the process that does the plain works has ended") from None


def manage_memory_as_usual() -> None:
    """Let networks that this process builds leave its C library's memory as it is by itself."""
    patch("natlib.network.keep_freed_memory").start()


def _serve(
    pipe: Connection,
    make: Callable[..., Sequence[Work]],
    arguments: Sequence[Any],
    threads: int,
    usual_memory: bool,
) -> None:
    """Do works as asked: a number from 0 is a work, one below 0 sets the threads."""
    if usual_memory:
        manage_memory_as_usual()
    torch.set_num_threads(threads)
    works = make(*arguments)
    pipe.send(len(works))
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        if what == "traffic":
            pipe.send(traffic(works))
        elif what < 0:
            torch.set_num_threads(-what)
            pipe.send(0)
        else:
            works[what]()
            pipe.send(0)


# Fresh processes -----------------------------------------------------------------------------


def processes(count: int, *, fresh: bool = False, forked: bool = True) -> ProcessPoolExecutor:
    """Return ``count`` processes with one thread each; ``fresh`` ones serve one call only.

    They are forked from a process that has imported what takes seconds (PyTorch's optimizers
    import ``torch._dynamo``) and computed nothing; code that it shares with them is not in their
    resident memory. Without ``forked`` they import everything themselves, and it is.
    """
    return ProcessPoolExecutor(
        count,
        mp_context=forkserver(*IMPORTED) if forked else get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
        max_tasks_per_child=1 if fresh else None,
    )


def memory(make: Callable[..., Iterable[Work]], *arguments: Any) -> tuple[float, float]:
    """Return the resident memory at the start and at its peak while the works are done, in MB.

    ``make`` returns the works, given ``arguments``; what it makes counts. To be called in a fresh
    process.
    """
    layer = torch.nn.Conv2d(4, 4, 3)
    for kind in (torch.optim.SGD, torch.optim.Adam):  # what is loaded with the first step
        layer(torch.rand(1, 4, 8, 8)).sum().backward()
        kind(layer.parameters(), lr=0.1).step()
    reset_peak_memory()
    start = peak_memory_mb()
    for work in make(*arguments):
        work()
    return start, peak_memory_mb()
