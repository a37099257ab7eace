"""What a training costs, counted as transformers' Trainer does (5.x, set_initial_training_values)."""

import math
from dataclasses import dataclass, replace

from served_tokens.proof.findings import Findings
from served_tokens.trees.check import AS_WRITTEN, MERGED, TREES
from served_tokens.trees.files import accumulated_rows


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
    per_epoch = max(1, math.ceil(batches / schedule.accumulation))
    limited = schedule.max_steps > 0
    steps = schedule.max_steps if limited else math.ceil(schedule.epochs * per_epoch)
    epochs = steps / per_epoch if limited else schedule.epochs
    return {
        "steps": steps,
        "steps per epoch": per_epoch,
        "epochs": epochs,
        "samples or rows per step": schedule.batch * schedule.accumulation * schedule.gpus,
        "tokens": round(tokens * epochs),
        "supervised tokens": round(supervised * epochs),
    }


def costs_by_way(training: list[Findings], schedule: Schedule, cutoff_len: int) -> dict[str, dict[str, float]]:
    """{how these data sets can be trained: what that costs}; packed samples are taken for full."""
    supervised, costs = sum(found.counts.supervised_tokens for found in training), {}
    for way in (AS_WRITTEN, MERGED, TREES):
        samples, tokens = (sum(found.ways[way][number] for found in training) for number in (0, 1))
        if schedule.packing:
            return {way: training_cost(math.ceil(tokens / cutoff_len), tokens, supervised, schedule)}
        if way == TREES:  # a step takes about as many samples
            of_step = schedule.batch * schedule.accumulation * schedule.gpus
            a_row = sum(len(found.lengths) for found in training) / max(1, samples)
            rows = accumulated_rows(of_step, a_row, schedule.gpus)
            schedule = replace(schedule, batch=1, accumulation=rows)
        costs[way] = training_cost(samples, tokens, supervised, schedule)
    return costs
