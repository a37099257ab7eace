"""What the check learned of the training data, drawn: one HTML page, PNG plots, one sample in the terminal.

    findings, chosen samples -> report_page(…) -> HTML        findings -> histograms(…) -> write_plots(…) -> PNG
    one sample               -> terminal_view(…) -> text

The page is one file that loads nothing: its script and style are its own, and no text of the data is ever read as HTML.

The one idea: the numbers cover every sample, and are numbers alone; texts are taken of a bounded choice of samples, when
the check is done. So neither the page nor the memory grows with the data.
"""

import base64
import hashlib
import heapq
import html
import itertools
import json
import math
import random
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trajectories import whole_file

IGNORE_INDEX = -100  # LlamaFactory's extras/constants.py: no loss on this token
SAMPLES_IN_PAGE = 200
TOKENS_IN_PAGE = 500_000  # of all its samples together
TOKENS_OF_SAMPLE = 10_000  # more, and a browser is slow to show it
MISMATCHES_KEPT, PLACES_KEPT, REASONS_KEPT = 50, 20, 20
EXTREMES = 20  # samples that are in the page for being the longest, and as many for being the shortest
EXTREMES_LISTED = 5
BARS = 24
MOST = 0.99  # of the values decide what a histogram has room for
TOKENS_OF_CHARACTER = 8  # the most tokens that are tried together to find whole characters
# What a terminal would obey, a reader would not see or a file cannot hold: control characters, marks that reorder the
# text, lone surrogates.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass
class Findings:
    """What the check learns of one data set: numbers of all samples, texts of the first few mismatches only.

    counts: "exact", "mismatched", "cut", "trajectories", "turns", "supervised turns", "rows set aside"; "tokens" and
        "supervised tokens" as LlamaFactory trains on them.
    """

    name: str
    trains: bool  # else it is for evaluation
    settings: str  # what its samples are served as and built with
    lengths: array  # tokens of each sample as it is served, by its position in the data set
    exact: bytearray  # 1 for each sample that is exact, by its position
    counts: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)  # what differs -> samples
    reasons: Counter = field(default_factory=Counter)  # why it cannot be read -> trajectories
    turns: Counter = field(default_factory=Counter)  # turns of a trajectory -> trajectories
    targets: Counter = field(default_factory=Counter)  # tokens of a target -> turns
    mismatches: dict = field(default_factory=dict)  # position of a sample -> (first token that differs or None, text)
    left_out: list = field(default_factory=list)  # the first turns without a sample, as text
    why_left_out: Counter = field(default_factory=Counter)  # reason -> turns without a sample


class Sample(NamedTuple):
    """A sample that is shown: token ids and labels as LlamaFactory trains on them."""

    source: str
    trajectory: int
    turns: list
    input_ids: list
    labels: list
    why: str = ""
    served: int = 0  # tokens, before any are cut
    mismatch: tuple = (None, "")

    @property
    def place(self) -> str:
        return f"trajectory {self.trajectory}, {counted(self.turns, 'turn')}"

    @property
    def supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


class Histogram(NamedTuple):
    title: str
    x: str
    y: str
    bars: list  # (first value, last value, how many), of one width; but the last may go further
    mark: tuple | None = None  # (value, name)
    note: str = ""


# ---------------------------------------------------------------- numbers


def choice_of_samples(findings: Findings, limit: int) -> dict[int, str]:
    """{position: why it is shown}: those with a mismatch, the longest, the shortest, and an even choice of the rest."""
    length, every = findings.lengths.__getitem__, range(len(findings.lengths))
    chosen = {}
    for why, positions in (
        ("mismatch", findings.mismatches),
        ("longest", heapq.nlargest(EXTREMES, every, key=length)),
        ("shortest", heapq.nsmallest(EXTREMES, every, key=length)),
        ("even choice", random.Random(0).sample(every, min(limit, len(every)))),
    ):
        for position in positions:
            if len(chosen) < limit:
                chosen.setdefault(position, why)
    return chosen


