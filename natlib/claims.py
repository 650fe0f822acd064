"""The papers' claims, judged on what pages found here or on our long runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natlib.evidence import DROPPED, EACH, Rows
from natlib.published import RELEASED
from natlib.records import Record
from natlib.report import (
    RANKED,
    Claim,
    Interval,
    format_interval,
    interval,
    paired_difference,
    rank_correlation,
)
from natlib.train import LEARNED_ENOUGH
from natlib.transitions import ORIGINAL, TITLES

ACCURACY, CHANGE, MADDS = "top-1 (%)", "accuracy change (points)", "MAdds change (%)"
BEFORE, SHARED, SCRATCH = "before, by shared weights (%)", "shared weights", "from scratch"
RANKS = "Spearman's ρ with training from scratch"

NEAR = 0.01
"""Gains that differ by less are alike."""

TELLS = 1.5
"""So many times what guessing gets is the least that says anything; see ``telling``."""


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
            BEFORE: [float(r.result[name][rule]["before_accuracy"]) for r in records],
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


def rank_rows(
    scored: Sequence[Record], trained: Sequence[Sequence[Record]]
) -> dict[str, dict[str, list[float]]]:
    """Rows of how shared weights rank architectures against training from scratch.

    ``scored`` are records of kind "score", one a supernet; ``trained`` those of kind "train", for
    each architecture one a seed. Raises NatlibError on fewer than four architectures.
    """
    scratch = np.array([[r.result["report_accuracy"] for r in group] for group in trained])
    means = scratch.mean(axis=1)
    return {
        SHARED: {
            "accuracy (%)": [float(np.mean(r.result["accuracy"])) for r in scored],
            RANKS: [rank_correlation(r.result["accuracy"], means).rho for r in scored],
        },
        SCRATCH: {"accuracy (%)": scratch.mean(axis=0).tolist()},
        EACH: {
            SHARED: np.mean([r.result["accuracy"] for r in scored], axis=0).tolist(),
            SCRATCH: means.tolist(),
        },
    }


def by_method(rows: Rows) -> dict[str, dict[str, Mapping[str, Sequence[float]]]]:
    """Sort rows "network, method" by method, then network; those over all networks left out."""
    found: dict[str, dict[str, Mapping[str, Sequence[float]]]] = {}
    for name, columns in rows.items():
        network, _, method = name.removesuffix(RELEASED).rpartition(", ")
        if network != "all networks":
            method += RELEASED * name.endswith(RELEASED)
            found.setdefault(method, {})[network] = columns
    return found


def mixed(rows: Rows, better: str, worse: str) -> Interval | None:
    """Mean difference of test accuracies over the networks that both methods have, by seed.

    None where the rows lack one of them.
    """
    methods = by_method(rows)
    one, other = methods.get(better, {}), methods.get(worse, {})
    shared = [n for n in one if n in other]
    if not shared:
        return None
    return paired_difference(
        np.mean([other[n][ACCURACY] for n in shared], axis=0),
        np.mean([one[n][ACCURACY] for n in shared], axis=0),
    )


def _claim(text: str, source: str, evidence: Interval | bool | None, **more: Any) -> Claim:
    """A claim whose page ``judge`` fills in."""
    return Claim(text, source, "", evidence, **more)


def _ranking(rows: Rows) -> Iterator[Claim]:
    """What the supernet's page says of shared weights as a judge.

    Architectures are the sample: all seeds rank the same ones, against the same trainings.
    """
    text = "Shared weights rank architectures better than chance would"
    each = rows.get(EACH)
    known = rank_correlation(each[SHARED], each[SCRATCH]).interval if each else None
    yield _claim(text, "assumed by both", known, measured="Spearman's ρ", percent=False, digits=2)


def _natbench(rows: Rows) -> Iterator[Claim]:
    """What the page of natbench says of supernets as judges: each is trained anew."""
    text = "Shared weights rank architectures better than chance would, by the table of natbench"
    found = interval(rows["supernet"][RANKED]) if "supernet" in rows else None
    yield _claim(text, "assumed by both", found, measured="Spearman's ρ", percent=False, digits=2)


def _policy(rows: Rows) -> Iterator[Claim]:
    """What the policy's page says: gains on held-out architectures, by shared weights."""

    def change(name: str) -> Interval | None:
        return interval(rows[name][CHANGE]) if name in rows else None

    def beyond(better: str, worse: str) -> Interval | None:
        if better not in rows or worse not in rows:
            return None
        return paired_difference(rows[worse][CHANGE], rows[better][CHANGE])

    for t in ("NAT", "NAT++"):
        text = f"A {t} rewriting (argmax) improves held-out architectures, by shared weights"
        yield _claim(text, f"{t}, Sec. 5", change(f"{t} argmax"))
    for t, where in (("NAT", "NAT, Table 3"), ("NAT++", "NAT++, Sec. 5")):
        text = f"Learned {t} transitions beat uniform random ones, by shared weights"
        yield _claim(text, where, beyond(f"{t} sample", f"{t} random"))
    text = "The larger transition set of NAT++ beats NAT (argmax, held-out), by shared weights"
    yield _claim(text, "NAT++, Sec. 5", beyond("NAT++ argmax", "NAT argmax"))


