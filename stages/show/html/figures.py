"""The report's figures as lines, shapes and words in pixels, which templates/figure.html draws as SVG.

Nothing is computed but logarithms, places and labels. Every text is escaped by the template.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.show.html.grid import Row

# Pixels: a figure that grows with depth scrolls where it does not fit, the others fit a phone.
WIDE, NARROW = 960, 380
_LEFT, _RIGHT, _TOP = 64, 14, 30
# Shades of a residual, from the most negative to the most positive; the middle one is not drawn.
_SHADES = 6
# Stages whose spread over depth tells how a model behaves: the residual stream and what is added to it.
STREAM = ("post_attn_residual", "post_ffn_residual", "attn_out", "ffn_out")


@dataclass(frozen=True)
class Shape:
    """An SVG path and its CSS class; `title` is what a pointer is told."""

    path: str
    css: str
    title: str = ""


@dataclass(frozen=True)
class Label:
    """A text at a point; `css` says how it stands, `turned` that it runs upwards."""

    x: float
    y: float
    text: str
    css: str = ""
    turned: bool = False


@dataclass
class Figure:
    """A drawing of so many pixels; `key` are the classes and names of its lines."""

    width: int
    height: int
    shapes: list[Shape] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    key: list[tuple[str, str]] = field(default_factory=list)

    @property
    def wide(self) -> bool:
        return self.width > NARROW


@dataclass(frozen=True)
class _Panel:
    """Axes inside a figure: where they are, and the values at their ends; `log` counts powers of ten."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: int
    height: int
    width: int
    log: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; outside the axes it is on their edge."""
        y = math.log10(y) if self.log else y
        right = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return _LEFT + right * (self.width - _LEFT - _RIGHT), self.top + (1 - up) * self.height

    def box(self, low: float, high: float) -> str:
        """The path of a band across the panel, between two values of y in its own units."""
        y0, y1 = (self.top + (1 - (v - self.y[0]) / ((self.y[1] - self.y[0]) or 1)) * self.height for v in (low, high))
        return f"M{_LEFT} {y0:.1f}H{self.width - _RIGHT}V{y1:.1f}H{_LEFT}Z"

    def frame(self, figure: Figure, title: str) -> None:
        """Ticks and grid lines of y, and the panel's title."""
        for value, text in _ticks(*self.y, log=self.log):
            y = self.top + (1 - (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1)) * self.height
            figure.shapes.append(Shape(f"M{_LEFT} {y:.1f}H{self.width - _RIGHT}", "grid"))
            figure.labels.append(Label(_LEFT - 8, y + 4, text, "end"))
        if title:
            figure.labels.append(Label(_LEFT, self.top - 10, title, "strong"))


def _ticks(low: float, high: float, *, log: bool) -> list[tuple[float, str]]:
    if log:
        step = max(1, math.ceil((high - low) / 6))
        first = math.ceil(low / step) * step
        return [(n, "1" if n == 0 else f"1e{n}") for n in range(first, math.floor(high) + 1, step)]
    size = 10 ** math.floor(math.log10((high - low) or 1))
    step_of = next(size * s for s in (0.2, 0.5, 1, 2, 5, 10) if (high - low) / (size * s) <= 6)
    first = math.ceil(low / step_of)
    return [(n * step_of, f"{n * step_of:.4g}") for n in range(first, math.floor(high / step_of + 1e-9) + 1)]


def _line(panel: _Panel, points: Iterable[tuple[float, float | None]]) -> str:
    """A path through points; one without a value ends the line, and the next begins another."""
    path, inside = [], False
    for x, y in points:
        if y is None or not math.isfinite(y) or (panel.log and y <= 0):
            inside = False
            continue
        px, py = panel.at(x, y)
        path.append(f"{'L' if inside else 'M'}{px:.1f} {py:.1f}")
        inside = True
    return "".join(path)


def _dots(panel: _Panel, points: Iterable[tuple[float, float | None]]) -> str:
    """A path of points alone, which a round line cap shows."""
    good = [panel.at(x, y) for x, y in points if y is not None and math.isfinite(y) and not (panel.log and y <= 0)]
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in good)


