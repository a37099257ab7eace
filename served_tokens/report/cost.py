"""What a training costs, counted as transformers' Trainer does (5.x, set_initial_training_values)."""

import math
from dataclasses import dataclass, replace

from served_tokens.proof.findings import Findings
from served_tokens.trees.check import AS_WRITTEN, TREES
from served_tokens.trees.files import rows_of_step

TOKENS_A_SECOND = {AS_WRITTEN: 10_300, TREES: 8_000}  # benchmarks.trees, a model of 4B on one H200


@dataclass(frozen=True)
class Schedule:
    """How long a training takes: `max_steps` where that is over 0, else `epochs`; batches are of one GPU."""

    epochs: float
    max_steps: int
    batch: int
    accumulation: int
    gpus: int
    packing: bool = False

    @property
    def of_step(self) -> int:
        """How many samples, or rows, a step takes."""
        return self.batch * self.accumulation * self.gpus


def training_cost(rows: int, tokens: int, schedule: Schedule) -> dict[str, int]:
    """Steps and tokens of a training, of which one epoch has so many rows (or samples) and tokens."""
    batches = math.ceil(rows / (schedule.batch * schedule.gpus))
    steps_of_epoch = max(1, math.ceil(batches / schedule.accumulation))
    steps, epochs = math.ceil(schedule.epochs * steps_of_epoch), schedule.epochs
    if schedule.max_steps > 0:
        steps, epochs = schedule.max_steps, schedule.max_steps / steps_of_epoch
    return {"steps": steps, "samples or rows per step": min(schedule.of_step, rows), "tokens": round(tokens * epochs)}


def costs_by_way(training: list[Findings], schedule: Schedule, cutoff_len: int) -> dict[str, dict[str, int]]:
    """{how these data sets can be trained: what that costs}; packed samples are taken for full, and for no trees."""
    samples, tokens = _sizes(training, AS_WRITTEN)
    if schedule.packing:
        return {AS_WRITTEN: training_cost(math.ceil(tokens / cutoff_len), tokens, schedule)}
    rows, row_tokens = _sizes(training, TREES)
    accumulation = rows_of_step(schedule.of_step, samples / max(1, rows), schedule.gpus)
    return {
        AS_WRITTEN: training_cost(samples, tokens, schedule),
        TREES: training_cost(rows, row_tokens, replace(schedule, batch=1, accumulation=accumulation)),
    }


def _sizes(training: list[Findings], way: str) -> tuple[int, int]:
    """How many samples or rows, and tokens, these data sets have together."""
    return sum(found.ways[way][0] for found in training), sum(found.ways[way][1] for found in training)
