"""Results on disk: what was computed is never computed again, what was interrupted goes on.

A record is one JSON file with a configuration, the result that a function computed from it, and
where it came from. Its key depends on what determines the result (kind, recipe, configuration,
data, upstream records), never on the machine: source hash, versions, threads and times are recorded
but not in the key.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import hashlib
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from multiprocessing import get_context, set_forkserver_preload
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from natlib import sources
from natlib.errors import NatlibError
from natlib.files import locked, replacing, write_json

# torch is imported where it is used: `make verify` and `make stale` read records without it.

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTED = time.time()

PAGE = "page"
"""The kind of records that only sum up others (``natlib.evidence``)."""

Body = Callable[["Run"], dict[str, Any]]
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Artifact:
    """A file beside a record: its name in the record's folder, its SHA-256 and its size."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Record:
    """One result with its configuration and provenance; ``path`` is its JSON file.

    ``config`` is the configuration as JSON (each dataclass with its name under "type"); ``data`` is
    the checksum of the images, "" where there are none; ``inputs`` are keys of upstream records.
    """

    kind: str
    key: str
    recipe: int
    config: dict[str, Any]
    data: str
    inputs: dict[str, str]
    result: dict[str, Any]
    artifacts: dict[str, Artifact]
    provenance: dict[str, Any]
    path: Path

    @property
    def content(self) -> dict[str, Any]:
        """What its JSON file holds."""
        content = asdict(self)
        del content["path"]
        return content

    @property
    def machine(self) -> str:
        """What computed it, in words."""
        return "{device}, {cpu}, threads: {threads}".format(**self.provenance)

    def artifact(self, name: str) -> Path:
        """Return the file of artifact ``name``, its checksum verified (once a process).

        Raises NatlibError where the record has no such artifact, or the file is missing or changed.
        """
        if name not in self.artifacts:
            have = ", ".join(sorted(self.artifacts)) or "none"
            raise NatlibError(f"{self.kind} {self.key} has no artifact {name!r}; it has: {have}")
        expected = self.artifacts[name]
        file = self.path.parent / expected.path
        if not file.is_file():
            raise NatlibError(f"{file} is missing: delete {self.path.parent} and run again")
        if _sha256(file, file.stat().st_mtime_ns) != expected.sha256:
            raise NatlibError(
                f"{file} is not the file that was recorded (its checksum differs): "
                f"delete {self.path.parent} and run again"
            )
        return file

    def load(self, name: str) -> Any:
        """Return what was saved as artifact ``name``, tensors on the CPU."""
        import torch

        return torch.load(self.artifact(name), map_location="cpu", weights_only=True)


