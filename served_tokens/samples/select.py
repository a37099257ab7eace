"""The samples of a row of step 1: which turns get one, which are left out and why, and what is counted of it."""

import json
from collections import Counter
from typing import NamedTuple

import orjson

from served_tokens.files.read import LEFT_OUT, Place
from served_tokens.marks import TrajectoryError
from served_tokens.samples.alpaca import dates, reasoning_of, step1_columns, to_samples
from served_tokens.samples.dataset_info import group_of, is_held_out
from served_tokens.samples.lengths import load_tokenizer, token_counter

VALIDATION = "_val"
# What is counted.
TRAJECTORIES, WITHOUT_SAMPLES, TURNS, SAMPLES, SUPERVISED = (
    "trajectories",
    "without samples",
    "turns",
    "samples",
    "supervised",
)
NOT_THINKING, WITH_REASONING, UNMERGED, MERGED = "without thinking", "with reasoning", "unmerged", "merged"
DATED, UNDATED = "dated", "undated"
# Why turns are left out.
OTHER_LENGTH = "their trajectory has fewer turns than --min-turns or more than --max-turns"
THINKING_OFF = "the row says enable_thinking: false; step 2 keeps it by --no-thinking"
HELD_OUT = "they are held out, to be evaluated"
NO_REASONING = "they have no reasoning"
TOO_LONG = "their sample does not fit in --cutoff-len"


class Options(NamedTuple):
    """What samples are made of a trajectory; as in the command."""

    served_as: str = "drop"
    merge_turns: bool = False
    min_turns: int = 1
    max_turns: int | None = None
    require_reasoning: bool = False
    cutoff_len: int | None = None
    tokenizer: str | None = None
    val_ratio: float = 0.0
    seed: int = 42
    as_json: bool = False  # the output is read by a JSON reader


def convert_row(row: dict, place: Place, options: Options) -> tuple[Counter, list]:
    """A row of step 1 -> (counts, its samples and the turns left out, see `Work.convert`); raises TrajectoryError."""
    messages, served = step1_columns(row)
    if served["enable_thinking"] is False and options.served_as != "no-thinking":
        raise TrajectoryError(THINKING_OFF)
    if served["reading"].get("echo", "none") != "none" and options.served_as == "no-thinking":
        raise SystemExit(
            "--no-thinking: step 1 was run with --echo, which echoes what a thinking model writes; run it without"
        )
    samples, left_out = row_samples(messages, served, options)
    by, _ = group = group_of(row.get("task_info"), messages)
    held_out = is_held_out(group, options.val_ratio, options.seed)
    counts = _counted(messages, served, samples, options)
    counts.update(_left_out_as(turn["reason"]) for turn in left_out)
    if options.as_json:
        counts.update(
            (DATED if dated else UNDATED, column) for sample in samples for column, dated in dates(sample).items()
        )
    if samples and held_out:
        counts.update({VALIDATION: len(samples), (VALIDATION, by): 1})
    if held_out:
        told = {"source": served["source"], "trajectory": served["trajectory"], "reason": HELD_OUT}
        left_out += [{**told, "turn": turn} for sample in samples for turn in sample["turns"]]
    made = [*((VALIDATION * held_out, sample) for sample in samples), *((LEFT_OUT, turn) for turn in left_out)]
    return counts, made


def load_text(raw: bytes):
    """json.loads, several times faster where texts and small integers matter: orjson may read others differently."""
    try:
        row = orjson.loads(raw)
    except ValueError:
        return json.loads(raw)
    task = row.get("task_info") if isinstance(row, dict) else None
    huge = isinstance(task, dict) and isinstance(task.get("task_id"), float)
    return json.loads(raw) if huge else row


def _left_out_as(reason: str) -> tuple:
    """What counts the turns that are left out for a reason."""
    return LEFT_OUT, reason


def row_samples(messages: list, served: dict, options: Options) -> tuple[list, list]:
    """(samples, turns left out: {"source", "trajectory", "turn", "reason"}, and "tokens" where it is too long)"""
    turns, tokens_of = [turn["turn"] for turn in served["turns"]], {}
    given = "" if options.served_as == "no-thinking" else served["given"]
    count = token_counter(load_tokenizer(options.tokenizer), given) if options.cutoff_len else None

    def refuse(turn: dict, columns: dict) -> str | None:
        target = messages[turn["message"]]["content"]
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


def _counted(messages: list, served: dict, samples: list, options: Options) -> Counter:
    once = {turn for sample in samples for turn in sample["turns"]}
    targets = [messages[turn["message"]]["content"] for turn in served["turns"] if not turn["left_out"]]
    counts = Counter(
        {TRAJECTORIES: 1, WITHOUT_SAMPLES: not samples, TURNS: len(served["turns"]), SAMPLES: len(samples)}
    )
    counts[SUPERVISED] = len(once)
    counts[WITH_REASONING] = sum(bool(reasoning_of(target)) for target in targets)
    counts[NOT_THINKING] = sum(not target.startswith("<think>") for target in targets)
    counts["given", served["given"]] += 1
    if options.merge_turns:
        unmerged, _ = to_samples(messages, served, options.served_as)
        counts[UNMERGED] = sum(_characters(sample) for sample in unmerged if sample["turns"][0] in once)
        counts[MERGED] = sum(map(_characters, samples))
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