def training_cost(samples: int, tokens: int, supervised: int, *, epochs: float, max_steps: int, batch: int, accumulation: int,
                  gpus: int) -> dict:  # fmt: skip
    """Steps, epochs and tokens of a training, counted as transformers' Trainer does (5.x, set_initial_training_values)."""
    per_epoch = max(1, math.ceil(math.ceil(samples / (batch * gpus)) / accumulation))
    steps = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    epochs = steps / per_epoch if max_steps > 0 else epochs
    return {"steps": steps, "steps per epoch": per_epoch, "epochs": epochs, "samples per step": batch * accumulation * gpus,
            "tokens": round(tokens * epochs), "supervised tokens": round(supervised * epochs)}  # fmt: skip


def histogram(title: str, x: str, y: str, values: Counter, mark: tuple | None = None) -> Histogram:
    """Bars of one round width, at most BARS + 2, over values that are counts.

    A few far higher values than all others share the last bar, and a mark far beyond all is only noted: else either would
    leave the others no room.
    """
    low, high, notes = min(values, default=0), max(values, default=0), []
    if mark and mark[0] > 2 * high:
        notes, mark = [f"{mark[1]} is further right"], None
    ordered = sorted(values)
    most = (value for value, seen in zip(ordered, itertools.accumulate(map(values.get, ordered))) if seen >= MOST * values.total())
    top = max(next(most, 0), min(mark[0], high) if mark else 0)
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
    return {
        "sample_lengths": histogram("Sample lengths", "tokens of a sample", "samples", Counter(findings.lengths),
                                    (cutoff_len, f"cutoff_len {cutoff_len:,}")),
        "turns_per_trajectory": histogram("Turns per trajectory", "turns of a trajectory", "trajectories", findings.turns),
        "supervised_tokens_per_turn": histogram("Supervised tokens per turn", "tokens of a target", "turns", findings.targets),
    }  # fmt: skip


def counted(numbers: list, what: str) -> str:
    """'turn 4', 'turns 2, 4'; of a long list its ends."""
    shown = [*numbers[:3], "…", *numbers[-2:]] if len(numbers) > 6 else numbers
    return f"{what}{'s' * (len(numbers) > 1)} {', '.join(map(str, shown))}"


# ---------------------------------------------------------------- tokens as text


