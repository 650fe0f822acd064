"""What pages keep of long runs, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from natlib import NatlibError, evidence, records
from natlib.records import Record, RunStore
from tests import record_bodies as bodies

ROWS = {
    "DARTS, original": {"top-1 (%)": [0.70, 0.72]},
    "DARTS, NAT": {"top-1 (%)": [0.71, 0.75], "change (points)": [0.01, 0.03]},
}


@pytest.fixture
def used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Two records in a store of their own, where pages keep theirs as well."""
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    monkeypatch.setattr(evidence, "read_reference", lambda s: records.read_reference(s, tmp_path))
    store = RunStore(tmp_path / "runs")
    configs = [bodies.Walk(seed) for seed in range(2)]
    return store.run_many("walk", configs, bodies.walk, recipe=1, data="", workers=1)


def record(root: Path, *kept: Record) -> None:
    """Write a reference of the extended scale."""
    folder = root / "results" / "reference" / "extended"
    folder.mkdir(parents=True)
    contents = [{k: v for k, v in asdict(r).items() if k != "path"} for r in kept]
    (folder / "records.json").write_text(json.dumps(contents))


def test_what_is_kept_is_shown_with_its_spread_number_machine_and_time(
    used: list[Record], tmp_path: Path
) -> None:
    kept = evidence.keep("table", "extended", ROWS, used, "4 trainings")
    ranks = {"top-1 (%)": [0.5], "Spearman's ρ": [0.5, 0.7]}
    other = evidence.keep("another", "extended", {"x": ranks}, used, "")
    record(tmp_path, kept, other, *used)
    table = evidence.recorded("table")
    assert list(table.frame.columns) == ["what", "top-1 (%)", "n", "change (points)"]
    assert list(table.frame["what"]) == list(ROWS)
    assert list(table.frame["n"]) == [2, 2]
    # Student's t with one degree of freedom: 12.706 times 0.01.
    assert table.frame["top-1 (%)"][0] == "71.0\u00a0±\u00a012.7"
    assert table.frame["change (points)"][1] == "+2.0 [-10.7, 14.7]"
    assert "4 trainings. n seeds each" in table.caption
    assert used[0].provenance["cpu"] in table.caption
    assert evidence.changes("table") == {"DARTS, NAT": [0.01, 0.03]}
    assert evidence.changes("another") == {}
    shown = evidence.recorded("another").frame.iloc[0]
    assert (shown["top-1 (%)"], shown["Spearman's ρ"]) == ("50.0", "0.60\u00a0±\u00a01.27")


def test_a_page_that_was_not_run_says_so(used: list[Record]) -> None:
    assert "Not run yet" in evidence.recorded("table").frame.iloc[0, 0]
    assert evidence.changes("table") == {}


def test_what_rests_on_other_records_is_another_record(used: list[Record]) -> None:
    both = evidence.keep("table", "extended", ROWS, used, "")
    assert evidence.keep("table", "extended", ROWS, used[::-1], "") == both
    assert evidence.keep("table", "extended", ROWS, used[:1], "").key != both.key
    assert evidence.keep("table", "reduced", ROWS, used, "").key != both.key


def test_nothing_is_not_kept(used: list[Record]) -> None:
    with pytest.raises(NatlibError, match="'table' keeps 0 rows from 2 records"):
        evidence.keep("table", "extended", {}, used, "")
