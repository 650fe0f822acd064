"""Every published row has a counterpart or a stated reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from natlib import NatlibError, coverage
from natlib.records import REPOSITORY
from natlib.report import load_reported


def test_every_published_row_is_covered_by_one_line_and_every_line_is_used() -> None:
    lines = coverage.items()
    reported = load_reported()
    owners = [coverage.item_of(row, lines) for _, row in reported.iterrows()]
    assert len(owners) == len(reported)
    tables = set(reported["table"])
    assert {line for line in lines if line.item in tables} == set(owners)


def test_every_notebook_that_is_there_is_in_experiments_yml() -> None:
    experiments = yaml.safe_load((REPOSITORY / "experiments.yml").read_text())
    there = {line.notebook for line in coverage.items() if line.there}
    assert there <= set(experiments)
    assert "01_search_space" in there


def test_notebooks_of_whole_tables_train_all_networks_that_they_are_said_to() -> None:
    experiments = yaml.safe_load((REPOSITORY / "experiments.yml").read_text())
    for _, row in load_reported().iterrows():
        line = coverage.item_of(row, coverage.items())
        if line.notebook in ("table_1_handcrafted", "table_2_nas"):
            given = experiments[line.notebook]["parameters"]["reduced"]
            assert row["architecture"] in [*given["networks"], *given.get("released_only", [])]


def test_the_counts_add_up_and_more_is_covered_at_paper_scale() -> None:
    every = {
        line.notebook: [
            (row["architecture"], row["method"])
            for _, row in load_reported().iterrows()
            if coverage.item_of(row, coverage.items()) == line
        ]
        for line in coverage.items()
    }
    reduced, paper = coverage.counts("reduced", every), coverage.counts("paper", every)
    reported = load_reported()
    assert reduced["accuracies"] == int(reported[["top1", "top5"]].notna().sum().sum())
    assert reduced["costs"] == int(reported[["params_m", "madds_m"]].notna().sum().sum())
    assert reduced["accuracies covered"] <= paper["accuracies covered"] <= paper["accuracies"]
    assert reduced["costs covered"] == paper["costs covered"] < paper["costs"]


def test_only_what_was_trained_counts() -> None:
    def count(*pairs: tuple[str, str], page: str = "table_4_graphs") -> int:
        return coverage.counts("reduced", {page: pairs})["accuracies covered"]

    assert count() == 0
    assert count(("VGG16, nearest", "NAT"), ("VGG16, slots", "NAT")) == 1
    assert count(("VGG16, nearest", "NAT"), ("VGG16, nearest", "original")) == 2
    assert count(("VGG1", "NAT"), ("VGG16", "NA"), ("R1", "NAT")) == 0
    assert count(("ResNet20", "NAO"), page="table_1_handcrafted") == 1
    # The authors' own cell is what they print.
    assert count(("NAONet", "NAT, released"), page="table_2_nas") == 1


def test_a_row_without_a_line_and_a_line_without_a_reason_are_refused(tmp_path: Path) -> None:
    first = next(row for _, row in load_reported().iterrows())
    with pytest.raises(NatlibError, match=r"no line covers Table 1 .*VGG16, original"):
        coverage.item_of(first, [])
    head = "item,dataset,architecture,notebook,scales,reason\n"
    (tmp_path / "c.csv").write_text(head + "Table 9,,,,,\n")
    with pytest.raises(NatlibError, match="line 2: Table 9 has no notebook and no reason"):
        coverage.items(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text(head + "Table 9,,,a,some,\n")
    with pytest.raises(NatlibError, match="scales 'some' is not all or paper"):
        coverage.items(tmp_path / "c.csv")
