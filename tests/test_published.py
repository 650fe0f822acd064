"""Published costs beside ours, and the file that explains what differs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from natlib import NatlibError
from natlib.latency import latencies
from natlib.macro import ImageNetMacro, MacroConfig
from natlib.published import (
    DIFFERS,
    EQUAL,
    NOT_RECOMPUTED,
    PAPER,
    PrintedCost,
    counts,
    number_notes,
    printed_costs,
    table,
)
from natlib.report import load_reported
from natlib.zoo import ZOO

ROWS = printed_costs()


def row(label: str) -> PrintedCost:
    (found,) = [r for r in ROWS if r.label == label]
    return found


def test_every_row_that_prints_costs_is_there_and_equal_or_has_a_note() -> None:
    reported = load_reported()
    printing = reported[reported["params_m"].notna() | reported["madds_m"].notna()]
    keys = [(r.table, r.dataset, r.architecture, r.method) for r in ROWS]
    columns = ["table", "dataset", "architecture", "method"]
    assert keys == list(printing[columns].itertuples(index=False, name=None))
    for r in ROWS:
        assert (r.verdict == EQUAL) == (r.explanation == "")
        assert r.explanation.count(". ") == 0, "one sentence"
        assert (r.cost is None) == (r.verdict == NOT_RECOMPUTED)
    found = counts(ROWS)
    assert found[EQUAL] + found[DIFFERS] + found[NOT_RECOMPUTED] == len(ROWS)


def test_rows_that_agree_to_all_printed_digits() -> None:
    assert row("ResNet20, original, CIFAR-10").agrees == {"params": True, "madds": True}
    assert row("MobileNetV2, original, CIFAR-10").agrees == {"params": True, "madds": True}
    # 15.249 M rounds to the printed 15.2, 313.7 M not to the printed 313.
    assert row("VGG16, original, CIFAR-10").agrees == {"params": True, "madds": False}
    # 2.98 M would be the printed 3.0; 2.68 M is not, and is not 3 either.
    assert row("DARTS, NAT, CIFAR-10").agrees == {"params": False, "madds": False}
    assert row("NAONet, original, ImageNet").agrees["params"]
    assert row("NAONet, NAT, ImageNet").agrees["params"]


def test_a_row_without_published_cells_is_not_recomputed() -> None:
    for label in ("PNAS, original, ImageNet", "DARTS, NAO, CIFAR-10", "VGG16, NAT, CIFAR-10"):
        assert row(label).verdict == NOT_RECOMPUTED
        assert row(label).agrees == {} and row(label).cost is None


def test_searched_cells_stand_in_networks_of_the_published_size() -> None:
    assert row("DARTS, NAT, CIFAR-10").network == (ZOO["NAT_DARTS"], MacroConfig(36, 20))
    assert row("ENAS, original, ImageNet").network == (ZOO["ENAS"], ImageNetMacro(48, 14))


def changed(folder: Path, key: tuple[str, str, str], **values: str | None) -> Path:
    """A copy of the paper's files with one row of costs.csv changed, or left out if None."""
    (folder / "reported.csv").write_text((PAPER / "reported.csv").read_text())
    with (PAPER / "costs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = []
    for r in rows:
        if (r["dataset"], r["architecture"], r["method"]) == key:
            if None in values.values():
                continue
            r |= {k: v for k, v in values.items() if v is not None}
        kept.append(r)
    with (folder / "costs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    return folder


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        (("CIFAR-10", "VGG16", "original"), {"explanation": ""}, r"VGG16, original.*explain why"),
        (("CIFAR-10", "ResNet20", "original"), {"explanation": "x"}, "needs no explanation"),
        (("CIFAR-10", "DARTS", "NAO"), {"explanation": None}, "DARTS, NAO: there is no such row"),
        (("CIFAR-10", "DARTS", "NAT"), {"genotype": "NATv3_DARTS"}, "unknown genotype"),
        (("CIFAR-10", "GHN", "original"), {"method": "NAT"}, "there is no such row"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    tmp_path: Path, key: tuple[str, str, str], values: dict[str, str | None], message: str
) -> None:
    with pytest.raises(NatlibError, match=message):
        printed_costs(changed(tmp_path, key, **values))


def test_a_row_too_many_is_named(tmp_path: Path) -> None:
    changed(tmp_path, ("", "", ""))
    with (tmp_path / "costs.csv").open("a") as file:
        file.write("CIFAR-10,AlexNet,original,,,,It is not there.\n")
    with pytest.raises(NatlibError, match=r"AlexNet.*prints no costs"):
        printed_costs(tmp_path)


def test_latencies_are_of_each_network() -> None:
    small, large = MacroConfig(4, 2, image_size=8), MacroConfig(32, 12, image_size=32)
    found = latencies({"small": (ZOO["VGG"], small), "large": (ZOO["VGG"], large)}, 1, 3)
    assert list(found) == ["small", "large"]
    assert 0 < found["small"] < found["large"]


@pytest.mark.parametrize(("rounds", "passes"), [(0, 1), (1, 0)])
def test_no_pass_has_no_median(rounds: int, passes: int) -> None:
    with pytest.raises(NatlibError, match=f"rounds = {rounds}, passes = {passes}"):
        latencies({}, rounds, passes)


def test_the_table_refers_to_each_explanation_once() -> None:
    rows = printed_costs()
    notes = number_notes(rows)
    assert list(notes.values()) == list(range(1, len(notes) + 1))
    lines = table(rows, {rows[0].label: 1.5}, notes)
    assert lines[0]["latency (ms)"] == 1.5 and lines[1]["latency (ms)"] is None
    for row, line in zip(rows, lines, strict=True):
        assert line["verdict"] == row.verdict
        assert (line["note"] is None) == (row.verdict == EQUAL)
        assert line["note"] is None or notes[row.explanation] == int(str(line["note"]))
        if row.cost is None:
            assert line["params (M), ours"] is line["params, difference"] is None
        elif row.params:
            ours = row.cost.params / 1e6
            assert line["params (M), ours"] == ours
            assert line["params, difference"] == ours - float(row.params)
    assert "note" not in table(rows)[0] and "latency (ms)" not in table(rows)[0]
