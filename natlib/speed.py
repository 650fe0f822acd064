"""Speed figures that ``make bench`` measured: read, tabulated, drawn.

Nothing is measured here; ``scripts/bench.py`` says what each figure is and how it was taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from natlib.drawing import CYCLE, GREY, INK, MARKERS, Chart, start_chart
from natlib.errors import NatlibError
from natlib.files import read_json
from natlib.published import PAPER

Bench = Mapping[str, Any]
"""What scripts/bench.py wrote: ``peaks``, ``figures``, ``scaling``, machine and versions."""


# Tables --------------------------------------------------------------------------------------


def read_bench(path: Path) -> dict[str, Any]:
    """Read figures; raises NatlibError where the file is missing or of another form."""
    if not path.is_file():
        raise NatlibError(f"there is no {path}: `make bench` measures this machine")
    bench = read_json(path)
    lacking = {"quick", "peaks", "figures", "scaling", "machine", "versions"} - set(bench)
    if lacking:
        raise NatlibError(f"{path} lacks {', '.join(sorted(lacking))}: measure again, `make bench`")
    return bench


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values: Mapping[str, float], unit: str = "") -> str:
    """Write median and quartiles."""
    middle, low, high = (_number(values[k]) for k in ("median", "low", "high"))
    return f"{middle}{unit} [{low}, {high}]"


def label(figure: Mapping[str, Any]) -> str:
    """Name a figure with its setting and cores."""
    size = f", {figure['size']}" if figure["size"] else ""
    return f"{figure['name']}{size}" + (", 2 cores" if figure["threads"] == 2 else "")


def _target(figure: Mapping[str, Any]) -> str:
    """The target of a figure's ratio, and whether it is met."""
    if not figure["target"]:
        return "–"
    met = figure["ratio"]["median"] >= figure["target"]
    return f"≥\u00a0{figure['target']:g}\u00a0{'✓' if met else '✗'}"


def speed_table(bench: Bench, here: Bench | None = None) -> pd.DataFrame:
    """Tabulate all figures: ours and plain with quartiles, their ratio, and its target.

    ``here`` are figures of another machine, shown beside.
    """
    others = {label(f): f for f in (here or {"figures": []})["figures"]}
    rows = []
    for f in bench["figures"]:
        row = {
            "what": label(f),
            "ours": _spread(f["ours"], f" {f['unit']}"),
            "plain": _number(f["plain"]["median"]) if f["plain"] else "–",
            "times better": _spread(f["ratio"]) if f["ratio"] else "–",
            "target": _target(f),
        }
        if here is not None:
            other = others.get(label(f))
            row["here"] = _spread(other["ours"], f" {other['unit']}") if other else "–"
            ratio = other["ratio"] if other else None
            row["times better here"] = _spread(ratio) if ratio else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def released_table(bench: Bench, path: Path = PAPER / "released_speed.csv") -> pd.DataFrame:
    """Set the authors' released code, measured apart from ``bench``, beside ours.

    Lines of ``path`` without a size stand for the first figure of their name. Raises NatlibError
    where ``path`` names a figure, or a unit of it, that ``bench`` lacks.
    """
    rows = []
    for row in pd.read_csv(path, keep_default_na=False).to_dict("records"):
        name, size, threads, unit, released = row.values()
        figure = next(
            (f for f in bench["figures"]
             if (f["name"], f["threads"], f["unit"]) == (name, threads, unit)
             and size in ("", f["size"])), None,
        )  # fmt: skip
        if figure is None:
            raise NatlibError(
                f"{path}: the bench has no figure {', '.join(map(str, row.values()))}"
            )
        ours = figure["ours"]["median"]
        rows.append(
            {
                "what": label(figure),
                "released": f"{_number(released)} {unit}",
                "ours": f"{_number(ours)} {unit}",
                "times better": _number(
                    ours / released if unit.endswith("/s") else released / ours
                ),
            }
        )
    return pd.DataFrame(rows)


