"""Which published rows, tables and figures have a counterpart here, and why others have none."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from natlib.errors import NatlibError
from natlib.published import PAPER, answers, printed_costs
from natlib.report import load_reported

NOTEBOOKS = PAPER.parent / "notebooks"
KEYS = ("dataset", "architecture", "method")


@dataclass(frozen=True)
class Item:
    """A line of ``paper/coverage.csv``: rows of a published table, or a figure or ablation.

    ``dataset`` and ``architecture`` are "" for all of them that no earlier line names.
    ``notebook`` has the counterpart, at the ``scales`` "all" or "paper"; "" where there is none,
    and then ``reason`` says why.
    """

    item: str
    dataset: str
    architecture: str
    notebook: str
    scales: str
    reason: str

    @property
    def there(self) -> bool:
        """Whether the notebook is in this repository."""
        return bool(self.notebook) and (NOTEBOOKS / f"{self.notebook}.ipynb").is_file()

    def covers(self, row: pd.Series) -> bool:
        """Whether a row of ``reported.csv`` is among this line's."""
        return self.item == row["table"] and all(
            own in ("", row[name])
            for name, own in (("dataset", self.dataset), ("architecture", self.architecture))
        )


def items(path: Path = PAPER / "coverage.csv") -> list[Item]:
    """Read the lines; raise NatlibError for one without notebook and reason, or other scales."""
    with path.open(encoding="utf-8", newline="") as file:
        found = [Item(**row) for row in csv.DictReader(file)]
    for i, line in enumerate(found):
        if not line.notebook and not line.reason:
            raise NatlibError(f"{path}, line {i + 2}: {line.item} has no notebook and no reason")
        if line.notebook and line.scales not in ("all", "paper"):
            raise NatlibError(f"{path}, line {i + 2}: scales {line.scales!r} is not all or paper")
    return found


def item_of(row: pd.Series, among: Sequence[Item]) -> Item:
    """Return the first line that covers a reported row; raise NatlibError where none does."""
    for line in among:
        if line.covers(row):
            return line
    named = ", ".join(str(row[c]) for c in ("table", "dataset", "architecture", "method"))
    raise NatlibError(f"paper/coverage.csv: no line covers {named}")


Trained = Mapping[str, Collection[tuple[str, str]]]
"""Notebook: the networks and methods that it trained."""


def _counterpart(row: pd.Series, trained: Collection[tuple[str, str]]) -> bool:
    """Whether something that was trained stands for a published row; see ``answers``."""
    return any(
        answers(network, method, row["architecture"], row["method"]) for network, method in trained
    )


def counts(scale: str, trained: Trained) -> dict[str, int]:
    """Count published numbers at a scale, and those that have a counterpart.

    ``trained`` says what the notebooks of whole tables trained. Keys: "costs", "costs covered"
    (recomputed, see ``published``), "accuracies", "accuracies covered" (trained, or at paper scale
    by a notebook that is there).
    """
    lines, reported, costs = items(), load_reported(), printed_costs()
    known = {(c.dataset, c.architecture, c.method) for c in costs if c.network}
    covered = total = 0
    for _, row in reported.iterrows():
        line = item_of(row, lines)
        number = int(row[["top1", "top5"]].notna().sum())
        total += number
        # What rewriting chose can be trained on ImageNet only where its cells were published.
        if line.scales == "all":
            found = _counterpart(row, trained.get(line.notebook, ()))
        else:
            found = line.scales == scale and tuple(row[n] for n in KEYS) in known
        covered += number * (line.there and found)
    numbers = [(bool(c.params) + bool(c.madds), c.network is not None) for c in costs]
    return {
        "costs": sum(n for n, _ in numbers),
        "costs covered": sum(n for n, found in numbers if found),
        "accuracies": total,
        "accuracies covered": covered,
    }


def table() -> pd.DataFrame:
    """A row for each line: what, its published rows, the notebook, and what there is to say."""
    lines, reported = items(), load_reported()
    owners = [item_of(row, lines) for _, row in reported.iterrows()]
    rows = []
    for line in lines:
        where = ", ".join(w for w in (line.architecture, line.dataset) if w)
        said = line.reason
        if line.notebook and not line.there:
            said = f"not here yet: {line.notebook}"
        elif line.scales == "paper":
            said = f"accuracies at paper scale only. {said}"
        rows.append(
            (
                line.item + (f": {where}" if where else ""),
                sum(owner is line for owner in owners) or None,
                line.notebook if line.there else "",
                said,
            )
        )
    return pd.DataFrame(rows, columns=["published", "rows", "notebook", "note"])