class Run:
    """What a body sees while it computes one record: its configuration, checkpoints, progress.

    Attributes: ``config`` (the dataclass given to the store), ``key``, ``directory``.
    """

    def __init__(
        self, config: Any, kind: str, key: str, directory: Path, checkpoint_seconds: float
    ) -> None:
        self.config = config
        self.key = key
        self.directory = directory
        self.artifacts: dict[str, Artifact] = {}
        self.resumed = 0
        self._kind = kind
        self._checkpoint = directory / "checkpoint.pt"
        self._checkpoint_seconds = checkpoint_seconds
        self._earlier_seconds = 0.0
        self._earlier_peak = 0.0
        self._started = self._saved = time.monotonic()
        self._reported = -math.inf
        reset_peak_memory()

    @property
    def wall_seconds(self) -> float:
        """Seconds of work that this run rests on, those before the last checkpoint included."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def peak_memory_mb(self) -> float:
        """Largest resident memory of the process while it worked on this run, in MB."""
        return max(self._earlier_peak, peak_memory_mb())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write ``state`` (tensors, numbers, strings and containers of them) for a later resume."""
        content = {
            "key": self.key,
            "seconds": self.wall_seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "resumed": self.resumed,
            "artifacts": {name: asdict(value) for name, value in self.artifacts.items()},
            "state": state,
        }
        _save(content, self._checkpoint)
        self._saved = time.monotonic()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state that an interrupted run of this record saved last, or None.

        Tensors are on the CPU. Raises NatlibError where the checkpoint cannot be read or belongs to
        another configuration.
        """
        import torch

        if not self._checkpoint.exists():
            return None
        try:
            content = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            key, state = content["key"], content["state"]
        except Exception as error:  # torch raises many types on a damaged file
            raise NatlibError(
                f"checkpoint {self._checkpoint} cannot be read ({type(error).__name__}): "
                "delete it and run again, which starts this result from the beginning"
            ) from error
        if key != self.key:
            raise NatlibError(
                f"checkpoint {self._checkpoint} is of another configuration (key {key}, "
                f"expected {self.key}): delete it and run again"
            )
        self._earlier_seconds = content["seconds"]
        self._earlier_peak = content["peak_memory_mb"]
        self.resumed = content["resumed"] + 1
        self.artifacts = {name: Artifact(**value) for name, value in content["artifacts"].items()}
        self._started = self._saved = time.monotonic()
        return dict(state)

    def checkpoint_due(self) -> bool:
        """Say whether the last checkpoint is old enough (about 20 s) to write another."""
        return time.monotonic() - self._saved >= self._checkpoint_seconds

    def save_artifact(self, name: str, value: Any) -> None:
        """Save ``value`` (as for a checkpoint) as a file that stays beside the record."""
        if not re.fullmatch(r"[a-z0-9_]+", name) or name == "checkpoint":
            raise NatlibError(f"artifact name {name!r}: use lower-case letters, digits and _")
        file = self.directory / f"{name}.pt"
        _save(value, file)
        stat = file.stat()
        self.artifacts[name] = Artifact(file.name, _sha256(file, stat.st_mtime_ns), stat.st_size)

    def progress(self, done: float, total: float) -> None:
        """Report progress, at most once a second; the runner shows it."""
        now = time.monotonic()
        if done >= total or now - self._reported >= 1:
            self._reported = now
            _report(self._kind, _label(self.config, self.key), done, total)


@dataclass(frozen=True)
class Job:
    """One record to compute, as a worker process receives it."""

    kind: str
    key: str
    config: Any
    body: Body
    recipe: int
    data: str
    inputs: dict[str, str]


@dataclass(frozen=True)
class RunStore:
    """The records under ``root``: one folder a record, ``root/kind/key``.

    Records and checkpoints written before ``fresh_since`` (seconds since the epoch) are ignored.
    ``checkpoint_seconds`` is the age at which Run.checkpoint_due says so; ``threads`` is the number
    of threads that each body computes with, since it changes rounding.
    """

    root: Path
    fresh_since: float = 0.0
    checkpoint_seconds: float = 20.0
    threads: int = 1

    @staticmethod
    def default() -> RunStore:
        """Return the store that the environment asks for.

        NATLIB_RUNS: its folder (default: runs/ beside the package). NATLIB_THREADS: threads a body
        (default 1). FRESH=1: ignore records made before this process; NATLIB_FRESH: ignore records
        made before that time (seconds since the epoch), which lets several processes share one run.
        """
        fresh = os.environ.get("NATLIB_FRESH") or (IMPORTED if _flag("FRESH") else 0.0)
        threads = os.environ.get("NATLIB_THREADS") or "1"
        if not threads.isdigit() or int(threads) < 1:
            raise NatlibError(f"NATLIB_THREADS={threads!r}: give a whole number of at least 1")
        try:
            since = float(fresh)
        except ValueError:
            raise NatlibError(f"NATLIB_FRESH={fresh!r}: give seconds since the epoch") from None
        root = Path(os.environ.get("NATLIB_RUNS") or REPOSITORY / "runs")
        return RunStore(root, fresh_since=since, threads=int(threads))

    def key(
        self, kind: str, config: Any, *, recipe: int, data: str, inputs: Mapping[str, str] | None
    ) -> str:
        """Return the key (16 hex digits) of the record that these determine."""
        if not re.fullmatch(r"[a-z0-9_]+", kind):
            raise NatlibError(f"kind {kind!r}: use lower-case letters, digits and _")
        if not is_dataclass(config) or isinstance(config, type):
            raise NatlibError(f"config of {kind} must be a dataclass instance, not {config!r}")
        values = (kind, recipe, as_json(config), data, dict(inputs or {}))
        return _hash_of(dict(zip(HASHED, values, strict=True)))

    def find(self, kind: str, key: str) -> Record | None:
        """Return the record ``key``, or None where it is not there or not fresh.

        Raises NatlibError where its file cannot be read.
        """
        path = self.root / kind / key / "record.json"
        try:
            record = read_record(path)
        except FileNotFoundError:
            return None
        return record if _timestamp(record.provenance["finished"]) >= self.fresh_since else None

    def run(
        self,
        kind: str,
        config: Any,
        body: Body,
        *,
        recipe: int,
        data: str,
        inputs: Mapping[str, str] | None = None,
    ) -> Record:
        """Return the record of ``config``, calling ``body`` to compute it where there is none.

        ``recipe`` is the version of what the body does: raise it when the meaning of results
        changes. ``data`` is the checksum of the images ("" for none), ``inputs`` the keys of the
        records that the body reads. A second process that wants the same record waits for the
        first. Raises what the body raises; nothing is recorded then.
        """
        key = self.key(kind, config, recipe=recipe, data=data, inputs=inputs)
        record = self.find(kind, key)
        if record is None:
            job = Job(kind, key, config, body, recipe, data, dict(inputs or {}))
            record = self._compute_here([job])[key]
        _note_use([record])
        return record

    def run_many(
        self,
        kind: str,
        configs: Sequence[Any],
        body: Body,
        *,
        recipe: int,
        data: str,
        inputs: Mapping[str, str] | None = None,
        workers: int,
        watch: Watch | None = None,
    ) -> list[Record]:
        """Return the records of ``configs``, in order, computing what is missing side by side.

        As ``run``, in up to ``workers`` processes of ``threads`` threads each, so that records do
        not depend on ``workers``. ``body`` must be a function at the top level of a module. When
        one fails the others are still computed and recorded; then the first error is raised, naming
        its configuration. ``watch`` is called with how many of the missing records are done, and
        how many there were.
        """
        if workers < 1:
            raise NatlibError(f"workers={workers}: give at least 1")
        inputs = dict(inputs or {})
        keys = [self.key(kind, c, recipe=recipe, data=data, inputs=inputs) for c in configs]
        found = {key: self.find(kind, key) for key in dict.fromkeys(keys)}
        missing = {k: c for k, c in zip(keys, configs, strict=True) if found[k] is None}
        if missing:
            _require_importable(body)
            jobs = [Job(kind, k, c, body, recipe, data, inputs) for k, c in missing.items()]
            found |= (
                self._compute_here(jobs, watch)
                if workers == 1
                else self._compute_in(workers, jobs, watch)
            )
        records = [record for key in keys if (record := found[key])]
        _note_use(records)
        return records

    def run_or_recall(
        self,
        kind: str,
        configs: Sequence[Any],
        body: Body,
        *,
        recipe: int,
        data: str,
        workers: int,
        lacking: str,
        scale: str,
    ) -> tuple[list[Record], str]:
        """As ``run_many``, unless something is ``lacking``; also say in words where they come from.

        Then records are those of the recorded references, that of ``scale`` first, if these hold
        all of ``configs``, else none. What is lacking is told in words, "" if nothing.
        """
        if not lacking:
            found = self.run_many(kind, configs, body, recipe=recipe, data=data, workers=workers)
            return found, "computed on this machine"
        keys = [self.key(kind, c, recipe=recipe, data=data, inputs=None) for c in configs]
        known = recalled(keys, scale, REPOSITORY)
        found = [known[key] for key in keys] if known.keys() >= set(keys) else []
        _note_use(found, recalled=True)
        told = "our recorded results" if found else "nothing to show yet"
        return found, f"{told}, because {lacking}"

    def _compute_here(self, jobs: Sequence[Job], watch: Watch | None = None) -> dict[str, Record]:
        """Compute the records of ``jobs`` one after the other in this process."""
        done: dict[str, Record] = {}
        errors: list[tuple[Job, Exception]] = []
        with _threads(self.threads):
            for number, job in enumerate(jobs):
                _report_group(job.kind, number, len(jobs), watch)
                try:
                    done[job.key] = self._compute(job)
                except Exception as error:
                    errors.append((job, error))
        _report_group(jobs[0].kind, len(jobs), len(jobs), watch)
        _raise_first(errors, len(jobs))
        return done

    def _compute_in(
        self, workers: int, jobs: Sequence[Job], watch: Watch | None = None
    ) -> dict[str, Record]:
        """Compute the records of ``jobs`` in up to ``workers`` processes of their own."""
        context = forkserver(jobs[0].body.__module__)
        # The workers read from a pipe that nobody writes to: it ends when this process closes it
        # or dies in any way, and they end with it.
        theirs, ours = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)),
            context,
            initializer=_start_worker,
            initargs=(theirs, self.threads, dict(os.environ)),
        )
        done: dict[str, Record] = {}
        errors: list[tuple[Job, Exception]] = []
        try:
            _report_group(jobs[0].kind, 0, len(jobs), watch)
            futures = {pool.submit(self._compute, job): job for job in jobs}
            # The pool starts a worker after it told its watching thread of the job; without one
            # more call that thread may never look at the last worker, nor see it killed.
            pool.submit(int)
            for number, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                try:
                    done[job.key] = future.result()
                except BrokenProcessPool as error:
                    raise NatlibError(
                        f"a worker process for {job.kind} ended before it was done (killed, or out "
                        "of memory?): run the same again, which goes on where it stopped"
                    ) from error
                except Exception as error:
                    errors.append((job, error))
                _report_group(job.kind, number, len(jobs), watch)
            pool.shutdown()
        finally:
            ours.close()
            theirs.close()
            pool.shutdown(wait=False, cancel_futures=True)
        _raise_first(errors, len(jobs))
        return done

    def _compute(self, job: Job) -> Record:
        """Compute and write one record, or read it where another process just wrote it."""
        directory = self.root / job.kind / job.key
        with locked(directory):
            record = self.find(job.kind, job.key)
            if record is not None:
                return record
            for leftover in directory.glob("*.tmp"):  # of a process that was killed while writing
                leftover.unlink()
            # It is not fresh: what is saved from here on belongs to the new one.
            (directory / "record.json").unlink(missing_ok=True)
            checkpoint = directory / "checkpoint.pt"
            if checkpoint.exists() and checkpoint.stat().st_mtime < self.fresh_since:
                checkpoint.unlink()
            code = {"source": sources.loaded_hash(job.body.__module__), **git_state()}
            started = datetime.now(UTC)
            run = Run(job.config, job.kind, job.key, directory, self.checkpoint_seconds)
            result = job.body(run)
            record = Record(
                kind=job.kind,
                key=job.key,
                recipe=job.recipe,
                config=as_json(job.config),
                data=job.data,
                inputs=job.inputs,
                result=_checked_result(result, job.kind),
                artifacts=run.artifacts,
                provenance=_provenance(job.body, run, started, code),
                path=directory / "record.json",
            )
            write_json(record.path, record.content)
            checkpoint.unlink(missing_ok=True)
            return record


ADDED_LATER: Mapping[str, bool] = MappingProxyType({"added later": True})
"""Metadata of a dataclass field that configurations of older records did not have."""


def as_json(value: Any) -> Any:
    """Return ``value`` as plain JSON data: a dataclass becomes a dict with its name under "type".

    Allowed: dataclasses, mappings with string keys, sequences, enums, strings, booleans, whole and
    finite numbers, None. A field with ``metadata=ADDED_LATER`` is left out while it holds its
    default, so that a configuration may grow and old records are still found. Raises NatlibError
    for anything else.
    """
    if is_dataclass(value) and not isinstance(value, type):
        named = {
            f.name: as_json(getattr(value, f.name))
            for f in fields(value)
            if not (f.metadata.get("added later") and getattr(value, f.name) == f.default)
        }
        return {"type": type(value).__qualname__, **named}
    if isinstance(value, enum.Enum):
        return as_json(value.value)
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise NatlibError(f"names in a configuration must be strings, not {list(value)!r}")
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise NatlibError(
        f"a configuration may hold numbers, strings, sequences, mappings and dataclasses, not "
        f"{type(value).__name__} {value!r}"
    )


HASHED = ("kind", "recipe", "config", "data", "inputs")
"""What a record's key stands for."""


