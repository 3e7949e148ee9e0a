"""The report's figures, through plotly: from rows and culprit data, nothing computed but logarithms and labels.

Every text goes to plotly as HTML, which it half understands: `_safe` escapes what came from a document.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from stages.diff import place_of
from stages.report.grid import Cell, Grid, Row
from stages.verdict import Verdict

# Blue below the bound, pale yellow at it, orange beyond: told apart by every common kind of colour vision.
BELOW, AT, BEYOND = "#2b6cb0", "#f6ebb4", "#c2540a"
# Okabe and Ito's colours (jfly.uni-koeln.de/color), without black and yellow, which a dark or light page hides.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SCALE = [[0.0, BELOW], [0.5, AT], [1.0, BEYOND]]
NEUTRAL = "#8a8f98"
SIDE_COLOURS = {"a": LINES[0], "b": LINES[1], "": NEUTRAL}
EXACT_COLOUR, ODD_COLOUR, MARK_COLOUR = "rgba(128,138,150,0.16)", "#6b2477", "#e0007a"
DECADES = 3  # of error / bound, either side of the bound, that the colours tell apart
_CELL = 30  # pixels
_UNSIDED = {"rel_l2": "a against b", "ratio": "error / bound"}


def _safe(text: object) -> str:
    return html.escape(str(text), quote=False).replace("\n", "<br>")


def heat_map(grid: Grid, side: str) -> dict[str, Any]:
    """log10(error / bound), every side a layer of traces of which one is visible."""
    figure = go.Figure()
    for name in grid.sides:
        for trace in _heat_traces(grid, name):
            figure.add_trace(trace.update(visible=name == side, meta=name))
    figure.update_xaxes(tickvals=list(range(len(grid.stages))), ticktext=[_safe(s) for s in grid.stages], tickangle=-60)
    places = [_safe(p) for p in grid.places]
    figure.update_yaxes(tickvals=list(range(len(places))), ticktext=places, autorange="reversed")
    figure.update_xaxes(showgrid=False, zeroline=False, side="top")
    figure.update_yaxes(showgrid=False, zeroline=False)
    for at, cell in _cells(grid, grid.sides[0]):
        if cell.culprit:
            _outline(figure, at)
    figure.update_layout(height=150 + _CELL * len(places), meta={"width": 260 + _CELL * len(grid.stages)})
    return _plain(figure, below=12)


def _cells(grid: Grid, side: str) -> Iterable[tuple[tuple[int, int], Cell]]:
    columns = {stage: i for i, stage in enumerate(grid.stages)}
    rows = {place: i for i, place in enumerate(grid.places)}
    for (place, stage), cell in grid.cells[side].items():
        yield (rows[place], columns[stage]), cell


def _heat_traces(grid: Grid, side: str) -> list[go.Heatmap]:
    """Three traces: ratios in colours, exact cells in grey, and what failed without a ratio, each with its mark."""
    layers: list[list[tuple[tuple[int, int], Cell]]] = [[], [], []]
    for at, cell in _cells(grid, side):
        quiet = cell.verdict in (Verdict.EXACT, Verdict.UNJUDGED)
        layers[0 if cell.log is not None else 1 if quiet else 2].append((at, cell))
    bar = {"title": {"text": "error / bound"}, "tickvals": [-DECADES, 0, DECADES], "thickness": 12}
    bar |= {"lenmode": "pixels", "len": 150, "y": 1, "yanchor": "top"}
    bar["ticktext"] = [f"10<sup>−{DECADES}</sup> or less", "the bound", f"10<sup>{DECADES}</sup> or more"]
    looks: list[dict[str, Any]] = [
        {"colorscale": SCALE, "colorbar": bar, "textfont": {"size": 11}},
        {
            "colorscale": [[0, EXACT_COLOUR], [1, EXACT_COLOUR]],
            "showscale": False,
            "textfont": {"size": 11, "color": NEUTRAL},
        },
        {
            "colorscale": [[0, ODD_COLOUR], [1, ODD_COLOUR]],
            "showscale": False,
            "textfont": {"size": 11, "color": "#fff"},
        },
    ]
    return [_heat_trace(grid, layer, look) for layer, look in zip(layers, looks, strict=True)]


def _heat_trace(grid: Grid, cells: Iterable[tuple[tuple[int, int], Cell]], look: Mapping[str, Any]) -> go.Heatmap:
    z: list[list[float | None]] = [[None] * len(grid.stages) for _ in grid.places]
    text, hover = ([[""] * len(grid.stages) for _ in grid.places] for _ in range(2))
    for (row, column), cell in cells:
        z[row][column] = cell.log or 0.0
        text[row][column] = "◆" * cell.culprit + _in_cell(cell)
        hover[row][column] = _safe(cell.text)
    return go.Heatmap(
        z=z, text=text, hovertext=hover, hoverinfo="text", texttemplate="%{text}", hoverongaps=False,
        zmin=-DECADES, zmax=DECADES, xgap=2, ygap=2, **look,
    )  # fmt: skip


def _in_cell(cell: Cell) -> str:
    """What stands in a cell: nothing within the bound, the power of ten beyond it, a mark where there is no ratio."""
    if cell.log is not None:
        return f"{cell.log:+.0f}" if cell.log > 0 else ""
    return _safe(cell.mark)


def _outline(figure: go.Figure, at: tuple[int, int]) -> None:
    row, column = at
    ends = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    figure.add_shape(type="rect", line={"color": MARK_COLOUR, "width": 3}, **ends)


def growth(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """Error over depth: propagated (relative L2 of a against b) above, isolated (error / bound) below."""
    compared = any("ratio_a" in row for row in rows)
    titles = ["Propagated: relative L2 of a against b"] if compared else []
    titles.append("Isolated: error / bound, each stage from its own inputs")
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=titles)
    lines = [_Line("", range(len(rows)), rows)] if kind == "forward" else _by_tensor(rows)
    panels = [("rel_l2", 1, "")] if compared else []
    panels += [(f"ratio_{s}", len(titles), s) for s in "ab"] if compared else [("ratio", 1, "")]
    for field, panel, side in panels:
        for number, line in enumerate(lines):
            figure.add_trace(line.trace(number, field, side, solo=len(lines) == 1), row=panel, col=1)
    for panel in range(1, len(titles) + 1):
        fields = [field for field, at, _ in panels if at == panel]
        _log_axis(figure, panel, [row.get(f) for row in rows for f in fields], band=panel == len(titles))
    _depth_axis(figure, rows, kind, len(titles))
    below = 96 if kind == "forward" else 190  # the stages' names, and a legend of nine tensors
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
    figure.update_layout(height=220 * len(titles) + below, legend=legend, meta={"width": 640})
    return _plain(figure, below=below)


@dataclass(frozen=True)
class _Line:
    """One line of the growth: a forward, or one tensor of a replay."""

    name: str
    where: Sequence[int]
    rows: Sequence[Row]

    def trace(self, number: int, field: str, side: str, *, solo: bool) -> go.Scatter:
        """The line of one field; alone it is of its side's colour, among others of its own."""
        values = [row.get(field) or None for row in self.rows]  # a logarithm has no zero
        hover = [_safe(f"{r['stage']}, {place_of(r)}\n{field} {v}") for r, v in zip(self.rows, values, strict=True)]
        colour = SIDE_COLOURS[side] if solo else LINES[number % len(LINES)]
        return go.Scatter(
            x=list(self.where), y=values, mode="lines+markers", hovertext=hover, hoverinfo="text",
            name=(side or _UNSIDED[field]) if solo else _safe(self.name), showlegend=solo or side == "b",
            legendgroup=self.name or side, line={"width": 1, "color": colour},
            marker={"size": 6, "symbol": "diamond-open" if side == "b" else "circle"},
        )  # fmt: skip


