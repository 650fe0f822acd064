"""Make natbench's table: train what is missing, measure latency, export, merge with others' tables.

    python -m natlib.natbench build --workers 2      # stop it at will; the same command goes on
    python -m natlib.natbench export --latency       # results/natbench/: table, card, README
    python -m natlib.natbench merge OTHER/natbench   # take over another machine's exported table

Each training is a record of kind "natbench". What the exported table holds already is not trained
again, so a clone of the repository goes on where its table ends.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch

from natlib import latency as timing
from natlib import natbench
from natlib.cost import network_cost
from natlib.errors import NatlibError
from natlib.files import replacing, write_json
from natlib.macro import MacroConfig
from natlib.natbench import COLUMNS, FOLDER, RESULTS, SEEDS, SIZE
from natlib.records import Record, Run, RunStore, Watch, as_json, cpu_model, git_state
from natlib.train import DataConfig, TrainConfig, accuracy, fit, lacking, splits, stream

KIND = "natbench"
RECIPE = 1
# The search part is the validation accuracy's. The report part trains and scores nothing here: it
# is kept for studies that need images which the table has not seen.
DATA = DataConfig("cifar10", image_size=16, train=5000, search=5000, report=5000, test=5000)
MACRO = MacroConfig(channels=8, cells=3, image_size=16, stem=1)
TRAINING = TrainConfig(
    DATA, MACRO, natbench.genotype(0), seed=0, epochs=4, batch=64, lr=0.2, lr_last=0.001
)
"""How every architecture is trained; its own genotype and seed take the place of these."""

Training = tuple[int, int]
"""An architecture that stands for itself (``trained_as``), and a seed."""


# Training ----------------------------------------------------------------------------------------


def config(training: Training) -> TrainConfig:
    """Return what a training is, in full."""
    return replace(TRAINING, genotype=natbench.genotype(training[0]), seed=training[1])


def measure(run: Run) -> dict[str, Any]:
    """Train and evaluate one architecture; body of records of kind "natbench".

    Accuracies in 0..1; ``seconds`` of processor time, which other processes on the machine change
    little.
    """
    started = time.process_time()
    network, losses = fit(run)
    parts = splits(run.config.data)
    return {
        "validation": accuracy(network, parts.search.normalised, parts.search.labels),
        "test": accuracy(network, parts.test.normalised, parts.test.labels),
        "loss": losses[-1],
        "seconds": time.process_time() - started,
    }


def trainings() -> list[Training]:
    """All trainings in the order of building: shuffled, the first seed of all before the second."""
    shuffled = torch.randperm(SIZE, generator=stream(0, "natbench order")).tolist()
    distinct = [i for i in shuffled if natbench.trained_as(i) == i]
    return [(i, seed) for seed in SEEDS for i in distinct]


def train(which: Sequence[Training], workers: int, watch: Watch | None = None) -> list[Record]:
    """Return the records of trainings, computing those that are missing in worker processes."""
    return RunStore.default().run_many(
        KIND,
        [config(t) for t in which],
        measure,
        recipe=RECIPE,
        data=splits(TRAINING.data).checksum,
        workers=workers,
        watch=watch,
    )


def again(count: int, workers: int, scale: str) -> tuple[list[Training], list[Record], str]:
    """Train ``count`` evenly spaced ones of the table again, or recall the reference of ``scale``.

    Where CIFAR-10 cannot be had they are recalled. Returns the trainings, their records, and in
    words where these come from. Raises NatlibError on a count that is not 1 to all of them.
    """
    every = trainings()
    if not 1 <= count <= len(every):
        raise NatlibError(f"{count} trainings; allowed are 1..{len(every)}")
    which = [every[i * len(every) // count] for i in range(count)]
    # The table names the images that it comes from.
    records, source = RunStore.default().run_or_recall(
        KIND, [config(t) for t in which], measure, recipe=RECIPE,
        data=str(natbench.load().card["data"]), workers=workers,
        lacking=lacking(TRAINING.data), scale=scale,
    )  # fmt: skip
    return which if records else [], records, source


def build(workers: int, part: tuple[int, int] = (1, 1), folder: Path = FOLDER) -> list[Record]:
    """Train what neither the table in ``folder`` nor the records hold; return the new records.

    ``part`` (k, n) takes every n-th training from the k-th on, for n machines side by side. Stopped
    at any moment and started again it loses at most one training a worker. Writes progress with
    the time left to stderr. Raises NatlibError on a part that is none, and where ``folder`` holds a
    table of another recipe or of other images.
    """
    k, n = part
    if not 1 <= k <= n:
        raise NatlibError(f"part {k}/{n} is none: give k/n with k from 1 to n")
    held = _Held.read(folder)
    return train([t for t in trainings()[k - 1 :: n] if t not in held.rows], workers, _Progress())


class _Progress:
    """Tells stderr how far a build is: in place on a terminal, else a line a minute."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.told = -math.inf

    def __call__(self, done: int, total: int) -> None:
        """Take the counts as ``RunStore.run_many`` gives them."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if done < total and now - self.told < (1 if terminal else 60):
            return
        self.told = now
        each = (now - self.started) / done if done else 0.0
        left = f", {each:.1f} s each, {each * (total - done) / 3600:.1f} h left" if done else ""
        end = "\n" if done == total or not terminal else ""
        start = "\r\x1b[K" if terminal else ""
        print(f"{start}natbench: {done} of {total}{left}", end=end, file=sys.stderr, flush=True)


# Latency -----------------------------------------------------------------------------------------


def latencies(architectures: Sequence[int], rounds: int = 3, passes: int = 10) -> dict[int, float]:
    """Median milliseconds of a forward pass of one image, on one thread, of each architecture."""
    networks = {i: (natbench.genotype(i), TRAINING.macro) for i in architectures}
    return timing.latencies(networks, rounds, passes)


# The table ---------------------------------------------------------------------------------------


@dataclass
class _Held:
    """What a table holds: results of trainings, latencies of ``trained_as``, its card's facts."""

    rows: dict[Training, dict[str, Any]] = field(default_factory=dict)
    latency: dict[int, float] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> _Held:
        """Read the table in ``folder``; nothing if there is none."""
        held = _Held()
        if not (folder / "card.json").exists() and not (folder / "table.csv").exists():
            return held
        table = natbench.load(folder)
        held.card = dict(table.card)
        theirs, ours = (held.card["recipe"], held.card["data"]), identity()
        if theirs != ours:
            raise NatlibError(
                f"the table in {folder} has recipe and data {theirs}, this natlib trains {ours}: "
                "move it away to start another"
            )
        for e in table.entries:
            if e.index != e.trained_as:
                continue
            if e.latency_ms is not None:
                held.latency[e.index] = e.latency_ms
            columns = zip(e.validation, e.test, e.loss, e.seconds, e.machines, strict=True)
            for seed, values in zip(e.seeds, columns, strict=True):
                held.rows[e.index, seed] = dict(zip(RESULTS, values, strict=True))
        return held

    def add(self, other: _Held) -> None:
        """Take over what is not held yet: adding again, or in another order, changes no key."""
        self.rows = other.rows | self.rows
        self.latency = self.latency or other.latency
        mine, theirs = self.card, other.card
        self.card = {
            **theirs,
            **mine,
            "machines": theirs.get("machines", {}) | mine.get("machines", {}),
            "trained": _span([*mine.get("trained", []), *theirs.get("trained", [])]),
        }