def _hash_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(path: Path) -> Record:
    """Return the record in the JSON file ``path``.

    Raises FileNotFoundError where there is none, NatlibError where the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
        record = _from_json(content, path)
        _timestamp(record.provenance["finished"])
        if _hash_of({name: content[name] for name in HASHED}) != record.key:
            raise ValueError("its configuration is not the one that its key stands for")
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NatlibError(
            f"record {path} cannot be read ({type(error).__name__}: {error}): "
            f"delete {path.parent} and run again"
        ) from error


def read_all(root: Path) -> Iterator[Record]:
    """Yield all records under ``root``, ordered by kind and key."""
    for path in sorted(root.glob("*/*/record.json")):
        yield read_record(path)


def read_reference(scale: str, repository: Path = REPOSITORY) -> list[Record]:
    """Return the recorded reference results of ``scale``; empty where none are recorded.

    Files of their artifacts are not there. Raises NatlibError where the file is damaged.
    """
    path = repository / "results" / "reference" / scale / "records.json"
    return list(_reference(path, path.stat().st_mtime_ns)) if path.is_file() else []


def recalled(keys: Iterable[str], scale: str, repository: Path) -> dict[str, Record]:
    """Return what the recorded references hold of ``keys``, that of ``scale`` before others."""
    others = sorted(p.name for p in (repository / "results" / "reference").glob("*/"))
    found: dict[str, Record] = {}
    for name in (*(n for n in others if n != scale), scale):
        found |= {record.key: record for record in read_reference(name, repository)}
    return {key: found[key] for key in keys if key in found}


@lru_cache(maxsize=4)
def _reference(path: Path, changed: int) -> list[Record]:
    """Read a file of records, once while it has not ``changed``: it takes a third of a second."""
    try:
        return [_from_json(content, path) for content in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise NatlibError(f"{path} cannot be read: {error!r}") from error


def current_source(record: Record) -> str:
    """Return the hash of the source that would compute ``record`` now.

    It differs from the one in ``record.provenance`` when the code changed since.
    """
    return sources.module_hash(str(record.provenance["body"]).partition(":")[0])


def _from_json(content: dict[str, Any], path: Path) -> Record:
    artifacts = {k: Artifact(**v) for k, v in content.get("artifacts", {}).items()}
    return Record(**{**content, "artifacts": artifacts, "path": path})


def _label(config: Any, key: str) -> str:
    """Return a short name of a run for progress lines."""
    seed = getattr(config, "seed", None)
    return key[:6] if seed is None else f"{key[:6]} seed {seed}"


def _checked_result(result: Any, kind: str) -> dict[str, Any]:
    """Return ``result`` as it will be read back; raise NatlibError where JSON cannot hold it."""
    try:
        if not isinstance(result, dict):
            raise TypeError(f"it is a {type(result).__name__}, not a dict")
        return dict(json.loads(json.dumps(result, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise NatlibError(f"result of {kind} cannot be recorded: {error}") from error


def _provenance(body: Body, run: Run, started: datetime, code: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded about machine and time, and about the ``code`` that ran."""
    import numpy
    import torch

    finished = datetime.now(UTC)
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "body": f"{body.__module__}:{body.__qualname__}",
        **code,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "started": started.isoformat(),
        "finished": finished.isoformat(),
        "wall_seconds": round(run.wall_seconds, 3),
        "peak_memory_mb": round(run.peak_memory_mb, 1),
        "resumed": run.resumed,
    }


