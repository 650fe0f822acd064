"""make bench: what it counts, how it takes turns, and that every figure is there. No times."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from natlib import NatlibError, speed, zoo
from natlib.cost import edge_cost
from natlib.handcrafted import MACROS, scaled
from natlib.macro import MacroConfig
from natlib.network import CellNetwork
from natlib.primitives import PRIMITIVES, primitive
from natlib.records import REPOSITORY
from tests.plain_network import supernet_forward

sys.path.append(str(REPOSITORY / "scripts"))
import bench
import measure


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """What one quick run wrote, what it printed, and the file."""
    runs = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", "--quick"],
        cwd=REPOSITORY,
        env={**os.environ, "NATLIB_RUNS": str(runs)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in runs.iterdir()] == ["bench.json"]  # no temporary file is left
    return json.loads((runs / "bench.json").read_text()), done.stdout, runs / "bench.json"


def test_on_two_cores_the_better_way_counts() -> None:
    times = {"ours": [1.0, 1.2, 1.1], "plain": [3.0] * 3, "workers": [1.8, 2.0, 1.6]}
    assert bench.better_on_two(times).endswith("two processes, a thread each")
    assert times == {"ours": [0.9, 1.0, 0.8], "plain": [3.0] * 3}
    times = {"ours": [1.0, 1.2, 1.1], "workers": [2.4, 2.4, 2.4]}
    assert bench.better_on_two(times).endswith("one process, two threads")
    assert times == {"ours": [1.0, 1.2, 1.1]}


def _works() -> list[Callable[[], None]]:
    return [lambda: None]


def test_a_process_beside_works_while_it_is_not_waited_for() -> None:
    with measure.Elsewhere(_works, usual_memory=False) as other:
        other.begin(0)
        other.finish()
        other.works[0]()
        with pytest.raises(NatlibError, match="has ended"):
            other.begin(1)  # there is no such work: the process fails
            other.finish()


def test_at_both_peaks_operations_and_bytes_take_their_time_in_turn() -> None:
    ours = {"of_matmul": 0.25, "of_copy": 0.5}
    figure = {"ratio": {"median": 1.5}, "roofline": {"ours": ours, "plain": {}}}
    assert speed.best_ratio(figure) == pytest.approx(2.0)
    assert math.isnan(speed.best_ratio({**figure, "ratio": None}))
    assert math.isnan(speed.best_ratio({**figure, "roofline": {}}))


def test_the_released_code_stands_beside_ours(tmp_path: Path) -> None:
    fast = {"name": "step", "size": "published", "threads": 2, "unit": "images/s"}
    small = {"name": "memory", "size": "", "threads": 1, "unit": "MB"}
    figures = [{**fast, "ours": {"median": 46.0}}, {**small, "ours": {"median": 1000.0}}]
    file = tmp_path / "released.csv"
    file.write_text(
        "name,size,threads,unit,value\nstep,published,2,images/s,23\nmemory,,1,MB,2500\n"
    )
    assert speed.released_table({"figures": figures}, file).to_dict("list") == {
        "what": ["step, published, 2 cores", "memory"],
        "released": ["23 images/s", "2,500 MB"],
        "ours": ["46 images/s", "1,000 MB"],
        "times better": ["2", "2.5"],
    }
    with pytest.raises(NatlibError, match="no figure memory, , 1, MB, 2500"):
        speed.released_table({"figures": figures[:1]}, file)


# --- the quick run --------------------------------------------------------------------------------

BOTH = [(size, threads) for size in ("published", "reduced") for threads in (1, 2)]
EXPECTED = {
    "peak memory, supernet training step": [("published", 1)],
    "supernet training step": BOTH,
    "reward evaluation": BOTH,
    "derive, one candidate": BOTH,
    "policy, forward": [("16 cells a call", 1)],
    "policy, update": [("16 cells a call", 1)],
    "training DARTS": BOTH,
    "training ResNet20": BOTH,
    "data: gather, crop, flip, normalise": [("published", 1)],
    "import natlib": [("", 1)],
    "import torch": [("", 1)],
    "import natlib.search": [("", 1)],
    "memory after that import": [("", 1)],
}
ALONE = {"import natlib", "import torch", "import natlib.search", "memory after that import"}


def test_a_run_has_every_figure(quick: tuple[dict[str, Any], str, Path]) -> None:
    content, out, _ = quick
    found: dict[str, list[tuple[str, int]]] = {}
    for f in content["figures"]:
        found.setdefault(f["name"], []).append((f["size"], f["threads"]))
        lines = [line for line in out.splitlines() if line.startswith(f["name"])]
        assert any(f["size"] in line and f["unit"] in line for line in lines)
    cores = min(2, os.cpu_count() or 1)
    assert found == {n: [w for w in where if w[1] <= cores] for n, where in EXPECTED.items()}
    assert set(content["peaks"]) == {str(n + 1) for n in range(cores)}
    assert [c["along"] for c in content["scaling"]] == [
        "cells", "channels", "architectures", "rollouts",
    ]  # fmt: skip
    assert content["quick"] and len(content["machine"]["load"]) == 3
    assert content["versions"]["torch"] == str(torch.__version__)
    assert content["machine"]["cpu"] and content["date"].endswith("+00:00")


def is_spread(values: dict[str, float]) -> bool:
    return 0 < values["low"] <= values["median"] <= values["high"] and values["n"] >= 2


def test_figures_are_positive_and_have_a_spread(quick: tuple[dict[str, Any], str, Path]) -> None:
    content, _, _ = quick
    for peak in content["peaks"].values():
        assert all(is_spread(peak[k]) for k in ("matmul", "copy", "cache"))
    for f in content["figures"]:
        assert is_spread(f["ours"])
        assert (f["plain"] is None) == (f["ratio"] is None) == (f["name"] in ALONE)
        if f["plain"]:
            assert is_spread(f["plain"]) and is_spread(f["ratio"])
    for curve in content["scaling"]:
        assert len(curve["values"]) == len(curve["seconds"]) == len(curve["memory_mb"])
        assert all(map(is_spread, curve["seconds"])) and min(curve["memory_mb"]) > 0
        assert all(math.isfinite(fit["exponent"]) for fit in curve["exponents"].values())


def test_shares_are_of_the_measured_peaks(quick: tuple[dict[str, Any], str, Path]) -> None:
    content, _, _ = quick
    counted = [f for f in content["figures"] if f["roofline"]]
    assert {f["group"] for f in counted} == {
        "supernet", "rewards", "derive", "policy", "scratch", "data",
    }  # fmt: skip
    for f in counted:
        peak = content["peaks"][str(f["threads"])]
        for reached in f["roofline"].values():
            assert reached["gbs"] > 0
            share = reached["gflops"] / peak["matmul"]["median"]
            assert reached["of_matmul"] == pytest.approx(share)
            assert reached["of_copy"] == pytest.approx(reached["gbs"] / peak["copy"]["median"])
            assert reached["intensity"] == pytest.approx(reached["gflops"] / reached["gbs"])
        assert (f["roofline"]["ours"]["gflops"] > 0) == (f["group"] != "data")


def test_tables_and_pictures_show_all_of_it(quick: tuple[dict[str, Any], str, Path]) -> None:
    content, _, path = quick
    read = speed.read_bench(path)
    assert read == content
    assert len(speed.released_table(read)) == 8
    table = speed.speed_table(read)
    assert len(set(table["what"])) == len(table) == len(read["figures"])
    for figure, shown in zip(read["figures"], table["target"], strict=True):
        if target := figure["target"]:
            assert shown.endswith("✓" if figure["ratio"]["median"] >= target else "✗")
        else:
            assert shown == "–"
    beside = speed.speed_table(read, here={**read, "figures": read["figures"][:1]})
    assert list(beside["here"][1:]) == ["–"] * (len(table) - 1)
    assert beside["here"][0] == beside["ours"][0]
    assert len(speed.share_table(read)) == sum(bool(f["roofline"]) for f in read["figures"])
    assert list(speed.growth_table(read)["against"]) == [c["along"] for c in read["scaling"]]
    assert "figures mean nothing" in speed.origin_table(read)["reference"].iloc[-1]
    roofline = speed.plot_roofline(read)
    drawn = [f for f in read["figures"] if f["threads"] == 1 and f["group"] not in
             ("data", "import", "memory")]  # fmt: skip
    for f in drawn:
        assert speed.label(f) in roofline.alt
    (legend,) = roofline.legends
    assert [t.get_text() for t in legend.get_texts()] == [speed.label(f) for f in drawn]
    for what in ("seconds", "memory_mb"):
        picture = speed.plot_growth(read, what)
        titles = [axes.get_title(loc="left") for axes in picture.axes]
        fits = [c["exponents"][what]["exponent"] for c in read["scaling"]]
        assert titles == [f"exponent {fit:.2f}" for fit in fits]
    with pytest.raises(NatlibError, match="'seconds' or 'memory_mb'"):
        speed.plot_growth(read, "hours")


def test_figures_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match="make bench"):
        speed.read_bench(tmp_path / "bench.json")
    (tmp_path / "bench.json").write_text('{"quick": false, "figures": []}')
    with pytest.raises(NatlibError, match="lacks machine, peaks, scaling, versions"):
        speed.read_bench(tmp_path / "bench.json")


# --- the command line -----------------------------------------------------------------------------


def test_only_full_runs_become_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, reference = tmp_path / "bench.json", tmp_path / "results" / "reference.json"
    monkeypatch.setattr(bench, "TARGET", measured)
    monkeypatch.setattr(bench, "REFERENCE", reference)
    content = {"quick": True, "date": "today", "machine": {"cpu": "a core", "load": [0.1, 0, 0]}}
    with pytest.raises(NatlibError, match="make bench"):
        bench.accept()
    measured.write_text(json.dumps(content))
    with pytest.raises(NatlibError, match="quick"):
        bench.accept()
    assert not reference.exists()
    for load, warned in ((0.1, False), (3.0, True)):
        content |= {"quick": False, "machine": {"cpu": "a core", "load": [load, 0, 0]}}
        measured.write_text(json.dumps(content))
        assert bench.accept() == 0
        assert json.loads(reference.read_text()) == content
        assert ("warning" in capsys.readouterr().out) == warned


def test_an_unknown_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "everything"])
    with pytest.raises(NatlibError, match="'everything' is not one of memory, supernet"):
        bench.main()


def test_the_reduced_setting_is_that_of_the_notebooks() -> None:
    plan = bench.full_plan()
    published, reduced = plan.sizes
    assert (published.macro, published.batch, published.nodes) == (MacroConfig(20, 8), 64, 4)
    entry = bench.parameters_at(bench.read_experiments(), "04_policy", "reduced")
    assert reduced.macro.channels == entry["macro"]["channels"]
    assert reduced.macro.image_size == entry["images"]["image_size"]
    assert reduced.batch == entry["supernet"]["batch"]
    trained = {(name, size.name): size.macro for name, size in plan.scratch}
    assert trained["DARTS", "published"] == MacroConfig(36, 20)
    assert trained["ResNet20", "published"] == MACROS["ResNet20", "CIFAR-10"]
    table = bench.parameters_at(bench.read_experiments(), "table_1_handcrafted", "reduced")
    images, width = (table["comparison"][k] for k in ("images", "width"))
    small = scaled(MACROS["ResNet20", "CIFAR-10"], width, 10, images["image_size"])
    assert trained["ResNet20", "reduced"] == small


def test_a_figure_is_made_from_seconds_operations_and_bytes() -> None:
    made = bench.Bench(bench.quick_plan())
    peak = {"matmul": 50.0, "copy": 8.0, "cache": 30.0}
    made.peaks[2] = {k: measure.Spread(v, v, v, 3) for k, v in peak.items()}
    times = {"ours": [1.0, 2.0, 4.0], "plain": [3.0, 2.0, 8.0]}
    for unit in ("images/s", "s"):
        made.timed(
            "derive", "a figure", "small", unit, times, 10, threads=2, flops=20e9,
            moved={"ours": 4 * 10**9, "plain": 16 * 10**9}, target=2.0, note="why",
        )  # fmt: skip
    rate, seconds = made.figures
    assert rate.ours == measure.Spread(5.0, 3.75, 7.5, 3)
    assert rate.plain == measure.Spread(10 / 3, (10 / 3 + 1.25) / 2, (10 / 3 + 5) / 2, 3)
    # The ratio is taken round by round: 3, 1 and 2.
    assert rate.ratio == seconds.ratio == measure.Spread(2.0, 1.5, 2.5, 3)
    assert seconds.ours == measure.Spread(0.2, pytest.approx(0.15), pytest.approx(0.3), 3)
    assert rate.roofline["ours"] == {
        "gflops": 10.0, "gbs": 2.0, "intensity": 5.0, "of_matmul": 0.2, "of_copy": 0.25,
    }  # fmt: skip
    assert rate.roofline["plain"]["of_copy"] == pytest.approx(16 / 3 / 8)
    assert (rate.target, rate.note, rate.threads) == (2.0, "why", 2)


# --- instruments ----------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when a work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.done.append(name)
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", made)
    return made


def test_versions_take_turns_and_the_order_turns_round(clock: Clock) -> None:
    works = {
        "a": [clock.work("a0", 1.0), clock.work("a1", 2.0)],
        "b": [clock.work("b0", 5.0), clock.work("b1", 6.0)],
    }
    assert measure.alternate(works, 0.0, 3) == {"a": [3.0] * 3, "b": [11.0] * 3}
    assert clock.done == [
        "a0", "b0", "a1", "b1", "b0", "a0", "b1", "a1", "a0", "b0", "a1", "b1",
    ]  # fmt: skip


def test_it_goes_on_until_the_time_is_up(clock: Clock) -> None:
    found = measure.alternate({"": [clock.work("", 0.5)]}, 4.9, 2)
    assert found[""] == [0.5] * 10


def test_short_works_are_repeated_within_a_measurement(clock: Clock) -> None:
    works = {"short": [clock.work("s", 0.001)], "long": [clock.work("l", 0.1)]}
    found = measure.alternate(works, 0.0, 2)
    assert found["short"] == pytest.approx([0.001] * 2)
    assert found["long"] == pytest.approx([0.1] * 2)
    # One round to see that it is too short, then two of twenty each.
    assert clock.done.count("s") == 1 + 2 * 20
    assert clock.done.count("l") == 1 + 2


def test_spread_is_median_and_quartiles() -> None:
    assert measure.Spread.of([4.0, 1.0, 2.0, 5.0, 3.0]) == measure.Spread(3.0, 2.0, 4.0, 5)


def moved(work: Callable[[], object]) -> int:
    return int(measure.traffic([work]))


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (8, 1)])
def test_one_convolution_moves_input_weights_and_output(groups: int, stride: int) -> None:
    x, w = torch.rand(3, 8, 10, 10), torch.rand(16, 8 // groups, 3, 3)
    side = 10 // stride
    expected = 4 * (3 * 8 * 100 + 16 * 8 // groups * 9 + 3 * 16 * side**2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert moved(lambda: F.conv2d(x, w, None, stride, 1, 1, groups)) == expected


def test_operations_of_a_layer_are_its_exact_multiply_adds_twice() -> None:
    p, c, size = primitive("conv_3x3"), 8, 10
    x, w = torch.rand(1, c, size, size), torch.rand(c, c, 3, 3)
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, padding=1)
    assert counter.get_total_flops() == 2 * edge_cost(p, c, size, 1).madds == 2 * 9 * c * c * 100


def test_operations_of_a_network_are_what_pytorch_counts() -> None:
    macro, genotype = MacroConfig(4, 3, image_size=16), zoo.get("DARTS")
    network = CellNetwork(macro, genotype=genotype)
    with FlopCounterMode(display=False) as counter:
        supernet_forward(network, torch.rand(5, 3, 16, 16), genotype)
    assert counter.get_total_flops() == 5 * bench.forward_flops([genotype], macro)


def test_traffic_counts_what_moves() -> None:
    n = 120
    x, y = torch.rand(4, 30), torch.rand(4, 30)
    index = torch.tensor([0, 2])
    like = torch.rand(30)
    counted: dict[str, tuple[Callable[[], object], int]] = {
        "views": (lambda: x.view(-1)[3:].reshape(9, 13).t().expand(2, 13, 9), 0),
        "allocation": (lambda: torch.empty_like(x), 0),
        "zeros": (lambda: torch.zeros_like(x), 4 * n),
        "sum of two": (lambda: x + y, 4 * 3 * n),
        "of one twice": (lambda: x * x, 4 * 2 * n),
        "in place": (lambda: x.add_(y), 4 * 3 * n),
        "fill": (lambda: x.fill_(1.0), 4 * n),
        "copy": (lambda: x.copy_(y), 4 * 2 * n),
        "result given": (lambda: torch.maximum(x, y, out=x), 4 * 3 * n),
        "concatenation": (lambda: torch.cat([x, y]), 4 * 4 * n),
        "some rows": (lambda: x.index_select(0, index), 4 * 2 * 60 + 8 * 2),
        "rows by index": (lambda: x[index], 4 * 2 * 60 + 8 * 2),
        "expanded": (lambda: like.expand(4, 30) + x, 4 * (30 + 2 * n)),
        "list of tensors": (lambda: torch._foreach_add_([x, y], 1.0), 4 * 4 * n),
        "whole numbers": (lambda: index + index, 8 * 2 * 2),
    }  # fmt: skip
    with torch.no_grad():
        assert {k: moved(work) for k, (work, _) in counted.items()} == {
            k: expected for k, (_, expected) in counted.items()
        }


def test_traffic_counts_the_backward_pass() -> None:
    a, b = (torch.rand(50, requires_grad=True) for _ in range(2))
    g = torch.rand(50)
    # Forward a * b, backward g * b and g * a: three tensors each.
    assert moved(lambda: (a * b).backward(g)) == 4 * 9 * 50


@given(st.floats(-3, 3), st.floats(0.01, 100), st.lists(st.integers(1, 1000), min_size=2,
       max_size=8, unique=True))  # fmt: skip
def test_the_fit_recovers_a_power_law(exponent: float, factor: float, x: list[int]) -> None:
    found = measure.power_law(x, [factor * v**exponent for v in x])
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.factor == pytest.approx(factor, rel=1e-4)
    assert found.last == pytest.approx(exponent, abs=1e-6)
    assert (found.error is None) == (len(x) == 2)
    if found.error is not None:
        assert found.error < 1e-6


def test_the_fit_says_how_sure_it_is() -> None:
    # Logarithms (base 2) 0, 1, 2 against 0, 2, 1: slope 1/2, residual sum of squares 3/2.
    found = measure.power_law([1, 2, 4], [1, 4, 2])
    assert found.exponent == pytest.approx(0.5)
    assert found.error == pytest.approx(math.sqrt(1.5 / 1 / 2))
    assert found.last == pytest.approx(-1.0)


@pytest.mark.parametrize(("x", "y"), [([2], [1]), ([2, 2], [1, 2]), ([0, 1], [1, 1]),
                                      ([1, 2], [1, -1]), ([1, 2, 3], [1, 2])])  # fmt: skip
def test_no_power_law_through_such_points(x: list[float], y: list[float]) -> None:
    with pytest.raises(NatlibError, match="pairs above 0"):
        measure.power_law(x, y)


def fill_megabytes(count: int) -> list[Callable[[], object]]:
    kept: list[torch.Tensor] = []
    return [lambda: kept.append(torch.ones(count, 2**18))]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets peaks")
def test_memory_of_a_fresh_process_is_that_of_its_work() -> None:
    with measure.processes(1, fresh=True) as pool:
        jobs = [pool.submit(measure.memory, fill_megabytes, count) for count in (100, 300)]
        (start, peak), (later_start, later_peak) = (job.result() for job in jobs)
    assert peak - start == pytest.approx(100, abs=10)
    assert later_peak - later_start == pytest.approx(300, abs=10)
    assert later_start == pytest.approx(start, abs=10)  # nothing is left of the first


# --- ours and plain are the same mathematics (the supernet: test_network.py) ----------------------


@pytest.mark.parametrize("name", ["DARTS", "ResBlock"])
def test_standalone_networks_agree(name: str) -> None:
    genotype = zoo.get(name)
    network = CellNetwork(MacroConfig(4, 3, image_size=16), genotype=genotype).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    ours = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(supernet_forward(network, images, genotype), ours)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CellNetwork]]:
    """The networks that the bench makes, in double precision."""
    made: list[CellNetwork] = []
    real = bench.make_network

    def make(*arguments: Any) -> CellNetwork:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(bench, "make_network", make)
    torch.set_default_dtype(torch.float64)
    yield made
    torch.set_default_dtype(torch.float32)


def test_training_steps_agree(networks: list[CellNetwork]) -> None:
    size = bench.Size("", MacroConfig(4, 3, image_size=8), 4, 6, 0)
    # Without null: behind it, plain has gradients of zero where ours has none at all, and weight
    # decay then differs for a step.
    drawn = bench.random_genotypes(4, 40)
    genotypes = [
        g for g in drawn if all(e.primitive != "null" for _, c in g.cells for e in c.edges)
    ]
    assert len(genotypes) > 3
    for plain in (False, True):
        for work in bench.training_steps(size, genotypes, plain):
            work()
    ours, literal = (network.state_dict() for network in networks)
    untrained = CellNetwork(size.macro, nodes=4, primitives=PRIMITIVES).state_dict()
    assert sum(not torch.equal(untrained[name], value) for name, value in ours.items()) > 50
    for name, value in ours.items():
        torch.testing.assert_close(literal[name], value, msg=name)
    assert literal["stem.weight"].is_contiguous()


def test_rewards_agree(networks: list[CellNetwork]) -> None:
    size = bench.Size("", MacroConfig(4, 3, image_size=8), 4, 30, 30)
    genotypes = bench.random_genotypes(4, 12)
    ours, plain = (
        [work() for work in bench.reward_evaluations(size, genotypes, literal)]
        for literal in (False, True)
    )
    assert len(ours) == 6 and any(value != [0.0] for value in ours)
    assert [value for (value,) in ours] == pytest.approx(plain)


def test_single_cells_are_those_of_the_batch() -> None:
    policy, _, _ = bench.make_policy()
    genotypes = bench.random_genotypes(4, 3)
    together = policy.log_probabilities(policy.encode(genotypes))
    one = [policy.log_probabilities(c) for g in genotypes for c in bench.single_cells(policy, g)]
    torch.testing.assert_close(torch.cat(one), together)
    assert len(one) == 6