def _decades(values: Iterable[float | None], *, bound: bool) -> tuple[float, float]:
    """The ends of a logarithmic axis around what there is, and around 1 where a bound is to be seen."""
    logs = [math.log10(v) for v in values if v and v > 0 and math.isfinite(v)]
    low, high = (min(logs), max(logs)) if logs else (-1.0, 0.0)
    return math.floor(low - 0.2), math.ceil((max(high, 0.0) if bound else high) + 0.2)


def growth(rows: Sequence[Row], kind: str) -> Figure:
    """Error over depth: propagated (relative L2 of a against b) above, isolated (error / bound) below."""
    compared = any("ratio_a" in row for row in rows)
    lines = [("", list(enumerate(rows)))] if kind == "forward" else _by_tensor(rows)
    fields = [("ratio_a", "s0", "a"), ("ratio_b", "s1", "b")] if compared else [("ratio", "s0", "error / bound")]
    panels = [("Propagated: relative L2 of b against a", [("rel_l2", "s2", "b against a")])] if compared else []
    panels.append(("Isolated: error / bound, each stage from its own inputs", fields))
    below = 44 if kind == "forward" else 130
    figure = Figure(WIDE, (_TOP + 190) * len(panels) + below)
    last = max((x for _, line in lines for x, _ in line), default=0)
    for number, (title, wanted) in enumerate(panels):
        isolated = number == len(panels) - 1
        ends = _decades((row.get(name) for row in rows for name, _, _ in wanted), bound=isolated)
        panel = _Panel((-0.5, last + 0.5), ends, _TOP + number * (_TOP + 190), 190, WIDE, log=True)
        panel.frame(figure, title)
        if isolated:
            figure.shapes.insert(0, Shape(panel.box(ends[0], 0.0), "band", "within the bound"))
        for at, (_, line) in enumerate(lines):
            for name, css, _ in wanted:
                points = [(x, row.get(name) or None) for x, row in line]  # a logarithm has no zero
                css = css if len(lines) == 1 else f"s{at % 6}"
                figure.shapes.append(Shape(_line(panel, points), f"line {css}"))
                figure.shapes.append(Shape(_dots(panel, points), f"dot {css}"))
        if not any(row.get(name) for row in rows for name, _, _ in wanted):
            figure.labels.append(Label(WIDE / 2, panel.top + 95, "nothing differs here", "middle"))
        _depth(figure, panel, lines[0][1] if lines else [], kind, named=isolated)
    if len(lines) == 1:
        figure.key = [(css, text) for _, wanted in panels for _, css, text in wanted]
    else:
        figure.key = [(f"s{at % 6}", name) for at, (name, _) in enumerate(lines)]
    return figure


def _by_tensor(rows: Sequence[Row]) -> list[tuple[str, list[tuple[int, Row]]]]:
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    tensors = dict.fromkeys(row["tensor"] for row in rows)
    return [(str(t), [(stages.index(r["stage"]), r) for r in rows if r["tensor"] == t]) for t in tensors]


def _depth(figure: Figure, panel: _Panel, line: Sequence[tuple[int, Row]], kind: str, *, named: bool) -> None:
    """The axis of depth: a mark where a layer begins, or each stage's name."""
    bottom = panel.top + panel.height
    if kind != "forward":
        for x, row in line if named else ():
            px, _ = panel.at(x, panel.y[0] if not panel.log else 10.0 ** panel.y[0])
            figure.labels.append(Label(px + 4, bottom + 12, str(row["stage"]), "end", turned=True))
        return
    first: dict[int, int] = {}
    for x, row in line:
        if row["layer"] is not None:
            first.setdefault(row["layer"], x)
    every = max(1, math.ceil(len(first) / 30))
    for layer, x in first.items():
        px, _ = panel.at(x - 0.5, 10.0 ** panel.y[0])
        figure.shapes.append(Shape(f"M{px:.1f} {panel.top}V{bottom}", "grid"))
        if named and layer % every == 0:
            figure.labels.append(Label(px + 3, bottom + 16, str(layer)))
    if named:
        figure.labels.append(Label(WIDE / 2, bottom + 36, "layer", "middle"))