def visible(text: str) -> str:
    """The text with what cannot be seen in it written out."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def pieces(ids: list[int], decode):
    """Yield (ids, text) of single tokens; of several together where only they make whole characters."""
    start = 0
    while start < len(ids):
        for end in range(start + 1, min(start + TOKENS_OF_CHARACTER, len(ids)) + 1):
            if "\ufffd" not in (text := decode(ids[start:end])):
                break
        else:  # the text is cut in a character, or really holds this sign
            end, text = start + 1, decode(ids[start : start + 1])
        yield tuple(ids[start:end]), text
        start = end


def shown_ranges(length: int, limit: int, at: int) -> list[tuple[int, int]]:
    """What is shown of a sample of this many tokens: its two ends and what is around `at`, or all of it."""
    if length <= limit:
        return [(0, length)]
    third = limit // 3
    start = min(max(0, at - third // 2), length - third)
    ranges = [(0, third)]
    for first, end in ((start, start + third), (length - third, length)):
        if first <= ranges[-1][1]:
            first = ranges.pop()[0]
        ranges.append((first, end))
    return ranges


def runs(sample: Sample, limit: int):
    """Yield (supervised, first token, ids), or (None, first token, how many) where tokens are not shown."""
    at = sample.mismatch[0]
    if at is None:
        at = next((i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX), 0)
    done = 0
    for start, end in shown_ranges(len(sample.input_ids), limit, at):
        if start > done:
            yield None, done, start - done
        for supervised, group in itertools.groupby(range(start, end), lambda i: sample.labels[i] != IGNORE_INDEX):
            positions = list(group)
            yield supervised, positions[0], sample.input_ids[positions[0] : positions[-1] + 1]
        done = end


def terminal_view(sample: Sample, decode, special: set[int], colour: bool) -> str:
    """The whole sample as text: what is supervised is green and underlined, or in ⟦…⟧ without colour."""
    marked = "green, underlined" if colour else "in ⟦…⟧"
    heading = f"{sample.source}: {sample.place}: {len(sample.input_ids):,} tokens, {sample.supervised:,} supervised ({marked})"
    text = []
    for supervised, _, ids in runs(sample, len(sample.input_ids)):
        parts = []
        for is_special, group in itertools.groupby(ids, special.__contains__):
            style = ";".join((["4", "32"] if supervised else []) + (["1", "35"] if is_special else []))
            part = visible(decode(list(group)))
            parts.append(f"\x1b[{style}m{part}\x1b[0m" if colour and style else part)
        text.append("⟦" + "".join(parts) + "⟧" if supervised and not colour else "".join(parts))
    return visible(heading) + "\n\n" + "".join(text)


# ---------------------------------------------------------------- plots


def write_plots(charts: dict[str, Histogram], folder: Path, name: str) -> list[Path]:
    """A PNG of each histogram in the folder, named after the data set."""
    from matplotlib.figure import Figure

    paths, prefix = [], re.sub(r"[^\w.-]", "_", name)
    for key, chart in charts.items():
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axes = figure.subplots()
        first, width = chart.bars[0][0], chart.bars[0][1] - chart.bars[0][0] + 1
        shift = 0.5 if width == 1 else 0  # a bar of one value stands over it
        axes.bar([bar[0] - shift for bar in chart.bars], [bar[2] for bar in chart.bars], width * 0.92, align="edge", color="#0b62b3")
        if chart.mark:
            axes.axvline(chart.mark[0], color="#a40e26", linestyle="--", label=chart.mark[1])
            axes.legend()
        axes.set_title(f"{chart.title} ({name})", parse_math=False)
        axes.set_xlabel("\n".join(filter(None, (chart.x, chart.note))))
        axes.set_ylabel(chart.y)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        path = folder / f"{prefix}_{key}.png"
        with whole_file(path) as part:
            figure.savefig(part, format="png")
        paths.append(path)
    return paths


# ---------------------------------------------------------------- the page


def report_page(settings: dict, problems: list[str], found: list[Findings], samples: list[tuple[str, Sample]], cost: dict, cutoff_len: int,
                decode, special: set[int]) -> str:  # fmt: skip
    """The HTML page.

    Args:
        settings: what was checked, by name, as text.
        problems: why the check failed; none where it passed.
        found, samples: the findings of each data set, and (name of the data set, sample) for those to show.
        cost: see `training_cost`.
        decode: decode(token ids) -> text; special: ids of the tokens that mark structure.
    """
    data = viewer_data(samples, decode, special)
    sections = [numbers_section(findings, cutoff_len) for findings in found]
    held = f"{len(samples):,} of {sum(len(findings.lengths) for findings in found):,} samples"
    sections += [cost_section(cost, settings), extremes_section(samples), VIEWER.format(held=held)]
    policy = f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    verdict = "FAILED" if problems else "PASSED"
    reasons = "".join(f"<li>{_text(problem)}</li>" for problem in problems) or (
        "<li>LlamaFactory trains on the very tokens that are served, in every sample that was checked.</li>")  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{verdict}: training tokens of {_text(", ".join(f.name for f in found))}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#viewer">To the samples</a>
<header>
<h1>Training tokens</h1>
<div id="verdict" class="{verdict.lower()}"><strong>{verdict}</strong><ul>{reasons}</ul></div>
<nav aria-label="Sections"><a href="#numbers">Numbers</a> <a href="#cost">Cost</a> <a href="#extremes">Longest and shortest</a>
<a href="#viewer">Samples</a></nav>
</header>
<main id="numbers">
{"".join(sections)}
</main>
<footer><p>{_text(settings["command"])}</p></footer>
<script type="application/json" id="data">{script_json(data)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def viewer_data(samples: list[tuple[str, Sample]], decode, special: set[int]) -> dict:
    """What the page's script shows: {"pieces": [[ids, text, special], …], "samples": [{…, "runs": [[supervised, first, pieces]]}]}."""
    limit = min(TOKENS_OF_SAMPLE, TOKENS_IN_PAGE // max(1, len(samples)))
    index, entries = {}, []
    for name, sample in samples:
        shown = [
            (supervised, first, ids if supervised is None else
             [index.setdefault((*piece, not special.isdisjoint(piece[0])), len(index)) for piece in pieces(ids, decode)])
            for supervised, first, ids in runs(sample, limit)
        ]  # fmt: skip
        entries.append({
            "name": name, "source": sample.source, "trajectory": sample.trajectory, "turns": sample.turns, "place": sample.place,
            "why": sample.why, "tokens": len(sample.input_ids), "supervised": sample.supervised, "served": sample.served,
            "at": sample.mismatch[0], "mismatch": visible(sample.mismatch[1]), "runs": shown,
        })  # fmt: skip
    return {"pieces": [(ids, visible(text), is_special) for ids, text, is_special in index], "samples": entries}


def script_json(value) -> str:
    """JSON that can stand in a script element: no text in it can end the element, or a line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def numbers_section(findings: Findings, cutoff_len: int) -> str:
    counts, samples = findings.counts, len(findings.lengths)
    tiles = {
        "trajectories": f"{counts['trajectories']:,}",
        "turns": f"{counts['turns']:,}",
        "samples": f"{samples:,}",
        "tokens": f"{counts['tokens']:,}",
        "supervised tokens": f"{counts['supervised tokens']:,}",
        "share supervised": f"{counts['supervised tokens'] / max(1, counts['tokens']):.1%}",
    }
    rows = [
        ("exact", counts["exact"], f"{counts['exact'] / max(1, samples):.2%}"),
        ("mismatched", counts["mismatched"], "; ".join(f"in {n:,} {kind}" for kind, n in findings.kinds.most_common())),
        ("over cutoff_len", counts["cut"], f"cutoff_len is {cutoff_len:,}; the longest sample has {max(findings.lengths, default=0):,} tokens"),
        ("supervised", counts["supervised turns"], "turns"),
        ("left out", counts["turns"] - counts["supervised turns"],
         "".join(f"{n:,}: {why}; " for why, n in findings.why_left_out.most_common())
         + "turns without a sample" + ": " * bool(findings.left_out) + ", ".join(findings.left_out)
         + ", …" * (counts["turns"] - counts["supervised turns"] > len(findings.left_out))),
        ("set aside", counts["rows set aside"],
         "; ".join(["trajectories that cannot be read", *(f"{n:,} like this: {why}" for why, n in findings.reasons.most_common())])),
    ]  # fmt: skip
    use = "" if findings.trains else " (for evaluation)"
    return f"""<section>
<h2>{_text(findings.name)}{use}</h2>
<p>{_text(findings.settings)}</p>
<dl class="tiles">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())}</dl>
{_table(("what", "how many", "more"), rows)}
<div class="charts">{"".join(map(svg_figure, histograms(findings, cutoff_len).values()))}</div>
</section>
"""


def svg_figure(chart: Histogram) -> str:
    """The histogram as a figure: an SVG whose bars tell their numbers, and these numbers as a table."""
    wide, high, left, right, top, bottom = 380, 230, 60, 12, 22, 42
    first, width = chart.bars[0][0], chart.bars[0][1] - chart.bars[0][0] + 1
    end = max(chart.bars[-1][0] + width, chart.mark[0] if chart.mark else 0)
    highest = max(bar[2] for bar in chart.bars) or 1

    def x(value: float) -> float:
        return round(left + (value - first) / (end - first) * (wide - left - right), 1)

    def y(number: float) -> float:
        return round(high - bottom - number / highest * (high - bottom - top), 1)

    parts = []
    for number in sorted({0, highest // 2, highest}):
        parts.append(f'<line class="grid" x1="{left}" x2="{wide - right}" y1="{y(number)}" y2="{y(number)}"/>'
                     f'<text x="{left - 6}" y="{y(number) + 4}" text-anchor="end">{_short(number)}</text>')  # fmt: skip
    for low, last, number in chart.bars:
        label = f"{_range(low, last)}: {number:,}"
        x0, x1 = x(low), x(low + width)
        gap = min(1.5, (x1 - x0) / 5)
        height = max(y(0) - y(number), 1.5 if number else 0)  # a single sample beside thousands is seen too
        parts.append(f'<rect class="bar" x="{x0}" y="{y(0) - height:.1f}" width="{x1 - x0 - gap:.1f}" height="{height:.1f}"/>'
                     f'<rect class="reach" x="{x0}" y="{top}" width="{x1 - x0:.1f}" height="{high - bottom - top}"><title>{label}</title></rect>')  # fmt: skip
    step = width * max(1, math.ceil((end - first) / width / 5))
    shift = width / 2 if width == 1 else 0
    for value in range(first, end, step):
        parts.append(f'<text x="{x(value + shift)}" y="{high - bottom + 16}" text-anchor="middle">{_short(value)}</text>')
    if chart.mark:
        value, name = chart.mark
        at, side = x(max(value, first)), "end" if x(max(value, first)) > wide / 2 else "start"
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{top - 6}" y2="{y(0)}"/>'
                     f'<text class="mark" x="{at}" y="{top - 10}" text-anchor="{side}">{_text(name)}</text>')  # fmt: skip
    table = _table((chart.x, chart.y), [(_range(low, last), number) for low, last, number in chart.bars if number])
    return f"""<figure>
