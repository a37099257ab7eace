"""The samples of a row of step 1: which turns get one, which are left out and why, and what is counted of it."""

import json
from collections import Counter
from dataclasses import dataclass, field

import orjson

from served_tokens.files.read import LEFT_OUT, Place
from served_tokens.marks import Counts, TrajectoryError
from served_tokens.samples.alpaca import NoSample, reasoning_of, step1_columns, to_samples
from served_tokens.samples.dataset_info import is_held_out
from served_tokens.samples.lengths import load_tokenizer, token_counter

VALIDATION = "_val"
# Why turns are left out.
THINKING_OFF = "the row says that the model is not to think; step 2 keeps it by --no-thinking"
NOT_LAST = "they are not the last turn of their row (--turns last)"
HELD_OUT = "they are held out, to be evaluated"
NO_REASONING = "they have no reasoning"
TOO_LONG = "their sample does not fit in --cutoff-len"


@dataclass(frozen=True)
class Options:
    """What samples are made of a trajectory; as in the command."""

    served_as: str = "drop"
    merge_turns: bool = False
    turns: str = "all"  # or "last"
    require_reasoning: bool = False
    cutoff_len: int | None = None
    tokenizer: str | None = None
    val_ratio: float = 0.0
    seed: int = 42


@dataclass
class Selected(Counts):
    """What step 2 counts of trajectories.

    without_samples: trajectories of which all turns are left out; supervised: turns that a sample trains.
    with_reasoning, not_thinking: of the targets that can be trained, those with reasoning and those that open no think
    block. without_reasoning: turns without reasoning that samples train; beside_reasoning: those of trajectories in
    which others have some.
    validation: samples that are held out.
    given: {what the generation prompt holds of a target: trajectories}; left_out: {why: turns}.
    """

    trajectories: int = 0
    without_samples: int = 0
    turns: int = 0
    samples: int = 0
    supervised: int = 0
    with_reasoning: int = 0
    not_thinking: int = 0
    without_reasoning: int = 0
    beside_reasoning: int = 0
    validation: int = 0
    given: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)


def samples_of_row(row: dict, place: Place, options: Options) -> tuple[Selected, list]:
    """A row of step 1 -> (counts, its samples and the turns left out, see `Work.convert`); raises TrajectoryError."""
    messages, served = step1_columns(row)
    if served["enable_thinking"] is False and options.served_as != "no-thinking":
        raise TrajectoryError(THINKING_OFF)
    if served["reading"].get("echo", "none") != "none" and options.served_as == "no-thinking":
        raise SystemExit(
            "--no-thinking: step 1 was run with --echo, which echoes what a thinking model writes; run it without"
        )
    samples, left_out = chosen_samples(messages, served, options)
    counts = _counted(messages, served, samples, options)
    counts.left_out.update(turn["reason"] for turn in left_out)
    stream = ""
    if is_held_out(row.get("task_info"), messages, options.val_ratio, options.seed):
        stream, counts.validation = VALIDATION, len(samples)
        left_out += [{"turn": turn, "reason": HELD_OUT} for sample in samples for turn in sample["turns"]]
    told = {"source": served["source"], "trajectory": served["trajectory"]}
    return counts, [*((stream, sample) for sample in samples), *((LEFT_OUT, told | turn) for turn in left_out)]


def chosen_samples(messages: list[dict], served: dict, options: Options) -> tuple[list[dict], list[dict]]:
    """(samples, the turns left out: {"turn", "reason"}, and "tokens" where its sample is too long)"""
    no_thinking, last, tokens_of = options.served_as == "no-thinking", served["turns"][-1:], {}
    if options.cutoff_len:
        count = token_counter(load_tokenizer(options.tokenizer), "" if no_thinking else served["given"])

    def refuse(turn: dict, columns: dict) -> None:
        target = messages[turn["message"]]["content"]
        if options.turns == "last" and turn not in last:
            raise NoSample(NOT_LAST)
        if options.require_reasoning and not reasoning_of(target):
            raise NoSample(NO_REASONING)
        if options.cutoff_len:
            tokens = count(columns, no_thinking and target.startswith("<think>"))
            if tokens >= options.cutoff_len:
                tokens_of[turn["turn"]] = {"tokens": tokens}
                raise NoSample(TOO_LONG)

    samples, reasons = to_samples(messages, served, options.served_as, options.merge_turns, refuse)
    left_out = [{"turn": turn, "reason": reason, **tokens_of.get(turn, {})} for turn, reason in reasons.items()]
    return samples, left_out


def _counted(messages: list[dict], served: dict, samples: list[dict], options: Options) -> Selected:
    """What is counted of a row of step 1 and the samples made of it, but for turns that are left out or held out."""
    trained = {turn for sample in samples for turn in sample["turns"]}
    targets = {turn["turn"]: messages[turn["message"]]["content"] for turn in served["turns"]}
    usable = [turn["turn"] for turn in served["turns"] if not turn["left_out"]]
    silent = {turn for turn, target in targets.items() if not reasoning_of(target)}
    counts = Selected(
        trajectories=1,
        without_samples=int(not samples),
        turns=len(targets),
        samples=len(samples),
        supervised=len(trained),
        with_reasoning=sum(turn not in silent for turn in usable),
        not_thinking=sum(not targets[turn].startswith("<think>") for turn in usable),
        given=Counter([served["given"]]),
    )
    if options.served_as != "no-thinking":
        counts.without_reasoning = len(trained & silent)
        counts.beside_reasoning = counts.without_reasoning if counts.with_reasoning else 0
    return counts


def load_text(raw: bytes):
    """json.loads, several times faster: orjson reads long integers as floats, of which samples hold none."""
    try:
        return orjson.loads(raw)
    except ValueError:  # it refuses NaN, which may stand in other columns
        return json.loads(raw)
