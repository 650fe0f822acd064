"""What pages keep of long runs, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from natlib import NatlibError, evidence, records
from natlib.records import Record, RunStore
from natlib.train import LEARNED_ENOUGH
from tests import record_bodies as bodies

ROWS = {
    "DARTS, original": {"top-1 (%)": [0.70, 0.72]},
    "DARTS, NAT": {
        "top-1 (%)": [0.71, 0.75],
        "change (points)": [0.01, 0.03],
        "rewritten": [1.0, 0.0],
        "MAdds change (%)": [-0.2, 0.9],
    },
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
    columns = ["what", "top-1 (%)", "change (points)", "rewritten", "MAdds change (%)"]
    assert list(table.frame.columns) == [*columns, "p (Holm)"]
    assert list(table.frame["what"]) == list(ROWS)
    # Student's t with one degree of freedom: 12.706 times 0.01.
    assert table.frame["top-1 (%)"][0] == "71.0\u00a0±\u00a012.7"
    assert table.frame["change (points)"][1] == "+2.0 [-10.7, 14.7]"
    assert "4 trainings. n = 2 seeds each" in table.caption
    assert used[0].provenance["cpu"] in table.caption
    assert f"code: revision {used[0].provenance['git'][:7]}" in table.caption
    assert table.frame["rewritten"][1] == "1 of 2"
    assert table.frame["MAdds change (%)"][1] == "+35 [-20, 90]"
    # Two of three tests would be corrected for; here there is one.
    assert table.frame["p (Holm)"][1] == pytest.approx(0.2951672)
    assert evidence.rows("table") == ROWS
    assert "p (Holm)" not in evidence.recorded("another").frame
    shown = evidence.recorded("another").frame.iloc[0]
    assert (shown["top-1 (%)"], shown["Spearman's ρ"]) == ("50.0", "0.60\u00a0±\u00a01.27")


def test_rows_of_other_numbers_of_seeds_say_each_their_own(
    used: list[Record], tmp_path: Path
) -> None:
    rows = {"a": {"top-1 (%)": [0.5, 0.6]}, "b": {"top-1 (%)": [0.5, 0.6, 0.7]}}
    record(tmp_path, evidence.keep("table", "extended", rows, used, ""))
    table = evidence.recorded("table")
    assert list(table.frame["n"]) == [2, 3]
    assert ". n seeds each" in table.caption


def test_what_shared_weights_say_of_original_and_rewriting_is_one_column(
    used: list[Record], tmp_path: Path
) -> None:
    rows = {
        "VGG16, original": {"by shared weights (%)": [0.3, 0.3]},
        "VGG16, NAT": {"change by shared weights": [0.1, 0.1]},
    }
    record(tmp_path, evidence.keep("table", "extended", rows, used, ""))
    table = evidence.recorded("table")
    assert list(table.frame["by shared weights"]) == ["30.0\u00a0±\u00a00.0", "+10.0 [10.0, 10.0]"]
    assert "an original's accuracy (%), a rewriting's change" in table.caption
    assert evidence.rows("table") == rows


def test_what_claims_alone_need_is_kept_and_not_shown(used: list[Record], tmp_path: Path) -> None:
    rows = {
        "VGG16, original": {"top-1 (%)": [0.3, 0.3], LEARNED_ENOUGH: [1.0, 1.0]},
        "VGG16, NAT": {"top-1 (%)": [0.3, 0.3], evidence.DROPPED: [1.0, 0.0]},
        evidence.EACH: {"shared weights": [0.1, 0.2, 0.3, 0.4]},
    }
    record(tmp_path, evidence.keep("table", "extended", rows, used, ""))
    table = evidence.recorded("table")
    assert list(table.frame.columns) == ["what", "top-1 (%)"] and len(table.frame) == 2
    assert "n = 2 seeds each" in table.caption
    assert evidence.rows("table") == rows


def test_a_page_that_was_not_run_says_so(used: list[Record]) -> None:
    assert "Not run yet" in evidence.recorded("table").frame.iloc[0, 0]
    assert evidence.rows("table") == {}


def test_what_rests_on_other_records_is_another_record(used: list[Record]) -> None:
    both = evidence.keep("table", "extended", ROWS, used, "")
    assert evidence.keep("table", "extended", ROWS, used[::-1], "") == both
    assert evidence.keep("table", "extended", ROWS, used[:1], "").key != both.key
    assert evidence.keep("table", "reduced", ROWS, used, "").key != both.key


def test_other_rows_of_the_same_records_are_another_record(used: list[Record]) -> None:
    first = evidence.keep("table", "extended", ROWS, used, "")
    assert evidence.keep("table", "extended", ROWS, used, "in other words").key != first.key
    other = {**ROWS, "ENAS, NAT": {"top-1 (%)": [0.5, 0.6]}}
    assert evidence.keep("table", "extended", other, used, "").key != first.key


def test_recorded_accuracies_stand_beside_what_is_printed_and_found(
    used: list[Record], tmp_path: Path
) -> None:
    record(tmp_path, evidence.keep("table", "extended", ROWS, used, ""))
    found = pd.DataFrame(
        {
            "network": ["DARTS", "DARTS", "ENAS", "VGG16"],
            "method": ["original", "NAT", "NAO", "NAO"],
            "top-1 (%), ours": [None, "20.0", "30.0", None],
            "top-1 (%), paper": [97.0, 97.3, None, 93.0],
            "params (M), ours": [1.0, 2.0, 3.0, None],
        }
    )
    beside = evidence.beside("table", found, "ours, smoke")
    assert list(beside["ours, smoke"].fillna("")) == ["", "20.0", "30.0"]
    assert list(beside["recorded, extended"].fillna("")) == [
        "71.0\u00a0±\u00a012.7 (n = 2)", "73.0\u00a0±\u00a025.4 (n = 2)", "",
    ]  # fmt: skip
    assert list(beside.columns[2:]) == ["paper", "ours, smoke", "recorded, extended", "notebook"]


def test_nothing_is_not_kept(used: list[Record]) -> None:
    with pytest.raises(NatlibError, match="'table' keeps 0 rows from 2 records"):
        evidence.keep("table", "extended", {}, used, "")
