"""What pages found on our own long runs, kept with the repository and shown at every scale."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd

from natlib.errors import NatlibError
from natlib.records import PAGE, Record, RunStore, read_reference
from natlib.report import Table, duration, format_interval, holm, interval, p_value
from natlib.train import LEARNED_ENOUGH

Rows = Mapping[str, Mapping[str, Sequence[float]]]
"""Row, column, one fraction a seed. Columns of changes of accuracy have "change" in their name, of
cost "change (%)", of rank correlations "ρ"; "rewritten" is 1 where a seed's genotype changed.

What claims are judged by and tables do not show: the columns of ``UNSHOWN``, and the row ``EACH``,
which holds a number an architecture instead of a seed."""

DROPPED = "dropped"
"""Column: how many samples were dropped because they cost more than the input."""

UNSHOWN = (DROPPED, LEARNED_ENOUGH)

EACH = "each architecture"

LIVE = "live MAdds change (%)"
"""Column: change of MAdds without edges into nodes that nothing reads."""

CORRECTED = "p (Holm)"

LONG = "extended"

SHARED = "by shared weights"
HEADS = {"by shared weights (%)": SHARED, "change by shared weights": SHARED}
"""Columns that no row has both of, shown as one: what tables hold must fit a page."""


@dataclass(frozen=True)
class PageConfig:
    """Which notebook found something, and at which scale."""

    page: str
    scale: str


def keep(page: str, scale: str, rows: Rows, used: Sequence[Record], about: str) -> Record:
    """Record what a page found, so that ``make reference`` keeps it and ``recorded`` shows it.

    ``used`` are the records that it rests on, whose computing time and machines are added up;
    ``about`` says in words what was run. Raises NatlibError where there is nothing to keep.
    """
    if not rows or not used:
        raise NatlibError(f"page {page!r} keeps {len(rows)} rows from {len(used)} records")
    distinct = {record.key: record for record in used}
    found = {
        "rows": {
            row: {column: [float(v) for v in values] for column, values in columns.items()}
            for row, columns in rows.items()
        },
        "about": about,
        "seconds": _seconds(distinct.values()),
        "code": _code(distinct.values()),
    }
    # One key stands for those of all records, of which there may be hundreds; another for what the
    # page makes of them.
    inputs = {
        "records": _short_hash(" ".join(sorted(distinct))),
        "found": _short_hash(json.dumps(found["rows"]) + about),
    }
    return RunStore.default().run(
        PAGE, PageConfig(page, scale), lambda _: found, recipe=3, data="", inputs=inputs
    )


def _seconds(records: Iterable[Record]) -> dict[str, float]:
    """Computing time by machine."""
    found: dict[str, float] = {}
    for r in records:
        found[r.machine] = found.get(r.machine, 0.0) + float(r.provenance["wall_seconds"])
    return found


def _code(records: Iterable[Record]) -> str:
    """Which revisions of the code computed records, in words."""
    used = [(r.provenance["git"], r.provenance["dirty"]) for r in records]
    revisions = list(dict.fromkeys(git[:7] or "unknown" for git, _ in used))
    said = f"revision{'s' * (len(revisions) > 1)} {', '.join(revisions)}"
    changed = sum(bool(dirty) for _, dirty in used)
    if changed:
        said += f", {changed} of {len(used)} records with changes not committed"
    return said


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _latest(page: str, scale: str) -> Record | None:
    """What the recorded reference of a scale holds of a page."""
    records = [r for r in read_reference(scale) if r.kind == PAGE and r.config["page"] == page]
    return records[-1] if records else None


def rows(page: str, scale: str = LONG) -> Rows:
    """Return what the recorded reference of a scale holds of a page, as ``keep`` took it."""
    record = _latest(page, scale)
    found: Rows = record.result["rows"] if record else {}
    return found


def recorded(page: str, scale: str = LONG) -> Table:
    """Show what the recorded reference of a scale holds of a page; say so where it holds nothing.

    Changes of accuracy are means with 95 % intervals over the seeds, with p-values corrected for
    all rows (Holm); those of cost medians with the least and the greatest; other values means ±
    half an interval, in percent but for rank correlations.
    """
    record = _latest(page, scale)
    if record is None:
        frame = pd.DataFrame(
            {f"{scale} scale": ["Not run yet: this page has no recorded results of this scale."]}
        )
        return Table(frame, f"Recorded at the {scale} scale")
    result = record.result
    shown, p = [], []
    rows = {name: columns for name, columns in result["rows"].items() if name != EACH}
    for name, columns in rows.items():
        cells = {HEADS.get(c, c): _cell(c, v) for c, v in columns.items() if c not in UNSHOWN}
        shown.append({"what": name, **cells})
        changed = [v for c, v in columns.items() if "change (points)" in c]
        p.append(p_value(interval(changed[0])) if changed else math.nan)
    frame = pd.DataFrame(shown)
    counts = [max(map(len, columns.values())) for columns in rows.values()]
    same = len(set(counts)) == 1
    if not same:
        frame["n"] = counts
    if not all(map(math.isnan, p)):
        frame[CORRECTED] = holm(p)
    caption = (
        f"Recorded at the {scale} scale: {result['about']}. {f'n = {counts[0]}' if same else 'n'} "
        "seeds each; ± and brackets are 95 % intervals over them, but changes of cost: the median "
        f"seed [the least, the greatest]. {_about_columns(frame)}Computing time "
        f"{'; '.join(f'{duration(t)} on {m}' for m, t in result['seconds'].items())}; "
        f"code: {result['code']}."
    )
    return Table(frame, caption)


def _about_columns(frame: pd.DataFrame) -> str:
    said = {
        CORRECTED: "p by the first change of a row, corrected for all rows of this table (the "
        "scorecard corrects for all its claims), none where fewer than two seeds changed. ",
        LIVE: "Live MAdds leave out edges into nodes that nothing reads. ",
        SHARED: "By shared weights: an original's accuracy (%), a rewriting's change (points). ",
    }
    return "".join(text for column, text in said.items() if column in frame)


def beside(page: str, table: pd.DataFrame, here: str, scale: str = LONG) -> pd.DataFrame:
    """Put what is recorded of a page beside a table that ``compare.Comparison.table`` made.

    Rows of accuracy alone: printed, found ``here`` (the name of that column), recorded; those that
    were trained nowhere are left out.
    """
    known, heads = rows(page, scale), ["top-1 (%), paper", "top-1 (%), ours"]
    found = table[["network", "method"]].join(table.reindex(columns=heads))
    found[f"recorded, {scale}"] = [
        f"{_cell('', own['top-1 (%)'])} (n = {len(own['top-1 (%)'])})"
        if (own := known.get(f"{network}, {method}"))
        else None
        for network, method in zip(found["network"], found["method"], strict=True)
    ]
    found["notebook"] = page
    trained = found[[heads[1], f"recorded, {scale}"]].notna().any(axis=1)
    return found[trained].rename(columns=dict(zip(heads, ("paper", here), strict=True)))


def _cell(column: str, values: Sequence[float]) -> str:
    """Write the values of a cell; see ``recorded``."""
    if column == "rewritten":
        return f"{sum(values):.0f} of {len(values)}"
    if "change (%)" in column:
        least, middle, most = (100 * v for v in (min(values), median(values), max(values)))
        return f"{middle:+.0f} [{least:.0f}, {most:.0f}]"
    i = interval(values)
    if "change" in column:
        return format_interval(i, counted=False)
    times, digits = (1, 2) if "ρ" in column else (100, 1)
    half = f"\u00a0±\u00a0{times * (i.high - i.mean):.{digits}f}" if i.n > 1 else ""
    return f"{times * i.mean:.{digits}f}{half}"
