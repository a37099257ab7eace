"""Token trees: the samples of a trajectory in one row that holds what they share once.

n prefix samples cost the sum of all prefixes. Here a sample shares with the one before it what is the same, and the
rest is appended, so the row is the tree of the samples in depth-first order. A token sees its ancestors alone, which
are the tokens before it in its sample: token q sees token k where k <= q <= last[k].

A row is trained by the usual loss, which predicts each token from the one before it in the row. So a token that a
sample supervises is never shared (two samples that supervise it both count), and a branch that would open with one
begins one token earlier, with a copy.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from served_tokens.marks import IGNORE_INDEX


class Sample(NamedTuple):
    """Token ids and labels (IGNORE_INDEX where there is no loss), integer arrays of one length."""

    ids: np.ndarray
    labels: np.ndarray


class Row(NamedTuple):
    """Samples in one row: int32 arrays of one length, in tokens."""

    input_ids: np.ndarray
    labels: np.ndarray  # as LlamaFactory has them, for a loss that shifts them by one
    position_ids: np.ndarray  # the index of each token in its sample
    last: np.ndarray  # the index of the last descendant of each token, its own where it has none


def predicting(labels: np.ndarray) -> np.ndarray:
    """The indices of the tokens from which a supervised one is predicted; nothing predicts the first token."""
    return np.flatnonzero(labels[1:] != IGNORE_INDEX)


def rows_of(samples: Iterable[Sample], row_tokens: int, row_samples: int | None = None) -> Iterator[Row]:
    """Yield rows that hold these samples, in their order, each within the limits where a single sample is.

    A row that is full ends where the next one has the least to repeat: between two trajectories, and in one of them
    only where it is too long. Memory is that of one row.

    Samples without supervised tokens teach nothing and are left out.
    """
    held, shared = [], []  # the samples of the row; how many tokens each of them shares with the one before
    for sample in samples:
        if not len(predicting(sample.labels)):
            continue
        shared.append(shared_tokens(held[-1], sample) if held else 0)
        held.append(sample)
        while len(held) > 1 and (_tokens(held, shared) > row_tokens or len(held) > (row_samples or len(held))):
            cut = _cheapest_cut(held, shared)
            yield tree(held[:cut], shared[:cut])
            held, shared = held[cut:], [0, *shared[cut + 1 :]]
    if held:
        yield tree(held, shared)


def shared_tokens(before: Sample, sample: Sample) -> int:
    """How many tokens a sample need not repeat behind the one before it."""
    limit = min(len(before.ids), len(sample.ids))
    supervised = sample.labels[:limit] != IGNORE_INDEX
    supervised[:1] = False  # nothing predicts the first token of a sample
    differs = (before.ids[:limit] != sample.ids[:limit]) | supervised
    shared = int(differs.argmax()) if differs.any() else limit
    opens_supervised = shared < len(sample.ids) and sample.labels[shared] != IGNORE_INDEX
    return shared - 1 if opens_supervised and 0 < shared < len(before.ids) else shared


def tree(samples: list[Sample], shared: list[int]) -> Row:
    """The row of these samples, of which each shares so many tokens with the one before."""
    size = _tokens(samples, shared)
    row = Row(*(np.empty(size, np.int32) for _ in Row._fields))
    path, end = np.empty(0, np.int64), 0  # where in the row the tokens of the sample are; how long the row is
    for sample, kept in zip(samples, shared):
        start, end = end, end + len(sample.ids) - kept
        path = np.concatenate([path[:kept], np.arange(start, end)])
        row.input_ids[start:end] = sample.ids[kept:]
        row.labels[start:end] = sample.labels[kept:]
        row.position_ids[start:end] = np.arange(kept, len(sample.ids))
        row.last[path] = end - 1
        if not kept:
            row.labels[start] = IGNORE_INDEX  # it would be predicted from the sample before
    return row


def padded(row: Row, multiple: int, pad_token: int) -> Row:
    """The row up to the next multiple of so many tokens; padding sees itself and is seen by no other token."""
    size = len(row.input_ids)
    zeros = np.zeros(-size % multiple, np.int32)
    own = np.arange(size, size + len(zeros), dtype=np.int32)
    padding = Row(input_ids=zeros + pad_token, labels=zeros + IGNORE_INDEX, position_ids=zeros, last=own)
    return Row(*(np.concatenate(columns) for columns in zip(row, padding)))


def _tokens(samples: list[Sample], shared: list[int]) -> int:
    return sum(len(sample.ids) for sample in samples) - sum(shared)


def _cheapest_cut(samples: list[Sample], shared: list[int]) -> int:
    """Before which sample to end the row: where the least is repeated for each token that is done with."""
    before, costs = 0, []
    for sample, kept in zip(samples[:-1], shared):
        before += len(sample.ids) - kept
        repeated = shared[len(costs) + 1]
        costs.append((repeated / max(1, before - repeated), -before))
    return costs.index(min(costs)) + 1