def _by_tensor(rows: Sequence[Row]) -> list[_Line]:
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    lines = []
    for tensor in dict.fromkeys(row["tensor"] for row in rows):
        line = [row for row in rows if row["tensor"] == tensor]
        lines.append(_Line(str(tensor), [stages.index(row["stage"]) for row in line], line))
    return lines


def _log_axis(figure: go.Figure, panel: int, values: Sequence[float | None], *, band: bool) -> None:
    """A logarithmic axis around what there is, with the noise band up to 1 where asked for."""
    logs = [math.log10(v) for v in values if v and math.isfinite(v)]
    low, high = (min(logs), max(logs)) if logs else (-1.0, 0.0)
    low, high = math.floor(low - 0.2), math.ceil(max(high, 0.0 if band else high) + 0.2)
    step = max(1, math.ceil((high - low) / 6))
    figure.update_yaxes(type="log", exponentformat="power", dtick=step, range=[low, high], row=panel, col=1)
    if band:
        figure.add_hrect(y0=10.0**low, y1=1, fillcolor=BELOW, opacity=0.12, line_width=0, row=panel, col=1)
    if not logs:
        middle = 10 ** ((low + high) / 2)
        figure.add_annotation(
            text="nothing differs here", x=0.5, xref="x domain", y=math.log10(middle), showarrow=False, row=panel, col=1
        )


def _depth_axis(figure: go.Figure, rows: Sequence[Row], kind: str, last: int) -> None:
    if kind == "forward":
        first: dict[str, int] = {}
        for at, row in enumerate(rows):
            label = "" if row["layer"] is None else str(row["layer"])
            if label:
                first.setdefault(label, at)
        ticks = {"tickvals": list(first.values()), "ticktext": list(first)}
        figure.update_xaxes(title="layer", row=last, col=1)
    else:
        stages = list(dict.fromkeys(row["stage"] for row in rows))
        ticks = {"tickvals": list(range(len(stages))), "ticktext": [_safe(s) for s in stages], "tickangle": -40}
    figure.update_xaxes(zeroline=False, **ticks)


