"""Counts of the check for people: statistics of lengths, and histograms, which the page's template draws."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from served_tokens.proof.findings import Findings

BARS, TICKS = 24, 6  # a histogram has fewer bars, and an axis fewer steps


@dataclass(frozen=True)
class Bar:
    """How many values there are from `first` to `last`, both included."""

    first: int
    last: int
    number: int


@dataclass(frozen=True)
class Histogram:
    """Bars of one width, from the lowest to the highest value. mark: a value that is marked where a bar holds it."""

    title: str
    x: str
    y: str
    bars: list[Bar]
    mark: int | None

    def across(self, value: float) -> float:
        """The place of a value in percent of the x axis, on which each whole number has room of its own."""
        first, end = self.bars[0].first, self.bars[-1].last + 1
        return 100 * (value - first + 0.5) / (end - first)


def histogram(title: str, x: str, y: str, values: list[int], mark: int | None = None) -> Histogram:
    """Count values in bars of a round width."""
    low, high = min(values, default=0), max(values, default=0)
    width = round_step(high - low, BARS)
    binned = Counter(value // width for value in values)
    bars = [Bar(n * width, (n + 1) * width - 1, binned[n]) for n in range(low // width, high // width + 1)]
    is_seen = mark is not None and bars[0].first <= mark <= bars[-1].last
    return Histogram(title, x, y, bars, mark if is_seen else None)


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
    steps = (digit * 10**zeros for zeros in range(20) for digit in (1, 2, 5))
    return next(step for step in steps if span // step < parts)


def length_statistics(lengths) -> dict[str, float]:
    """Of lengths in tokens, zeros for none; there is a sample of the 95th percentile's length."""
    lengths = np.array(lengths if len(lengths) else [0])
    statistics = {
        "shortest": lengths.min(),
        "mean": lengths.mean().round(1),
        "median": np.median(lengths),
        "95th percentile": np.percentile(lengths, 95, method="inverted_cdf"),
        "longest": lengths.max(),
    }
    return {name: number.item() for name, number in statistics.items()}
