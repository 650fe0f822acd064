from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from natlib import NatlibError, natbench, natbench_build
from natlib.cost import network_cost
from natlib.genotype import Cell, Edge, Genotype
from natlib.macro import MacroConfig
from natlib.natbench import SEEDS, SIZE
from natlib.network import CellNetwork
from natlib.primitives import PRIMITIVES
from tests.made import DATA

TINY = replace(
    natbench_build.TRAINING,
    data=DATA,
    macro=MacroConfig(channels=4, cells=3, classes=4, image_size=8, stem=1),
    epochs=1,
    batch=24,
)
indexes = st.integers(0, SIZE - 1)


@pytest.fixture
def tiny(made_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the builder train tiny networks on made images, five trainings in all."""
    monkeypatch.setattr(natbench_build, "TRAINING", TINY)
    few = [(20, 0), (700, 0), (1500, 0), (20, 1), (700, 1)]
    monkeypatch.setattr(natbench_build, "trainings", lambda: few)
    monkeypatch.setattr(natbench_build, "latencies", lambda which: dict.fromkeys(which, 1.25))


# --- the space -----------------------------------------------------------------------------------


def test_indexes_genotypes_and_primitives_are_one_to_one() -> None:
    assert SIZE == 2197
    triples = [natbench.primitives(i) for i in range(SIZE)]
    assert triples == list(itertools.product(PRIMITIVES, repeat=3))
    assert [natbench.index(t) for t in triples] == list(range(SIZE))
    genotypes = [natbench.genotype(i) for i in range(SIZE)]
    assert [natbench.index(g) for g in genotypes] == list(range(SIZE))
    assert len(set(genotypes)) == SIZE
    assert natbench.genotype(triples[1234]) == genotypes[1234]


def test_the_genotype_says_the_same_in_both_cells() -> None:
    g = natbench.genotype(("conv_3x3", "null", "max_pool_5x5"))
    edges = (Edge(1, 2, "conv_3x3"), Edge(1, 3, "null"), Edge(2, 3, "max_pool_5x5"))
    assert g == Genotype(Cell(edges, (3,)), Cell(edges, (3,)))


@pytest.mark.parametrize("bad", [-1, SIZE, True, 1.0, None])
def test_indexes_outside_the_space(bad: object) -> None:
    with pytest.raises(NatlibError, match=r"allowed are 0\.\.2196"):
        natbench.primitives(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("skip_connect", "null"), "three primitives"),
        ("abc", "three primitives"),
        (("skip_connect", "conv_7x7", "null"), "'conv_7x7'.*allowed are max_pool_3x3"),
        (natbench.genotype(5).with_primitives(["null"] * 5 + ["conv_1x1"]), "same primitives"),
        (
            Genotype(
                *[Cell((Edge(0, 2, "null"), Edge(0, 3, "null"), Edge(2, 3, "null")), (3,))] * 2
            ),
            "must have the edges",
        ),
    ],
)
def test_what_is_no_architecture_of_the_space(bad: object, message: str) -> None:
    with pytest.raises(NatlibError, match=message):
        natbench.index(bad)  # type: ignore[arg-type]


# --- shared trainings ----------------------------------------------------------------------------


def test_a_representative_stands_for_itself_and_fingerprints_never_split() -> None:
    groups = [natbench.trained_as(i) for i in range(SIZE)]
    assert all(groups[g] == g <= i for i, g in enumerate(groups))
    assert len(set(groups)) == 1820
    by_print: dict[str, set[int]] = {}
    for i in range(SIZE):
        by_print.setdefault(natbench.genotype(i).fingerprint(), set()).add(groups[i])
    assert all(len(found) == 1 for found in by_print.values())


# One of each way to compute the same, and pairs that come near but do not.
SAME = [
    (("conv_3x3", "max_pool_3x3", "null"), ("null", "max_pool_3x3", "null")),
    (("null", "conv_1x1", "avg_pool_3x3"), ("null", "conv_1x1", "skip_connect")),
    (("null", "conv_1x1", "sep_conv_3x3"), ("null", "conv_1x1", "conv_1x1")),
    (("null", "max_pool_5x5", "dil_conv_5x5"), ("null", "max_pool_5x5", "conv_5x5")),
    (("sep_conv_3x3", "null", "skip_connect"), ("null", "sep_conv_3x3", "null")),
    (("conv_5x5", "skip_connect", "skip_connect"), ("skip_connect", "conv_5x5", "skip_connect")),
]
OTHER = [
    (("null", "conv_1x1", "conv_3x3"), ("null", "conv_1x1", "null")),
    (("skip_connect", "null", "conv_3x3"), ("conv_3x3", "null", "skip_connect")),
    (("conv_3x3", "skip_connect", "max_pool_3x3"), ("skip_connect", "conv_3x3", "max_pool_3x3")),
]


@pytest.mark.parametrize("pair", SAME)
def test_architectures_that_share_trainings_compute_and_learn_the_same(
    pair: tuple[tuple[str, str, str], ...],
) -> None:
    """In float64, from equal weights, three steps of training give equal logits."""
    a, b = (natbench.genotype(names) for names in pair)
    assert natbench.trained_as(natbench.index(a)) == natbench.trained_as(natbench.index(b))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 8, 8, generator=draw, dtype=torch.float64)
    labels = torch.randint(4, (12,), generator=draw)
    one, two = (CellNetwork(TINY.macro, genotype=g).double() for g in (a, b))
    copy_by_role(one, two)
    outputs = []
    for network in (one, two):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=3e-4)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        outputs.append(network.eval()(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


def copy_by_role(one: CellNetwork, two: CellNetwork) -> None:
    """Copy the weights that play the same part, on the same edge or on the other from the input."""
    source = dict(one.named_parameters())
    with torch.no_grad():
        for name, weight in two.named_parameters():
            swapped = name.replace("1_3_", "?").replace("1_2_", "1_3_").replace("?", "1_2_")
            for candidate in (name, swapped):
                if candidate in source:
                    weight.copy_(source[candidate])
                    break


@pytest.mark.parametrize("pair", OTHER)
def test_architectures_that_come_near_do_not_share(pair: tuple[tuple[str, str, str], ...]) -> None:
    a, b = (natbench.trained_as(natbench.index(names)) for names in pair)
    assert a != b


# --- building ------------------------------------------------------------------------------------


def test_the_order_is_fixed_and_the_first_seed_comes_first() -> None:
    order = natbench_build.trainings()
    assert order == natbench_build.trainings()
    assert len(order) == len(set(order)) == 1820 * len(SEEDS)
    assert [seed for _, seed in order] == [0] * 1820 + [1] * 1820
    assert [i for i, _ in order[:1820]] == [i for i, _ in order[1820:]]
    assert [i for i, _ in order[:1820]] != sorted(i for i, _ in order[:1820])


def test_build_resumes_and_goes_on_where_a_table_ends(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "table"
    first = natbench_build.build(1, part=(1, 2), folder=folder)
    assert [(natbench.index(Genotype.from_json(g)), s) for g, s in described(first)] == [
        (20, 0), (1500, 0), (700, 1)
    ]  # fmt: skip
    assert "natbench: 3 of 3" in capsys.readouterr().err
    monkeypatch.setattr(natbench_build, "measure", fail)
    again = natbench_build.build(1, part=(1, 2), folder=folder)
    assert [r.result for r in again] == [r.result for r in first]
    natbench_build.export(folder)
    monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / "other machine"))
    assert natbench_build.build(1, part=(1, 2), folder=folder) == []
    with pytest.raises(NatlibError, match="must not train"):
        natbench_build.build(1, folder=folder)


def fail(run: object) -> dict[str, object]:
    raise NatlibError("must not train")


def described(records: object) -> list[tuple[dict[str, object], int]]:
    """Genotype (as its JSON form) and seed of each record."""
    out = []
    for r in records:  # type: ignore[attr-defined]
        cells = {}
        for name in ("normal", "reduce"):
            cell = r.config["genotype"][name]
            cells[name] = [[e["primitive"], e["source"], e["target"]] for e in cell["edges"]]
            cells[f"{name}_concat"] = cell["concat"]
        out.append((cells, r.config["seed"]))
    return out


@pytest.mark.parametrize("part", [(0, 1), (2, 1), (-1, 3)])
def test_parts_that_are_none(part: tuple[int, int], tiny: None, tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match="k/n"):
        natbench_build.build(1, part=part, folder=tmp_path)


# --- the table -----------------------------------------------------------------------------------


def test_export_writes_what_was_measured(tiny: None, tmp_path: Path) -> None:
    records = natbench_build.build(1, folder=tmp_path / "t")
    table = natbench_build.export(tmp_path / "t", latency=True)
    assert (tmp_path / "t" / "README.md").read_text().count("**5 of 4,394 trainings**") == 1
    assert table.trainings == 5 and not table.complete
    assert table.card["data"] == records[0].data
    for i, seeds in ((20, (0, 1)), (700, (0, 1)), (1500, (0,))):
        entry = table.query(i)
        assert entry == table.query(entry.primitives) == table.query(natbench.genotype(i))
        assert (entry.index, entry.seeds, entry.latency_ms) == (i, seeds, 1.25)
        cost = network_cost(natbench.genotype(i), TINY.macro)
        assert (entry.params, entry.madds) == (cost.params, cost.madds)
    by = {(20, 0): 0, (700, 0): 1, (1500, 0): 2, (20, 1): 3, (700, 1): 4}
    for (i, seed), k in by.items():
        entry, result = table.entries[i], records[k].result
        at = entry.seeds.index(seed)
        assert entry.validation[at] == pytest.approx(result["validation"], abs=5e-5)
        assert entry.test[at] == pytest.approx(result["test"], abs=5e-5)
        assert entry.loss[at] == pytest.approx(result["loss"], abs=5e-5)


def test_what_shares_a_training_has_its_results_and_its_own_cost(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = natbench.index(("conv_5x5", "max_pool_3x3", "null"))
    stands = natbench.trained_as(dead)
    assert stands != dead
    monkeypatch.setattr(natbench_build, "trainings", lambda: [(stands, 0)])
    natbench_build.build(1, folder=tmp_path)
    table = natbench_build.export(tmp_path)
    assert table.query(dead).validation == table.query(stands).validation
    assert table.query(dead).params > table.query(stands).params
    assert table.trainings == sum(natbench.trained_as(i) == stands for i in range(SIZE))


def test_merging_is_keyed_and_idempotent(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in (1, 2):
        monkeypatch.setenv("NATLIB_RUNS", str(tmp_path / f"runs{k}"))
        natbench_build.build(1, part=(k, 2), folder=tmp_path / f"t{k}")
        natbench_build.export(tmp_path / f"t{k}")
    both = [tmp_path / "t1", tmp_path / "t2"]
    one = natbench_build.merge(both, tmp_path / "one")
    two = natbench_build.merge(both[::-1], tmp_path / "two")
    assert one.trainings == 5
    assert one.entries == two.entries
    before = (tmp_path / "one" / "table.csv").read_bytes()
    natbench_build.merge([*both, *both, tmp_path / "two"], tmp_path / "one")
    assert (tmp_path / "one" / "table.csv").read_bytes() == before
    with pytest.raises(NatlibError, match="no natbench table"):
        natbench_build.merge([tmp_path / "nowhere"], tmp_path / "one")


def test_a_table_of_another_recipe_is_not_continued(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    natbench_build.export(tmp_path)
    monkeypatch.setattr(natbench_build, "RECIPE", 99)
    for use in (natbench_build.export, lambda folder: natbench_build.build(1, folder=folder)):
        with pytest.raises(NatlibError, match=r"recipe.*move it away"):
            use(tmp_path)


def test_noise_of_known_spreads() -> None:
    values = {0: (0.1, 0.3), 1: (0.5, 0.5), 2: (0.8, 0.6)}
    rows = {(i, s): {"validation": v[s], "test": 0.5} for i, v in values.items() for s in SEEDS} | {
        (7, 0): {"validation": 0.9, "test": 0.9}
    }
    found = natbench_build.noise(rows)["validation"]
    within = (0.02 + 0 + 0.02) / 3
    between = 0.19 / 3 - within / 2
    assert found["architectures"] == 3
    assert found["mean"] == pytest.approx(0.4666666667)
    assert found["seed"] == pytest.approx(within**0.5)
    assert found["between"] == pytest.approx(between**0.5)
    assert found["ratio"] == pytest.approx((between / (within / 2)) ** 0.5)
    assert natbench_build.noise({(7, 0): rows[7, 0]}) == {}


# --- asking --------------------------------------------------------------------------------------


def test_errors_of_a_query(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match=r"no natbench table.*card\.json is missing"):
        natbench.load(tmp_path)
    table = natbench_build.export(tmp_path)
    with pytest.raises(NatlibError, match="not trained yet: the table holds 0 of 4394"):
        table.query(3)
    with pytest.raises(NatlibError, match="unknown primitive"):
        table.query(("a", "b", "c"))
    path = tmp_path / "table.csv"
    path.write_bytes(path.read_bytes().replace(b"conv_5x5", b"conv_3x3", 1))
    with pytest.raises(NatlibError, match=r"table\.csv is corrupt: its SHA-256"):
        natbench.load(tmp_path)
    path.unlink()
    with pytest.raises(NatlibError, match=r"table\.csv is missing"):
        natbench.load(tmp_path)


@settings(max_examples=20)
@given(indexes)
def test_the_shipped_table_knows_its_architectures(i: int) -> None:
    entry = natbench.load().entries[i]
    assert (entry.index, entry.primitives) == (i, natbench.primitives(i))
    assert entry.trained_as == natbench.trained_as(i)
    cost = network_cost(natbench.genotype(i), natbench_build.TRAINING.macro)
    assert (entry.params, entry.madds) == (cost.params, cost.madds)
    assert all(0 <= a <= 1 for a in (*entry.validation, *entry.test))


def test_the_shipped_table_is_of_the_recipe_that_the_code_trains() -> None:
    """Whoever changes how natbench trains must raise RECIPE and train again."""
    card = natbench.load().card
    assert card["recipe"] == natbench_build.RECIPE
    assert card["training"] == json.loads(
        json.dumps(natbench_build.as_json(natbench_build.TRAINING))
    )


def test_asking_needs_no_torch() -> None:
    code = (
        "import sys; from natlib import natbench; natbench.load(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ.copy()).returncode == 0


def test_latency_is_measured_for_each(made_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natbench_build, "TRAINING", TINY)
    threads = torch.get_num_threads()
    started = time.process_time()
    found = natbench_build.latencies([0, SIZE - 1], rounds=1, passes=3)
    assert set(found) == {0, SIZE - 1}
    assert all(0 < ms < 1e3 * (time.process_time() - started) for ms in found.values())
    assert torch.get_num_threads() == threads


def test_the_command_line_names_what_is_wrong(tiny: None) -> None:
    with pytest.raises(SystemExit, match="error: part 3/2"):
        natbench_build.main(["build", "--part", "3/2"])
    with pytest.raises(SystemExit, match="2"):
        natbench_build.main(["build", "--part", "half"])


def test_some_trainings_again_are_spread_over_the_table(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = natbench_build.splits(DATA).checksum
    card = SimpleNamespace(card={"data": checksum})
    monkeypatch.setattr(natbench_build.natbench, "load", lambda: card)
    which, records, source = natbench_build.again(2, 1, "smoke")
    assert which == [(20, 0), (1500, 0)]
    assert [r.result for r in records] == [r.result for r in natbench_build.train(which, workers=1)]
    assert source == "computed on this machine"
    for count in (0, 6):
        with pytest.raises(NatlibError, match=f"{count} trainings; allowed are 1..5"):
            natbench_build.again(count, 1, "smoke")


def test_without_the_images_trainings_are_recalled_or_none_are_shown(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(natbench_build, "lacking", lambda _: "there is no CIFAR-10")
    which, records, source = natbench_build.again(2, 1, "smoke")
    assert (which, records) == ([], [])
    assert source == "nothing to show yet, because there is no CIFAR-10"