<figcaption>{chart.title}</figcaption>
<svg viewBox="0 0 {wide} {high}" role="img" aria-label="Histogram: {chart.title}; its numbers are in the table below">
{"".join(parts)}
<text x="{(left + wide - right) / 2}" y="{high - 8}" text-anchor="middle">{_text(chart.x)}</text>
<text x="12" y="{(high - bottom + top) / 2}" text-anchor="middle" transform="rotate(-90 12 {(high - bottom + top) / 2})">{chart.y}</text>
</svg>
<p>{_text(chart.note)}</p>
<details><summary>The numbers</summary>{table}</details>
</figure>
"""


def cost_section(cost: dict, settings: dict) -> str:
    return f"""<section id="cost">
<h2>What the training costs</h2>
<p>{_text(settings["cost"])}</p>
{_table(("what", "how many"), list(cost.items()))}
</section>
"""


def extremes_section(samples: list[tuple[str, Sample]]) -> str:
    tables = []
    for why, longest in (("longest", True), ("shortest", False)):
        order = sorted(range(len(samples)), key=lambda i: samples[i][1].served, reverse=longest)[:EXTREMES_LISTED]
        rows = [(_Link(f"#s{i}", samples[i][1].place), samples[i][1].served, samples[i][1].supervised) for i in order]
        tables.append(f"<div><h3>The {why} samples</h3>{_table(('sample', 'tokens', 'supervised'), rows)}</div>")
    return f'<section id="extremes"><h2>Longest and shortest</h2><div class="pair">{"".join(tables)}</div></section>\n'


class _Link(NamedTuple):
    href: str
    text: str


def _table(heads: tuple, rows: list[tuple]) -> str:
    def cell(value) -> str:
        if isinstance(value, _Link):
            return f'<td><a href="{value.href}">{_text(value.text)}</a></td>'
        if isinstance(value, (int, float)):
            return f'<td class="number">{value:{",d" if isinstance(value, int) else ",g"}}</td>'
        return f"<td>{_text(value)}</td>"

    numbers = [rows and isinstance(value, (int, float)) for value in (rows[0] if rows else heads)]
    head = "".join(f'<th scope="col"{" class=number" * number}>{_text(name)}</th>' for name, number in zip(heads, numbers))
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(visible(text))


def _range(low: int, last: int) -> str:
    return f"{low:,}" if low == last else f"{low:,} to {last:,}"


def _short(number: int) -> str:
    """12000 as 12k: an axis has little room."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f8fa;--ink:#1b1f24;--muted:#57606a;--line:#d0d7de;--accent:#0b62b3;