def _savings(rows: Rows) -> Iterator[Claim]:
    """What the policy's page says of cost."""
    if "NAT++ argmax" in rows:
        cheaper = interval([-v for v in rows["NAT++ argmax"][MADDS]])
        yield _claim(
            "Learned NAT++ rewritings save MAdds (argmax; percent)", "NAT++, Sec. 3", cheaper
        )


def _cells(rows: Rows) -> Iterator[Claim]:
    """What the page of published cells says, by shared weights."""
    for t, source in (
        ("NAT", "NAT, Sec. 3.1 (the reward)"),
        ("NAT++", "NAT++, Eq. 1 (the reward)"),
    ):
        found = by_method(rows).get(t, {})
        text = f"{t} improves published cells ({', '.join(found)}), by shared weights"
        mean = np.mean([columns[CHANGE] for columns in found.values()], axis=0) if found else None
        yield _claim(text, source, None if mean is None else interval(mean))


def _improves(where: str, what: str, nao: bool = False) -> Callable[[Rows], Iterator[Claim]]:
    """What a table of networks trained from scratch says, of NAT and, where it does, of others."""

    def found(rows: Rows) -> Iterator[Claim]:
        on = f"{what} ({_names(rows, 'NAT')}), trained from scratch"
        yield _claim(f"NAT improves {on}", f"NAT, {where}", mixed(rows, "NAT", ORIGINAL))
        yield _claim(f"NAT++ improves {on}", "NAT++, Sec. 5", mixed(rows, "NAT++", ORIGINAL))
        if nao:
            text = f"NAT beats NAO at equally many samples, {on}"
            yield _claim(text, f"NAT, {where}", mixed(rows, "NAT", "NAO"))
        for t in ("NAT", "NAT++"):
            cells = f"{t}{RELEASED}"
            text = f"The authors' {t} cells beat their originals ({_names(rows, cells)}), "
            source = f"{t}, {where if t == 'NAT' else 'Sec. 5'}"
            yield _claim(f"{text}trained from scratch", source, mixed(rows, cells, ORIGINAL))

    return found


def _graphs(rows: Rows) -> Iterator[Claim]:
    """What the table of graphs says."""
    yield from _improves("Sec. 4.5", "several graphs of one network")(rows)
    methods = by_method(rows)
    new, old = methods.get("NAT", {}), methods.get(ORIGINAL, {})

    def gain(graph: str) -> NDArray[np.float64]:
        names = [n for n in new if n.endswith(f", {graph}")]
        gains = [np.subtract(new[n][ACCURACY], old[n][ACCURACY]) for n in names]
        mean: NDArray[np.float64] = np.mean(gains, axis=0)
        return mean

    graphs = list(dict.fromkeys(n.partition(", ")[2] for n in new if ", " in n))
    if len(graphs) > 1:
        first, *others = graphs
        apart = {g: paired_difference(gain(first), gain(g)) for g in others}
        near = all(i.low > -NEAR and i.high < NEAR for i in apart.values())
        far = any(i.low > NEAR or i.high < -NEAR for i in apart.values())
        said = "; ".join(f"{g} − {first} {format_interval(i)}" for g, i in apart.items())
        text = f"NAT's gain hardly depends on the graph (within {100 * NEAR:g} point)"
        yield _claim(text, "NAT, Sec. 4.5", near, measured=said, void=not (near or far))


def _names(rows: Rows, method: str) -> str:
    """The networks that a method has, without their graphs."""
    names = dict.fromkeys(n.partition(", ")[0] for n in by_method(rows).get(method, {}))
    return ", ".join(names)


