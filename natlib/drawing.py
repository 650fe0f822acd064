"""Draw cells, the search space and its transition rules, from plain data.

Every picture is a ``Chart``: a matplotlib figure that carries its own text alternative.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath
from numpy.typing import ArrayLike

from natlib.errors import NatlibError
from natlib.genotype import INPUTS, Cell, Genotype
from natlib.primitives import Cost, primitive

WIDTH = 345.0
"""Width of a figure in points: shown 360 pixels wide, its 9-point text is 9 pixels high."""

# Okabe and Ito's colours, told apart with any colour vision; black text reads on the tints.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
INK, GREY, FAINT = "#222222", "#666666", "#d9d9d9"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, INK)
TINTS = {
    "conv": "#c6dcef", "sep_conv": "#c9ebdd", "dil_conv": "#e9f2c5", "max_pool": "#fce5b8",
    "avg_pool": "#fce5b8", "skip": "#e6e6e6", "null": "#ffffff",
}  # fmt: skip
KINDS = {
    "conv": "conv", "sep_conv": "sep", "dil_conv": "dil", "max_pool": "max", "avg_pool": "avg",
    "skip": "skip", "null": "null",
}  # fmt: skip
DASHES = ("-", "--", "-.", ":")
_WORDS = {
    "conv": "convolution", "sep_conv": "separable", "dil_conv": "dilated", "max_pool": "max pool",
    "avg_pool": "average pool", "skip": "skip", "null": "null",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style() -> None:
    """Set matplotlib's defaults for this project; every function here that draws does it too."""
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "natlib", "svg.fonttype": "path", "pdf.fonttype": 42,
            "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
            "font.size": 9.0, "axes.titlesize": 10.0, "axes.labelsize": 9.5,
            "xtick.labelsize": 9.0, "ytick.labelsize": 9.0, "legend.fontsize": 9.0,
            "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
            "xtick.color": INK, "ytick.color": INK, "axes.titlelocation": "left",
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
            "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.axisbelow": True,
            "lines.linewidth": 1.8, "legend.frameon": False, "text.parse_math": False,
            "axes.prop_cycle": cycler(color=CYCLE),
        }
    )  # fmt: skip


class Chart(Figure):
    """A figure with a text alternative, shown in notebooks as SVG on a white ground.

    ``alt`` says in words what the picture shows. The same figure gives the same bytes each time.
    """

    alt: str = ""

    def svg(self) -> str:
        """Return the picture as SVG text, without date or random identifiers."""
        style()
        buffer = io.StringIO()
        self.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    def png(self, dots: float = 200.0) -> bytes:
        """Return the picture as PNG with ``dots`` to the inch, without date or program name."""
        style()
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dots, metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # As HTML the picture keeps its text alternative wherever the notebook is shown, and can
        # be glued into another page of the book (which takes no SVG).
        data = base64.b64encode(self.svg().encode()).decode()
        html = (
            f'<img class="natlib-figure" alt="{escape(self.alt)}" '
            f'style="width:100%;max-width:{self.get_figwidth() * 1.25:.1f}in;background:white" '
            f'src="data:image/svg+xml;base64,{data}">'
        )
        return {"text/html": html, "text/plain": self.alt}


def start_chart(height: float, alt: str, width: float = WIDTH) -> Chart:
    """Start an empty chart, sizes in points."""
    style()
    chart = Chart(figsize=(width / 72, height / 72), layout="constrained")
    chart.alt = alt
    return chart


def short_name(name: str) -> str:
    """Shorten a primitive's name for drawings: ``sep_conv_3x3`` to ``sep 3``.

    Raises NatlibError on an unknown primitive.
    """
    p = primitive(name)
    if p.kernel == (0, 0):
        return KINDS[p.kind]
    square = p.kernel[0] == p.kernel[1]
    return f"{KINDS[p.kind]} {p.kernel[0] if square else f'{p.kernel[0]}×{p.kernel[1]}'}"


# Cells ---------------------------------------------------------------------------------------

_RADIUS, _PILL, _FONT, _OUT, _MARGIN, _TITLE, _KEY = 8.5, 15.0, 9.0, 26.0, 6.0, 18.0, 16.0


@dataclass(frozen=True)
class _Layout:
    """Where a cell's parts stand, in points, y downwards.

    Every node has a row of its own and the labels of its incoming edges stand before it, so an
    edge bends only in the gap behind its source and then runs along its target's row: no edge
    ever crosses a label or a node.
    """

    nodes: dict[int, tuple[float, float]]
    pills: tuple[tuple[float, float], ...]  # centres, in the order of the cell's edges
    pill: float
    gap: float
    out: tuple[float, float]
    size: tuple[float, float]