@cache
def git_state() -> dict[str, Any]:
    """Return the revision of the repository and whether tracked files were changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return {"git": revision, "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        return {"git": "", "dirty": False}


@cache
def cpu_model() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Start measuring the peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process in MB, since the last reset."""
    with contextlib.suppress(OSError):
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if match:
            return int(match.group(1)) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


@cache
def _sha256(file: Path, mtime_ns: int) -> str:
    """Return the checksum of ``file``; the time is there so that a changed file is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _save(value: Any, target: Path) -> None:
    """Write ``value`` to ``target``, all or nothing."""
    import torch

    # Given a path, torch would write its name into the file: equal values, other bytes.
    with replacing(target) as temporary, temporary.open("wb") as stream:
        torch.save(value, stream)


def _timestamp(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _flag(name: str) -> bool:
    """Return whether environment variable ``name`` is 1 (unset, empty and 0 are no)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise NatlibError(f"{name}={value!r}: give 1 or 0")
    return value == "1"


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch compute with ``number`` threads, then with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forkserver(*modules: str) -> Any:
    """Return the context of worker processes, which a server forks that has imported ``modules``.

    Importing torch takes seconds: the server does it once, spawned workers would each do it again.
    The server never computes, so forking it is safe where forking this process, with its threads
    and perhaps a GPU, is not.
    """
    # Optimizers import torch._dynamo. A server that runs already does not heed this.
    set_forkserver_preload(["torch._dynamo", *modules])
    return get_context("forkserver")


