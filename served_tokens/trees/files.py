"""Samples as rows of token trees, in a folder that LlamaFactory trains on (its `tokenized_path`)."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from served_tokens.files.write import work_folder
from served_tokens.trees.rows import Row, Sample, padded, predicting, rows_of

OWN = ("row_tokens", "row_samples")
BATCH = 64  # rows that are written at once
COUNTS = "counts.json"  # in the folder of rows
MULTIPLE = 128  # tokens; a block of flex_attention


@dataclass
class Written:
    """Of a split: how many samples and rows, how many tokens all of them hold."""

    samples: int = 0
    tokens: int = 0
    rows: int = 0
    row_tokens: int = 0
    longest: int = 0  # tokens of a sample


def own_options(overrides: list[str]) -> tuple[list[str], dict[str, int]]:
    """(the overrides that are LlamaFactory's, those of trees: {name: number})"""
    others, own = [], {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in OWN:
            others.append(override)
        elif not value.isdecimal() or not int(value):
            sys.exit(f"{override}: is no whole number above 0")
        else:
            own[key] = int(value)
    return others, own


def rows_of_step(samples: int, samples_of_row: float, devices: int) -> int:
    """How many rows each device takes for a step that holds about so many samples; samples_of_row: on average."""
    return max(1, round(samples / samples_of_row / devices))


def write_rows(
    splits: dict[str, Iterable[Sample]], place: Path, limits: dict, pad_token: int, whole_logits: bool
) -> dict[str, Written]:
    """Write the rows of samples; returns {split: what is there}. Rows that are there already are not made again.

    Args:
        place: the folder for these rows, and no others: its name is to change with all that they are made of.
        limits: the arguments of `rows_of` beside the samples.
        whole_logits: what computes the loss wants the logits of all tokens, not of those that are predicted from alone.
    """
    from datasets import Dataset, DatasetDict

    if place.exists():
        counts = json.loads((place / COUNTS).read_text(encoding="utf-8"))
        return {split: Written(**count) for split, count in counts.items()}
    counts, made = {}, DatasetDict()
    with work_folder(place) as part:
        for split, samples in splits.items():
            path = part / f"{split}.arrow"
            counts[split] = _write_split(path, samples, limits, pad_token, whole_logits)
            made[split] = Dataset.from_file(str(path)).select([])  # what says how to read them, without a second copy
        made.save_to_disk(str(part / "whole"))
        for split in splits:
            [empty] = (part / "whole" / split).glob("*.arrow")
            (part / f"{split}.arrow").rename(empty)
        told = json.dumps({split: asdict(count) for split, count in counts.items()})
        (part / "whole" / COUNTS).write_text(told, encoding="utf-8")
        try:
            os.replace(part / "whole", place)
        except OSError:
            if not place.exists():  # else the same rows are there, of a run beside this
                raise
    return counts


def _write_split(path: Path, samples: Iterable[Sample], limits: dict, pad_token: int, whole_logits: bool) -> Written:
    """Write the rows of a split as an Arrow file."""
    from datasets.arrow_writer import ArrowWriter

    count = Written()

    def counted():
        for sample in samples:
            count.samples += 1
            count.tokens += len(sample.ids)
            count.longest = max(count.longest, len(sample.ids))
            yield sample

    with ArrowWriter(path=str(path), writer_batch_size=BATCH) as writer:
        for row in rows_of(counted(), **limits):
            count.rows += 1
            count.row_tokens += len(row.input_ids)
            writer.write(columns_of(padded(row, MULTIPLE, pad_token), whole_logits))
        writer.finalize()
    return count


def columns_of(row: Row, whole_logits: bool = False) -> dict:
    """A row as a batch of one takes it to the model: `last` is its attention mask, of one more dimension than usual.

    logits_to_keep and shift_labels are arguments of the models of transformers: the loss needs no other logits.
    """
    columns = {"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}
    columns["attention_mask"] = row.last[None]
    at = predicting(row.labels).astype(np.int32)
    return columns if whole_logits else {**columns, "logits_to_keep": at, "shift_labels": row.labels[at + 1]}
