"""Counts of the check for people: statistics of lengths, and histograms, which the page's template draws."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from served_tokens.proof.findings import Findings

BARS, TICKS = 24, 6  # a histogram has fewer bars of one width, and an axis fewer steps


@dataclass(frozen=True)
class Bar:
    """How many values there are from `first` to `last`, both included."""

    first: int
    last: int
    number: int


@dataclass(frozen=True)
class Histogram:
    """Bars of one width, though the last may hold all higher values too. mark: a value, 0 for none."""

    title: str
    x: str
    y: str
    bars: list[Bar]
    mark: int
    note: str

    def across(self, value: float) -> float:
        """The place of a value in percent of the x axis, on which each whole number has room of its own."""
        first, width = self.bars[0].first, self.bars[0].last - self.bars[0].first + 1
        return 100 * (value - first + 0.5) / max(width * len(self.bars), self.mark - first + 1)


def histogram(title: str, x: str, y: str, values: list[int], mark: int = 0) -> Histogram:
    """Count values in bars of a round width.

    A few far higher values share the last bar, and a mark far beyond all values is only noted: else either would leave
    the others no room.
    """
    ordered, notes = sorted(values) or [0], []
    low, high = ordered[0], ordered[-1]
    if mark > 2 * high:
        notes.append(f"cutoff_len {mark:,} is further right")
        mark = 0
    enough = max(nearest_rank(ordered, 99), mark)
    top = high if high <= 2 * enough else enough
    width = round_step(top - low, BARS)
    binned = Counter(value // width for value in values)
    bars = [Bar(n * width, (n + 1) * width - 1, binned.pop(n, 0)) for n in range(low // width, top // width + 1)]
    if binned:
        bars.append(Bar(bars[-1].last + 1, high, binned.total()))
        notes.append(f"the last bar goes to {high:,}")
    return Histogram(title, x, y, bars, mark, "; ".join(notes))


def histograms(found: Findings, cutoff_len: int) -> list[Histogram]:
    """The three of a data set."""
    turns, targets = [*found.turns.elements()], [*found.targets.elements()]
    return [
        histogram("Sample lengths", "tokens of a sample", "samples", found.lengths, mark=cutoff_len),
        histogram("Turns per trajectory", "turns of a trajectory", "trajectories", turns),
        histogram("Supervised tokens per turn", "tokens of a target", "turns", targets),
    ]


def ticks(low: int, high: int) -> range:
    """The round numbers from `low` to `high`, for an axis."""
    step = round_step(high - low, TICKS)
    return range(-(-low // step) * step, high + 1, step)


def round_step(span: int, parts: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that goes into a span fewer than `parts` times."""
    steps = (digit * 10**zeros for zeros in itertools.count() for digit in (1, 2, 5))
    return next(step for step in steps if span // step < parts)


def nearest_rank(ordered: list[int], percent: int) -> int:
    """The smallest of ordered numbers that so many percent of them do not exceed."""
    return ordered[-(-percent * len(ordered) // 100) - 1]


def length_statistics(lengths: Iterable[int]) -> dict[str, float]:
    """Of lengths in tokens, zeros for none; there is a sample of the 95th percentile's length."""
    ordered = sorted(lengths) or [0]
    return {
        "shortest": ordered[0],
        "mean": round(statistics.fmean(ordered), 1),
        "median": statistics.median(ordered),
        "95th percentile": nearest_rank(ordered, 95),
        "longest": ordered[-1],
    }
