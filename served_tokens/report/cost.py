"""What a training costs, counted as transformers' Trainer does (5.x, set_initial_training_values)."""

import math
from dataclasses import dataclass, replace

from served_tokens.proof.findings import Findings
from served_tokens.trees.check import AS_WRITTEN, TREES
from served_tokens.trees.files import rows_of_step


@dataclass(frozen=True)
class Schedule:
    """How long a training takes: `max_steps` where that is over 0, else `epochs`; batches are of one GPU."""

    epochs: float
    max_steps: int
    batch: int
    accumulation: int
    gpus: int
    packing: bool = False


def training_cost(samples: int, tokens: int, supervised: int, schedule: Schedule) -> dict[str, float]:
    """Steps, epochs and tokens of a training, of which one epoch has these samples (or rows) and tokens."""
    batches = math.ceil(samples / (schedule.batch * schedule.gpus))
    steps_of_epoch = max(1, math.ceil(batches / schedule.accumulation))
    steps, epochs = math.ceil(schedule.epochs * steps_of_epoch), schedule.epochs
    if schedule.max_steps > 0:
        steps, epochs = schedule.max_steps, schedule.max_steps / steps_of_epoch
    return {
        "steps": steps,
        "steps per epoch": steps_of_epoch,
        "epochs": epochs,
        "samples or rows per step": schedule.batch * schedule.accumulation * schedule.gpus,
        "tokens": round(tokens * epochs),
        "supervised tokens": round(supervised * epochs),
    }


def costs_by_way(training: list[Findings], schedule: Schedule, cutoff_len: int) -> dict[str, dict[str, float]]:
    """{how these data sets can be trained: what that costs}; packed samples are taken for full."""
    supervised = sum(found.counts.supervised_tokens for found in training)
    samples, tokens = (sum(found.ways[AS_WRITTEN][number] for found in training) for number in (0, 1))
    if schedule.packing:
        return {AS_WRITTEN: training_cost(math.ceil(tokens / cutoff_len), tokens, supervised, schedule)}
    rows, row_tokens = (sum(found.ways[TREES][number] for found in training) for number in (0, 1))
    of_step = schedule.batch * schedule.accumulation * schedule.gpus
    accumulation = rows_of_step(of_step, samples / max(1, rows), schedule.gpus)
    in_rows = replace(schedule, batch=1, accumulation=accumulation)
    return {
        AS_WRITTEN: training_cost(samples, tokens, supervised, schedule),
        TREES: training_cost(rows, row_tokens, supervised, in_rows),
    }
