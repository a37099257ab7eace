"""The check of token trees: in the rows, each supervised token is predicted from what is before it in its sample.

That the samples are what is served is the comparison's to prove; here it is that the rows show the same.
"""

from typing import NamedTuple

import numpy as np

from served_tokens.marks import IGNORE_INDEX
from served_tokens.trees.rows import Row, Sample, rows_of, shared_tokens

AS_WRITTEN, MERGED, TREES = "samples as written", "merged chains", "token trees"


class TreesFound(NamedTuple):
    """What is found of the rows of a data set.

    ways: {how it can be trained: (samples or rows, tokens)}
    differ: the positions of samples that are seen otherwise in the rows.
    """

    ways: dict[str, tuple[int, int]]
    differ: list[int]


def check_rows(samples, row_tokens: int, row_samples: int | None = None) -> TreesFound:
    """Make the rows of all samples, as the training does, and look for each supervised token at what it sees.

    Args:
        samples: (ids, labels) of each, integer arrays.
    """
    held, counts, differ = [], {AS_WRITTEN: [0, 0], MERGED: [0, 0], TREES: [0, 0]}, []

    def counted():
        before = None
        for position, sample in enumerate(samples):
            sample = Sample(*map(np.asarray, sample))
            _add(counts[AS_WRITTEN], len(sample.ids))
            if before is not None and shared_tokens(before, sample) == len(before.ids):
                _add(counts[MERGED], -len(before.ids), 0)  # the next sample repeats all of it
            else:
                _add(counts[MERGED], 0)
            _add(counts[MERGED], len(sample.ids), 0)
            before = sample
            if (sample.labels[1:] != IGNORE_INDEX).any():
                held.append((position, sample))
            yield sample

    for row in rows_of(counted(), row_tokens, row_samples):
        _add(counts[TREES], len(row.input_ids))
        differ += differing(row, held)
    differ += [position for position, _ in held]  # they are in no row
    return TreesFound({way: tuple(numbers) for way, numbers in counts.items()}, differ)


def differing(row: Row, held: list) -> list[int]:
    """The positions of the samples of a row whose supervised tokens do not see there what they see in the sample.

    Args:
        held: (position, sample) of all samples from the row's first on; those of the row are taken out.
    """
    differ, predicting, taken = [], np.flatnonzero(row.labels[1:] != IGNORE_INDEX), 0
    ends = np.bincount(row.last + 1, minlength=len(row.last) + 1)[:-1]
    seen = np.cumsum(1 - ends)  # how many tokens each token sees, itself too
    position = held[0][0]
    while taken < len(predicting):
        if not held:
            return [*differ, position]  # the row supervises more than its samples
        position, sample = held.pop(0)
        at = np.flatnonzero(sample.labels[1:] != IGNORE_INDEX)
        these = predicting[taken : taken + len(at)]
        taken += len(at)
        if not (len(these) == len(at) and _is_shown(row, these, sample, at, seen)):
            differ.append(position)
    return differ


def _is_shown(row: Row, these: np.ndarray, sample: Sample, at: np.ndarray, seen: np.ndarray) -> bool:
    """Whether the tokens `these` of a row see, and predict, what those `at` in a sample do."""
    path = np.flatnonzero(row.last[: these[-1] + 1] >= these[-1])  # what the last of them sees
    size = at[-1] + 1
    return (
        len(path) == size
        and np.array_equal(path[at], these)
        and np.array_equal(row.input_ids[path], sample.ids[:size])
        and np.array_equal(row.labels[these + 1], sample.labels[at + 1])
        # each token before the last sees those of the path up to itself: they are among what it sees, and so many
        and np.array_equal(seen[path], np.arange(1, size + 1))
        and np.array_equal(row.position_ids[path], np.arange(size))
    )


def _add(numbers: list, tokens: int, rows: int = 1) -> None:
    numbers[0] += rows
    numbers[1] += tokens