@cache
def _label_width(text: str) -> float:
    """Width of an edge's label in points; tracing its outline takes milliseconds."""
    outline = TextPath((0, 0), text, size=_FONT, prop=FontProperties(weight="bold"))
    return float(outline.get_extents().width)


def _layout(cell: Cell, changed: frozenset[int], width: float) -> _Layout:
    depth = {n: 0 for n in range(INPUTS)}
    for e in cell.edges:
        depth[e.target] = max(depth.get(e.target, 0), depth[e.source] + 1)
    columns = max(depth.values())
    pill = max(_label_width(short_name(e.primitive)) for e in cell.edges) + 8
    block = pill + 9 + 2 * _RADIUS
    fixed = 2 * _MARGIN + 2 * _RADIUS + columns * block + _OUT
    # Most edges start at the inputs: the first gap is the wider one.
    gap = max(13.0, (width - fixed) / (columns + 2))
    total = fixed + (columns + 2) * gap
    nodes: dict[int, tuple[float, float]] = {}
    pills: list[tuple[float, float]] = []
    y = _TITLE
    for i, group in enumerate(cell.in_edges):
        x = _MARGIN + gap + _RADIUS + depth[i + INPUTS] * (gap + block)
        tall = max(len(group) * (_PILL + 2), 2 * _RADIUS) + 12
        nodes[i + INPUTS] = (x, y + tall / 2)
        for j in range(len(group)):
            offset = (j - (len(group) - 1) / 2) * (_PILL + 2)
            pills.append((x - _RADIUS - 9 - pill / 2, y + tall / 2 + offset))
        y += tall
    middle = (_TITLE + y) / 2
    spread = min(34.0, (y - _TITLE) / 3)
    for n in range(INPUTS):
        nodes[n] = (_MARGIN + _RADIUS, middle + (n - (INPUTS - 1) / 2) * spread)
    key = _KEY if changed or any(e.primitive == "null" for e in cell.edges) else 0.0
    out = (total - _MARGIN - _OUT / 2, middle)
    return _Layout(nodes, tuple(pills), pill, gap, out, (total, y + key + 4))


def _changes(cell: Cell, other: Cell | None) -> frozenset[int]:
    if other is None:
        return frozenset()
    if [(e.source, e.target) for e in cell.edges] != [(e.source, e.target) for e in other.edges]:
        raise NatlibError(
            "the two cells are different graphs; only cells with the same edges (source, target) "
            "in the same order can be compared"
        )
    pairs = zip(cell.edges, other.edges, strict=True)
    return frozenset(i for i, (a, b) in enumerate(pairs) if a.primitive != b.primitive)


