"""The samples of a row of step 1: which turns get one, which are left out and why, and what is counted of it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from served_tokens.files.read import LEFT_OUT, Place
from served_tokens.marks import HELD_OUT, Counts, TrajectoryError
from served_tokens.samples.alpaca import step1_columns, to_samples
from served_tokens.samples.dataset_info import is_held_out
from served_tokens.samples.tokens import load_encoder, to_token_samples

VALIDATION = "_val"
# Why turns are left out.
THINKING_OFF = "the row, or --template-kwargs, says that the model is not to think; keep it by step 2 --no-thinking"
NOT_LAST = "they are not the last turn of their row (--turns last)"
NO_REASONING = "they have no reasoning"
TOO_LONG = "their sample does not fit in --cutoff-len"


@dataclass(frozen=True)
class Options:
    """What samples are made, as in the command, and under which name and in which file LlamaFactory finds them."""

    served_as: str
    merge_turns: bool
    turns: str  # "all" or "last"
    require_reasoning: bool
    cutoff_len: int | None
    tokenizer: str | None  # a model
    tokens: str | None  # the same model, where samples are its token ids and no texts
    val_ratio: float
    seed: int
    dataset_name: str
    dataset_info: Path


@dataclass
class Selected(Counts):
    """What step 2 counts of trajectories."""

    trajectories: int = 0
    without_samples: int = 0  # trajectories of which all turns are left out
    turns: int = 0
    samples: int = 0
    supervised: int = 0  # turns that a sample trains
    not_thinking: int = 0  # of the targets that can be trained, those that open no think block
    validation: int = 0  # samples that are held out
    held_out: int = 0  # their turns
    given: Counter = field(default_factory=Counter)  # what the generation prompt holds of a target -> trajectories
    left_out: Counter = field(default_factory=Counter)  # why -> turns


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
        how = messages, _as_wanted(messages, served, options), options.served_as, options.merge_turns
        samples, left_out = to_token_samples(*how, load_encoder(options.tokens)) if options.tokens else to_samples(*how)
    except (LookupError, TypeError) as error:
        changed = f"the row of step 1 was changed ({type(error).__name__}: {error}); run step 1 again"
        raise TrajectoryError(changed) from None
    targets = [messages[turn["message"]]["content"] for turn in served["turns"] if not turn["left_out"]]
    counts = Selected(
        trajectories=1,
        without_samples=int(not samples),
        turns=len(served["turns"]),
        samples=len(samples),
        supervised=sum(len(sample["turns"]) for sample in samples),
        not_thinking=sum(not target.startswith("<think>") for target in targets),
        given=Counter([served["given"]]),
        left_out=Counter(left_out.values()),
    )
    stream = ""
    if is_held_out(row.get("task_info"), messages, options.val_ratio, options.seed):
        stream, counts.validation = VALIDATION, len(samples)
        left_out |= {turn: HELD_OUT for sample in samples for turn in sample["turns"]}
        counts.held_out = counts.supervised
    told = {"source": served["source"], "trajectory": served["trajectory"]}
    made = [(stream, sample) for sample in samples]
    made += [(LEFT_OUT, {**told, "turn": turn, "reason": reason}) for turn, reason in left_out.items()]
    return counts, made


def _as_wanted(messages: list[dict], served: dict, options: Options) -> dict:
    """`served`, in which turns that the options do not want are left out too, with the reason."""
    too_long, turns = set(), []
    if options.cutoff_len:
        whole, _ = to_token_samples(messages, served, options.served_as, False, load_encoder(options.tokenizer))
        too_long = {sample["turns"][0] for sample in whole if len(sample["input_ids"]) >= options.cutoff_len}
    for turn in served["turns"]:
        why = turn["left_out"]
        if not why and options.turns == "last" and turn != served["turns"][-1]:
            why = NOT_LAST
        elif not why and options.require_reasoning and not _reasons(messages[turn["message"]]["content"]):
            why = NO_REASONING
        elif turn["turn"] in too_long:  # which step 1 did not leave out
            why = TOO_LONG
        turns.append({**turn, "left_out": why})
    return {**served, "turns": turns}


def _reasons(target: str) -> bool:
    """Whether a target of step 1 reasons before it answers."""
    return target.startswith("<think>") and bool(target.removeprefix("<think>").partition("</think>")[0].strip())