def _costs(rows: Rows) -> Iterator[Claim]:
    """What a table says of costs at the published size.

    What costs more than its input is dropped, so of NAT and NAT++ the claim is about what was
    proposed; NAO may cost what it likes.
    """
    methods = by_method(rows)
    for t in ("NAT", "NAT++"):
        found = [c for c in methods.get(t, {}).values() if DROPPED in c]
        if found:
            dropped = sum(sum(columns[DROPPED]) for columns in found)
            of = sum(len(columns[DROPPED]) for columns in found)
            text = f"Nothing that {t} proposes costs more than its input ({_names(rows, t)})"
            said = f"{dropped:.0f} samples did, and were dropped, in {of} rewritings"
            yield _claim(text, "NAT, Eq. 2", dropped == 0, measured=said)
    if nao := methods.get("NAO"):
        changes = np.array([columns[MADDS] for columns in nao.values()])
        text = f"NAO's networks cost more than their originals ({_names(rows, 'NAO')}; percent)"
        said = f"{(changes > 0).sum()} of {changes.size} cost more MAdds, on average"
        yield _claim(text, "NAT, Tables 1-2", interval(changes.mean(axis=0)), measured=said)


def _learners(rows: Rows) -> Iterator[Claim]:
    """What the table of learners says."""
    on = ", ".join(by_method(rows).get("Sampling-GCN", {}))
    for other in ("Maximum-GCN", "LSTM", "Random Search"):
        text = f"Sampling-GCN beats {other} ({on}), trained from scratch"
        yield _claim(text, "NAT, Table 3", mixed(rows, "Sampling-GCN", other))


def _faces(rows: Rows) -> Iterator[Claim]:
    """What the page of faces says."""
    for t in ("NAT", "NAT++"):
        if t in rows:
            text = f"{t} improves face verification (LFW; cells rewritten for objects)"
            yield _claim(text, "asked by us", interval(rows[t]["change (points)"]))


JUDGES: dict[str, Callable[[Rows], Iterator[Claim]]] = {
    "truth_natbench": _natbench,
    "03_supernet": _ranking,
    "04_policy": _policy,
    "05_transform": _cells,
    "table_1_handcrafted": _improves("Table 1", "hand-crafted networks", nao=True),
    "table_2_nas": _improves("Table 2", "searched networks", nao=True),
    "table_3_learners": _learners,
    "table_4_graphs": _graphs,
    "table_5_random_architectures": _improves("R1-R5", "random architectures"),
    "transfer_cifar100": _improves("Sec. 5", "networks on images that chose nothing"),
    "faces_lfw": _faces,
}
"""Pages whose rows claims about accuracy are judged on, in the order of the scorecard."""

COSTS: dict[str, Callable[[Rows], Iterator[Claim]]] = {
    "04_policy": _savings,
    "table_1_handcrafted": _costs,
    "table_2_nas": _costs,
}
"""The same for claims about cost, which hold whatever networks have learned."""


def telling(rows: Rows, guessing: float) -> Rows:
    """Leave out rows of cells that shared weights tell from guessing (0..1) by too little.

    That is below ``TELLS`` times as much: such weights cannot judge their rewritings.
    """
    least = guessing * TELLS
    return {
        n: columns for n, columns in rows.items() if np.mean(columns.get(BEFORE, least)) >= least
    }


def judge(pages: Mapping[str, Rows], guessing: float = 0.1) -> list[Claim]:
    """Judge the claims of ``JUDGES`` and ``COSTS`` on rows as ``evidence.keep`` takes them.

    Claims without evidence in the rows are left out. Those about the accuracy of pages whose
    networks learned too little to say anything are not decided whatever was found. Cells that
    shared weights do not tell from ``guessing`` (0..1) do not count (see ``telling``).
    """
    found = []
    for page, says in JUDGES.items():
        rows = telling(pages.get(page, {}), guessing)
        unlearned = not all(all(columns.get(LEARNED_ENOUGH, ())) for columns in rows.values())
        for claim in says(rows):
            if unlearned:
                said = f"the originals learned too little: {claim.measured}".removesuffix(" ")
                claim = replace(claim, measured=said, void=True)
            found.append(replace(claim, where=page))
        for claim in COSTS[page](rows) if page in COSTS else ():
            found.append(replace(claim, where=page))
    return [claim for claim in found if claim.evidence is not None]