def identity() -> tuple[int, str]:
    """What a table must share with this natlib to be continued: recipe version, data checksum."""
    return RECIPE, splits(TRAINING.data).checksum


def _recorded(record: Record, training: Training) -> _Held:
    """One record as part of a table."""
    p = record.provenance
    machine = {name: p[name] for name in ("cpu", "device", "threads", "torch", "python")}
    name = "m" + hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:6]
    row = {**record.result, "machine": name}
    days = [p["started"][:10], p["finished"][:10]]
    return _Held({training: row}, {}, {"machines": {name: machine}, "trained": days})


def export(folder: Path = FOLDER, latency: bool = False) -> natbench.Table:
    """Write table, card and README in ``folder`` from its own table and this machine's records.

    ``latency`` measures all latencies anew, on this machine; else those in the table stay. Raises
    NatlibError where the folder holds a table of another recipe or is corrupt.
    """
    held = _Held.read(folder)
    store, data = RunStore.default(), identity()[1]
    for training in trainings():
        if training not in held.rows:
            key = store.key(KIND, config(training), recipe=RECIPE, data=data, inputs=None)
            if record := store.find(KIND, key):
                held.add(_recorded(record, training))
    if latency:
        held.latency = latencies([i for i in range(SIZE) if natbench.trained_as(i) == i])
        held.card["latency"] = {
            "cpu": cpu_model(), "torch": str(torch.__version__), "date": _today()
        }  # fmt: skip
    return _write(folder, held)


