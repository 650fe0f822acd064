"""Published costs beside ours: every printed number of parameters or MAdds, recomputed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from natlib import handcrafted, zoo
from natlib.cost import Cost, network_cost
from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.macro import ImageNetMacro, Macro, MacroConfig

PAPER = Path(__file__).resolve().parent.parent / "paper"
EQUAL, DIFFERS, NOT_RECOMPUTED = "equal", "differs", "cannot be recomputed"
"""The verdicts on a row."""

RELEASED = ", released"
"""Ends the names of methods whose cells are the authors' own."""


@dataclass(frozen=True)
class PrintedCost:
    """A row of the papers that prints costs, and ours.

    ``params`` and ``madds`` are the printed numbers in millions, digit by digit, "" where there is
    none. ``network`` is the genotype and the macro architecture behind the row, None where no
    genotype was published. ``explanation`` says in a sentence what differs and, where it can be
    told, why, or what is missing; it is empty where they are equal.
    """

    table: str
    dataset: str
    architecture: str
    method: str
    params: str
    madds: str
    network: tuple[Genotype, Macro] | None
    explanation: str

    @property
    def label(self) -> str:
        """Architecture, method and data set."""
        return f"{self.architecture}, {self.method}, {self.dataset}"

    @property
    def cost(self) -> Cost | None:
        """Our cost at published scale, without auxiliary head."""
        return None if self.network is None else network_cost(*self.network)

    @property
    def agrees(self) -> dict[str, bool]:
        """Say for "params" and "madds", where printed, whether ours round to all their digits."""
        cost = self.cost
        if cost is None:
            return {}
        pairs = {"params": (self.params, cost.params), "madds": (self.madds, cost.madds)}
        return {name: _rounded(n, p) == Decimal(p) for name, (p, n) in pairs.items() if p}

    @property
    def verdict(self) -> str:
        """Say whether the row is equal to all printed digits, differs, or cannot be recomputed."""
        if self.network is None:
            return NOT_RECOMPUTED
        return EQUAL if all(self.agrees.values()) else DIFFERS


def _rounded(ours: int, printed: str) -> Decimal:
    """Our count in millions, with as many decimals as the printed number has."""
    return (Decimal(ours) / 10**6).quantize(Decimal(printed), ROUND_HALF_UP)


def _network(row: dict[str, str]) -> tuple[Genotype, Macro] | None:
    """The genotype and macro architecture that a row of ``costs.csv`` names, None for none."""
    name, dataset = row["genotype"], row["dataset"]
    if not name:
        return None
    originals = handcrafted.ORIGINALS
    genotype = originals[name] if name in originals else zoo.get(name)
    if row["architecture"] in originals:
        return genotype, handcrafted.macro(row["architecture"], dataset)
    sizes = {"CIFAR-10": MacroConfig, "ImageNet": ImageNetMacro}
    if dataset not in sizes:
        raise NatlibError(f"dataset {dataset!r} is not one of {', '.join(sizes)}")
    return genotype, sizes[dataset](int(row["channels"]), int(row["cells"]))


def _read(path: Path) -> Iterator[tuple[tuple[str, str, str], dict[str, str]]]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield (row["dataset"], row["architecture"], row["method"]), row


def counts(rows: Iterable[PrintedCost]) -> dict[str, int]:
    """Count the rows of each verdict, and the printed numbers that agree and that could.

    Keys: the three verdicts, "params", "params agree", "madds" and "madds agree".
    """
    rows = list(rows)
    found = {v: sum(r.verdict == v for r in rows) for v in (EQUAL, DIFFERS, NOT_RECOMPUTED)}
    for name in ("params", "madds"):
        judged = [r.agrees[name] for r in rows if name in r.agrees]
        found |= {name: len(judged), f"{name} agree": sum(judged)}
    return found


def table(
    rows: Iterable[PrintedCost],
    latency: Mapping[str, float] | None = None,
    notes: Mapping[str, int] | None = None,
) -> list[dict[str, str | float | None]]:
    """Rows for a data frame: printed and our costs in millions, and ours less the printed ones.

    ``latency`` maps labels to milliseconds, ``notes`` explanations to their numbers; None leaves
    the column out.
    """
    found: list[dict[str, str | float | None]] = []
    for r in rows:
        line: dict[str, str | float | None] = {
            "data set": r.dataset, "network": r.architecture, "method": r.method
        }  # fmt: skip
        ours = r.cost
        for name, printed, count in (
            ("params", r.params, ours.params if ours else None),
            ("MAdds", r.madds, ours.madds if ours else None),
        ):
            millions = None if count is None else count / 1e6
            line[f"{name} (M), paper"] = printed or None
            line[f"{name} (M), ours"] = millions
            line[f"{name}, difference"] = (
                millions - float(printed) if printed and millions is not None else None
            )
        if latency is not None:
            line["latency (ms)"] = latency.get(r.label)
        line["verdict"] = r.verdict
        if notes is not None:
            line["note"] = str(notes[r.explanation]) if r.explanation else None
        found.append(line)
    return found


def number_notes(rows: Iterable[PrintedCost]) -> dict[str, int]:
    """Number the explanations of rows from 1, each once, in the order in which they first stand."""
    distinct = dict.fromkeys(r.explanation for r in rows if r.explanation)
    return {text: number for number, text in enumerate(distinct, 1)}


def printed_costs(folder: Path = PAPER) -> list[PrintedCost]:
    """Return every row of ``reported.csv`` that prints params or MAdds, in its order.

    ``costs.csv`` beside it names the genotype and the size of the network behind each row
    (hand-crafted networks have their own) and explains what differs. Raises NatlibError, naming
    the row, if one is missing there, if a difference is not explained, if an explanation stands
    where nothing differs, or for a row that prints no costs.
    """
    behind = dict(_read(folder / "costs.csv"))
    found = []
    for key, printed in _read(folder / "reported.csv"):
        if not printed["params_m"] and not printed["madds_m"]:
            continue
        where = f"{folder / 'costs.csv'}: {', '.join(key)}"
        if key not in behind:
            raise NatlibError(f"{where}: there is no such row, but the papers print its costs")
        row = behind.pop(key)
        cost = PrintedCost(
            printed["table"], *key, printed["params_m"], printed["madds_m"], _network(row),
            row["explanation"],
        )  # fmt: skip
        if (cost.verdict == EQUAL) != (not cost.explanation):
            raise NatlibError(
                f"{where}: ours is {cost.cost}; "
                + ("an equal row needs no explanation" if cost.explanation else "explain why")
            )
        found.append(cost)
    if behind:
        raise NatlibError(f"{folder / 'costs.csv'}: {next(iter(behind))} prints no costs")
    return found


def answers(network: str, method: str, architecture: str, printed: str) -> bool:
    """Whether a network and method of ours stand for a printed architecture and method.

    A graph of several, "VGG16, nearest", does for "VGG16", "NAT" for "NAT, mean of 3 graphs", and
    the authors' own cell, "NAT, released", for "NAT".
    """
    return f"{network}, ".startswith(f"{architecture}, ") and f"{printed}, ".startswith(
        f"{method.removesuffix(RELEASED)}, "
    )
