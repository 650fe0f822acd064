"""Compare this machine's records with the recorded reference, cell by cell; record it, restore it.

Every number in every record is a cell; of a list of numbers, its mean and its length. A record that
depends on no seed must give the same values anywhere. One that does may differ between machines, as
other rounding leads training elsewhere, just as another seed would: the tolerance of a metric is
what the difference of two runs exceeds with a probability of 0.1 %, by the spread between the
recorded seeds (Student's t, pooled over the configurations of a kind); a count may differ by as
much as any two recorded ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import RUNS, SCALES, exit_with, require, write_text
from scipy import stats

from natlib import NatlibError
from natlib.files import replacing
from natlib.records import PAGE, Record, read_record, read_reference, recalled

REFERENCE = Path("results/reference")
LEVEL = 0.001
MISSING = "missing"
ROUNDING = 1e-6  # relative; float32 sums in another order

Tolerances = dict[str, dict[str, float | None]]


def leaves(value: Any, path: str = "", many: bool = False) -> Iterator[tuple[str, bool, Any]]:
    """Yield each value in a result with its path and whether it stands in a list."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}" if path else name, many)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path, True)
    else:
        yield path, many, value


def cells(result: dict[str, Any]) -> dict[str, float | str]:
    """Return a result's cells by name: numbers as they are, lists of them as mean and length."""
    found: dict[str, float | str] = {}
    lists: dict[str, list[Any]] = defaultdict(list)
    for path, many, value in leaves(result):
        if many:
            lists[path].append(value)
        else:
            found[path] = value if is_number(value) else repr(value)
    for path, values in lists.items():
        found[f"{path} (length)"] = len(values)
        if all(map(is_number, values)):
            found[f"{path} (mean)"] = math.fsum(values) / len(values)
        else:
            found[path] = repr(values)
    return found