def _paint(axes: Axes, cell: Cell, at: _Layout, changed: frozenset[int], title: str) -> None:
    axes.set(xlim=(0, at.size[0]), ylim=(at.size[1], 0))
    axes.axis("off")
    axes.text(_MARGIN, 3, title, va="top", fontsize=10, weight="bold")

    def wire(
        start: tuple[float, float], end: tuple[float, float], bend: float, **look: Any
    ) -> None:
        (x0, y0), (x1, y1), half = start, end, bend / 2
        points = [(x0, y0), (x0 + half, y0), (x0 + half, y1), (x0 + bend, y1), (x1, y1)]
        codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO]
        axes.add_patch(PathPatch(Curve(points, codes), fill=False, **look))

    def box(x: float, y: float, w: float, text: str, bold: bool = False, **look: Any) -> None:
        patch = FancyBboxPatch(
            (x - w / 2 + 4, y - _PILL / 2 + 4), w - 8, _PILL - 8,
            boxstyle="round,pad=4,rounding_size=4", zorder=3, **look,
        )  # fmt: skip
        axes.add_patch(patch)
        axes.text(
            x, y + 0.3, text, ha="center", va="center_baseline", fontsize=_FONT, zorder=4,
            weight="bold" if bold else "normal",
        )  # fmt: skip

    for i, (edge, (x, y)) in enumerate(zip(cell.edges, at.pills, strict=True)):
        kind = primitive(edge.primitive).kind
        look: dict[str, Any] = {"lw": 1.2, "ls": "-", "edgecolor": INK, "zorder": 2}
        if kind == "null":
            look |= {"ls": (0, (1, 2)), "edgecolor": GREY}
        if i in changed:
            look |= {"lw": 2.2, "edgecolor": RED}
            look |= {"ls": (0, (1, 1.2)) if kind == "null" else (0, (4, 1.5))}
        source, node = at.nodes[edge.source], at.nodes[edge.target]
        bend = at.gap * (2 if edge.source < INPUTS else 1)
        wire((source[0] + _RADIUS, source[1]), (x - at.pill / 2, y), bend, **look)
        tip = math.atan2(y - node[1], _RADIUS + 9)
        arrow = FancyArrowPatch(
            (x + at.pill / 2, y),
            (node[0] - _RADIUS * math.cos(tip), node[1] + _RADIUS * math.sin(tip)),
            arrowstyle="-|>", mutation_scale=7, shrinkA=0, shrinkB=0, color=look["edgecolor"],
            lw=look["lw"], zorder=2,
        )  # fmt: skip
        axes.add_patch(arrow)
        edgecolor = RED if i in changed else GREY
        ls = ":" if kind == "null" and i not in changed else "-"
        box(
            x, y, at.pill, short_name(edge.primitive), i in changed, facecolor=TINTS[kind],
            edgecolor=edgecolor, lw=1.8 if i in changed else 0.8, ls=ls,
        )  # fmt: skip
    for n in cell.concat:
        x, y = at.nodes[n]
        # Run along the node's own row to the last gap before the output.
        start = at.out[0] - _OUT / 2 - at.gap
        axes.plot([x + _RADIUS, start], [y, y], color="#9a9a9a", lw=1.2, zorder=1)
        wire((start, y), (at.out[0] - _OUT / 2, at.out[1]), at.gap, edgecolor="#9a9a9a", lw=1.2)
    for n, (x, y) in at.nodes.items():
        face = "white" if n >= INPUTS else INK
        axes.add_patch(Circle((x, y), _RADIUS, facecolor=face, edgecolor=INK, lw=1.2, zorder=3))
        color = INK if n >= INPUTS else "white"
        axes.text(
            x, y + 0.3, str(n), ha="center", va="center_baseline", color=color, zorder=4,
            weight="bold", fontsize=_FONT,
        )  # fmt: skip
    box(*at.out, _OUT, "out", facecolor="white", edgecolor=INK, lw=1.2)
    notes = []
    if changed:
        notes.append("dashed red, bold: changed")
    if any(e.primitive == "null" for e in cell.edges):
        notes.append("dotted: null (no connection)")
    axes.text(_MARGIN, at.size[1] - 3, "   ".join(notes), va="bottom", color=GREY, fontsize=9)


def describe_cell(cell: Cell, other: Cell | None = None) -> str:
    """Say in words what a cell computes, with what each edge of ``other`` changed from."""
    changed, parts, i = _changes(cell, other), [], 0
    for n, group in enumerate(cell.in_edges):
        terms = []
        for e in group:
            was = f", changed from {other.edges[i].primitive}" if other and i in changed else ""
            terms.append(f"{e.primitive} of {e.source}{was}")
            i += 1
        parts.append(f"node {n + INPUTS} adds {'; '.join(terms)}")
    return ". ".join([*parts, f"output joins {', '.join(map(str, cell.concat))}"]) + "."


def draw_cell(cell: Cell, other: Cell | None = None, title: str = "Cell") -> Chart:
    """Draw a cell from its inputs (left) to its output, each edge labelled with its primitive.

    With ``other``, the cell that it was made from, the edges whose primitive differs are marked
    by colour, dashes and bold labels. Raises NatlibError if the two are not the same graph.
    """
    return _draw([(title, cell, other)])


def draw_genotype(genotype: Genotype, before: Genotype | None = None, title: str = "") -> Chart:
    """Draw the normal cell above the reduction cell; see ``draw_cell`` for ``before``."""
    names = {"normal": "normal cell", "reduce": "reduction cell"}
    others: Iterable[Cell | None] = (
        (None, None) if before is None else (before.normal, before.reduce)
    )
    head = f"{title}, " if title else ""
    return _draw(
        [(head + names[n], c, o) for (n, c), o in zip(genotype.cells, others, strict=True)]
    )


def _draw(panels: Sequence[tuple[str, Cell, Cell | None]]) -> Chart:
    changes = [_changes(cell, other) for _, cell, other in panels]
    width = WIDTH
    for _ in range(2):  # a second pass gives all panels the width of the widest
        layouts = [_layout(cell, c, width) for (_, cell, _), c in zip(panels, changes, strict=True)]
        width = max(at.size[0] for at in layouts)
    height = sum(at.size[1] for at in layouts)
    alt = " ".join(f"{title}: {describe_cell(cell, other)}" for title, cell, other in panels)
    chart = start_chart(height, alt, width)
    chart.set_layout_engine("none")
    top = height
    for (title, cell, _), at, changed in zip(panels, layouts, changes, strict=True):
        top -= at.size[1]
        axes = chart.add_axes((0, top / height, 1, at.size[1] / height))
        _paint(axes, cell, at, changed, title)
    return chart


