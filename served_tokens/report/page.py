"""The page of the check: one HTML file that loads nothing, whose script and style are its own.

No text of the data is ever read as HTML: jinja2 escapes all but our own files, charts and JSON that ends no element.
"""

import base64
import hashlib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from served_tokens.proof.findings import Findings, Sample, length_statistics
from served_tokens.report.charts import histograms, rows, svg
from served_tokens.report.summary import unread_keys
from served_tokens.report.tokens import script_json, viewer_data, visible

HERE = Path(__file__).parent
EXTREMES_LISTED, KEYS_LISTED = 5, 10


class Checked(NamedTuple):
    """What was checked, and with what."""

    command: str
    model: str
    cutoff_len: int
    costs: dict[str, dict[str, float]]  # how it can be trained -> see training_cost
    reckoning: str  # what the costs are reckoned with

    @property
    def cost_rows(self) -> list[list]:
        """Of each number, its name and what it is for each way."""
        ways = list(self.costs.values())
        return [[what, *(cost[what] for cost in ways)] for what in ways[0]]


def report_page(
    checked: Checked,
    problems: list[str],
    found: list[Findings],
    samples: list[tuple[str, Sample]],
    decode,
    special: set,
) -> str:
    """The HTML page.

    Args:
        problems: why the check failed; none where it passed.
        found, samples: the findings of each data set, and (name of the data set, sample) for those to show.
        decode: decode(token ids) -> text; special: ids of the tokens that mark structure.
    """
    style, script = (HERE.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    only = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "finalize": _shown}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), **options)
    return environment.get_template("report.html.jinja").render(
        checked=checked,
        versions={name: version(name) for name in ("llamafactory", "transformers")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        policy=f"default-src 'none'; {only}; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        verdict="FAILED" if problems else "PASSED",
        problems=problems,
        sets=[_numbers(findings, checked.cutoff_len) for findings in found],
        extremes={"longest": _extremes(samples, True), "shortest": _extremes(samples, False)},
        held=f"{len(samples):,} of {sum(len(findings.lengths) for findings in found):,} samples",
        data=Markup(script_json(viewer_data(samples, decode, special))),
    )


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hex; of a folder, that of the lines that sha256sum prints of its files, sorted by name."""
    if path.is_dir():
        lines = "".join(f"{checksum(file)}  {file.name}\n" for file in sorted(path.iterdir()))
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbers(findings: Findings, cutoff_len: int) -> dict:
    """What the page says of one data set."""
    counts, path = findings.counts, findings.path
    of = " of the lines that sha256sum prints of its files, sorted by name" if path and path.is_dir() else ""
    return {
        "findings": findings,
        "file": f"{path.name}: SHA-256 {checksum(path)}{of}" if path else "",
        "tiles": {
            "trajectories": counts["trajectories"],
            "turns": counts["turns"],
            "samples": len(findings.lengths),
            "tokens": counts["tokens"],
            "supervised tokens": counts["supervised tokens"],
            "share supervised": f"{counts['supervised tokens'] / max(1, counts['tokens']):.1%}",
        },
        "faults": _faults(findings, cutoff_len),
        "lengths": length_statistics(findings.lengths),
        "ways": [(way, *of, f"{counts['tokens'] / max(1, of[1]):.1f}") for way, of in findings.ways.items()],
        "charts": [(chart, Markup(svg(chart)), rows(chart)) for chart in histograms(findings, cutoff_len).values()],
    }


def _faults(findings: Findings, cutoff_len: int) -> list[tuple[str, int, str]]:
    """(what, how many, more)."""
    counts, samples, listed = findings.counts, len(findings.lengths), findings.left_out
    left_out = counts["turns"] - counts["supervised turns"]
    why = "".join(f"{number:,}: {why}; " for why, number in findings.why_left_out.most_common())
    turns = ": " * bool(listed) + ", ".join(listed) + ", …" * (left_out > len(listed))
    kinds = "; ".join(f"in {number:,} {kind}" for kind, number in findings.kinds.most_common())
    reasons = [f"{number:,} like this: {reason}" for reason, number in findings.reasons.most_common()]
    lost = [f"{number:,} under {key}" for key, number in findings.lost_under.most_common(KEYS_LISTED)]
    longest = f"the longest sample has {max(findings.lengths, default=0):,} tokens"
    return [
        ("exact", counts["exact"], f"{counts['exact'] / max(1, samples):.2%}"),
        ("mismatched", counts["mismatched"], kinds),
        ("over cutoff_len", counts["cut"], f"cutoff_len is {cutoff_len:,}; {longest}"),
        ("supervised", counts["supervised turns"], "turns"),
        ("left out", left_out, f"{why}turns without a sample{turns}"),
        ("lost", counts["lost texts"], "; ".join(["texts in no sample that should hold them", *lost, *findings.lost])),
        ("read otherwise", counts["read otherwise"], "rows that the check itself reads in another way"),
        (
            "other targets",
            counts["other targets"],
            f"prompts that are trained to another target too {findings.other_targets}",
        ),
        ("not shown", sum(findings.unread.values()), f"columns and keys that nobody reads: {unread_keys(findings)}"),
        ("set aside", counts["rows set aside"], "; ".join(["trajectories that cannot be read", *reasons])),
    ]


def _extremes(samples: list[tuple[str, Sample]], longest: bool) -> list[tuple[Markup, int, int]]:
    """(link to the sample, its tokens, how many are supervised)."""
    by_length = sorted(enumerate(samples), key=lambda numbered: numbered[1][1].served, reverse=longest)
    link = Markup('<a href="#s{}">{}</a>')
    return [(link.format(i, it.place), it.served, it.supervised) for i, (_, it) in by_length[:EXTREMES_LISTED]]


def _shown(value):
    """A value as the page shows it: numbers with separators, and what cannot be seen in a text written out."""
    if isinstance(value, (int, float)):
        return f"{value:,.10g}"
    return visible(value) if type(value) is str else value


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