def histogram(data: Mapping[str, Any]) -> dict[str, Any]:
    """Signed distance in ULPs, in bins that double."""
    bins, (a, b) = data["ulp"], data["labels"]
    hover = [_safe(f"{b} is {x['from']:,} to {x['to']:,} ULP from {a}\n{x['count']:,} elements") for x in bins]
    figure = go.Figure(go.Bar(x=[_power(x) for x in bins], y=[x["count"] or None for x in bins], hovertext=hover))
    figure.update_traces(hoverinfo="text", marker_color=[_bin_colour(x) for x in bins])
    figure.update_yaxes(type="log", title="elements", exponentformat="power", dtick=1)
    figure.update_xaxes(type="category", title=_safe(f"{b} above {a}, ULP"), showgrid=False, nticks=7, tickangle=0)
    figure.update_layout(height=320, bargap=0.1)
    return _plain(figure)


def _power(x: Mapping[str, int]) -> str:
    if not x["from"] and not x["to"]:
        return "0"
    sign, least = ("+", x["from"]) if x["from"] > 0 else ("−", -x["to"])
    return f"{sign}{least}" if least < 16 else f"{sign}2<sup>{int(math.log2(least))}</sup>"


def _bin_colour(x: Mapping[str, int]) -> str:
    return NEUTRAL if not x["to"] and not x["from"] else BEYOND if x["from"] > 0 else BELOW


def scatter(data: Mapping[str, Any]) -> dict[str, Any]:
    """b against a: a sample of elements, the worst ones beside it."""
    a, b = data["labels"]
    points, far = data["scatter"], data["worst"]
    figure = go.Figure()
    figure.add_trace(
        _points(points["a"], points["b"], f"{len(points['a'])} of them", size=4, colour=BELOW, opacity=0.5)
    )
    worst_a, worst_b = ([item[name] for item in far] for name in ("a", "b"))
    figure.add_trace(_points(worst_a, worst_b, "the worst", size=9, colour=BEYOND, symbol="diamond-open"))
    ends = [v for v in (*points["a"], *points["b"], *worst_a, *worst_b) if v is not None]
    line = [min(ends, default=0), max(ends, default=1)]
    figure.add_trace(go.Scatter(x=line, y=line, mode="lines", line={"width": 1, "color": NEUTRAL}, name="equal"))
    figure.update_xaxes(title=_safe(a), zeroline=False)
    figure.update_yaxes(title=_safe(b), zeroline=False)
    figure.update_layout(height=320, legend={"orientation": "h", "y": 1.12})
    return _plain(figure)


def _points(x: list[Any], y: list[Any], name: str, *, size: int, colour: str, **marker: Any) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode="markers", name=name, marker={"size": size, "color": colour, **marker})


def residual_map(data: Mapping[str, Any]) -> dict[str, Any]:
    """The signed difference by token and channel; of a block, its largest."""
    values, block, of = data["map"]["values"], data["map"]["block"], data["map"]["of"]
    largest = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    names = data["axes"].split() or ["element"]
    lead = 1 if names[:1] in (["tokens"], ["rows"]) and len(names) > 1 else len(names) - 1
    x0, y0 = (block[1] - 1) / 2, (block[0] - 1) / 2
    figure = go.Figure(
        go.Heatmap(
            z=values, x0=x0, dx=block[1], y0=y0, dy=block[0], colorscale=SCALE, zmin=-largest, zmax=largest,
            hovertemplate="%{y}, %{x}: %{z}<extra></extra>", colorbar={"thickness": 12, "exponentformat": "power"},
        )
    )  # fmt: skip
    figure.update_xaxes(title=_axis(names[lead:], block[1]), range=[-0.5, of[1] - 0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(title=_axis(names[:lead], block[0]), range=[of[0] - 0.5, -0.5], showgrid=False, zeroline=False)
    figure.update_layout(height=320)
    return _plain(figure)


def _axis(names: Sequence[str], block: int) -> str:
    return _safe(" × ".join(names)) + (f", blocks of {block}" if block > 1 else "")


def _plain(figure: go.Figure, below: int = 56) -> dict[str, Any]:
    """The figure as plain values, `below` pixels under its axes; colours of text and grid are the page's."""
    figure.update_layout(
        template=None, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", autosize=True, dragmode=False,
        margin={"l": 60, "r": 16, "t": 36, "b": below}, font={"size": 13},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, fixedrange=True)
    figure.update_yaxes(automargin=True, fixedrange=True)
    plain: dict[str, Any] = figure.to_plotly_json()
    return plain