def is_number(value: Any) -> bool:
    """Say whether ``value`` is a number (True and False are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_seeds(config: Any) -> Any:
    """Return a configuration without seeds and keys of other records, at any depth."""
    if isinstance(config, dict):
        return {name: without_seeds(v) for name, v in config.items() if name != "seed"}
    if isinstance(config, list):
        return [without_seeds(item) for item in config]
    if isinstance(config, str) and re.fullmatch(r"[0-9a-f]{16}", config):
        return ""
    return config


def is_exact(record: Record) -> bool:
    """Say whether a record depends on no seed, its own or that of a record it was made from."""
    return not record.inputs and without_seeds(record.config) == record.config


def tolerances(records: list[Record]) -> Tolerances:
    """Return for each kind and metric the tolerance, None where one seed shows no spread."""
    groups: dict[str, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        if is_exact(record) or record.kind == PAGE:
            continue
        group = json.dumps(without_seeds(record.config), sort_keys=True) + record.data
        for metric, value in cells(record.result).items():
            if not isinstance(value, str):
                metrics = groups.setdefault(record.kind, {}).setdefault(metric, {})
                metrics.setdefault(group, []).append(value)
    return {
        kind: {metric: tolerance(list(values.values())) for metric, values in metrics.items()}
        for kind, metrics in groups.items()
    }


def tolerance(groups: list[list[float]]) -> float | None:
    """Return the tolerance from groups of values that differ in the seed alone."""
    freedom = sum(len(values) - 1 for values in groups)
    if freedom == 0:
        return None
    squares = sum((x - math.fsum(v) / len(v)) ** 2 for v in groups for x in v)
    allowed = float(stats.t.ppf(1 - LEVEL / 2, freedom) * math.sqrt(2 * squares / freedom))
    values = [x for v in groups for x in v]
    if squares and all(float(x).is_integer() for x in values):
        # Counts are not normal: most are alike, and the others differ by whole steps.
        allowed = max(allowed, max(values) - min(values))
    return allowed


def changes(record: Record) -> dict[str, list[float]]:
    """Return the changes of accuracy in what a page kept, by row and column: one value a seed."""
    return {
        f"{row}: {column}": values
        for row, columns in record.result["rows"].items()
        for column, values in columns.items()
        if "change" in column and "change (%)" not in column and len(values) > 1
    }


def page_rows(references: list[Record], here: list[Record]) -> list[tuple[Any, ...]]:
    """Compare mean changes page by page; the tolerance is by the seeds' spread, page by page.

    Records of pages have no key in common, as it says what was found.
    """
    mine = {r.config["page"]: changes(r) for r in here if r.kind == PAGE}
    rows: list[tuple[Any, ...]] = []
    for reference in references:
        if reference.kind != PAGE or (page := reference.config["page"]) not in mine:
            continue
        recorded = changes(reference)
        # What a method left as it was in all seeds has no spread to learn from.
        limit = tolerance([v for v in recorded.values() if len(set(v)) > 1])
        for name, values in recorded.items():
            mean, own = math.fsum(values) / len(values), mine[page].get(name)
            other = math.fsum(own) / len(own) if own else MISSING
            allowed = None if limit is None else limit / math.sqrt(len(values))
            rows.append((PAGE, page, name, mean, other, allowed, judge(mean, other, allowed)))
    return rows


def judge(reference: float | str, here: float | str, allowed: float | None) -> str:
    """Return the verdict on one cell: same, inside, OUTSIDE or (without tolerance) not judged."""
    if isinstance(reference, str) or isinstance(here, str):
        same = inside = reference == here
    else:
        same = math.isclose(reference, here, rel_tol=ROUNDING, abs_tol=ROUNDING)
        inside = abs(reference - here) <= (allowed or 0)
    if same:
        return "same"
    if allowed is None and here != MISSING:
        return "not judged"
    return "inside" if inside else "OUTSIDE"


def manifests(scale: str) -> dict[str, list[dict[str, Any]]]:
    """Return what each executed notebook of ``scale`` noted of the records that it used."""
    files = sorted((RUNS / "manifests" / scale).glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def used_records(scale: str) -> dict[str, list[Record]]:
    """Return the records that each executed notebook of ``scale`` used on this machine.

    Those that it recalled from a reference, for lack of their data, are not this machine's.
    """
    found: dict[str, list[Record]] = {}
    for page, used in manifests(scale).items():
        entries = {e["key"]: e["kind"] for e in used if not e.get("recalled")}
        paths = [RUNS / kind / key / "record.json" for key, kind in entries.items()]
        if gone := [path for path in paths if not path.exists()]:
            raise NatlibError(
                f"{RUNS / 'manifests' / scale / page}.json names {len(gone)} records that are "
                f"gone, such as {gone[0]}: run `make notebook NAME={page} SCALE={scale}` again"
            )
        found[page] = [read_record(path) for path in paths]
    return found


def recalled_keys(scale: str) -> dict[str, list[str]]:
    """Return which records each executed notebook of ``scale`` recalled from a reference."""
    return {
        page: list(dict.fromkeys(e["key"] for e in used if e.get("recalled")))
        for page, used in manifests(scale).items()
    }


def folder_of(scale: str) -> Path:
    """Return where the reference of ``scale`` is recorded."""
    return REFERENCE / scale


def record_reference(scale: str) -> int:
    """Record this machine's results of ``scale`` as the reference.

    Notebooks that were not executed here keep what is recorded of them: long runs grow page by
    page, over sessions and machines.
    """
    here = used_records(scale)
    if not any(here.values()):
        raise NatlibError(f"no records of scale {scale} here: run `make reproduce SCALE={scale}`")
    folder = folder_of(scale)
    pages = {page: [r.key for r in records] for page, records in here.items()}
    kept: dict[str, Record] = {}
    for page, keys in recalled_keys(scale).items():
        pages[page] += keys
        kept |= recalled(keys, scale, Path())
    if (folder / "pages.json").is_file():
        known = {r.key: r for r in read_reference(scale, Path())}
        earlier: dict[str, list[str]] = json.loads((folder / "pages.json").read_text())
        for page in earlier.keys() - pages.keys():
            pages[page] = earlier[page]
            kept |= {key: known[key] for key in earlier[page]}
    records = list((kept | {r.key: r for rs in here.values() for r in rs}).values())
    contents = [r.content for r in sorted(records, key=lambda r: (r.kind, r.key))]
    write_text(folder / "records.json", json.dumps(contents, indent=1) + "\n")
    write_text(folder / "pages.json", json.dumps(pages, indent=1, sort_keys=True) + "\n")
    limits = tolerances(records)
    write_text(folder / "tolerances.json", json.dumps(limits, indent=1, sort_keys=True) + "\n")
    single = [f"{kind} {name}" for kind, m in limits.items() for name, v in m.items() if v is None]
    print(f"{len(records)} records of scale {scale} written to {folder}")
    if kept:
        print(f"{len(kept)} of them from earlier: not computed here")
    if single:
        print(f"of one seed only, so not judged by verify: {', '.join(single)}")
    if any(record.provenance["dirty"] for record in records):
        print("note: some were made with uncommitted changes to the code")
    return 0


def restore(scale: str) -> int:
    """Put the reference's records of ``scale`` where this machine's are, to go on from them."""
    references = read_reference(scale, Path())
    if not references:
        raise NatlibError(f"no reference of scale {scale} is recorded in {folder_of(scale)}")
    restored, without = 0, 0
    for record in references:
        path = RUNS / record.kind / record.key / "record.json"
        if path.exists():
            continue
        write_text(path, json.dumps(record.content, indent=1) + "\n")
        restored += 1
        without += bool(record.artifacts)
    print(f"{restored} of {len(references)} records of scale {scale} restored to {RUNS}")
    if without:
        print(
            f"{without} are of supernets and policies and come without their weights: what needs "
            "these stops and names the folder to delete, so that they are trained again"
        )
    return 0


def verify(scale: str) -> int:
    """Print how this machine's results compare; return 1 where a cell is outside."""
    references = read_reference(scale, Path())
    if not references:
        raise NatlibError(f"no reference of scale {scale} is recorded in {folder_of(scale)}")
    limits: Tolerances = json.loads((folder_of(scale) / "tolerances.json").read_text())
    used = [record for records in used_records(scale).values() for record in records]
    here = {record.key: record for record in used}
    rows = []
    for reference in references:
        if reference.key not in here or reference.kind == PAGE:
            continue
        mine = cells(here[reference.key].result)
        exact = is_exact(reference)
        for metric, value in cells(reference.result).items():
            allowed = 0.0 if exact else limits.get(reference.kind, {}).get(metric)
            verdict = judge(value, mine.get(metric, MISSING), allowed)
            rows.append(
                (reference.kind, reference.key, metric, value, mine.get(metric), allowed, verdict)
            )
    rows += page_rows(references, used)
    print_table(rows)
    pages = {r.config["page"] for r in references if r.kind == PAGE and changes(r)}
    if apart := sorted(pages - {row[1] for row in rows if row[0] == PAGE}):
        print(f"not compared, not run on this machine: the changes on {', '.join(apart)}")
    missing = Counter(r.kind for r in references if r.key not in here and r.kind != PAGE)
    for kind, count in sorted(missing.items()):
        print(f"missing on this machine: {count} of kind {kind}")
    if missing and not {r.data for r in here.values()} & {r.data for r in references if r.data}:
        print("note: the reference was computed on another data set than this machine's")
    path = RUNS / "verify" / f"{scale}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["kind", "key", "metric", "reference", "here", "tolerance", "verdict"])
        writer.writerows(rows)
    outside = sum(row[-1] == "OUTSIDE" for row in rows)
    print(f"{len(rows)} cells compared, {outside} outside their tolerance; all of them: {path}")
    if not rows:
        print(f"nothing to compare: run `make reproduce SCALE={scale}` first")
    return 1 if outside or not rows else 0


def print_table(rows: list[tuple[Any, ...]]) -> None:
    """Print one line for each kind and metric, and one for each cell that is outside."""
    print(f"{'kind':<12} {'metric':<48} {'tolerance':>12}   cells")
    groups: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        groups[row[0], row[2]].append(row)
    for (kind, metric), members in sorted(groups.items()):
        verdicts = Counter(row[-1] for row in members)
        counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
        allowed = members[0][5]
        limit = "none" if allowed is None else f"± {allowed:.4g}" if allowed else "exact"
        print(f"{kind:<12} {metric:<48} {limit:>12}   {counts}")
        for _, key, _, reference, mine, _, verdict in members:
            if verdict == "OUTSIDE":
                print(f"    {key}: recorded {reference}, here {mine}")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = {"check": verify, "record": record_reference, "restore": restore}
    parser.add_argument("action", choices=actions)
    parser.add_argument("--scale", required=True)
    arguments = parser.parse_args()
    require(arguments.scale, SCALES, "scale")
    return actions[arguments.action](arguments.scale)


if __name__ == "__main__":
    exit_with(main)