def best_ratio(figure: Mapping[str, Any]) -> float:
    """How many times better than plain ours would be at the machine's peaks.

    Its operations would run at the speed of a matrix product and its bytes move at that of a copy,
    one after the other. NaN for a figure without plain or without bytes.
    """
    ours = figure["roofline"].get("ours")
    if not ours or not figure["ratio"]:
        return math.nan
    return float(figure["ratio"]["median"]) / float(ours["of_matmul"] + ours["of_copy"])


def share_table(bench: Bench) -> pd.DataFrame:
    """Tabulate what ours reaches of the machine's peaks, and plain beside it, in percent."""
    rows = [
        {
            "what": label(f),
            "GFLOP/s": f["roofline"]["ours"]["gflops"],
            "of matrix product (%)": 100 * f["roofline"]["ours"]["of_matmul"],
            "plain (%)": 100 * f["roofline"].get("plain", {}).get("of_matmul", math.nan),
            "GB/s": f["roofline"]["ours"]["gbs"],
            "of memory copy (%)": 100 * f["roofline"]["ours"]["of_copy"],
            "FLOP a byte": f["roofline"]["ours"]["intensity"],
            "at both peaks (times plain)": best_ratio(f),
        }
        for f in bench["figures"]
        if f["roofline"]
    ]
    return pd.DataFrame(rows)


def growth_table(bench: Bench) -> pd.DataFrame:
    """Tabulate the fitted exponents: of time, memory and, where it is exact, of the work."""

    def exponent(curve: Mapping[str, Any], what: str) -> str:
        fit = curve["exponents"].get(what)
        if fit is None:
            return "–"
        error = f" ± {fit['error']:.2f}" if fit["error"] is not None else ""
        return f"{fit['exponent']:.2f}{error} (last {fit['last']:.2f})"

    return pd.DataFrame(
        {
            "what": curve["name"],
            "against": curve["along"],
            "from": curve["values"][0],
            "to": curve["values"][-1],
            "time": exponent(curve, "seconds"),
            "memory": exponent(curve, "memory_mb"),
            "multiply-adds": exponent(curve, "madds"),
        }
        for curve in bench["scaling"]
    )


def origin_table(bench: Bench, here: Bench | None = None) -> pd.DataFrame:
    """Say where figures come from: machine, load, versions, code, date."""

    def column(b: Bench) -> dict[str, str]:
        one = b["peaks"]["1"]
        return {
            "machine": f"{b['machine']['cpu']}, {b['machine']['cores']} cores",
            "load average at the start": f"{b['machine']['load'][0]:.2f}",
            "matrix product, 1 thread": f"{one['matmul']['median']:.0f} GFLOP/s",
            "memory copy, 1 thread": f"{one['copy']['median']:.1f} GB/s",
            "versions": ", ".join(f"{k} {v}" for k, v in b["versions"].items()),
            "code": f"{b['git'][:10] or 'no git'}{' with changes' if b['dirty'] else ''}",
            "date": b["date"],
            "took": f"{b['seconds']:.0f} s{' (quick: figures mean nothing)' * b['quick']}",
        }

    frame = {"what": list(column(bench)), "reference": list(column(bench).values())}
    if here is not None:
        frame["this machine"] = list(column(here).values())
    return pd.DataFrame(frame)


# Pictures ------------------------------------------------------------------------------------


