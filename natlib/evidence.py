"""What pages found on our own long runs, kept with the repository and shown at every scale."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from natlib.errors import NatlibError
from natlib.records import PAGE, Record, RunStore, read_reference
from natlib.report import Table, duration, format_interval, interval

Rows = Mapping[str, Mapping[str, Sequence[float]]]
"""Row, column, one fraction a seed. Columns of changes have "change" in their name, of rank
correlations "ρ"."""

LONG = "extended"


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
    machines = dict.fromkeys(r.machine for r in distinct.values())
    found = {
        "rows": {
            row: {column: [float(v) for v in values] for column, values in columns.items()}
            for row, columns in rows.items()
        },
        "about": about,
        "machines": list(machines),
        "seconds": sum(float(r.provenance["wall_seconds"]) for r in distinct.values()),
    }
    # One key stands for those of all records, of which there may be hundreds.
    keys = hashlib.sha256(" ".join(sorted(distinct)).encode()).hexdigest()[:16]
    return RunStore.default().run(
        PAGE, PageConfig(page, scale), lambda _: found, recipe=2, data="", inputs={"records": keys}
    )


def _latest(page: str, scale: str) -> Record | None:
    """What the recorded reference of a scale holds of a page."""
    records = [r for r in read_reference(scale) if r.kind == PAGE and r.config["page"] == page]
    return records[-1] if records else None


def changes(page: str, scale: str = LONG) -> dict[str, list[float]]:
    """Return the recorded changes of accuracy, row by row, one a seed; none where none are."""
    record = _latest(page, scale)
    return {
        row: values
        for row, columns in (record.result["rows"].items() if record else ())
        for column, values in columns.items()
        if "change (points)" in column
    }


def recorded(page: str, scale: str = LONG) -> Table:
    """Show what the recorded reference of a scale holds of a page; say so where it holds nothing.

    Changes are means with 95 % intervals over the seeds, other values means ± half an interval,
    in percent but for rank correlations.
    """
    record = _latest(page, scale)
    if record is None:
        frame = pd.DataFrame(
            {f"{scale} scale": ["Not run yet: this page has no recorded results of this scale."]}
        )
        return Table(frame, f"Recorded at the {scale} scale")
    result = record.result
    rows = []
    for name, columns in result["rows"].items():
        count = max(len(values) for values in columns.values())
        rows.append({"what": name, **{c: _cell(c, v) for c, v in columns.items()}, "n": count})
    caption = (
        f"Recorded at the {scale} scale: {result['about']}. n seeds each; ± and brackets are 95 % "
        f"intervals over them. Computing time {duration(result['seconds'])} on "
        f"{'; '.join(result['machines'])}."
    )
    return Table(pd.DataFrame(rows), caption)


def _cell(column: str, values: Sequence[float]) -> str:
    """Write a mean with its interval, in percent; a rank correlation as it is."""
    i = interval(values)
    if "change" in column:
        return format_interval(i, counted=False)
    times, digits = (1, 2) if "ρ" in column else (100, 1)
    half = f"\u00a0±\u00a0{times * (i.high - i.mean):.{digits}f}" if i.n > 1 else ""
    return f"{times * i.mean:.{digits}f}{half}"