def spread(rows: Sequence[Row]) -> Figure | None:
    """Standard deviation of the residual stream and of what is added to it, and its largest value, by layer.

    None where no stage of a layer has statistics.
    """
    found = {
        stage: [(row["layer"], _statistics(row)) for row in rows if row["stage"] == stage and row["layer"] is not None]
        for stage in STREAM
    }
    lines = [(stage, [(n, s["std"]) for n, s in line if s]) for stage, line in found.items()]
    largest = [
        (n, max(abs(s["min"]), abs(s["max"]))) for n, s in found["post_ffn_residual"] if s and s["min"] is not None
    ]
    lines = [(name, line) for name, line in [*lines, ("largest |value| of post_ffn_residual", largest)] if line]
    if not lines:
        return None
    layers = [n for _, line in lines for n, _ in line]
    ends = _decades((v for _, line in lines for _, v in line), bound=False)
    figure = Figure(WIDE, _TOP + 220 + 44, key=[(f"s{at}", name) for at, (name, _) in enumerate(lines)])
    panel = _Panel((min(layers) - 0.5, max(layers) + 0.5), ends, _TOP, 220, WIDE, log=True)
    panel.frame(figure, "")
    for at, (_, line) in enumerate(lines):
        figure.shapes += [Shape(_line(panel, line), f"line s{at}"), Shape(_dots(panel, line), f"dot s{at}")]
    every = max(1, math.ceil((max(layers) - min(layers) + 1) / 30))
    for layer in range(min(layers), max(layers) + 1, every):
        px, _ = panel.at(layer, 10.0 ** ends[0])
        figure.labels.append(Label(px, _TOP + 236, str(layer), "middle"))
    figure.labels.append(Label(WIDE / 2, _TOP + 256, "layer", "middle"))
    return figure


def _statistics(row: Row) -> Mapping[str, Any] | None:
    """A row's own statistics, or those of side b."""
    found = row.get("stats") or row.get("stats_b") or (row if "std" in row else None)
    return found if found and found["std"] is not None else None


def histogram(data: Mapping[str, Any]) -> Figure:
    """Signed distance in ULPs, in bins that double; as many elements as a bar is high, on a logarithmic axis."""
    bins, (a, b) = data["ulp"], data["labels"]
    figure = Figure(NARROW, 282)
    most = max((x["count"] for x in bins), default=1)
    panel = _Panel((-0.5, len(bins) - 0.5), (-0.3, math.log10(max(most, 1)) + 0.2), _TOP, 200, NARROW, log=True)
    panel.frame(figure, "elements")
    for at, x in enumerate(bins):
        if x["count"]:
            (left, top), (right, _) = panel.at(at - 0.45, x["count"]), panel.at(at + 0.45, x["count"])
            title = f"{b} is {x['from']:,} to {x['to']:,} ULP from {a}: {x['count']:,} elements"
            path = f"M{left:.1f} {_TOP + 200}V{top:.1f}H{right:.1f}V{_TOP + 200}Z"
            figure.shapes.append(Shape(path, _side_of_zero(x), title))
    every = max(1, math.ceil(len(bins) / 6))
    zero = next((i for i, x in enumerate(bins) if not x["from"] and not x["to"]), 0)
    for at, x in enumerate(bins):
        if (at - zero) % every == 0:
            figure.labels.append(Label(panel.at(at, 1)[0], _TOP + 218, _power(x), "middle"))
    figure.labels.append(Label(NARROW / 2, _TOP + 244, f"{b} above {a}, ULP", "middle"))
    return figure


def _power(x: Mapping[str, int]) -> str:
    if not x["from"] and not x["to"]:
        return "0"
    sign, least = ("+", x["from"]) if x["from"] > 0 else ("−", -x["to"])
    return f"{sign}{least}" if least < 1000 else f"{sign}2^{int(math.log2(least))}"


def _side_of_zero(x: Mapping[str, int]) -> str:
    return "calmbar" if not x["to"] and not x["from"] else "above" if x["from"] > 0 else "below"