def cell_to_dot(cell: Cell, name: str = "cell") -> str:
    """Write a cell as a Graphviz DOT digraph, for tools that read DOT."""
    lines = [f'digraph "{name}" {{', "  rankdir=LR;", '  out [shape=box, label="output"];']
    lines += [f'  n{n} [label="{n}"];' for n in range(INPUTS + cell.nodes)]
    for e in cell.edges:
        dotted = ", style=dotted" if e.primitive == "null" else ""
        lines.append(f'  n{e.source} -> n{e.target} [label="{e.primitive}"{dotted}];')
    lines += [f"  n{n} -> out;" for n in cell.concat]
    return "\n".join([*lines, "}"])


# Search space --------------------------------------------------------------------------------


def plot_primitive_costs(costs: Mapping[str, Cost]) -> Chart:
    """Draw params and MAdds of each primitive as bars with their values (NAT++, Fig. 4)."""
    names = list(costs)
    parts = ", ".join(f"{n} {c.params / 1e3:.1f} k {c.madds / 1e6:.1f} M" for n, c in costs.items())
    chart = start_chart(40 + 17 * len(names), f"Bars of parameters and multiply-adds: {parts}.")
    panels = chart.subplots(1, 2, sharey=True)
    values = ([c.params / 1e3 for c in costs.values()], [c.madds / 1e6 for c in costs.values()])
    for axes, numbers, label, color in zip(
        panels, values, ("params, thousands", "MAdds, millions"), (BLUE, RED), strict=True
    ):
        bars = axes.barh(range(len(names)), numbers, color=color, height=0.7)
        axes.bar_label(bars, [f"{v:.1f}" for v in numbers], padding=3, fontsize=9)
        axes.set(title=label, xlim=(0, max([1e-9, *numbers]) * 1.45), xticks=[])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return chart


def plot_transition_scheme(
    allowed: Collection[tuple[str, str]], names: Sequence[str], costs: Mapping[str, Cost]
) -> Chart:
    """Draw a transition rule in two levels, kinds downwards and kernels to the right.

    ``allowed`` holds the ordered pairs (source, target); ``names`` the primitives. Only arrows
    that no chain of other arrows implies are drawn (NAT++, Fig. 4). Everything follows from
    ``allowed``: another rule gives another picture.
    """
    prims = sorted(map(primitive, names), key=lambda p: (p.rank, p.kind != "max_pool", -p.size))
    kinds = list(dict.fromkeys(p.kind for p in prims))
    rows = {k: [p for p in prims if p.kind == k] for k in kinds}
    step, stem, left, chip, space, high = 48.0, 42.0, 130.0, 56.0, 18.0, 40.0
    depth = step * len(kinds) + 20
    arrows: list[str] = []
    chart = start_chart(depth, "")
    chart.set_layout_engine("none")
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(depth, 0))
    axes.axis("off")
    between = {
        (a, b)
        for a in kinds
        for b in kinds
        if a != b and any((p.name, q.name) in allowed for p in rows[a] for q in rows[b])
    }

    def arrow(start: tuple[float, float], end: tuple[float, float], bow: float, up: bool) -> None:
        patch = FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=10, lw=1.4, shrinkA=1, shrinkB=1,
            color=RED if up else INK, ls="--" if up else "-", connectionstyle=f"arc3,rad={bow}",
        )  # fmt: skip
        axes.add_patch(patch)

    for r, kind in enumerate(kinds):
        y = r * step + step / 2
        axes.text(stem + 8, y, _WORDS[kind], va="center", fontsize=9.5, weight="bold")
        for i, p in enumerate(rows[kind]):
            x = left + i * (chip + space)
            patch = FancyBboxPatch(
                (x + 3, y - high / 2 + 3), chip - 6, high - 6, boxstyle="round,pad=3",
                facecolor=TINTS[kind], edgecolor=GREY, lw=0.8,
            )  # fmt: skip
            axes.add_patch(patch)
            label = f"{p.kernel[0]}×{p.kernel[1]}" if p.size else kind
            axes.text(x + chip / 2, y - 11, label, ha="center", va="center", weight="bold")
            cost = costs[p.name]
            texts = (f"{cost.params / 1e3:.1f} k", f"{cost.madds / 1e6:.1f} M")
            for line, text in enumerate(texts):
                axes.text(x + chip / 2, y + 1 + 11 * line, text, ha="center", va="center")
            for q in rows[kind][i + 1 : i + 2]:
                if (p.name, q.name) in allowed:
                    arrows.append(f"{p.name} to {q.name}")
                    arrow((x + chip, y), (x + chip + space, y), 0.0, False)
    for a, b in sorted(between, key=lambda ab: (kinds.index(ab[0]), kinds.index(ab[1]))):
        i, j = kinds.index(a), kinds.index(b)
        if any((a, c) in between and (c, b) in between for c in kinds[i + 1 : j]):
            continue
        if i - j > 1:
            raise NatlibError(f"cannot draw {a} to {b}: it climbs more than one kind")
        arrows.append(f"{a} to {b}")
        y0, y1, up = i * step + step / 2, j * step + step / 2, i > j
        x, clear = (stem - 12, -9) if up else (stem, 6)
        arrow((x, y0 + clear), (x, y1 - clear), 0.0 if j - i < 2 else 0.14 + 0.02 * (j - i), up)
    note = "k: thousand params   M: million MAdds   dashed: towards more cost"
    axes.text(_MARGIN, depth - 4, note, va="bottom", color=GREY)
    chart.alt = (
        "Transition scheme. Each box is a primitive with its parameters in thousands and "
        f"multiply-adds in millions; arrows, others follow from them: {'; '.join(arrows)}."
    )
    return chart


