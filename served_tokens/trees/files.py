"""LlamaFactory's tokenized samples as rows of token trees, in a folder that it trains on (its `tokenized_path`)."""

import hashlib
import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from served_tokens.files.write import work_folder, written
from served_tokens.marks import IGNORE_INDEX
from served_tokens.trees.rows import Row, padded, rows_of

OWN = ("row_tokens", "row_samples", "row_accumulation")
BATCH = 64  # samples that are read at once
MULTIPLE = 128  # tokens; a block of flex_attention
# What is counted.
SAMPLES, TOKENS, SUPERVISED = "samples", "tokens", "supervised"
ROWS, ROW_TOKENS, LONGEST = "rows", "row tokens", "longest row"


def own_options(overrides: list[str]) -> tuple[list[str], dict[str, int]]:
    """(the overrides that are LlamaFactory's, those of trees: {name: number})"""
    own = {}
    for key, _, value in (override.partition("=") for override in overrides):
        if key in OWN:
            if not value.isdecimal() or not int(value):
                sys.exit(f"{key}={value}: is no whole number above 0")
            own[key] = int(value)
    return [override for override in overrides if override.partition("=")[0] not in OWN], own


def accumulated_rows(samples: int, a_row: float, devices: int) -> int:
    """How many rows a device takes for a step to hold about as many samples as it held.

    Args:
        samples: of a step, on all devices together; a_row: samples of a row, on average.
    """
    return max(1, round(samples / a_row / devices))


def samples_of(dataset, counts: Counter):
    """Yield (ids, labels) of each sample of a tokenized data set, integer arrays; they are counted on the way."""
    for table in dataset.with_format("arrow").iter(BATCH):
        for ids, labels in zip(_lists(table["input_ids"]), _lists(table["labels"])):
            counts.update({SAMPLES: 1, TOKENS: len(ids), SUPERVISED: _supervised(labels)})
            yield ids, labels


def _lists(column):
    """The lists of an Arrow column, without a Python number for each token."""
    for chunk in column.chunks:
        values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        yield from (values[start:end] for start, end in itertools.pairwise(ends))


def write_rows(built: dict, folder: Path, limits: dict, pad_token: int, whole_logits: bool) -> tuple[Path, dict]:
    """(where the rows are, {split: what is counted}); the place is of the rows alone, so the same ones are there once.

    Args:
        built: {split: tokenized data set}, the splits as LlamaFactory names them.
        folder: in which each set of rows has a folder of its own.
        limits: the arguments of `rows_of` beside the samples.
        whole_logits: what computes the loss wants the logits of all tokens, not of those that are predicted from alone.
    """
    from datasets import Dataset, DatasetDict

    digest, counts, splits = hashlib.sha256(), {split: Counter() for split in built}, DatasetDict()
    with work_folder(folder / "rows") as part:
        for split, dataset in built.items():
            rows = rows_of(samples_of(dataset, counts[split]), **limits)
            _write_split(part / f"{split}.arrow", rows, counts[split], digest, pad_token, whole_logits)
            splits[split] = Dataset.from_file(str(part / f"{split}.arrow"))
        place = folder / digest.hexdigest()[:16]
        splits.save_to_disk(str(part / "whole"))
        with written(place):
            _move(part / "whole", place)
    return place, counts


def _move(whole: Path, place: Path) -> None:
    """Give rows their place, where another run may put the same ones at any time."""
    if place.exists():
        return
    try:
        os.replace(whole, place)
    except OSError:
        if not place.exists():
            raise


def _write_split(path: Path, rows, counts: Counter, digest, pad_token: int, whole_logits: bool) -> None:
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    tokens = Sequence(Value("int32"))
    columns = {"input_ids": tokens, "labels": tokens, "position_ids": tokens, "attention_mask": Sequence(tokens)}
    columns |= {} if whole_logits else {"logits_to_keep": tokens, "shift_labels": tokens}
    expected = 0
    digest.update(repr((path.stem, list(columns))).encode())  # a row of the same tokens is another one in another split
    with ArrowWriter(path=str(path), features=Features(columns), writer_batch_size=BATCH) as writer:
        for row in rows:
            expected += _supervised(row.labels)
            row = padded(row, MULTIPLE, pad_token)
            counts.update({ROWS: 1, ROW_TOKENS: len(row.input_ids)})
            counts[LONGEST] = max(counts[LONGEST], len(row.input_ids))
            digest.update(f"{len(row.input_ids)} ".encode())
            for column in row:
                digest.update(column.tobytes())
            writer.write({name: value for name, value in columns_of(row).items() if name in columns})
        writer.finalize()
    if expected != counts[SUPERVISED]:
        raise RuntimeError(f"{counts[SUPERVISED]} supervised tokens became {expected}; this is a bug of token trees")


def columns_of(row: Row) -> dict:
    """A row as a batch of one takes it to the model: `last` is its attention mask, of one more dimension than usual.

    logits_to_keep and shift_labels are arguments of the models of transformers: the loss needs no other logits.
    """
    predicting = np.flatnonzero(row.labels[1:] != IGNORE_INDEX)
    return {
        "input_ids": row.input_ids,
        "labels": row.labels,
        "position_ids": row.position_ids,
        "attention_mask": [row.last],
        "logits_to_keep": predicting,
        "shift_labels": row.labels[predicting + 1],
    }


def _supervised(labels: np.ndarray) -> int:
    return int((labels[1:] != IGNORE_INDEX).sum())