def scatter(data: Mapping[str, Any]) -> Figure:
    """b against a: a sample of elements, and the worst ones."""
    a, b = data["labels"]
    points, far = data["scatter"], data["worst"]
    sample = [(x, y) for x, y in zip(points["a"], points["b"], strict=True) if x is not None and y is not None]
    worst = [(x["a"], x["b"]) for x in far if x["a"] is not None and x["b"] is not None]
    values = [float(v) for pair in (*sample, *worst) for v in pair]
    low, high = (min(values, default=0.0), max(values, default=1.0))
    pad = (high - low) * 0.04 or 1.0
    figure = Figure(NARROW, 282, key=[("below", f"{len(sample):,} of them"), ("above", "the worst")])
    panel = _Panel((low - pad, high + pad), (low - pad, high + pad), _TOP, 200, NARROW)
    panel.frame(figure, str(b))
    figure.shapes.append(Shape(_line(panel, [(low, low), (high, high)]), "line calmline", "equal"))
    figure.shapes.append(Shape(_dots(panel, sample), "dot small below"))
    figure.shapes.append(Shape(_dots(panel, worst), "dot above"))
    for value, text in _ticks(low - pad, high + pad, log=False):
        figure.labels.append(Label(panel.at(value, low)[0], _TOP + 218, text, "middle"))
    figure.labels.append(Label(NARROW / 2, _TOP + 244, str(a), "middle"))
    return figure


def residual_map(data: Mapping[str, Any]) -> Figure:
    """The signed difference by token and channel; of a block, its largest. One path for all cells of a shade."""
    values, block, of = data["map"]["values"], data["map"]["block"], data["map"]["of"]
    largest = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    names = data["axes"].split() or ["element"]
    lead = 1 if names[:1] in (["tokens"], ["rows"]) and len(names) > 1 else len(names) - 1
    width, height = (NARROW - _LEFT - _RIGHT) / max(len(values[0]), 1), 200 / max(len(values), 1)
    paths: dict[str, list[str]] = {}
    for row, line in enumerate(values):
        for column, run, shade in _runs([_shade(v, largest) for v in line]):
            x, y = _LEFT + column * width, _TOP + row * height
            paths.setdefault(shade, []).append(f"M{x:.1f} {y:.1f}h{run * width:.1f}v{height:.1f}h{-run * width:.1f}z")
    figure = Figure(NARROW, 282, key=[("r-6", f"−{largest:.2g}"), ("r6", f"+{largest:.2g}")])
    figure.shapes.append(Shape(f"M{_LEFT} {_TOP}H{NARROW - _RIGHT}V{_TOP + 200}H{_LEFT}Z", "frame"))
    figure.shapes += [Shape("".join(path), shade) for shade, path in sorted(paths.items())]
    figure.labels += [
        Label(_LEFT - 8, _TOP + 10, "0", "end"),
        Label(_LEFT - 8, _TOP + 200, f"{of[0] - 1:,}", "end"),
        Label(_LEFT, _TOP + 218, "0"),
        Label(NARROW - _RIGHT, _TOP + 218, f"{of[1] - 1:,}", "end"),
        Label(_LEFT, _TOP - 10, _axis(names[:lead], block[0]) + " ↓", "strong"),
        Label(NARROW / 2, _TOP + 244, _axis(names[lead:], block[1]) + " →", "middle"),
    ]
    return figure


def _shade(value: float | None, largest: float) -> str:
    if value is None:
        return "rn"
    return f"r{round(_SHADES * math.copysign(math.sqrt(abs(value) / largest), value))}"


def _runs(shades: Sequence[str]) -> Iterable[tuple[int, int, str]]:
    """Column, length and shade of each run of one shade; what is about 0 is not drawn."""
    start = 0
    for at in range(1, len(shades) + 1):
        if at == len(shades) or shades[at] != shades[start]:
            if shades[start] != "r0":
                yield start, at - start, shades[start]
            start = at


def _axis(names: Sequence[str], block: int) -> str:
    return " × ".join(names) + (f", blocks of {block}" if block > 1 else "")