def mask_plot(
    mask: ArrayLike, names: Sequence[str], highlight: Collection[tuple[str, str]] = (),
    title: str = "", highlight_label: str = "marked",
) -> Chart:  # fmt: skip
    """Draw which primitive (row) may replace which (column) as a grid of cells.

    ``mask`` is bool (K, K), [source, target]; ``highlight`` pairs (source, target) get a cross.
    Raises NatlibError if the shape does not fit ``names``.
    """
    allowed = np.asarray(mask, dtype=bool)
    k = len(names)
    if allowed.shape != (k, k):
        raise NatlibError(f"mask has shape {allowed.shape}; {k} names need ({k}, {k})")
    total = int(allowed.sum())
    rows = "; ".join(
        f"{n} to {', '.join(t for j, t in enumerate(names) if allowed[i, j] and i != j) or '-'}"
        for i, n in enumerate(names)
    )
    alt = f"{title + ': ' if title else ''}{total} allowed pairs, keep included. {rows}."
    if highlight:
        pairs = ", ".join(f"{s} to {t}" for s, t in sorted(highlight))
        alt += f" {highlight_label}: {pairs}."
    chart = start_chart(WIDTH + (44 if title else 22), alt)
    axes = chart.subplots()
    axes.set_xlim(-0.5, k - 0.5)
    axes.set_ylim(k - 0.5, -0.5)
    axes.set_aspect("equal")
    colors = [["#ffffff", SKY], ["#ffffff", "#b9b9b9"]]
    for i in range(k):
        for j in range(k):
            color = colors[int(i == j)][int(allowed[i, j])]
            axes.add_patch(
                matplotlib.patches.Rectangle(
                    (j - 0.5, i - 0.5), 1, 1, facecolor=color, edgecolor=FAINT, lw=0.8
                )
            )
            if allowed[i, j] and (names[i], names[j]) not in highlight:
                axes.text(j, i, "=" if i == j else "•", ha="center", va="center", fontsize=9)
    index = {n: i for i, n in enumerate(names)}
    crosses = [(index[s], index[t]) for s, t in highlight if s in index and t in index]
    for i, j in crosses:
        axes.plot(j, i, marker="X", color=RED, ms=8.5, mec="white", mew=0.8, ls="")
    axes.set_xticks(range(k), names, rotation=90)
    axes.set_yticks(range(k), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_ylabel("from")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("to")
    if title:
        chart.suptitle(f"{title}: {total} of {k * k} pairs", x=0.02, ha="left", fontsize=10)
    keys: list[Any] = [
        axes.plot([], [], "s", color=SKY, label="allowed")[0],
        axes.plot([], [], "s", color="#b9b9b9", label="keep")[0],
    ]
    if highlight:
        keys.append(axes.plot([], [], "X", color=RED, label=highlight_label)[0])
    chart.legend(handles=keys, loc="outside lower center", ncols=3, columnspacing=1.2)
    return chart
