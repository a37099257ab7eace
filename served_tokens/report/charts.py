"""Histograms of what the check counted, drawn by matplotlib: SVG in the page, PNG in a folder."""

import io
import itertools
import math
import re
from collections import Counter
from typing import NamedTuple
from xml.etree import ElementTree

from served_tokens.proof.findings import Findings
from served_tokens.report.tokens import visible

BARS = 24
MOST = 0.99  # of the values decide what a histogram has room for
BAR, MARK, MUTED, LINE = "#0b62b3", "#a40e26", "#57606a", "#d0d7de"
THEME = {
    BAR: "var(--accent)",
    MARK: "var(--bad)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
}  # as report.css names them
STYLE = {
    "svg.fonttype": "none",  # text that can be searched and copied, and that follows the page's font
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    **{"xtick.bottom": False, "ytick.left": False},
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LINE},
}


class Histogram(NamedTuple):
    title: str
    x: str
    y: str
    bars: list  # (first value, last value, how many), of one width; but the last may go further
    mark: tuple | None = None  # (value, name)
    note: str = ""


def histogram(title: str, x: str, y: str, values: Counter, mark: tuple | None = None) -> Histogram:
    """Bars of one round width, at most BARS + 2, over values that are counts.

    A few far higher values than all others share the last bar, and a mark far beyond all is only noted: else either
    would leave the others no room.
    """
    low, high, notes = min(values, default=0), max(values, default=0), []
    if mark and mark[0] > 2 * high:
        notes, mark = [f"{mark[1]} is further right"], None
    ordered = sorted(values)
    seen = itertools.accumulate(values[value] for value in ordered)
    enough = MOST * values.total()
    most = next((value for value, so_far in zip(ordered, seen, strict=True) if so_far >= enough), 0)
    top = max(most, min(mark[0], high) if mark else 0)
    if high <= 2 * top:
        top = high
    width = next(w for e in itertools.count() for w in (10**e, 2 * 10**e, 5 * 10**e) if (top - low) // w < BARS)
    binned = Counter()
    for value, number in values.items():
        binned[value // width] += number
    bars = [(b * width, b * width + width - 1, binned.pop(b, 0)) for b in range(low // width, top // width + 1)]
    if binned:
        bars.append((bars[-1][1] + 1, high, binned.total()))
        notes.append(f"the last bar goes to {high:,}")
    return Histogram(title, x, y, bars, mark, "; ".join(notes))


def histograms(findings: Findings, cutoff_len: int) -> dict[str, Histogram]:
    """The three of a data set, by the end of their file's name."""
    lengths, cutoff = Counter(findings.lengths), (cutoff_len, f"cutoff_len {cutoff_len:,}")
    turns, targets = findings.turns, findings.targets
    return {
        "sample_lengths": histogram("Sample lengths", "tokens of a sample", "samples", lengths, cutoff),
        "turns_per_trajectory": histogram("Turns per trajectory", "turns of a trajectory", "trajectories", turns),
        "supervised_tokens_per_turn": histogram("Supervised tokens per turn", "tokens of a target", "turns", targets),
    }


def rows(chart: Histogram) -> list[tuple[str, int]]:
    """(values, how many) of each bar."""
    return [(f"{low:,}" if low == last else f"{low:,} to {last:,}", number) for low, last, number in chart.bars]


def plots(findings: Findings, cutoff_len: int) -> dict[str, bytes]:
    """The PNG of each histogram, by the name of its file."""
    prefix = re.sub(r"[^\w.-]", "_", findings.name)
    return {
        f"{prefix}_{key}.png": _saved(chart, "png", title=f"{chart.title} ({visible(findings.name)})")
        for key, chart in histograms(findings, cutoff_len).items()
    }


def svg(chart: Histogram) -> str:
    """The histogram as an SVG element whose bars tell their numbers, in the colours of the page.

    matplotlib writes style attributes, which the page's policy forbids, and which would have no dark mode. As
    attributes of their own the parts of a style are allowed, and name the page's colours.
    """
    root = ElementTree.fromstring(_saved(chart, "svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))))
    told = (f"{values}: {number:,}" for values, number in rows(chart))
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        style = [pair.partition(":") for pair in element.attrib.pop("style", "").split(";") if pair.strip()]
        element.attrib |= {name.strip(): THEME.get(value.strip(), value.strip()) for name, _, value in style}
        element.attrib.pop("clip-path", None)  # nothing is drawn outside
        if element.attrib.pop("id", "") == "reach":  # other ids would be the same in each chart
            element.set("class", "reach")
            ElementTree.SubElement(element, "title").text = next(told)
    for part in ("metadata", "defs"):  # in defs are a style that the policy forbids, and clip paths
        for unneeded in root.findall(part):
            root.remove(unneeded)
    label = f"Histogram: {chart.title}; its numbers are in the table below"
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _saved(chart: Histogram, kind: str, title: str = "", **options) -> bytes:
    """The histogram as a file of this kind."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, file = _figure(chart), io.BytesIO()
        if title:
            figure.suptitle(title, parse_math=False)
        figure.savefig(file, format=kind, transparent=kind == "svg", **options)
    return file.getvalue()


def _figure(chart: Histogram):
    """The histogram as a matplotlib figure; "reach" is what a pointer reaches of each bar in the page."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(5.4, 3.3), dpi=200, layout="constrained")
    axes = figure.subplots()
    first, width = chart.bars[0][0], chart.bars[0][1] - chart.bars[0][0] + 1
    shift = 0.5 if width == 1 else 0  # a bar of one value stands over it
    lefts, numbers = [low - shift for low, _, _ in chart.bars], [number for *_, number in chart.bars]
    # The edge, in points, shows a single sample beside thousands too; nothing is drawn of no samples.
    drawn = {"color": BAR, "edgecolor": BAR, "linewidth": 1}
    axes.bar(lefts, [number or math.nan for number in numbers], 0.92 * width, align="edge", **drawn)
    axes.bar(lefts, max(numbers) or 1, width, align="edge", color="none", gid="reach")
    if chart.mark:
        at = max(chart.mark[0], first)
        side = "right" if at > (first + max(at, lefts[-1] + width)) / 2 else "left"
        axes.axvline(at, color=MARK, linestyle="--")
        place = {"transform": axes.get_xaxis_transform(), "ha": side, "va": "bottom"}
        axes.text(at, 1.01, chart.mark[1], color=MARK, **place)
    axes.margins(x=0.01)
    axes.set_xlabel("\n".join(filter(None, (chart.x, chart.note))))
    axes.set_ylabel(chart.y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    return figure


def short(number: float) -> str:
    """12000 as 12k: an axis has little room."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
