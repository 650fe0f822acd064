"""Comparisons of networks trained from scratch: statistics, pairing, costs, the printed numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from natlib import NatlibError, zoo
from natlib.baselines import NAOConfig
from natlib.compare import (
    Comparison,
    Network,
    Size,
    _silent,
    _training,
    compare,
    promised,
    rewrite,
    rewritten,
)
from natlib.cost import network_cost
from natlib.evidence import DROPPED
from natlib.genotype import Genotype
from natlib.handcrafted import MACROS, ORIGINALS, macro, scaled
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.records import Record
from natlib.report import format_interval, holm, interval, load_reported, p_value
from natlib.search import Setting
from natlib.train import LEARNED_ENOUGH
from natlib.transitions import ORIGINAL
from tests.made import DATA

SIZES = {"image_size": 8, "train": 48, "search": 40, "report": 36, "test": 32}
SIZE = Size(SIZES, 0.125, 8, 2, {"epochs": 1, "batch": 16, "lr": 0.05})
TABLE = "Table 1 (hand-crafted)"
accuracies = st.lists(st.floats(0, 1), min_size=3, max_size=3)


def by_hand(
    values: dict[tuple[str, str], list[float]], changed: bool = True, device: str = "cpu"
) -> Comparison:
    """A comparison of VGG16, ResNet20 with given test accuracies; rewritings ran on ``device``."""
    names = dict.fromkeys(n for _, n in values)
    published = {n: macro(n, "CIFAR-10") for n in names}
    networks = {n: Network(ORIGINALS[n], published[n], published[n]) for n in names}
    genotypes: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for (method, name), given_values in values.items():
        genotype = ORIGINALS[name]
        if method != ORIGINAL and changed:
            genotype = genotype.with_primitives(["null"] * len(genotype.primitives))
        genotypes.setdefault(method, {})[name] = [genotype] * len(given_values)
        trained_on = {"device": "cpu" if method == ORIGINAL else device}
        records.setdefault(method, {})[name] = [
            Record("train", f"{method} {name} {i}", 1, {}, "", {}, {"test_accuracy": v}, {},
                   trained_on, Path())
            for i, v in enumerate(given_values)
        ]  # fmt: skip
    seeds = range(max(map(len, values.values())))
    return Comparison(networks, seeds, genotypes, records, SIZE, DATA)


def test_a_page_is_told_sizes_and_the_range_of_the_originals(made_images: None) -> None:
    result = by_hand(
        {
            (ORIGINAL, "VGG16"): [0.2, 0.3, 0.4],
            (ORIGINAL, "ResNet20"): [0.6, 0.6, 0.6],
            ("NAT++", "VGG16"): [0.3, 0.4, 0.5],
        }
    )
    told = result.told()
    assert f"{told['trainings']} trainings on {told['train']} images" in result.about()
    assert (told["lowest"], told["highest"], told["chance"]) == pytest.approx((30, 60, 25))
    assert told["mixed_natpp"].startswith("+10.0")
    assert "too little" in told["standing"]  # VGG16's 30 %, where guessing gets 25
    good = by_hand({(ORIGINAL, "VGG16"): [0.6, 0.7], ("NAT", "VGG16"): [0.6, 0.5]})
    assert good.told()["standing"].endswith("enough here for a verdict.")
    assert not {"mixed_nat", "mixed_nao"} & told.keys()
    assert (told["seeds"], told["trainings"]) == (3, 9)
    sizes = {"train": 48, "side": 8, "epochs": 1, "width": 0.125, "channels": 8, "cells": 2}
    assert {name: told[name] for name in sizes} == sizes


def test_methods_trained_on_different_devices_are_named(made_images: None) -> None:
    values = {(ORIGINAL, "VGG16"): [0.2, 0.3], ("NAT", "VGG16"): [0.3, 0.4]}
    assert by_hand(values, changed=False).about().endswith("test images")
    assert (
        by_hand(values, changed=False, device="H")
        .about()
        .endswith("; trained on cpu for original; H for NAT")
    )


# Statistics ----------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_agrees_with_stepping_down_one_by_one(p: list[float]) -> None:
    expected = [math.nan] * len(p)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: (p[i], i))):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        expected[i] = largest
    assert np.allclose(holm(p), expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_p_and_leaves_out_what_is_unknown(p: list[float]) -> None:
    corrected = holm(p)
    assert (corrected >= np.array(p) - 1e-12).all() and (corrected <= 1).all()
    with_unknown = holm([math.nan, *p, math.nan])
    assert np.isnan(with_unknown[[0, -1]]).all()
    assert np.array_equal(with_unknown[1:-1], corrected)


@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=10).filter(
        lambda v: len({*v}) > 1 < np.count_nonzero(v)
    )
)
def test_p_values_are_those_of_a_t_test(values: list[int]) -> None:
    expected = stats.ttest_1samp(np.array(values) / 100, 0).pvalue
    assert p_value(interval(np.array(values) / 100)) == pytest.approx(expected)


def test_p_values_without_spread() -> None:
    # A single value, nothing changed, one of three changed (always 0.423), all changed alike.
    for values in ([0.1], [0.0, 0.0], [0.0, 0.0, 0.2], [0.004, 0.004], [0.1 + 0.2, 0.3, 0.3]):
        assert math.isnan(p_value(interval(values)))
    assert p_value(interval([0.004, 0.0041])) < 0.01


@given(accuracies, accuracies, accuracies, accuracies)
def test_differences_are_paired_over_seeds(
    a: list[float], b: list[float], c: list[float], d: list[float]
) -> None:
    found = by_hand(
        {
            (ORIGINAL, "VGG16"): a,
            (ORIGINAL, "ResNet20"): b,
            ("NAT", "VGG16"): c,
            ("NAT", "ResNet20"): d,
        }
    )
    assert found.difference("NAT", "VGG16") == interval(np.subtract(c, a))
    # All networks of a seed are one value.
    mixed = found.mixed("NAT")
    by_seed = [(c[i] + d[i]) / 2 - (a[i] + b[i]) / 2 for i in range(3)]
    assert mixed.n == 3
    assert [mixed.mean, mixed.low] == pytest.approx(
        [interval(by_seed).mean, interval(by_seed).low], abs=1e-9
    )
    frame = found.differences()
    assert len(frame) == 2 and (frame["rewritten"] == "3 of 3").all()
    assert np.allclose(frame["p (Holm)"], holm(frame["p"]), equal_nan=True)


def test_the_summary_counts_improved_networks_and_costs() -> None:
    found = by_hand(
        {
            (ORIGINAL, "VGG16"): [0.5, 0.5, 0.5],
            (ORIGINAL, "ResNet20"): [0.5, 0.5, 0.5],
            ("NAT", "VGG16"): [0.6, 0.7, 0.6],
            ("NAT", "ResNet20"): [0.4, 0.5, 0.5],
        }
    )
    (row,) = found.summary().to_dict("records")
    assert row["networks improved"] == "1 of 2"
    assert "n = 3" in row["change (points)"]
    # One method: nothing to correct for.
    assert row["p (Holm)"] == p_value(found.mixed("NAT")) > 0
    ratios = []
    for name in ("VGG16", "ResNet20"):
        new, old = (found.cost(m, name)[1] for m in ("NAT", ORIGINAL))
        ratios.append(new / old)
    assert row["MAdds change (%)"] == pytest.approx(100 * (sum(ratios) / 2 - 1), abs=0.5)


def test_what_is_kept_are_accuracies_and_changes_of_every_seed(made_images: None) -> None:
    found = by_hand(
        {
            (ORIGINAL, "VGG16"): [0.5, 0.5],
            (ORIGINAL, "ResNet20"): [0.5, 0.5],
            ("NAT", "VGG16"): [0.6, 0.7],
            ("NAT", "ResNet20"): [0.4, 0.5],
        }
    )
    rows = found.kept()
    assert rows["VGG16, original"] == {"top-1 (%)": [0.5, 0.5], LEARNED_ENOUGH: [1, 1]}
    assert rows["VGG16, NAT"]["change (points)"] == pytest.approx([0.1, 0.2])
    (params, _), (old, _) = (found.cost(m, "VGG16") for m in ("NAT", ORIGINAL))
    assert rows["VGG16, NAT"]["params change (%)"] == pytest.approx([params / old - 1] * 2)
    assert rows["VGG16, NAT"]["rewritten"] == [1, 1]
    assert rows["all networks, NAT"]["change (points)"] == pytest.approx([0.0, 0.1])
    mixed = found.mixed("NAT")
    assert sum(rows["all networks, NAT"]["change (points)"]) / 2 == pytest.approx(mixed.mean)
    alone = by_hand({(ORIGINAL, "VGG16"): [0.5], ("NAT", "VGG16"): [0.6]})
    assert list(alone.kept()) == ["VGG16, original", "VGG16, NAT"]
    # A method that only one of the networks has is not summed up again.
    few = by_hand(
        {(ORIGINAL, "VGG16"): [0.5], (ORIGINAL, "ResNet20"): [0.5], ("NAT", "VGG16"): [0.6]}
    )
    assert list(few.kept()) == ["VGG16, original", "VGG16, NAT", "ResNet20, original"]


def test_live_cost_leaves_out_what_nothing_reads(made_images: None) -> None:
    # The second convolution reads node 3, the output does not: nothing computes the first either.
    names = list(ORIGINALS["ResNet20"].primitives)
    names[5] = names[13] = "null"
    genotype = ORIGINALS["ResNet20"].with_primitives(names)
    found = by_hand({(ORIGINAL, "ResNet20"): [0.5], ("NAT", "ResNet20"): [0.4]})
    found.genotypes["NAT"]["ResNet20"][:] = [genotype]  # type: ignore[index]
    row = found.kept()["ResNet20, NAT"]
    assert row["live MAdds change (%)"][0] < row["MAdds change (%)"][0] < 0
    pruned = genotype.pruned()
    assert pruned.fingerprint() == genotype.fingerprint()
    assert pruned == pruned.pruned() != genotype
    assert ORIGINALS["ResNet20"].pruned() == ORIGINALS["ResNet20"]


def test_a_network_whose_cells_let_nothing_through_is_named(made_images: None) -> None:
    # A block reads two earlier ones: past one that puts out zeros, but not past all normal ones.
    original = ORIGINALS["ResNet20"]
    normal, reduce = (c.with_primitives(["null"] * 8) for _, c in original.cells)
    found = by_hand({(ORIGINAL, "ResNet20"): [0.5] * 3, ("NAT", "ResNet20"): [0.5, 0.1, 0.4]})
    skips = original.normal.with_primitives(["skip_connect"] * 8)
    silent, passed = Genotype(normal, original.reduce), Genotype(skips, reduce)
    found.genotypes["NAT"]["ResNet20"][:] = [original, silent, passed]  # type: ignore[index]
    assert found.silent("NAT", "ResNet20") == [False, True, False]
    assert found.about().endswith("; let nothing through and guess: ResNet20, NAT, seed 1")
    images = torch.randn(4, 3, 32, 32)
    for genotype, alike in ((silent, True), (passed, False)):
        network = CellNetwork(found.networks["ResNet20"].trained, genotype=genotype).eval()
        assert (float(network(images).std(0).max().detach()) == 0) is alike


@pytest.mark.parametrize("name", ["DARTS", "ENAS"])
def test_a_cell_network_hears_past_one_silent_cell(name: str) -> None:
    macro, known = MacroConfig(4, 6, image_size=8), zoo.get(name)
    normal, reduce = (c.with_primitives(["null"] * len(c.edges)) for _, c in known.cells)
    images = torch.randn(4, 3, 8, 8)
    for genotype, silent in (
        (known, False),
        (Genotype(known.normal, reduce), False),
        (Genotype(normal, known.reduce), True),
    ):
        assert _silent(genotype, macro) is silent
        network = CellNetwork(macro, genotype=genotype).eval()
        assert (float(network(images).std(0).max().detach()) == 0) is silent


def test_whether_the_originals_learned_is_a_share_of_the_way(made_images: None) -> None:
    # Four classes: guessing is 25 %, three tenths of the way 47.5 %.
    for low, learned in ((0.48, True), (0.47, False)):
        found = by_hand({(ORIGINAL, "VGG16"): [0.9] * 3, (ORIGINAL, "ResNet20"): [low] * 3})
        assert found.learned is learned


def test_what_shared_weights_promised_stands_beside_what_training_gave(made_images: None) -> None:
    found = by_hand(
        {
            (ORIGINAL, "VGG16"): [0.5, 0.5],
            ("NAT", "VGG16"): [0.4, 0.5],
            ("released", "VGG16"): [0.5, 0.6],
        }
    )
    records = {
        "VGG16": [
            SimpleNamespace(
                result={"NAT": {"before_accuracy": 0.3, "accuracy": after, "dropped": dropped}}
            )
            for after, dropped in ((0.4, 3), (0.5, 0))
        ]
    }
    assert promised(records)["VGG16", "NAT"] == pytest.approx([0.1, 0.2])  # type: ignore[arg-type]
    frame = found.differences(records).set_index("method")  # type: ignore[arg-type]
    expected = format_interval(interval([0.1, 0.2]), counted=False)
    assert frame["by shared weights"]["NAT"] == expected
    assert pd.isna(frame["by shared weights"]["released"])
    assert "by shared weights" not in found.differences()
    rows = found.kept(records)  # type: ignore[arg-type]
    assert rows["VGG16, NAT"]["change by shared weights"] == pytest.approx([0.1, 0.2])
    assert rows["VGG16, NAT"]["change (points)"] == pytest.approx([-0.1, 0.0])
    assert rows["VGG16, NAT"][DROPPED] == [3, 0]
    assert not {"change by shared weights", DROPPED} & rows["VGG16, released"].keys()
    assert rows["VGG16, original"]["by shared weights (%)"] == [0.3, 0.3]


def test_the_table_joins_what_is_printed_and_keeps_what_was_not_trained() -> None:
    found = by_hand(
        {(ORIGINAL, "VGG16"): [0.5, 0.6, 0.7], ("NAT++", "VGG16"): [0.5, 0.6, 0.7]}, changed=False
    )
    frame = found.table(TABLE).set_index(["network", "method"])
    reported = load_reported()
    rows = reported[(reported["table"] == TABLE) & (reported["dataset"] == "CIFAR-10")]
    # NAT++ is not printed, everything else is there once.
    assert len(frame) == len(rows) + 1
    for _, row in rows.iterrows():
        assert frame.loc[(row["architecture"], row["method"]), "top-1 (%), paper"] == row["top1"]
    ours = frame.loc[("VGG16", ORIGINAL)]
    assert ours["top-1 (%), ours"].startswith("60.0") and "n = 3" in ours["top-1 (%), ours"]
    cost = network_cost(ORIGINALS["VGG16"], macro("VGG16", "CIFAR-10"))
    assert ours["params (M), ours"] == cost.params / 1e6
    assert frame.loc[("VGG16", "NAT++"), "change"].startswith("+0.0")
    with pytest.raises(NatlibError, match="no table 'Table 9'"):
        found.table("Table 9")


def test_a_released_cell_and_a_graph_of_several_stand_beside_what_is_printed_of_them() -> None:
    reported = load_reported().query("dataset == 'CIFAR-10'")
    printed = reported.set_index(["table", "architecture", "method"])["top1"]
    graphs = "Sec. 4.5 (graph representations)"
    for title, network, method, key in (
        (TABLE, "VGG16", "NAT, released", ("VGG16", "NAT")),
        (graphs, "VGG16, nearest", "NAT", ("VGG16", "NAT, mean of 3 graphs")),
    ):
        found = by_hand({(ORIGINAL, "VGG16"): [0.5], (method, "VGG16"): [0.5]})
        for group in (found.networks, *found.genotypes.values(), *found.records.values()):
            group[network] = group.pop("VGG16")  # type: ignore[attr-defined]
        frame = found.table(title).set_index(["network", "method"])
        assert frame.loc[(network, method), "top-1 (%), paper"] == printed[(title, *key)]
        # Answered rows do not come again.
        assert list(frame.index).count(key) == 0 and frame.index.is_unique


# Training ------------------------------------------------------------------------------------


def test_unchanged_genotypes_share_a_record_and_pairs_have_one_seed(made_images: None) -> None:
    images = SIZE.data("made")
    networks = SIZE.networks(["ResNet20", "DARTS"], images)
    own = networks["ResNet20"].genotype
    other = own.with_primitives(["skip_connect"] * len(own.primitives))
    found = compare(networks, {"NAT": {"ResNet20": [own, other]}}, SIZE, images, [3, 4], 1)
    same, changed = found.records["NAT"]["ResNet20"]
    first, second = found.records[ORIGINAL]["ResNet20"]
    assert same.key == first.key and changed.key != second.key
    assert [r.config["seed"] for r in (same, changed, first, second)] == [3, 4, 3, 4]
    # Two seeds of two originals, and the changed one.
    assert len(found.used) == 5
    assert found.difference("NAT", "ResNet20").n == 2
    found.plot("some")
    for methods, words in (
        ({"NAT": {"ResNet20": [own]}}, "1 genotypes of ResNet20 by NAT for 2 seeds"),
        ({"NAT": {"R1": [own, own]}}, "no network 'R1'"),
    ):
        with pytest.raises(NatlibError, match=words):
            compare(networks, methods, SIZE, images, [3, 4], 1)


@pytest.mark.parametrize(("name", "weight"), [("ResNet20", 0.0), ("DARTS", 0.4)])
def test_only_cell_networks_have_an_auxiliary_head(
    made_images: None, name: str, weight: float
) -> None:
    size = replace(SIZE, training={"epochs": 1, "auxiliary": 0.4})
    network = size.network(name, DATA)
    assert _training(network.trained, network.genotype, 0, size, DATA).auxiliary == weight


def test_rewriting_keeps_to_the_cost_of_the_hand_crafted_network(made_images: None) -> None:
    setting = Setting(
        "made", [0, 1], SIZES, {"channels": 8, "cells": 3}, {"nodes": [4]},
        {"epochs": 1, "batch": 16}, 1,
    )  # fmt: skip
    policies = setting.policies(["nat", "natpp"], {"updates": 1, "reward_images": 8})
    networks = SIZE.networks(["ResNet20", "MobileNetV2"], SIZE.data("made"))
    records = rewrite(setting, policies, networks, 4, NAOConfig(updates=1))
    methods = rewritten(records)
    assert list(methods) == ["NAO", "NAT", "NAT++"]
    for name, network in networks.items():
        limit = network_cost(network.genotype, network.published)
        for method in ("NAT", "NAT++"):
            assert len(methods[method][name]) == 2
            for genotype in methods[method][name]:
                cost = network_cost(genotype, network.published)
                assert cost.params <= limit.params and cost.madds <= limit.madds
        for record in records[name]:
            assert record.result["NAO"]["evaluations"] == 5
            assert record.result["NAT"]["evaluations"] + record.result["NAT"]["dropped"] <= 5


# Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, d in MACROS if d == "CIFAR-10"])
def test_full_width_is_the_published_network(name: str) -> None:
    assert scaled(macro(name, "CIFAR-10"), 1, 10, 32) == macro(name, "CIFAR-10")
    narrow = scaled(macro(name, "CIFAR-10"), 0.25, 100, 16)
    assert narrow.classes == 100 and narrow.image_size == 16
    assert len(narrow.stages) == len(macro(name, "CIFAR-10").stages)
    assert network_cost(ORIGINALS[name], narrow).madds > 0
    with pytest.raises(NatlibError, match="width = 0"):
        scaled(macro(name, "CIFAR-10"), 0, 10, 32)


def test_costs_count_at_the_size_that_the_papers_print(made_images: None) -> None:
    images = SIZE.data("made")
    assert SIZE.network("DARTS", images).published == MacroConfig(channels=36, cells=20)
    assert SIZE.network("NAONet", images).published.classes == 10
    given_cells = SIZE.network("ResNet20", images, zoo.get("NAT_ResBlock"))
    assert given_cells.genotype == zoo.get("NAT_ResBlock")
    assert given_cells.trained == scaled(macro("ResNet20", "CIFAR-10"), 0.125, 4, 8)
    with pytest.raises(NatlibError, match="unknown genotype 'VGG19'"):
        SIZE.network("VGG19", images)
