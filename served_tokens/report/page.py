"""The page of the check: one HTML file that loads nothing, whose script and style are its own.

No text of the data is ever read as HTML: jinja2 escapes all but our own files, and its JSON ends no element.
"""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jinja2

from served_tokens.files.read import checksum
from served_tokens.marks import many
from served_tokens.proof.findings import Findings
from served_tokens.report.charts import histograms, length_statistics, ticks
from served_tokens.report.cost import TOKENS_A_SECOND, Schedule, costs_by_way
from served_tokens.report.tokens import ShownSample, viewer_data, visible
from served_tokens.rows.notes import listed


@dataclass(frozen=True)
class Checked:
    """What was checked, with what, and what came out."""

    command: str
    model: str
    cutoff_len: int
    problems: list[str]  # why the check failed; none where it passed
    next: str  # the command that trains, where it passed
    found: list[Findings]  # of each data set
    schedule: Schedule


def report_page(checked: Checked, samples: list[ShownSample], decode, special: set[int]) -> str:
    """The HTML page, whose viewer holds these samples.

    decode: decode(token ids) -> text; special: ids of the tokens that mark structure.
    """
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "finalize": _shown}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **options)
    for function in (checksum, histograms, length_statistics, listed, many, ticks):
        environment.globals[function.__name__] = function
    training = [found for found in checked.found if found.trains]
    return environment.get_template("report.html.jinja").render(
        checked=checked,
        rates=TOKENS_A_SECOND,
        costs=costs_by_way(training, checked.schedule, checked.cutoff_len),
        samples=samples,
        versions={name: version(name) for name in ("llamafactory", "transformers")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        nonce=secrets.token_urlsafe(16),  # which no text of the data can know, so the browser runs none as a script
        verdict="FAILED" if checked.problems else "PASSED",
        data=viewer_data(samples, decode, special),
    )


def _shown(value):
    """A value as the page shows it: numbers with separators, and what cannot be seen in a text written out."""
    if isinstance(value, (int, float)):
        return f"{value:,.10g}"
    return visible(value) if type(value) is str else value