--good:#116329;--bad:#a40e26;--supervised:#d9f5e0;--special:#7a3e00}
@media (prefers-color-scheme:dark){:root{--paper:#0f1419;--card:#1a2129;--ink:#e6edf3;--muted:#9aa7b4;--line:#3a4552;--accent:#6cb6ff;
--good:#6fdd8b;--bad:#ff9a9a;--supervised:#12381f;--special:#ffb86b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:0 16px 40px;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:20px 0 12px}h2{font-size:1.25rem;margin:36px 0 12px;overflow-wrap:anywhere}h3{font-size:1rem;margin:12px 0 6px}
a{color:var(--accent)}nav a{display:inline-block;padding:6px 14px 6px 0}
.skip{position:absolute;left:-999px}.skip:focus{left:16px;top:8px;background:var(--paper);padding:6px 10px}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
#verdict{border:2px solid;border-radius:8px;padding:10px 16px;margin:0 0 8px;overflow-wrap:anywhere}
#verdict strong{font-size:1.2rem}#verdict ul{margin:4px 0 0;padding-left:20px;color:var(--ink)}
.passed{color:var(--good)}.failed{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:0 0 14px}
.tiles div,figure,.viewer{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
dt{color:var(--muted);font-size:.85rem}dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;min-width:min(420px,100%);font-size:.92rem}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
th{color:var(--muted);font-weight:600}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.charts,.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:14px;margin-top:16px}
figure{margin:0}figure p{margin:0;color:var(--muted);font-size:.85rem;text-align:center}figcaption{font-weight:600}svg{display:block;width:100%;height:auto}
svg text{fill:var(--muted);font-size:12px}.bar{fill:var(--accent)}.reach{fill:transparent}.reach:hover{fill:var(--ink);fill-opacity:.09}
.grid{stroke:var(--line);stroke-width:1}line.mark{stroke:var(--bad);stroke-width:2;stroke-dasharray:5 4}svg text.mark{fill:var(--bad)}
summary{cursor:pointer;color:var(--accent);padding:4px 0}
form,.group{display:flex;flex-wrap:wrap;gap:10px;align-items:end}label{font-size:.85rem;color:var(--muted)}
select,input,button{font:inherit;color:var(--ink);background:var(--paper);border:1px solid var(--muted);border-radius:6px;padding:7px 10px}
label select,label input{display:block}select{max-width:100%}.wide{flex:1 1 280px;min-width:0}.wide select{width:100%}
input{width:6em}button{cursor:pointer;min-width:44px}
#note{margin:10px 0;overflow-wrap:anywhere}#mismatch{white-space:pre-wrap;overflow-wrap:anywhere;color:var(--bad);font:.85rem/1.5 monospace}
#mismatch:empty,#message:empty{display:none}#message{color:var(--bad)}
.legend{margin-top:10px}.context{color:var(--muted)}.legend span{margin-right:12px;white-space:nowrap}
#tokens{white-space:pre-wrap;overflow-wrap:anywhere;overflow-y:auto;max-height:65vh;padding:10px;border:1px solid var(--line);border-radius:6px;
background:var(--paper);color:var(--muted);font:.88rem/1.75 ui-monospace,monospace;margin:10px 0 0;position:relative}
.token{unicode-bidi:isolate}.token:hover,.active{outline:2px solid var(--accent)}
mark{background:var(--supervised);color:var(--ink);text-decoration:underline;text-decoration-color:var(--good);text-decoration-thickness:2px;
text-underline-offset:3px}
.special{border:1px solid var(--special);border-radius:4px;color:var(--special);font-weight:700;padding:0 2px}
.first{outline:3px solid var(--bad)}.gap{display:block;text-align:center;border:1px dashed var(--muted);border-radius:4px;margin:8px 0}
.break{user-select:none;opacity:.6;font-style:normal}
#inspector{display:block;position:sticky;bottom:0;background:var(--card);border-top:1px solid var(--line);padding:8px 0;min-height:2.6em;
overflow-wrap:anywhere;font:.88rem/1.5 ui-monospace,monospace}
footer{color:var(--muted);font:.85rem/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
@media (forced-colors:active){mark{border-bottom:2px solid}}
"""

VIEWER = """<section id="viewer" aria-labelledby="viewer-title">
<h2 id="viewer-title">Samples</h2>
<p>{held}: those with a mismatch, the longest, the shortest, and an even choice of the rest.</p>
<noscript><p>The samples need JavaScript; all above does without.</p></noscript>
<div class="viewer">
<form id="choose" aria-label="Choose a sample">
<label class="wide">Sample <select id="sample"></select></label>
<button type="button" id="previous">← Previous</button><button type="button" id="next">Next →</button>
<div class="group"><label>Trajectory <input id="trajectory" inputmode="numeric" required pattern="[0-9]+"></label>
<label>Turn <input id="turn" inputmode="numeric" pattern="[0-9]*" placeholder="any"></label>
<button>Go</button></div>
</form>
<p id="message" role="alert"></p>
<div id="note" role="status"></div>
<div id="mismatch"></div>
<div class="legend"><mark>supervised</mark><span></span> <span class="context">context</span> <span class="special">special</span></div>
<div><div id="tokens" tabindex="0" role="group" aria-label="Tokens of the sample; the left and right arrow keys go from token to token"></div>
<output id="inspector">Point at a token, or go there with the arrow keys.</output></div>
</div>
</section>
"""

SCRIPT = r"""
'use strict';
const {pieces, samples} = JSON.parse(document.getElementById('data').textContent);
const at = id => document.getElementById(id), number = n => n.toLocaleString('en');
let current = -1, active = null;

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function tokenElement(piece, position, sample) {
  const [ids, text, special] = piece, made = element('span', special ? 'token special' : 'token', '');
  text.split(/(\n)/).forEach(part => {
    if (part === '\n') made.append(element('i', 'break', '↵'));
    made.append(part);
  });
  if (sample.at !== null && sample.at >= position && sample.at < position + ids.length) made.classList.add('first');
  made.dataset.position = position;
  made.dataset.ids = ids.join(' + ');
  made.title = `${made.dataset.ids}: ${JSON.stringify(text)}`;
  return made;
}

function show(index, move) {
  if (!samples.length) return;
  current = (index + samples.length) % samples.length;
  const sample = samples[current], box = document.createDocumentFragment();
  for (const [supervised, first, held] of sample.runs) {
    if (supervised === null) {
      box.append(element('span', 'gap', `… ${number(held)} tokens are not shown …`));
      continue;
    }
    const run = element(supervised ? 'mark' : 'span', '', '');
    let position = first;
    for (const piece of held) {
      run.append(tokenElement(pieces[piece], position, sample));
      position += pieces[piece][0].length;
    }
    box.append(run);
  }
  active = null;
  at('tokens').replaceChildren(box);
  const begin = at('tokens').querySelector('.first') || at('tokens').querySelector('mark');
  at('tokens').scrollTop = begin ? begin.offsetTop - 90 : 0;
  at('sample').value = current;
  at('mismatch').textContent = sample.mismatch;
  at('message').textContent = '';
  const served = sample.served === sample.tokens ? '' : `; as it is served it has ${number(sample.served)} tokens`;
  at('note').textContent = `${current + 1} of ${samples.length} (${sample.why}): ${sample.name}, ${sample.source}, ${sample.place}: `
    + `${number(sample.tokens)} tokens, ${number(sample.supervised)} supervised${served}`;
  at('trajectory').value = sample.trajectory;
  at('turn').value = sample.turns.at(-1);
  if (move) history.replaceState(null, '', '#s' + current);
}

function jump(trajectory, turn) {
  for (let step = 1; step <= samples.length; step++) {  // from the one that is shown, so that a second jump finds the next
    const index = (current + step) % samples.length, sample = samples[index];
    if (sample.trajectory === trajectory && (turn === null || sample.turns.includes(turn))) return show(index, true);
  }
  at('message').textContent = `trajectory ${trajectory}${turn === null ? '' : ', turn ' + turn} is not among the ${samples.length} samples `
    + `of this page; --show ${trajectory}:${turn === null ? 'TURN' : turn} of the check shows it in the terminal`;
}

function inspect(token) {
  if (!token) return;
  if (active) active.classList.remove('active');
  active = token;
  token.classList.add('active');
  const kind = (token.closest('mark') ? 'supervised' : 'context') + (token.classList.contains('special') ? ', special' : '');
  at('inspector').textContent = `token ${number(+token.dataset.position)}, id ${token.title}, ${kind}`;
}

function fromHash() {
  const match = /^#s(\d+)$/.exec(location.hash);
  if (match && +match[1] < samples.length) {
    show(+match[1], false);
    at('viewer').scrollIntoView();
  }
  return match;
}

samples.forEach((sample, index) => {
  const option = element('option', '', `${sample.place}: ${number(sample.tokens)} tokens (${sample.why})`);
  option.value = index;
  at('sample').append(option);
});
at('sample').addEventListener('change', event => show(+event.target.value, true));
at('previous').addEventListener('click', () => show(current - 1, true));
at('next').addEventListener('click', () => show(current + 1, true));
at('choose').addEventListener('submit', event => {
  event.preventDefault();
  jump(+at('trajectory').value, at('turn').value === '' ? null : +at('turn').value);
});
for (const kind of ['mouseover', 'click']) at('tokens').addEventListener(kind, event => inspect(event.target.closest('.token')));
at('tokens').addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  const all = [...at('tokens').querySelectorAll('.token')];
  inspect(all[active ? Math.min(Math.max(all.indexOf(active) + step, 0), all.length - 1) : 0]);
  active.scrollIntoView({block: 'nearest'});
});
window.addEventListener('hashchange', fromHash);
if (!fromHash()) show(0, false);
"""