def _logarithmic(axis: Any, subs: tuple[float, ...] = (1.0,)) -> None:
    """Label an axis of powers in plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_roofline(bench: Bench, title: str = "") -> Chart:
    """Draw speed against operations a byte, one thread: ours filled, plain hollow, roofs behind.

    Above a roof no program gets: the slope is memory copy (dashed: within the cache), the level the
    matrix product.
    """
    peak = {k: v["median"] for k, v in bench["peaks"]["1"].items()}
    points = [
        f for f in bench["figures"]
        if f["threads"] == 1 and f["roofline"].get("ours", {}).get("gflops")
    ]  # fmt: skip
    found = [side for f in points for side in f["roofline"].values()]
    chart = start_chart(330 + 7 * len(points), "")
    axes = chart.subplots()
    low = min(s["intensity"] for s in found) / 2
    high = max(max(s["intensity"] for s in found) * 2, 2 * peak["matmul"] / peak["copy"])
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(peak["matmul"], x * peak["copy"]), color=INK, lw=2)
    axes.plot(x, np.minimum(peak["matmul"], x * peak["cache"]), color=GREY, lw=1.2, ls="--")
    axes.text(high, 1.15 * peak["matmul"], f"matrix product {peak['matmul']:.0f} GFLOP/s",
              ha="right")  # fmt: skip
    said = []
    for i, f in enumerate(points):
        ours, plain = f["roofline"]["ours"], f["roofline"].get("plain")
        color, marker = CYCLE[i % 7], MARKERS[(i + i // 7) % 7]
        if plain:
            axes.plot([plain["intensity"], ours["intensity"]], [plain["gflops"], ours["gflops"]],
                      color=color, lw=1, zorder=2)  # fmt: skip
            axes.plot(plain["intensity"], plain["gflops"], marker, color=color, mfc="white", ms=6)
        axes.plot(ours["intensity"], ours["gflops"], marker, color=color, ms=7, ls="",
                  label=label(f))  # fmt: skip
        said.append(f"{label(f)} {ours['gflops']:.3g} GFLOP/s at {ours['intensity']:.2g}"
                    + (f", plain {plain['gflops']:.3g}" if plain else ""))  # fmt: skip
    bottom = min(s["gflops"] for s in found) / 2
    axes.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="GFLOP/s",
             xlim=(low, high), ylim=(bottom, 2 * peak["matmul"]), title=title)  # fmt: skip
    _logarithmic(axes.xaxis)
    _logarithmic(axes.yaxis)
    chart.legend(loc="outside lower left", ncols=1)
    chart.alt = (
        f"{title or 'Roofline'}: GFLOP/s against operations a byte on one thread, below the roofs "
        f"of memory copy ({peak['copy']:.3g} GB/s) and matrix product ({peak['matmul']:.3g} "
        f"GFLOP/s). {'; '.join(said)}."
    )
    return chart


def plot_growth(bench: Bench, what: str, title: str = "") -> Chart:
    """Draw how ``what`` ("seconds" or "memory_mb") grows along each scaled quantity, with fits."""
    if what not in ("seconds", "memory_mb"):
        raise NatlibError(f"growth of {what!r}: give 'seconds' or 'memory_mb'")
    chart = start_chart(330, "")
    said = []
    for axes, curve in zip(chart.subplots(2, 2).flat, bench["scaling"], strict=True):
        x, fit = np.asarray(curve["values"], dtype=np.float64), curve["exponents"][what]
        y = curve[what]
        if what == "seconds":
            bars = [[s["median"] - s["low"], s["high"] - s["median"]] for s in y]
            y = [s["median"] for s in y]
            axes.errorbar(x, y, np.transpose(bars), fmt="o", color=CYCLE[0], ms=5, lw=1.2)
        else:
            axes.plot(x, y, "o", color=CYCLE[0], ms=5)
        axes.plot(x, fit["factor"] * x ** fit["exponent"], "--", color=CYCLE[1], lw=1.4)
        axes.set(xscale="log", yscale="log", xlabel=curve["along"],
                 title=f"exponent {fit['exponent']:.2f}")  # fmt: skip
        _logarithmic(axes.yaxis, (1, 2, 5))
        axes.set_xticks(x, [f"{v:g}" for v in x])
        axes.set_xticks([], minor=True)
        said.append(f"{curve['name']} against {curve['along']} from {x[0]:g} to {x[-1]:g}: "
                    f"{y[0]:.3g} to {y[-1]:.3g}, exponent {fit['exponent']:.2f}")  # fmt: skip
    name = "seconds a step" if what == "seconds" else "memory (MB)"
    chart.supylabel(name, fontsize=9.5)
    if title:
        chart.suptitle(title, x=0.02, ha="left", fontsize=10)
    chart.alt = f"{title or 'Growth'}, {name}: {'; '.join(said)}."
    return chart