def _start_worker(lifeline: Connection, threads: int, environment: Mapping[str, str]) -> None:
    """Prepare a worker process: threads, environment, that it ends with the one that started it.

    The server's environment is the one of its own start.
    """
    import torch

    os.environ.clear()
    os.environ.update(environment)

    def wait_for_the_end() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    # An interrupt from the terminal or the notebook reaches the whole group: the starter decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_the_end, daemon=True).start()
    torch.set_num_threads(threads)
    # Policies make thousands of genotypes a second, so the garbage collector comes often; without
    # this it walks through all of torch, a tenth of a policy update's time.
    gc.freeze()


def _require_importable(body: Body) -> None:
    """Raise NatlibError where a worker process could not import ``body``."""
    module = sys.modules.get(body.__module__)
    if body.__module__ == "__main__" or getattr(module, body.__qualname__, None) is not body:
        raise NatlibError(
            f"{body.__module__}.{body.__qualname__} must be a function at the top level of a "
            "module, since worker processes import it"
        )


def _raise_first(errors: Sequence[tuple[Job, Exception]], total: int) -> None:
    """Raise the first error, if any, naming the configuration that it came from."""
    if not errors:
        return
    job, error = errors[0]
    count = f" ({len(errors)} of {total} failed)" if total > 1 else ""
    config = textwrap.shorten(repr(job.config), 300, placeholder=" …")
    where = f"{job.kind} {job.key}{count} with configuration {config}"
    if isinstance(error, NatlibError):
        raise NatlibError(f"{error}; while computing {where}") from error
    error.add_note(f"while computing {where}")
    raise error


def _append_line(file: str, content: dict[str, Any]) -> None:
    """Append one JSON line in a single write, so that processes do not mix their lines."""
    line = (json.dumps(content) + "\n").encode()
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def _report(kind: str, label: str, done: float, total: float) -> None:
    """Tell the runner how far a run (or, with label "", a group of runs) is."""
    if file := os.environ.get("NATLIB_PROGRESS"):
        task = f"{kind} {label}".strip()
        _append_line(file, {"task": task, "done": done, "total": total, "time": time.time()})


def _report_group(kind: str, done: int, total: int, watch: Watch | None) -> None:
    """Tell the runner, and ``watch``, how many records of a group are computed."""
    _report(kind, "", done, total)
    if watch is not None:
        watch(done, total)


def _note_use(records: Sequence[Record], recalled: bool = False) -> None:
    """Note in the runner's manifest which records a notebook used, or recalled from a reference."""
    if file := os.environ.get("NATLIB_MANIFEST"):
        for record in records:
            line: dict[str, Any] = {"kind": record.kind, "key": record.key}
            _append_line(file, line | ({"recalled": True} if recalled else {}))
