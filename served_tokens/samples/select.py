"""The samples of a row of step 1: which turns get one, which are left out and why, and what is counted of it."""

import json
from collections import Counter
from dataclasses import dataclass, field

import orjson

from served_tokens.files.read import LEFT_OUT, Place
from served_tokens.marks import Counts, TrajectoryError
from served_tokens.samples.alpaca import NoSample, reasoning_of, step1_columns, to_samples
from served_tokens.samples.dataset_info import held_out_by
from served_tokens.samples.lengths import load_tokenizer, token_counter

VALIDATION = "_val"
# Why turns are left out.
OTHER_LENGTH = "their trajectory has fewer turns than --min-turns or more than --max-turns"
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
    min_turns: int = 1
    max_turns: int | None = None
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
    merged: characters of the samples of --merge-turns; unmerged: the same with a sample for each turn.
    given: {what the generation prompt holds of a target: trajectories}; left_out: {why: turns}; held_out: {by what:
    trajectories}; validation: samples of these.
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
    unmerged: int = 0
    merged: int = 0
    validation: int = 0
    given: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    held_out: Counter = field(default_factory=Counter)


def samples_of_row(row: dict, place: Place, options: Options) -> tuple[Selected, list]:
    """A row of step 1 -> (counts, its samples and the turns left out, see `Work.convert`); raises TrajectoryError."""
    messages, served = step1_columns(row)
    if served["enable_thinking"] is False and options.served_as != "no-thinking":
        raise TrajectoryError(THINKING_OFF)
    if served["reading"].get("echo", "none") != "none" and options.served_as == "no-thinking":
        raise SystemExit(
            "--no-thinking: step 1 was run with --echo, which echoes what a thinking model writes; run it without"
        )
    try:
        samples, left_out = chosen_samples(messages, served, options)
        counts = _counted(messages, served, samples, options)
    except (LookupError, TypeError) as error:
        raise TrajectoryError(
            f"the row of step 1 was changed ({type(error).__name__}: {error}); run step 1 again"
        ) from None
    counts.left_out.update(turn["reason"] for turn in left_out)
    stream = ""
    by = held_out_by(row.get("task_info"), messages, options.val_ratio, options.seed)
    if samples and by:
        stream = VALIDATION
        counts.validation = len(samples)
        counts.held_out[by] += 1
        left_out += [{"turn": turn, "reason": HELD_OUT} for sample in samples for turn in sample["turns"]]
    told = {"source": served["source"], "trajectory": served["trajectory"]}
    return counts, [*((stream, sample) for sample in samples), *((LEFT_OUT, told | turn) for turn in left_out)]


def chosen_samples(messages: list[dict], served: dict, options: Options) -> tuple[list[dict], list[dict]]:
    """(samples, the turns left out: {"turn", "reason"}, and "tokens" where its sample is too long)"""
    turns, tokens_of = [turn["turn"] for turn in served["turns"]], {}
    if not options.min_turns <= len(turns) <= (options.max_turns or len(turns)):
        return [], [{"turn": turn, "reason": OTHER_LENGTH} for turn in turns]
    given = "" if options.served_as == "no-thinking" else served["given"]
    count = token_counter(load_tokenizer(options.tokenizer), given) if options.cutoff_len else None

    def refuse(turn: dict, columns: dict) -> None:
        target = messages[turn["message"]]["content"]
        if options.turns == "last" and turn["turn"] != turns[-1]:
            raise NoSample(NOT_LAST)
        if options.require_reasoning and not reasoning_of(target):
            raise NoSample(NO_REASONING)
        if options.cutoff_len:
            no_thinking = options.served_as == "no-thinking" and target.startswith("<think>")
            tokens = count(columns, no_thinking)
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
    if options.merge_turns:
        for sample in samples:
            size = len(sample["system"])
            for user, assistant in [*sample["history"], [sample["instruction"], sample["output"]]]:
                size += len(user) + len(assistant)
                counts.unmerged += size
            counts.merged += size
    return counts


def load_text(raw: bytes):
    """json.loads, several times faster where texts and small integers matter: orjson may read others differently."""
    try:
        row = orjson.loads(raw)
    except ValueError:
        return json.loads(raw)
    task = row.get("task_info") if isinstance(row, dict) else None
    huge = isinstance(task, dict) and isinstance(task.get("task_id"), float)
    return json.loads(raw) if huge else row