def merge(others: Sequence[Path], folder: Path = FOLDER) -> natbench.Table:
    """Add the trainings of other exported tables to the one in ``folder``.

    Keyed by architecture and seed; what ``folder`` holds already stays, so merging the same table
    twice changes nothing. Raises NatlibError for a table that is missing, corrupt or of another
    recipe or other images.
    """
    held = _Held.read(folder)
    for other in others:
        natbench.load(other)
        held.add(_Held.read(other))
    return _write(folder, held)


FORMATS = {"validation": ".4f", "test": ".4f", "loss": ".4f", "seconds": ".2f", "machine": "s"}


def _write(folder: Path, held: _Held) -> natbench.Table:
    """Write a table and return it as it is read back."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for i in range(SIZE):
        names, source = natbench.primitives(i), natbench.trained_as(i)
        cost = network_cost(natbench.genotype(i), TRAINING.macro)
        row: dict[str, Any] = dict(zip(COLUMNS[:5], (i, *names, source), strict=True))
        row |= {"params": cost.params, "madds": cost.madds}
        if source in held.latency:
            row["latency_ms"] = f"{held.latency[source]:.3f}"
        for seed in SEEDS:
            for name, value in held.rows.get((source, seed), {}).items():
                row[f"{name}_{seed}"] = format(value, FORMATS[name])
        writer.writerow(row)
    content = out.getvalue().encode()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "table.csv") as temporary:
        temporary.write_bytes(content)
    recipe, data = identity()
    parts = splits(TRAINING.data)
    held.card |= {
        "recipe": recipe,
        "data": data,
        "images": parts.source,
        "training": as_json(TRAINING),
        "sha256": hashlib.sha256(content).hexdigest(),
        "exported": _today(),
        "git": git_state()["git"],
        "distinct": len(held.rows),
        "noise": noise(held.rows),
    }
    write_json(folder / "card.json", held.card)
    table = natbench.load(folder)
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(_readme(table), "utf-8")
    return table


def noise(rows: Mapping[Training, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Spread between architectures against spread between seeds, of those with both seeds.

    For validation and test accuracy: their ``mean``; ``between``, the standard deviation between
    architectures of the mean over seeds, the seeds' share taken out; ``seed``, that of one training
    between seeds; ``ratio``, of ``between`` to the seed noise of the mean. Empty for fewer than
    three architectures.
    """
    pairs = [i for i, seed in rows if seed == 0 and all((i, s) in rows for s in SEEDS)]
    out = {}
    for name in ("validation", "test") if len(pairs) > 2 else ():
        values = [[rows[i, s][name] for s in SEEDS] for i in pairs]
        within = fmean(variance(v) for v in values)
        of_mean = within / len(SEEDS)
        between = math.sqrt(max(0.0, variance(fmean(v) for v in values) - of_mean))
        out[name] = {
            "architectures": len(pairs),
            "mean": fmean(fmean(v) for v in values),
            "between": between,
            "seed": math.sqrt(within),
            "ratio": between / math.sqrt(of_mean) if of_mean else 0.0,
        }
    return out


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _span(days: Sequence[str]) -> list[str]:
    """First and last of some dates."""
    return [min(days), max(days)] if days else []


def _readme(table: natbench.Table) -> str:
    """The data card in words."""
    card: dict[str, Any] = table.card
    t, d, m = TRAINING, TRAINING.data, MACRO
    distinct = len(trainings())
    lines = [
        f"- {v['architectures']} architectures with both seeds, {name}: mean {v['mean']:.1%}; "
        f"standard deviation between architectures {v['between']:.2%}, between seeds "
        f"{v['seed']:.2%}; ratio to the seed noise of the mean {v['ratio']:.1f}"
        for name, v in card["noise"].items()
    ] or ["- too few architectures have both seeds yet; see `pilot.csv`"]
    seconds = [s for e in table.entries if e.index == e.trained_as for s in e.seconds]
    machines = [
        f"- `{name}`: {v['cpu']} ({v['device']}, {v['threads']} thread), torch {v['torch']}, "
        f"Python {v['python']}"
        for name, v in sorted(card.get("machines", {}).items())
    ]
    at = card.get("latency")
    return README.format(
        size=SIZE, seeds=len(SEEDS), trainings=table.trainings, pairs=SIZE * len(SEEDS),
        done=card["distinct"], distinct=distinct,
        state="complete" if table.complete else "not complete: `build` goes on where it ends",
        dataset=d.dataset, side=d.image_size, train=d.train, search=d.search, report=d.report,
        test=d.test, split=d.seed, data=card["data"], images=card["images"],
        cells=m.cells, reductions=", ".join(str(r + 1) for r in m.reductions),
        channels=", ".join(str(c) for c in dict.fromkeys(p.channels for p in m.positions())),
        stem=m.stem * m.channels, epochs=t.epochs, batch=t.batch, lr=t.lr, lr_last=t.lr_last,
        momentum=t.momentum, decay=t.weight_decay, clip=t.clip, crop=d.image_size // 8,
        recipe=card["recipe"], noise="\n".join(lines), machines="\n".join(machines) or "- none yet",
        mean=f"{fmean(seconds):.1f}" if seconds else "–",
        days=" to ".join(dict.fromkeys(card.get("trained", []))) or "–",
        latency=f"measured {at['date']} on {at['cpu']}" if at else "not measured",
        exported=card["exported"], git=card["git"][:12] or "unknown", sha256=card["sha256"],
    )  # fmt: skip


