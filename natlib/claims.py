"""The papers' claims about accuracy, judged on what pages found here or on our long runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from natlib.compare import ORIGINAL
from natlib.evidence import Rows
from natlib.records import Record
from natlib.report import Claim, Interval, interval, paired_difference
from natlib.transitions import TITLES

ACCURACY, CHANGE, MADDS = "top-1 (%)", "accuracy change (points)", "MAdds change (%)"


def gain_rows(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Rows of what one rewriting of held-out architectures changes, from records of kind "gain".

    A row a method ("NAT++ argmax", "NAT++ sample", ...); one fraction a record, the mean over its
    architectures, which share their supernet.
    """

    def title(method: str) -> str:
        rule, *how = method.split()
        return " ".join([TITLES[rule], *(how or ["sample"])])

    def means(method: str, what: str) -> NDArray[np.float64]:
        return np.array([np.mean(r.result[method][what]) for r in records])

    return {
        title(method): {
            CHANGE: (means(method, "accuracy") - means("input", "accuracy")).tolist(),
            MADDS: (means(method, "madds") / means("input", "madds") - 1).tolist(),
        }
        for method in records[0].result
        if method != "input"
    }


def derived_rows(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Rows of what derivation changes in each cell, from records of kind "derive".

    A row a cell and rule ("DARTS, NAT++"); one fraction a record.
    """
    return {
        f"{name}, {TITLES[rule]}": {
            "before, by shared weights (%)": [
                float(r.result[name][rule]["before_accuracy"]) for r in records
            ],
            CHANGE: [
                float(r.result[name][rule]["accuracy"] - r.result[name][rule]["before_accuracy"])
                for r in records
            ],
            MADDS: [
                float(r.result[name][rule]["madds"] / r.result[name][rule]["before_madds"] - 1)
                for r in records
            ],
        }
        for name, rules in records[0].result.items()
        for rule in rules
    }


def _methods(rows: Rows) -> dict[str, dict[str, Mapping[str, Sequence[float]]]]:
    """Rows "network, method" by method, then network; those over all networks left out."""
    found: dict[str, dict[str, Mapping[str, Sequence[float]]]] = {}
    for name, columns in rows.items():
        network, _, method = name.rpartition(", ")
        if network != "all networks":
            found.setdefault(method, {})[network] = columns
    return found


def mixed(rows: Rows, better: str, worse: str) -> Interval | None:
    """Mean difference of test accuracies over the networks that both methods have, by seed.

    None where the rows lack one of them.
    """
    methods = _methods(rows)
    one, other = methods.get(better, {}), methods.get(worse, {})
    shared = [n for n in one if n in other]
    if not shared:
        return None
    return paired_difference(
        np.mean([other[n][ACCURACY] for n in shared], axis=0),
        np.mean([one[n][ACCURACY] for n in shared], axis=0),
    )


Found = tuple[str, str, Interval | None]
"""A claim's text, its source, and the evidence, None where the rows hold none."""


def _policy(rows: Rows) -> Iterator[Found]:
    """What the policy's page says: gains on held-out architectures, by shared weights."""

    def change(name: str) -> Interval | None:
        return interval(rows[name][CHANGE]) if name in rows else None

    def beyond(better: str, worse: str) -> Interval | None:
        if better not in rows or worse not in rows:
            return None
        return paired_difference(rows[worse][CHANGE], rows[better][CHANGE])

    for t in ("NAT", "NAT++"):
        text = f"A {t} rewriting (argmax) improves held-out architectures"
        yield text, f"{t}, Sec. 5", change(f"{t} argmax")
    for t, where in (("NAT", "NAT, Table 3"), ("NAT++", "NAT++, Sec. 5")):
        text = f"Learned {t} transitions beat uniform random ones"
        yield text, where, beyond(f"{t} sample", f"{t} random")
    text = "The larger transition set of NAT++ beats NAT (argmax, held-out architectures)"
    yield text, "NAT++, Sec. 5", beyond("NAT++ argmax", "NAT argmax")
    if "NAT++ argmax" in rows:
        cheaper = interval([-v for v in rows["NAT++ argmax"][MADDS]])
        yield "Learned NAT++ rewritings save MAdds (argmax; percent)", "NAT++, Sec. 3", cheaper


def _cells(rows: Rows) -> Iterator[Found]:
    """What the page of published cells says, by shared weights."""
    for t, source in (("NAT", "NAT, Tables 1-2"), ("NAT++", "NAT++, Sec. 5")):
        found = [columns[CHANGE] for columns in _methods(rows).get(t, {}).values()]
        text = f"{t} improves published cells (shared weights, mean over cells, by seed)"
        yield text, source, interval(np.mean(found, axis=0)) if found else None


def _improves(
    where: str, what: str, natpp: bool = True, nao: bool = False
) -> Callable[[Rows], Iterator[Found]]:
    """What a table of networks trained from scratch says, of NAT and, where it does, of others."""

    def found(rows: Rows) -> Iterator[Found]:
        names = dict.fromkeys(n.partition(", ")[0] for n in _methods(rows).get("NAT", {}))
        on = f"{what} ({', '.join(names)}), trained from scratch"
        yield f"NAT improves {on}", f"NAT, {where}", mixed(rows, "NAT", ORIGINAL)
        if natpp:
            yield f"NAT++ improves {on}", "NAT++, Sec. 5", mixed(rows, "NAT++", ORIGINAL)
        if nao:
            text = f"NAT beats NAO at equally many samples, {on}"
            yield text, f"NAT, {where}", mixed(rows, "NAT", "NAO")

    return found


def _learners(rows: Rows) -> Iterator[Found]:
    """What the table of learners says."""
    on = ", ".join(_methods(rows).get("Sampling-GCN", {}))
    for other in ("Maximum-GCN", "LSTM", "Random Search"):
        text = f"Sampling-GCN beats {other} ({on}), trained from scratch"
        yield text, "NAT, Table 3", mixed(rows, "Sampling-GCN", other)


JUDGES: dict[str, Callable[[Rows], Iterator[Found]]] = {
    "04_policy": _policy,
    "05_transform": _cells,
    "table_1_handcrafted": _improves("Table 1", "hand-crafted networks", nao=True),
    "table_2_nas": _improves("Table 2", "searched networks", nao=True),
    "table_3_learners": _learners,
    "table_4_graphs": _improves("Sec. 4.5", "several graphs of one network", natpp=False),
    "table_5_random_architectures": _improves("R1-R5", "random architectures"),
    "transfer_cifar100": _improves("Sec. 5", "networks on images that chose nothing"),
}
"""Pages whose rows claims are judged on, in the order of the scorecard."""


def judge(pages: Mapping[str, Rows], unlearned: Collection[str] = ()) -> list[Claim]:
    """Judge the claims of ``JUDGES`` on rows as ``evidence.keep`` takes them.

    Claims without evidence in the rows are left out; those of pages in ``unlearned``, whose
    networks learned too little to say anything, are not decided whatever they found.
    """
    found = []
    for page, says in JUDGES.items():
        for text, source, evidence in says(pages.get(page, {})):
            if evidence is None:
                continue
            if page in unlearned:
                claim = Claim(text, source, page, None, "the originals learned too little")
            else:
                claim = Claim(text, source, page, evidence)
            found.append(claim)
    return found
