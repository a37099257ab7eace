"""The samples of a row of step 1: which turns get one, which are left out and why, and what is counted of it."""

import json
from collections import Counter
from dataclasses import dataclass, field

import orjson

from served_tokens.files.read import LEFT_OUT, Place
from served_tokens.marks import Counts, TrajectoryError
from served_tokens.samples.alpaca import reasoning_of, step1_columns, to_samples
from served_tokens.samples.dataset_info import group_of, is_held_out
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
    unmerged, merged: characters of the samples, one by one and by --merge-turns.
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


def convert_row(row: dict, place: Place, options: Options) -> tuple[Selected, list]:
    """A row of step 1 -> (counts, its samples and the turns left out, see `Work.convert`); raises TrajectoryError."""
    messages, served = step1_columns(row)
    if served["enable_thinking"] is False and options.served_as != "no-thinking":
        raise TrajectoryError(THINKING_OFF)
    if served["reading"].get("echo", "none") != "none" and options.served_as == "no-thinking":
        raise SystemExit(
            "--no-thinking: step 1 was run with --echo, which echoes what a thinking model writes; run it without"
        )
    try:
        samples, left_out = row_samples(messages, served, options)
    except (LookupError, TypeError) as error:
        raise TrajectoryError(
            f"the row of step 1 was changed ({type(error).__name__}: {error}); run step 1 again"
        ) from None
    by, _ = group = group_of(row.get("task_info"), messages)
    held_out = is_held_out(group, options.val_ratio, options.seed)
    counts = _counted(messages, served, samples, options)
    counts.left_out.update(turn["reason"] for turn in left_out)
    if samples and held_out:
        counts.validation = len(samples)
        counts.held_out[by] += 1
    if held_out:
        told = {"source": served["source"], "trajectory": served["trajectory"], "reason": HELD_OUT}
        left_out += [{**told, "turn": turn} for sample in samples for turn in sample["turns"]]
    stream = VALIDATION if held_out else ""
    return counts, [*((stream, sample) for sample in samples), *((LEFT_OUT, turn) for turn in left_out)]


def load_text(raw: bytes):
    """json.loads, several times faster where texts and small integers matter: orjson may read others differently."""
    try:
        row = orjson.loads(raw)
    except ValueError:
        return json.loads(raw)
    task = row.get("task_info") if isinstance(row, dict) else None
    huge = isinstance(task, dict) and isinstance(task.get("task_id"), float)
    return json.loads(raw) if huge else row


def row_samples(messages: list, served: dict, options: Options) -> tuple[list, list]:
    """(samples, turns left out: {"source", "trajectory", "turn", "reason"}, and "tokens" where it is too long)"""
    turns, tokens_of = [turn["turn"] for turn in served["turns"]], {}
    given = "" if options.served_as == "no-thinking" else served["given"]
    count = token_counter(load_tokenizer(options.tokenizer), given) if options.cutoff_len else None

    def refuse(turn: dict, columns: dict) -> str | None:
        target = messages[turn["message"]]["content"]
        if options.turns == "last" and turn["turn"] != turns[-1]:
            return NOT_LAST
        if options.require_reasoning and not reasoning_of(target):
            return NO_REASONING
        no_thinking = options.served_as == "no-thinking" and target.startswith("<think>")
        if options.cutoff_len and (tokens := count(columns, no_thinking)) >= options.cutoff_len:
            tokens_of[turn["turn"]] = {"tokens": tokens}
            return TOO_LONG
        return None

    if options.min_turns <= len(turns) <= (options.max_turns or len(turns)):
        samples, reasons = to_samples(messages, served, options.served_as, options.merge_turns, refuse)
    else:
        samples, reasons = [], [OTHER_LENGTH] * len(turns)
    once = {turn for sample in samples for turn in sample["turns"]}
    told = {"source": served["source"], "trajectory": served["trajectory"]}
    left_out = [
        {**told, "turn": turn, "reason": reason, **tokens_of.get(turn, {})}
        for turn, reason in zip((turn for turn in turns if turn not in once), reasons)
    ]
    return samples, left_out


def _counted(messages: list, served: dict, samples: list, options: Options) -> Selected:
    once = {turn for sample in samples for turn in sample["turns"]}
    target_of = {turn["turn"]: messages[turn["message"]]["content"] for turn in served["turns"]}
    targets = [target_of[turn["turn"]] for turn in served["turns"] if not turn["left_out"]]
    thinking = sum(bool(reasoning_of(target)) for target in targets)
    counts = Selected(
        trajectories=1,
        without_samples=int(not samples),
        turns=len(served["turns"]),
        samples=len(samples),
        supervised=len(once),
        with_reasoning=thinking,
        not_thinking=sum(not target.startswith("<think>") for target in targets),
        given=Counter([served["given"]]),
    )
    if options.served_as != "no-thinking":
        counts.without_reasoning = sum(not reasoning_of(target_of[turn]) for turn in once)
        counts.beside_reasoning = counts.without_reasoning if thinking else 0
    if options.merge_turns:
        unmerged, _ = to_samples(messages, served, options.served_as)
        counts.unmerged = sum(_characters(sample) for sample in unmerged if sample["turns"][0] in once)
        counts.merged = sum(map(_characters, samples))
    return counts


def _characters(sample: dict) -> int:
    """The length of a sample's text, without its role marks."""
    texts = (
        sample["system"],
        *(text for pair in sample["history"] for text in pair),
        sample["instruction"],
        sample["output"],
    )
    return sum(map(len, texts))