README = """\
# natbench: data card

Written by `python -m natlib.natbench export`; do not edit.

All {size:,} cells with three nodes and one of the 13 NAT++ primitives on each of the edges 0→1,
0→2, 1→2 (node 0 the input, node 2 the output), each trained from scratch with {seeds} seeds.
**{trainings:,} of {pairs:,} trainings** ({state}). Cells that compute the same function of the
same free weights share trainings (`natlib.natbench.computation`): {done:,} of {distinct:,}
distinct ones are done.

## Ask it

```python
from natlib import natbench

entry = natbench.query(("sep_conv_3x3", "skip_connect", "max_pool_3x3"))
entry.validation, entry.test, entry.params, entry.madds, entry.latency_ms
natbench.load().entries  # all, by index
```

| column of `table.csv` | |
|---|---|
| `index`; `edge_0_1`, `edge_0_2`, `edge_1_2` | the three primitives as digits of base 13 |
| `trained_as` | the architecture whose trainings these are |
| `params`, `madds` | `natlib.cost.network_cost`: dead parts and unused input layers included |
| `latency_ms` | forward pass of one image, one core, median of 30, processor time; {latency} |
| `validation_S`, `test_S` | accuracy, 0 to 1, of seed S |
| `loss_S` | mean training loss of the last epoch |
| `seconds_S` | processor time of training and evaluation, one core |
| `machine_S` | where it was trained, see below |

## Recipe {recipe}

- Images: {dataset}, averaged down to {side}×{side} ({images}). Split by class with seed {split}:
  {train:,} training, {search:,} validation and {report:,} untouched images of the training split,
  {test:,} of the test split. SHA-256 of all parts: `{data}`.
- Network: {stem}-channel 3×3 stem, {cells} cells of {channels} channels, of which
  {reductions} reduce, global pooling, linear layer. Normal and reduction cells carry the same three
  primitives.
- Training: {epochs} epochs, batches of {batch}, SGD with momentum {momentum}, learning rate {lr} to
  {lr_last} (cosine), weight decay {decay}, gradient norm at most {clip}, random crops
  (±{crop} pixels) and flips. In full: `training` in `card.json`.

## Noise

{noise}

`pilot.csv` holds the trainings that the recipe was chosen by: 12 random cells, two seeds, nine
settings, each scored on two disjoint sets of 5,000 validation and 5,000 test images. Setting E is
the recipe: ratio 5.1 on the first validation set there. It was chosen by that figure among nine,
so expect a lower one of the whole table.

## Machines and time

{machines}

Trained {days}; {mean} core-seconds a training on average. Exported {exported} at revision {git}.
SHA-256 of `table.csv`: `{sha256}` (checked at each load against `card.json`).

## Make it again

```
python -m natlib.natbench build --workers 2     # stops and goes on at will
python -m natlib.natbench export --latency      # this folder
python -m natlib.natbench merge FOLDER ...      # exports of machines that shared work (--part 1/3)
```

`build` trains only what this folder does not hold: move it away to train all again.
"""


# Command line ------------------------------------------------------------------------------------


def _part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    return int(k), int(n)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see the module's head."""
    parser = argparse.ArgumentParser(
        "python -m natlib.natbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="train what is missing")
    one.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    one.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="K-th of N machines")
    one = commands.add_parser("export", help="write results/natbench/")
    one.add_argument("--latency", action="store_true", help="measure all latencies anew")
    one = commands.add_parser("merge", help="take over other machines' exported tables")
    one.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    try:
        if given.command == "build":
            build(given.workers, given.part)
            return
        table = merge(given.folders) if given.command == "merge" else export(latency=given.latency)
    except NatlibError as error:
        sys.exit(f"error: {error}")
    print(f"natbench: {table.trainings:,} of {SIZE * len(SEEDS):,} trainings in {FOLDER}")
