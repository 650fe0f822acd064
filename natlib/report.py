"""Report results: intervals, curves, comparison with the paper, claims, provenance.

Everything here takes plain data (numbers, arrays, finished records) and trains nothing. The
drawings of cells and transition rules (``natlib.drawing``) can be had from here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import seaborn
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from natlib.drawing import (
    BLUE,
    CYCLE,
    DASHES,
    INK,
    MARKERS,
    ORANGE,
    WIDTH,
    Chart,
    cell_to_dot,
    describe_cell,
    draw_cell,
    draw_genotype,
    mask_plot,
    plot_primitive_costs,
    plot_transition_scheme,
    short_name,
    start_chart,
    style,
)  # fmt: skip
from natlib.errors import NatlibError
from natlib.records import Record

__all__ = [
    "Chart",
    "Claim",
    "Interval",
    "RankCorrelation",
    "Table",
    "block_means",
    "cell_to_dot",
    "describe_cell",
    "draw_cell",
    "draw_genotype",
    "duration",
    "format_interval",
    "holm",
    "interval",
    "interval_table",
    "load_reported",
    "mask_plot",
    "mean_change",
    "measured",
    "p_value",
    "paired_difference",
    "plot_curves",
    "plot_intervals",
    "plot_plane",
    "plot_primitive_costs",
    "plot_scatter",
    "plot_transition_scheme",
    "probability_map",
    "provenance_footer",
    "rank_correlation",
    "scorecard",
    "short_name",
    "style",
]  # fmt: skip

REPORTED = Path(__file__).resolve().parent.parent / "paper" / "reported.csv"

# Statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval [low, high], from ``n`` values of deviation ``sd``.

    ``nonzero`` of them are not zero, where that is known; ``p`` is known where the interval is not
    Student's.
    """

    mean: float
    low: float
    high: float
    n: int
    sd: float
    confidence: float = 0.95
    nonzero: int | None = None
    p: float | None = None


