"""The check of token trees: in the rows, each supervised token is predicted from what is before it in its sample.

That the samples are what is served is the proof's to show; here it is that the rows show the same.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from served_tokens.trees.rows import Row, Sample, predicting, rows_of

AS_WRITTEN, TREES = "samples as written", "token trees"


def check_rows(
    samples: Iterable[Sample], row_tokens: int, row_samples: int | None = None
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Make the rows of all samples, as the training does, and look for each supervised token at what it sees.

    Returns ({how the samples can be trained: (samples or rows, tokens)}, positions of samples seen otherwise there).
    """
    to_rows, to_compare = itertools.tee(samples)
    sizes, row_sizes, differ = [], [], []  # the first two in tokens

    def supervised():
        for position, sample in enumerate(to_compare):
            sizes.append(len(sample.ids))
            if len(predicting(sample.labels)):
                yield position, sample

    expected = supervised()
    for row in rows_of(to_rows, row_tokens, row_samples):
        row_sizes.append(len(row.input_ids))
        differ += differing(row, expected)
    differ += [position for position, _ in expected]  # they are in no row
    ways = {AS_WRITTEN: (len(sizes), sum(sizes)), TREES: (len(row_sizes), sum(row_sizes))}
    return ways, differ


def differing(row: Row, expected: Iterator[tuple[int, Sample]]) -> list[int]:
    """The positions of the samples of a row whose supervised tokens do not see there what they see in the sample.

    expected: (position, sample) of all samples from the row's first on; those of the row are taken from it.
    """
    differ, left = [], predicting(row.labels)
    ends = np.bincount(row.last + 1, minlength=len(row.last) + 1)[:-1]
    seen = np.cumsum(1 - ends)  # how many tokens each token sees, itself too
    for position, sample in expected:
        at = predicting(sample.labels)
        here, left = left[: len(at)], left[len(at) :]
        if len(here) < len(at) or not _is_shown(row, here, sample, at, seen):
            differ.append(position)
        if not len(left):
            return differ
    return [*differ, position]  # the row supervises more than its samples


def _is_shown(row: Row, here: np.ndarray, sample: Sample, at: np.ndarray, seen: np.ndarray) -> bool:
    """Whether the tokens `here` of a row see, and predict, what those `at` in a sample do."""
    path = np.flatnonzero(row.last[: here[-1] + 1] >= here[-1])  # what the last of them sees
    size = at[-1] + 1
    return (
        len(path) == size
        and np.array_equal(path[at], here)
        and np.array_equal(row.input_ids[path], sample.ids[:size])
        and np.array_equal(row.labels[here + 1], sample.labels[at + 1])
        # each token before the last sees those of the path up to itself: they are among what it sees, and so many
        and np.array_equal(seen[path], np.arange(1, size + 1))
        and np.array_equal(row.position_ids[path], np.arange(size))
    )
