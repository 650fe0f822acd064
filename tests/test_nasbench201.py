from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from natlib import NatlibError, data, nasbench201
from natlib.genotype import format_nasbench201, parse_nasbench201
from natlib.nasbench201 import DATASETS, SIZE
from tests.tables import nasbench201_columns, write_nasbench201

GOLDEN = Path(__file__).parent / "golden" / "nasbench201.csv"
needs_table = pytest.mark.skipif(
    nasbench201.locate() is None, reason="NAS-Bench-201's table is not in NATLIB_DATA or data/"
)


@pytest.fixture(scope="module")
def columns() -> dict[str, list[object]]:
    return nasbench201_columns()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[object]]) -> Path:
    """A made table that natlib takes for the real one."""
    path = write_nasbench201(tmp_path, columns)
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path))
    with pytest.raises(NatlibError) as caught:
        nasbench201.load()
    found = str(caught.value).partition("content is ")[2].partition(",")[0]
    monkeypatch.setattr(nasbench201, "CONTENT", found)
    return path


@needs_table
def test_golden_facts_of_the_published_table() -> None:
    for row in csv.DictReader(GOLDEN.open()):
        entries = nasbench201.load(row["dataset"]).entries
        best = max(entries, key=lambda e: e.mean_test)
        assert len(entries) == SIZE == 15_625
        assert round(100 * best.mean_test, 3) == float(row["best_test"])
        if row["best_cell"]:
            assert best.cell == row["best_cell"]
        for i in (0, 1):
            cost = (entries[i].params, entries[i].madds)
            assert cost == (int(row[f"params_{i}"]), int(row[f"madds_{i}"]))
        assert len({e.isomorphism for e in entries}) == 6466


@needs_table
def test_the_table_says_what_the_file_says() -> None:
    frame = pd.read_parquet(nasbench201.locate())
    for dataset, prefix in DATASETS.items():
        for i in np.random.default_rng(0).integers(0, SIZE, 50).tolist():
            entry, row = nasbench201.query(i, dataset), frame.iloc[i]
            assert entry.index == row.arch == i
            assert entry.cell == row.cellstr
            assert 100 * entry.mean_validation == pytest.approx(row[f"{prefix}_val_12ep"])
            assert 100 * entry.mean_test == pytest.approx(row[f"{prefix}_test_200ep"])
            assert (entry.params, entry.madds) == (row[f"{prefix}_params"], row[f"{prefix}_flops"])
            assert entry.latency_ms == pytest.approx(row.pi5_onnx_lat_ms)


def test_an_architecture_is_found_by_index_string_and_genotype(
    made: Path, columns: dict[str, list[object]]
) -> None:
    table = nasbench201.load("cifar100")
    assert len(table.entries) == SIZE
    for i in (0, 17, SIZE - 1):
        entry = table.query(i)
        genotype = parse_nasbench201(entry.cell)
        assert entry.primitives == tuple(e.primitive for e in genotype.normal.edges)
        assert tuple((e.source, e.target) for e in genotype.normal.edges) == nasbench201.EDGES
        assert format_nasbench201(genotype) == entry.cell == columns["cellstr"][i]
        assert entry == table.query(entry.cell) == table.query(genotype)
        assert entry == nasbench201.query(i, "cifar100")
        assert entry.mean_test * 100 == pytest.approx(columns["c100_test_200ep"][i])


def test_an_architecture_outside_the_space_is_refused(made: Path) -> None:
    with pytest.raises(NatlibError, match=r"no architecture 15625; allowed are 0\.\.15624"):
        nasbench201.query(SIZE)
    with pytest.raises(NatlibError, match="its cells have three nodes"):
        nasbench201.query("|none~0|+|none~0|none~1|")
    with pytest.raises(NatlibError, match="unknown primitive"):
        nasbench201.query("|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|")
    with pytest.raises(NatlibError, match="dataset 'svhn' is not one of cifar10, cifar100"):
        nasbench201.load("svhn")


def test_a_missing_file_is_one_error_that_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path))
    monkeypatch.setattr(data, "_DATA", tmp_path / "nothing")
    assert nasbench201.locate() is None
    with pytest.raises(NatlibError, match=r"put nasbench201/nasbench201\.parquet into the folder"):
        nasbench201.load()


def test_the_folder_of_the_environment_comes_first(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(data, "_DATA", tmp_path)
    assert nasbench201.locate() == made
    monkeypatch.setenv("NATLIB_DATA", str(tmp_path / "other"))
    assert nasbench201.locate() == made


def test_an_altered_table_is_refused(
    made: Path, tmp_path: Path, columns: dict[str, list[object]]
) -> None:
    accuracies = [*columns["c10_test_200ep"]]
    accuracies[3] = 99.0
    write_nasbench201(tmp_path, {**columns, "c10_test_200ep": accuracies})
    with pytest.raises(NatlibError, match=r"nasbench201\.parquet is corrupt or another table"):
        nasbench201.load()
    fewer = {k: v for k, v in columns.items() if k != "in16_flops"}
    write_nasbench201(tmp_path, fewer)
    with pytest.raises(NatlibError, match=r"cannot be read \(.*in16_flops"):
        nasbench201.load()
    made.write_bytes(b"PAR1 no more")
    with pytest.raises(NatlibError, match="cannot be read"):
        nasbench201.load()