def _numbers(values: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise NatlibError(
            f"{what} must be a flat sequence of finite numbers, got shape {numbers.shape}"
        )
    return numbers


def interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean with Student's t interval; that of a single value has no bounds (NaN).

    Raises NatlibError on no values, on any that is not finite, and on a confidence outside (0, 1).
    """
    numbers = _numbers(values, "values")
    if not 0 < confidence < 1:
        raise NatlibError(f"confidence {confidence} is not between 0 and 1")
    if len(numbers) == 0:
        raise NatlibError("an interval needs at least one value, got none")
    n, nonzero = len(numbers), int(np.count_nonzero(numbers))
    if n == 1:
        return Interval(float(numbers[0]), math.nan, math.nan, 1, math.nan, confidence, nonzero)
    mean, sd = float(numbers.mean()), float(numbers.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / n**0.5
    return Interval(mean, mean - half, mean + half, n, sd, confidence, nonzero)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the interval of ``b - a``, pair by pair: positive means that ``b`` is larger.

    Raises NatlibError unless both hold the same number (one or more) of finite values.
    """
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if len(first) != len(second):
        raise NatlibError(f"pairs need equal lengths, got {len(first)} and {len(second)}")
    return interval(second - first, confidence)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Correct p-values for their number; those that are NaN count for nothing and stay.

    Source: Holm, Scand. J. Statist. 6 (1979).
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full_like(values, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return adjusted


def p_value(i: Interval) -> float:
    """Two-sided p of Student's t test that the mean is zero, or the interval's own.

    NaN for a single value; where fewer than two are not zero, as for rewritings that changed one
    network at most: p would then be the same whatever the size of the change; and where all are
    the same but not zero: few seeds on few images do that by chance, and the spread is unknown.
    """
    if i.p is not None:
        return i.p
    if i.n < 2 or (i.nonzero is not None and i.nonzero < 2):
        return math.nan
    if i.sd <= 1e-12 * abs(i.mean):
        return 1.0 if i.mean == 0 else math.nan
    return float(2 * stats.t.sf(abs(i.mean) / (i.sd / math.sqrt(i.n)), i.n - 1))


def format_interval(
    i: Interval, percent: bool = True, signed: bool = True, digits: int = 1, counted: bool = True
) -> str:
    """Write an interval as ``+1.5 [0.9, 2.1] (n = 200)``; ``percent`` multiplies by 100.

    A single value has no bounds to write. Without ``counted`` the n is left out, for tables that
    say it once.
    """
    scale = 100.0 if percent else 1.0
    # Adding 0.0 turns a negative zero into zero.
    mean, low, high = (round(v * scale, digits) + 0.0 for v in (i.mean, i.low, i.high))
    sign = "+" if signed else ""
    text = f"{mean:{sign}.{digits}f}"
    if i.n > 1:
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{text} (n = {i.n})" if counted else text


def measured(values: ArrayLike, digits: int = 1, signed: bool = True) -> str:
    """Write fractions, one a seed, as mean in percent with interval; fewer than two as a dash."""
    if len(_numbers(values, "values")) < 2:
        return "– (not measured)"
    return format_interval(interval(values), signed=signed, digits=digits, counted=False)


def interval_table(
    rows: Mapping[str, Mapping[str, ArrayLike]], first: str = "method", digits: int = 2
) -> pd.DataFrame:
    """Tabulate fractions, one a seed, as percent ± half a 95 % interval; too few as a dash.

    ``rows`` maps a row's name to its columns; ``first`` heads the names. The last column, "n", is
    the number of seeds.
    """

    def cell(values: ArrayLike) -> str:
        if len(_numbers(values, "values")) < 2:
            return "–"
        i = interval(values)
        # Not to be broken over lines.
        return f"{100 * i.mean:.{digits}f}\u00a0±\u00a0{100 * (i.high - i.mean):.{digits}f}"

    def seeds(columns: Mapping[str, ArrayLike]) -> str:
        counts = {len(np.asarray(values)) for values in columns.values()}
        return ", ".join(str(n) for n in sorted(counts) if n > 1) or "–"

    table = [
        {first: name, **{c: cell(v) for c, v in columns.items()}, "n": seeds(columns)}
        for name, columns in rows.items()
    ]
    return pd.DataFrame(table)


def block_means(series: Sequence[ArrayLike], blocks: int) -> NDArray[np.float64]:
    """Average each series over ``blocks`` consecutive blocks: (series, blocks), for noisy curves.

    Raises NatlibError unless all series are equally long and at least ``blocks`` long.
    """
    rows = np.asarray(series, dtype=np.float64)
    if rows.ndim != 2 or not 1 <= blocks <= rows.shape[1]:
        raise NatlibError(f"cannot cut series of shape {rows.shape} into {blocks} blocks")
    return np.stack([part.mean(axis=1) for part in np.array_split(rows, blocks, axis=1)], axis=1)


def mean_change(before: ArrayLike, after: ArrayLike) -> str:
    """Write the mean change of accuracies (0..1) in points, with its interval where n is above 1.

    Raises NatlibError if the lengths differ.
    """
    return format_interval(paired_difference(before, after))


RANKED = "Spearman's ρ with test accuracy"
"""Column of what judges of a table of known accuracies reach."""


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau and Spearman's rho of ``n`` pairs; [low, high] is the 95 % interval of rho."""

    tau: float
    rho: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> Interval:
        """The interval of rho over pairs, with the p of rho being zero that belongs to it."""
        z, width = _fisher(self.rho, self.n)
        p = float(2 * stats.norm.sf(abs(z) / width))
        return Interval(self.rho, self.low, self.high, self.n, math.nan, p=p)


def _fisher(rho: float, n: int) -> tuple[float, float]:
    """Fisher's z of a rank correlation and its standard error (Bonett and Wright, 2000)."""
    z = math.atanh(max(-0.999999, min(0.999999, rho)))
    return z, math.sqrt((1 + rho**2 / 2) / (n - 3))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> RankCorrelation:
    """Say how far two scores rank alike; the interval is Fisher's with Bonett and Wright's width.

    Raises NatlibError on fewer than four pairs, unequal lengths or a constant score.
    """
    a, b = _numbers(x, "x"), _numbers(y, "y")
    if len(a) != len(b) or len(a) < 4:
        raise NatlibError(f"a rank correlation needs four pairs, got {len(a)} and {len(b)} values")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise NatlibError("a rank correlation needs scores that differ, got a constant one")
    tau, rho = float(stats.kendalltau(a, b).statistic), float(stats.spearmanr(a, b).statistic)
    z, width = _fisher(rho, len(a))
    half = 1.96 * width
    return RankCorrelation(tau, rho, math.tanh(z - half), math.tanh(z + half), len(a))


def ranking(x: ArrayLike, y: ArrayLike) -> str:
    """Write Spearman's rho of two scores with its interval; see ``rank_correlation``."""
    return format_interval(rank_correlation(x, y).interval, percent=False, digits=2)


# Plots of results ----------------------------------------------------------------------------


def plot_curves(
    curves: Mapping[str, ArrayLike], xlabel: str, ylabel: str, x: ArrayLike | None = None,
    title: str = "",
) -> Chart:  # fmt: skip
    """Draw named curves over steps; (seeds, steps) arrays as their mean with a 95 % band.

    Each curve is (steps,) or (seeds, steps); ``x`` holds the step positions, 1, 2, ... by default.
    """
    chart = start_chart(215, "")
    axes = chart.subplots()
    said = []
    for i, (name, values) in enumerate(curves.items()):
        rows = np.atleast_2d(np.asarray(values, dtype=np.float64))
        steps = np.arange(1, rows.shape[1] + 1) if x is None else np.asarray(x)
        if len(steps) != rows.shape[1]:
            raise NatlibError(f"curve {name!r} has {rows.shape[1]} steps but x has {len(steps)}")
        mean = rows.mean(axis=0)
        axes.plot(steps, mean, label=name, ls=DASHES[i % 4], color=CYCLE[i % 7])
        if len(rows) > 1:
            spread = rows.std(axis=0, ddof=1) / len(rows) ** 0.5
            half = stats.t.ppf(0.975, len(rows) - 1) * spread
            axes.fill_between(steps, mean - half, mean + half, color=CYCLE[i % 7], alpha=0.18, lw=0)
        said.append(f"{name} from {mean[0]:.3g} to {mean[-1]:.3g} (n = {len(rows)})")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        chart.legend(loc="outside upper left", ncols=3 if len(curves) > 4 else len(curves))
    if title:
        axes.set_title(title)
    chart.alt = f"{title or 'Curves'}: {ylabel} against {xlabel}. {'; '.join(said)}."
    return chart


def probability_map(matrix: ArrayLike, names: Sequence[str], title: str = "") -> Chart:
    """Draw probabilities (K, K) of moving from a primitive (row) to another (column).

    Rows that were never seen are all zero and stay blank. Raises NatlibError on another shape.
    """
    values = np.asarray(matrix, dtype=np.float64)
    k = len(names)
    if values.shape != (k, k):
        raise NatlibError(f"matrix has shape {values.shape}; {k} names need ({k}, {k})")
    short = [short_name(n) for n in names]
    likeliest = [
        f"{short[i]} to {short[int(row.argmax())]} ({100 * row.max():.0f} %)"
        for i, row in enumerate(values)
        if row.any()
    ]
    alt = f"{title or 'Probabilities'}. Likeliest target of each source: {'; '.join(likeliest)}."
    chart = start_chart(WIDTH, alt)
    axes = chart.subplots()
    seaborn.heatmap(
        100 * values, ax=axes, mask=values == 0, cmap="cividis_r", vmin=0, vmax=100, square=True,
        xticklabels=short, yticklabels=short, linewidths=0.5, annot=True, fmt=".0f",
        annot_kws={"fontsize": 7}, cbar_kws={"label": "probability (%)", "shrink": 0.7},
    )  # fmt: skip
    axes.set(xlabel="to", ylabel="from")
    axes.tick_params(length=0)
    if title:
        chart.suptitle(title, x=0.02, ha="left", fontsize=10)
    return chart


def plot_scatter(x: ArrayLike, y: ArrayLike, xlabel: str, ylabel: str, title: str = "") -> Chart:
    """Draw one score against another with their rank correlation and its interval."""
    r = rank_correlation(x, y)
    text = f"Spearman ρ = {r.rho:.2f} [{r.low:.2f}, {r.high:.2f}], Kendall τ = {r.tau:.2f}"
    alt = f"{title or 'Scatter'}: {ylabel} against {xlabel}. {text}, n = {r.n}."
    chart = start_chart(255, alt)
    axes = chart.subplots()
    size = 6 if r.n < 200 else 3
    axes.plot(_numbers(x, "x"), _numbers(y, "y"), "o", color=BLUE, mec="white", mew=0.1 * size,
              ms=size)  # fmt: skip
    text = f"{text}\nn = {r.n:,}"
    axes.set(xlabel=xlabel, ylabel=ylabel, title=f"{title}\n{text}" if title else text)
    return chart


def plot_intervals(
    intervals: Mapping[str, Interval], xlabel: str, percent: bool = True, title: str = "",
    digits: int = 1,
) -> Chart:  # fmt: skip
    """Draw named intervals as points with whiskers beside a line at zero."""
    scale = 100.0 if percent else 1.0
    texts = [format_interval(i, percent, digits=digits) for i in intervals.values()]
    said = "; ".join(f"{n} {t}" for n, t in zip(intervals, texts, strict=True))
    chart = start_chart(
        56 + (20 if title else 0) + 34 * len(intervals), f"{title or xlabel}: {said}."
    )
    axes = chart.subplots()
    axes.axvline(0, color=INK, lw=1)
    for k, i in enumerate(intervals.values()):
        axes.plot([i.low * scale, i.high * scale], [k, k], color=CYCLE[k % 7], lw=2.4)
        axes.plot(i.mean * scale, k, MARKERS[k % 7], color=CYCLE[k % 7], ms=7)
    labels = [f"{name}\n{text}" for name, text in zip(intervals, texts, strict=True)]
    axes.set_yticks(range(len(intervals)), labels)
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    if title:  # over the labels too, which take half the width
        chart.suptitle(title, x=0.02, ha="left", fontsize=10)
    return chart


def plot_plane(points: ArrayLike, front: ArrayLike, title: str = "") -> Chart:
    """Draw architectures before and after in the plane of cost and accuracy, with a Pareto front.

    ``points`` (n, 4): MAdds and accuracy (0..1) before, then after; ``front`` (m, 2): the same of
    the architectures that no cheaper one beats, by rising MAdds.
    """
    before, after = np.split(np.asarray(points, dtype=np.float64), 2, axis=1)
    best = np.asarray(front, dtype=np.float64)
    # What the front reaches at an architecture's own cost.
    reach = [best[np.searchsorted(best[:, 0], p[:, 0], "right") - 1, 1] for p in (before, after)]
    below = [100 * float(np.mean(r - p[:, 1])) for r, p in zip(reach, (before, after), strict=True)]
    chart = start_chart(
        285,
        f"{title or 'Cost and accuracy'}: {len(before)} architectures lie {below[0]:.1f} points "
        f"below the Pareto front on average before, {below[1]:.1f} after rewriting.",
    )
    axes = chart.subplots()
    axes.step(best[:, 0] / 1e6, 100 * best[:, 1], where="post", color=INK, label="Pareto front")
    for p, name, color, mark in ((before, "input", ORANGE, "x"), (after, "rewritten", BLUE, "o")):
        axes.plot(p[:, 0] / 1e6, 100 * p[:, 1], mark, color=color, ms=4, alpha=0.7, label=name)
    low = float(np.quantile(100 * before[:, 1], 0.1))
    axes.set(xlabel="MAdds (M)", ylabel="test accuracy (%)", ylim=(low, 100.5 * best[-1, 1]))
    chart.legend(loc="outside upper left", ncols=3)
    if title:
        axes.set_title(title)
    return chart


SMALLEST = 0.001
"""Smaller p-values are not written out."""


def _p_text(p: float) -> str:
    return f"<\u00a0{SMALLEST}" if p < SMALLEST else f"{p:.3f}"


# Tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A data frame shown as an HTML table that scrolls sideways where it does not fit.

    ``formats`` maps column names to format specifications for their numbers (``".2f"``); columns
    "p" and "p (...)" hold p-values.
    ``stacked`` tables of the book turn their rows into cards on a phone (None: those of four
    columns and more). Verdicts get a sign and names in a column "notebook" become links.
    """

    frame: pd.DataFrame
    caption: str = ""
    formats: Mapping[str, str] | None = None
    stacked: bool | None = None

    def _format(self, column: str) -> str:
        """Return the format of a column's numbers: as many decimals as the column needs."""
        if self.formats and column in self.formats:
            return self.formats[column]
        if column == "p" or column.startswith("p ("):
            return "p"
        numbers = [v for v in self.frame[column] if not isinstance(v, str) and pd.notna(v)]
        for digits in range(4):
            if all(abs(v - round(v, digits)) < 1e-9 for v in numbers):
                return f",.{digits}f"
        return ".4g"

    def _cell(self, value: Any, form: str) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if form == "p":
            return escape(_p_text(value))
        if isinstance(value, int | float | np.number):
            return format(value, form)
        # An interval and its n break before or after, not inside.
        whole = re.sub(
            r"\[[^][]*\]|\(n = \d+\)", lambda m: m[0].replace(" ", "\N{NO-BREAK SPACE}"), str(value)
        )
        return escape(whole)

    def _repr_html_(self) -> str:
        columns = [str(c) for c in self.frame.columns]
        numeric = [pd.api.types.is_numeric_dtype(d) for d in self.frame.dtypes]
        marks = [' class="number"' if n else "" for n in numeric]
        forms = [self._format(c) if n else ".4g" for c, n in zip(columns, numeric, strict=True)]
        head = "".join(
            f'<th scope="col"{mark}>{escape(c)}</th>'
            for c, mark in zip(columns, marks, strict=True)
        )
        body = []
        for row in self.frame.itertuples(index=False, name=None):
            cells = []
            for c, mark, form, v in zip(columns, marks, forms, row, strict=True):
                text = self._cell(v, form)
                if isinstance(v, str) and v in VERDICTS:
                    mark, text = f' class="{VERDICTS[v][0]}"', f"{VERDICTS[v][1]} {text}"
                if c == "notebook" and v:
                    # The book's build turns the name into a link that holds on every page.
                    broken = text.replace("_", "_<wbr>")
                    text = f'<a href="{text}.ipynb">{broken}</a>'
                cells.append(f'<td data-label="{escape(c)}"{mark}>{text}</td>')
            # The line ends keep neighbours apart in the book's search index.
            body.append("<tr>" + "\n".join(cells) + "</tr>")
        stacked = len(columns) > 3 if self.stacked is None else self.stacked
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        label = f' role="region" aria-label="{escape(self.caption)}"' if self.caption else ""
        return (
            f'<div class="natlib-table" style="overflow-x:auto" tabindex="0"{label}>'
            f'<table class="natlib{" stacked" if stacked else ""}">{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>{chr(10).join(body)}</tbody></table></div>"
        )


_REPORTED = ("paper", "table", "dataset", "architecture", "method", "params_m", "madds_m", "top1",
             "top5", "note", "source")  # fmt: skip
_NUMERIC = ("params_m", "madds_m", "top1", "top5")


def load_reported(path: Path = REPORTED) -> pd.DataFrame:
    """Read the published numbers: a row a table cell; params and MAdds in millions, accuracy in %.

    Raises NatlibError on a missing file, other columns, an empty name, a number that is none, an
    accuracy outside 0..100, or the same cell twice; the message names the line.
    """
    if not path.is_file():
        raise NatlibError(f"{path}: no such file; it holds the published numbers")
    raw = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(raw.columns) != _REPORTED:
        raise NatlibError(f"{path}: columns are {list(raw.columns)}; expected {list(_REPORTED)}")
    frame = raw.copy()
    for column in _NUMERIC:
        frame[column] = pd.to_numeric(raw[column], errors="coerce")
        top = 100.0 if column.startswith("top") else math.inf
        wrong = (raw[column] != "") & ~frame[column].between(0, top)
        for i in raw.index[wrong]:
            raise NatlibError(f"{path}, line {i + 2}: {column} {raw[column][i]!r} is not a number "
                              f"of 0..{top:g}")  # fmt: skip
    names = ["paper", "table", "dataset", "architecture", "method", "source"]
    for column in names:
        for i in raw.index[raw[column].str.strip() == ""]:
            raise NatlibError(f"{path}, line {i + 2}: {column} is empty")
    for i in raw.index[raw.duplicated(names[:5])]:
        raise NatlibError(f"{path}, line {i + 2}: the same paper, table, dataset, architecture and "
                          "method stand in an earlier line")  # fmt: skip
    return frame


# Claims --------------------------------------------------------------------------------------

Verdict = Literal["holds", "does not hold", "cannot be decided at this scale"]
VERDICTS: Mapping[object, tuple[str, str]] = {
    "holds": ("holds", "✓"),
    "does not hold": ("fails", "✗"),
    "cannot be decided at this scale": ("open", "?"),
}


LEVEL = 0.05
"""Below it a p-value decides a claim."""


@dataclass(frozen=True)
class Claim:
    """A published claim with our evidence on it.

    ``text`` is the claim, ``source`` the paper and section, ``where`` the notebook that looked
    into it. ``evidence`` is the interval of a quantity that the claim says is positive (better),
    a boolean where the matter is exact, or None where this scale cannot measure it. ``measured``
    says the evidence in words; an interval writes itself. ``void`` evidence is shown and decides
    nothing.
    """

    text: str
    source: str
    where: str
    evidence: Interval | bool | None
    measured: str = ""
    percent: bool = True
    digits: int = 1
    void: bool = False

    @property
    def p(self) -> float:
        """Two-sided p of the interval's mean being zero; NaN for other or void evidence."""
        if self.void or not isinstance(self.evidence, Interval):
            return math.nan
        return p_value(self.evidence)

    def verdict(self, p: float) -> Verdict:
        """Decide an interval by its sign where ``p``, corrected or not, is below 5 %."""
        if self.void:
            return "cannot be decided at this scale"
        if isinstance(self.evidence, Interval):
            if not p < LEVEL:
                return "cannot be decided at this scale"
            return "holds" if self.evidence.mean > 0 else "does not hold"
        if self.evidence is None:
            return "cannot be decided at this scale"
        return "holds" if self.evidence else "does not hold"

    @property
    def words(self) -> str:
        """The evidence in words."""
        shown = (
            format_interval(self.evidence, self.percent, digits=self.digits)
            if isinstance(self.evidence, Interval)
            else ""
        )
        return " ".join(w for w in (self.measured, shown) if w) or "–"


def scorecard(claims: Sequence[Claim]) -> pd.DataFrame:
    """Tabulate claims: claim, source, evidence with p, verdict, notebook.

    Verdicts on intervals go by p corrected for all claims of the table (Holm).
    """
    corrected = holm([c.p for c in claims])
    columns = ["claim", "source", "what we found", "verdict", "notebook"]
    rows = [
        (c.text, c.source, _with_p(c.words, p), c.verdict(p), c.where)
        for c, p in zip(claims, corrected, strict=True)
    ]
    return pd.DataFrame(rows, columns=columns)


def _with_p(words: str, p: float) -> str:
    if math.isnan(p):
        return words
    equals = "" if p < SMALLEST else "=\u00a0"
    return f"{words}, p\u00a0{equals}{_p_text(p)}"


# Provenance ----------------------------------------------------------------------------------


def _seeds(config: Any) -> set[int]:
    """Collect the seeds of a configuration, those of its parts included."""
    if not isinstance(config, Mapping):
        return set()
    own = {v for k, v in config.items() if k == "seed" and isinstance(v, int)}
    return own.union(*(_seeds(v) for v in config.values()))


def duration(seconds: float) -> str:
    """Write a time span as ``12.3 s``, ``4 min 05 s`` or ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60} min"


def provenance_footer(records: Iterable[Record], scale: str, data: str = "") -> Table:
    """Say where a notebook's figures come from: scale, data, seeds, machine, versions, time.

    ``records`` are all that the notebook used, ``data`` names the data set in words. Where records
    differ, every value is listed.
    """
    found = list({r.key: r for r in records}.values())

    def each(form: str) -> str:
        return ", ".join(dict.fromkeys(form.format(**r.provenance) for r in found)) or "–"

    seeds = sorted(set().union(*(_seeds(r.config) for r in found)))
    sums = ", ".join(dict.fromkeys(r.data[:12] for r in found if r.data))
    code = dict.fromkeys(
        f"{r.provenance['git'][:10] or 'no git'}{' with changes' if r.provenance['dirty'] else ''}"
        for r in found
    )
    seconds = sum(float(r.provenance["wall_seconds"]) for r in found)
    memory = max((float(r.provenance["peak_memory_mb"]) for r in found), default=0.0)
    rows = {
        "scale": scale,
        "data": f"{data or '–'}{f' (checksum {sums})' if sums else ''}",
        "results": f"{len(found)} records, seeds {', '.join(map(str, seeds)) or '–'}",
        "computing time, summed over processes": duration(seconds),
        "peak memory": f"{memory:,.0f} MB",
        "machine": ", ".join(dict.fromkeys(r.machine for r in found)) or "–",
        "versions": each("Python {python}, torch {torch}, numpy {numpy}"),
        "code": ", ".join(code) or "–",
    }
    frame = pd.DataFrame(list(rows.items()), columns=["what", "value"])
    return Table(frame, caption="Where these figures come from")
