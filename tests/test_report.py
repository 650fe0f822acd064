"""Figures, tables, intervals and claims: what they say, and that they say it of the right thing."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from natlib import NatlibError, report, transitions, zoo
from natlib.genotype import Cell, Edge, Genotype
from natlib.primitives import PRIMITIVES, Cost, primitive
from natlib.records import Record

COSTS = {n: primitive(n).cost(128, 32) for n in PRIMITIVES}


def edges(*items: tuple[str, int, int]) -> tuple[Edge, ...]:
    return tuple(Edge(s, t, p) for p, s, t in items)


TWICE = Cell(
    edges(("skip_connect", 0, 2), ("sep_conv_3x3", 0, 2), ("null", 1, 3), ("conv_3x3", 2, 3)),
    (2, 3),
)


def labels(chart: report.Chart) -> list[str]:
    return [t.get_text() for axes in chart.axes for t in axes.texts]


def bold(chart: report.Chart) -> list[str]:
    return [t.get_text() for a in chart.axes for t in a.texts if t.get_weight() == "bold"]


# Cells


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_every_published_genotype_draws_with_all_its_labels_apart(name: str) -> None:
    genotype = zoo.get(name)
    chart = report.draw_genotype(genotype, title=name)
    chart.draw_without_rendering()
    for axes, (_, cell) in zip(chart.axes, genotype.cells, strict=True):
        shorts = [report.short_name(e.primitive) for e in cell.edges]
        texts = [t for t in axes.texts if t.get_text()]
        assert sorted(t.get_text() for t in texts if t.get_text() in set(shorts)) == sorted(shorts)
        boxes = [t.get_window_extent() for t in texts]
        canvas = axes.get_window_extent()
        for i, box in enumerate(boxes):
            assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), texts[i]


def test_drawing_marks_exactly_the_changed_edges() -> None:
    before, after = zoo.get("DARTS").normal, zoo.get("NATv2_DARTS").normal
    changed = [
        report.short_name(a.primitive)
        for a, b in zip(after.edges, before.edges, strict=True)
        if a.primitive != b.primitive
    ]
    marked = [t for t in bold(report.draw_cell(after, before, title="t")) if not t.isdigit()]
    assert sorted(marked) == sorted([*changed, "t"])


def test_drawing_refuses_to_compare_two_different_graphs() -> None:
    with pytest.raises(NatlibError, match="different graphs"):
        report.draw_cell(zoo.get("DARTS").normal, zoo.get("ENAS").normal)


def test_both_edges_between_the_same_two_nodes_are_drawn() -> None:
    chart = report.draw_cell(TWICE)
    assert {"skip", "sep 3", "null", "conv 3"} <= set(labels(chart))
    assert "node 2 adds skip_connect of 0; sep_conv_3x3 of 0" in chart.alt
    assert "dotted: null" in labels(chart)[-1]


def test_alternative_text_names_what_an_edge_was() -> None:
    other = TWICE.with_primitives(["null", "sep_conv_3x3", "null", "conv_5x5"])
    text = report.describe_cell(TWICE, other)
    assert "skip_connect of 0, changed from null" in text
    assert "conv_3x3 of 2, changed from conv_5x5" in text
    assert text.count("changed") == 2


def test_a_chart_is_the_same_svg_each_time_and_carries_its_alternative() -> None:
    first, second = (report.draw_cell(TWICE, title='a "b"') for _ in range(2))
    assert first.svg() == second.svg()
    assert ElementTree.fromstring(first.svg()).tag.endswith("svg")
    bundle = first._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert 'alt="a &quot;b&quot;: node 2 adds' in bundle["text/html"]
    assert "http" not in bundle["text/html"]


def test_dot_holds_every_edge_and_the_concat() -> None:
    text = report.cell_to_dot(TWICE)
    assert text.count("n0 -> n2") == 2
    assert 'n1 -> n3 [label="null", style=dotted]' in text
    assert re.findall(r"(n\d) -> out", text) == ["n2", "n3"]


def test_short_names_are_distinct_and_unknown_ones_refused() -> None:
    assert report.short_name("sep_conv_3x3") == "sep 3"
    assert report.short_name("conv_7x1_1x7") != report.short_name("conv_1x7_7x1")
    assert len({report.short_name(n) for n in PRIMITIVES}) == len(PRIMITIVES)
    with pytest.raises(NatlibError, match="sep_conv_9x9"):
        report.short_name("sep_conv_9x9")


# Search space


def arrows(rule: transitions.Transitions) -> set[tuple[str, str]]:
    chart = report.plot_transition_scheme(rule.pairs(), rule.primitives, COSTS)
    text = chart.alt.split("follow from them: ")[1].rstrip(".")
    return {tuple(a.split(" to ")) for a in text.split("; ")}  # type: ignore[misc]


def test_scheme_of_natpp_is_a_chain_of_kinds_with_kernels_shrinking() -> None:
    chain = ["conv", "sep_conv", "dil_conv", "max_pool", "avg_pool", "skip", "null"]
    kinds = {*pairwise(chain), ("avg_pool", "max_pool"), ("null", "skip")}
    kernels = {(f"{k}_5x5", f"{k}_3x3") for k in chain[:5]} | {("conv_3x3", "conv_1x1")}
    assert arrows(transitions.natpp()) == kinds | kernels


def test_scheme_of_nat_leads_every_operation_to_skip_without_changing_kernels() -> None:
    kinds = {"conv", "sep_conv", "dil_conv", "max_pool", "avg_pool"}
    expected = {(k, "skip") for k in kinds} | {("skip", "null"), ("null", "skip")}
    assert arrows(transitions.nat()) == expected


def test_mask_plot_counts_and_marks_pairs() -> None:
    names = ("conv_3x3", "skip_connect", "null")
    mask = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1]], dtype=bool)
    chart = report.mask_plot(mask, names, {("null", "skip_connect")}, "rule", "dearer")
    assert "rule: 7 allowed pairs" in chart.alt
    assert "dearer: null to skip_connect" in chart.alt
    crosses = [line for line in chart.axes[0].lines if len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(1, 2)]
    with pytest.raises(NatlibError, match=r"\(2, 3\)"):
        report.mask_plot(mask[:2], names)


def test_cost_bars_show_the_costs() -> None:
    chart = report.plot_primitive_costs({"conv_5x5": Cost(409_600, 419_400_000), "null": Cost()})
    assert {"409.6", "419.4", "0.0"} <= set(labels(chart))


# Statistics

finite = st.floats(-1e3, 1e3, allow_nan=False).map(lambda v: round(v, 3))


@given(st.lists(finite, min_size=2, max_size=20))
def test_interval_is_students(values: list[float]) -> None:
    got = report.interval(values)
    assert got.low <= got.mean <= got.high and got.n == len(values)
    if got.sd > 0:
        low, high = stats.t.interval(
            0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
        )
        assert got.low == pytest.approx(low) and got.high == pytest.approx(high)
    assert report.interval(values, 0.5).high <= got.high


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=20))
def test_paired_difference_is_of_the_pairs_and_changes_sign(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = report.paired_difference(a, b), report.paired_difference(b, a)
    assert there.mean == pytest.approx(np.mean(b) - np.mean(a), abs=1e-9)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one"),
        ([1.0, math.nan], "finite"),
        ([[1, 2]], "flat"),
    ],
)
def test_interval_refuses_what_has_none(values: list[float], message: str) -> None:
    with pytest.raises(NatlibError, match=message):
        report.interval(values)


def test_a_single_value_has_no_bounds_and_decides_nothing() -> None:
    one = report.paired_difference([0.5], [0.52])
    assert (one.n, one.mean) == (1, pytest.approx(0.02))
    assert math.isnan(one.low) and math.isnan(one.high)
    assert report.format_interval(one) == report.mean_change([0.5], [0.52]) == "+2.0 (n = 1)"
    claim = report.Claim("a", "b", "c", one)
    assert claim.verdict(claim.p) == "cannot be decided at this scale"
    assert "NAT +2.0 (n = 1)." in report.plot_intervals({"NAT": one}, "points").alt


def test_pairs_need_equal_lengths_and_confidence_a_share() -> None:
    with pytest.raises(NatlibError, match="2 and 3"):
        report.paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(NatlibError, match="95"):
        report.interval([1, 2], confidence=95)


def test_interval_formats() -> None:
    i = report.Interval(0.015, 0.009, 0.0214, 200, 0.1)
    assert report.format_interval(i) == "+1.5 [0.9, 2.1] (n = 200)"
    assert report.format_interval(i, percent=False, signed=False, digits=3) == (
        "0.015 [0.009, 0.021] (n = 200)"
    )
    zero = report.Interval(-0.0001, -0.0002, 0.0, 3, 0.1)
    assert report.format_interval(zero) == "+0.0 [0.0, 0.0] (n = 3)"


def test_rank_correlation_of_known_orders() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    same, opposite = report.rank_correlation(x, np.exp(x)), report.rank_correlation(x, x[::-1])
    assert (same.tau, same.rho) == pytest.approx((1, 1))
    assert (opposite.tau, opposite.rho) == pytest.approx((-1, -1))
    mixed = report.rank_correlation(x, [2, 1, 4, 3, 5])
    assert (mixed.tau, mixed.rho) == (pytest.approx(0.6), pytest.approx(0.8))
    assert mixed.low < mixed.rho < mixed.high
    for bad in ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0]):
        with pytest.raises(NatlibError):
            report.rank_correlation(bad, x[: len(bad)])


# Plots


def test_curves_draw_the_mean_over_seeds() -> None:
    chart = report.plot_curves({"a": [[1, 3], [3, 5]], "b": [0, 1]}, "step", "reward")
    drawn = {line.get_label(): list(line.get_ydata()) for line in chart.axes[0].lines}
    assert drawn == {"a": [2, 4], "b": [0, 1]}
    assert len(chart.axes[0].collections) == 1  # a band only where there are seeds
    assert "a from 2 to 4 (n = 2)" in chart.alt
    with pytest.raises(NatlibError, match="'b' has 2 steps but x has 3"):
        report.plot_curves({"b": [0, 1]}, "step", "reward", x=[1, 2, 3])


def test_curves_of_equal_colour_differ_in_dashes() -> None:
    chart = report.plot_curves({str(i): [0, i] for i in range(9)}, "step", "y")
    looks = {(line.get_color(), line.get_linestyle()) for line in chart.axes[0].lines}
    assert len(looks) == 9


def test_scatter_prints_its_correlation() -> None:
    chart = report.plot_scatter([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], "x", "y")
    assert "Spearman ρ = 0.80" in chart.axes[0].get_title(loc="left")
    assert "n = 5" in chart.alt


def test_interval_plot_shows_the_numbers_and_the_zero_line() -> None:
    i = report.Interval(0.015, 0.009, 0.021, 200, 0.1)
    chart = report.plot_intervals({"NAT++": i}, "points")
    ticks = [t.get_text() for t in chart.axes[0].get_yticklabels()]
    assert ticks == ["NAT++\n+1.5 [0.9, 2.1] (n = 200)"]
    assert list(chart.axes[0].lines[0].get_xdata()) == [0, 0]
    assert list(chart.axes[0].lines[1].get_xdata()) == pytest.approx([0.9, 2.1])


# Tables


def test_the_interval_of_a_rank_correlation_has_its_own_p() -> None:
    rng = np.random.default_rng(0)
    for n in (8, 40):
        found = [report.rank_correlation(*rng.random((2, n))).interval for _ in range(400)]
        # Of unrelated scores one in twenty is below 5 %, as often as the interval leaves zero out.
        assert 0.02 < np.mean([report.p_value(i) < 0.05 for i in found]) < 0.08
        for i in found:
            assert (report.p_value(i) < 0.05) == (not i.low <= 0 <= i.high)
    x = np.arange(10.0)
    assert report.ranking(x, x).startswith("+1.00 [")


def test_p_values_are_written_as_such() -> None:
    frame = pd.DataFrame({"what": list("abcd"), "p": [1e-9, 0.04, 1.0, float("nan")]})
    frame["p (Holm)"] = frame["p"]
    shown = re.findall(r"<td[^>]*>([^<]*)</td>", report.Table(frame)._repr_html_())
    written = ["&lt;\u00a00.001", "0.040", "1.000", "–"]
    assert shown == [cell for name, p in zip("abcd", written, strict=True) for cell in (name, p, p)]


def test_table_escapes_formats_and_scrolls() -> None:
    frame = pd.DataFrame({"name": ["<b>"], "x": [1.23456], "n": [12345], "gone": [math.nan]})
    html = report.Table(frame, "a & b", {"x": ".2f"})._repr_html_()
    ElementTree.fromstring(html.replace("–", "-"))
    assert "overflow-x:auto" in html and "<caption>a &amp; b</caption>" in html
    assert "<b>" not in html and "&lt;b&gt;" in html
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells == ["&lt;b&gt;", "1.23", "12,345", "–"]


def test_numbers_of_a_column_have_equal_decimals() -> None:
    frame = pd.DataFrame(
        {"a": [95.4, 93.21], "b": [1 / 3, 2.0], "c": [1.0, 2000.0], "d": [True, False]}
    )
    html = report.Table(frame)._repr_html_()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells == ["95.40", "0.3333", "1", "yes", "93.21", "2", "2,000", "no"]


def test_published_numbers_are_all_read() -> None:
    frame = report.load_reported()
    nat = frame[(frame.table == "Table 2 (NAS-based)") & (frame.architecture == "DARTS")]
    row = nat[(nat.dataset == "CIFAR-10") & (nat.method == "NAT")].iloc[0]
    assert (row.params_m, row.madds_m, row.top1) == (3.0, 483, 97.28)
    assert len(frame) == report.REPORTED.read_text().count("\n") - 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("93.56", "935.6", r"line 2: top1 '935.6' is not a number of 0..100"),
        ("93.56", "n/a", "line 2: top1 'n/a'"),
        ("15.2,", "-15.2,", "line 2: params_m"),
        (",VGG16,original", ",,original", "line 2: architecture is empty"),
        ("params_m", "params", "columns are"),
        ("CIFAR-10,VGG16,NAO", "CIFAR-10,VGG16,original", "line 3: the same"),
    ],
)
def test_reported_names_the_faulty_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = report.REPORTED.read_text()
    path = tmp_path / "reported.csv"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(NatlibError, match=message):
        report.load_reported(path)


def test_reported_missing_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(NatlibError, match="no such file"):
        report.load_reported(tmp_path / "none.csv")


# Claims


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (report.Interval(2, 1, 3, 5, 1), "holds"),
        (report.Interval(-2, -3, -1, 5, 1), "does not hold"),
        (report.Interval(1, -1, 3, 5, 1), "cannot be decided at this scale"),
        (report.Interval(1, 0, 2, 5, 1), "cannot be decided at this scale"),
        (True, "holds"),
        (False, "does not hold"),
        (None, "cannot be decided at this scale"),
    ],
)
def test_verdict_follows_from_the_evidence(
    evidence: report.Interval | bool | None, verdict: str
) -> None:
    claim = report.Claim("text", "NAT, Sec. 4", "04_policy", evidence, "seen")
    frame = report.scorecard([claim])
    assert claim.verdict(claim.p) == verdict == frame.verdict[0]
    assert frame["what we found"][0].startswith("seen")
    html = report.Table(frame, stacked=True)._repr_html_()
    assert f"{report.VERDICTS[verdict][1]} {verdict}" in html
    assert '<a href="04_policy.ipynb">04_<wbr>policy</a>' in html


def test_a_scorecard_corrects_for_the_number_of_its_claims() -> None:
    one = report.Claim("a", "b", "c", report.Interval(2, 0.24, 3.76, 5, 1.42))
    assert 0.02 < one.p < 0.04
    assert report.scorecard([one]).verdict[0] == "holds"
    exact = report.Claim("a", "b", "c", True)
    assert list(report.scorecard([one, exact]).verdict) == ["holds", "holds"]
    both = report.scorecard([one, one, exact])
    assert both["what we found"][0].endswith(f"(n = 5), p\u00a0=\u00a0{2 * one.p:.3f}")
    assert "p" not in both["what we found"][2]
    sure = report.Claim("a", "b", "c", report.Interval(2, 1.9, 2.1, 50, 0.1))
    assert report.scorecard([sure])["what we found"][0].endswith("p\u00a0<\u00a00.001")
    assert list(both.verdict) == ["cannot be decided at this scale"] * 2 + ["holds"]


# Provenance


def record(key: str, seed: int, wall: float, torch: str = "2.14.1") -> Record:
    provenance = {
        "python": "3.11.7", "torch": torch, "numpy": "2.4", "device": "cpu", "cpu": "Some CPU",
        "threads": 1, "git": "0123456789abcdef", "dirty": True, "wall_seconds": wall,
        "peak_memory_mb": 1234.5,
    }  # fmt: skip
    config = {"type": "Outer", "inner": {"type": "Inner", "seed": seed}, "rate": 0.1}
    return Record("kind", key, 1, config, "f" * 64, {}, {}, {}, provenance, Path("record.json"))


def test_footer_sums_time_once_a_record_and_lists_what_differs() -> None:
    records = [record("a", 3, 30), record("b", 4, 40, "2.15.0"), record("a", 3, 30)]
    frame = report.provenance_footer(records, "reduced", "CIFAR-10").frame
    values = dict(zip(frame.what, frame.value, strict=True))
    assert values["data"] == "CIFAR-10 (checksum ffffffffffff)"
    assert values["results"] == "2 records, seeds 3, 4"
    assert values["computing time, summed over processes"] == "1 min 10 s"
    assert values["versions"].count("torch") == 2
    assert values["code"] == "0123456789 with changes"
    assert values["peak memory"] == "1,234 MB"


def test_footer_without_records_says_so() -> None:
    frame = report.provenance_footer([], "smoke").frame
    values = dict(zip(frame.what, frame.value, strict=True))
    assert values["results"] == "0 records, seeds –" and values["machine"] == "–"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (12.34, "12.3 s"), (245, "4 min 05 s"), (12000, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_a_genotype_draws_its_two_cells_with_their_names() -> None:
    chart = report.draw_genotype(Genotype(TWICE, TWICE), title="mine")
    assert {"mine, normal cell", "mine, reduction cell"} <= set(labels(chart))


def test_tables_and_words_of_values_by_seed() -> None:
    values = [0.10, 0.12, 0.14]
    half = report.interval(values).high - 0.12
    frame = report.interval_table({"a": {"x": values, "y": []}, "b": {"x": [0.5], "y": values}})
    assert list(frame.columns) == ["method", "x", "y", "n"]
    assert frame.n.tolist() == ["3", "3"]
    counted = report.interval_table({"a": {"x": values, "y": values[:2]}, "b": {"x": [0.5]}})
    assert counted.n.tolist() == ["2, 3", "–"]
    assert frame.x.tolist() == [f"12.00\u00a0±\u00a0{100 * half:.2f}", "–"]
    assert frame.y.tolist() == ["–", f"12.00\u00a0±\u00a0{100 * half:.2f}"]
    assert report.measured(values).startswith("+12.0 [")
    assert "n =" not in report.measured(values)
    assert report.measured([]) == "– (not measured)"


def test_a_claim_may_show_small_effects() -> None:
    effect = report.interval([0.0004, 0.0005, 0.0006])
    claim = report.Claim("a", "b", "c", effect, digits=2)
    assert claim.words == "+0.05 [0.03, 0.07] (n = 3)"


def test_the_plane_says_how_far_below_the_front() -> None:
    front = [[1e6, 0.5], [2e6, 0.7]]
    points = [[2.5e6, 0.6, 1.5e6, 0.5], [3e6, 0.6, 1e6, 0.5]]
    chart = report.plot_plane(points, front, title="T")
    assert "2 architectures lie 10.0 points below the Pareto front on average before" in chart.alt
    assert "0.0 after rewriting" in chart.alt
