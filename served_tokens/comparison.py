"""The comparison: each sample that LlamaFactory built with the served prompts and targets of its turns, by token."""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jinja2

from served_tokens.chat_template import time_limit
from served_tokens.findings import IGNORE_INDEX, MISMATCHES_KEPT, PLACES_KEPT, REASONS_KEPT, Findings
from served_tokens.reading import LEFT_OUT, read_rows
from served_tokens.row_texts import looking_for
from served_tokens.samples import THINKING_OFF
from served_tokens.served_turn import SERVED_AS, expected_sample, served_turn, task_of
from served_tokens.trajectory import Reading, Trajectory, read_trajectory
from served_tokens.unusual import refuse_breaks
from served_tokens.values import TrajectoryError

NOT_SAID = "step 2 does not say why"
REFUSED = "the model's chat template refuses it"
SHOWN_TOKENS = 12  # on each side of the first difference


class Truth(NamedTuple):
    """What samples are compared with.

    tokenizer: the model's, with its chat template.
    cutoff_len: LlamaFactory's, in tokens.
    trajectories: the file that step 1 read, where it is not the one that the samples name.
    is_cut: only the first samples of a data set are there.
    """

    tokenizer: object
    cutoff_len: int
    trajectories: str | None
    is_cut: bool

    def render(self, messages, tools, add_generation_prompt, **variables) -> str:
        variables["add_generation_prompt"] = add_generation_prompt
        with time_limit():
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables)

    def expected(self, messages: list, tools: list | None, turns: list[int], served_as: str) -> tuple[dict, list, list]:
        """(what a sample of these turns must be, the tokens of each target, (served prompt, target) of each turn)"""
        texts = [text for turn in turns for text in served_turn(messages, tools, turn, served_as, self.render)]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rendered = list(zip(texts[::2], texts[1::2]))
        return expected_sample(list(zip(ids[::2], ids[1::2]))), [*map(len, ids[1::2])], rendered


def check_dataset(found: Findings, path: Path, provenance, built, truth: Truth) -> tuple[list, set]:
    """Compare each sample with its turns, and note what is found; returns (what is supervised, the tasks of which
    it is).

    What is supervised: (source, trajectory, turn), as often as it is; the tasks: see `task_of`. Of a data set for
    evaluation, only trajectories that have samples count.

    Args:
        path: of the samples, beside which step 2 says why it left turns out.
        provenance, built: two data sets with the same rows, what step 2 says of the samples and what LlamaFactory
            made of them.
    """
    supervised, tasks, why = [], set(), reasons_of(path)
    traced = {place[:2] for place in why}
    for source, (reading, samples_of) in samples_by_trajectory(provenance, truth.trajectories).items():
        for index, row, error in read_rows(source, "check"):
            if not (found.trains or index in samples_of):
                continue
            found.counts["rows"] += 1
            try:
                if error:
                    raise error
                trajectory = read_trajectory(row, reading)
                if not (index in samples_of or (source, index) in traced or truth.is_cut):
                    raise TrajectoryError(_why_no_trace(trajectory, reading))
            except TrajectoryError as error:
                _set_aside(found, str(error))
                continue
            samples = samples_of.pop(index, [])
            if samples:
                tasks.add(task_of(row))
            turns = [turn for turn, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
            _note_turns(found, (source, index), turns, samples, why)
            ignored = frozenset(reading.ignore_keys)
            look = looking_for(found, row, trajectory.messages, f"{source}: trajectory {index}", ignored)
            for position, its_turns, served_as in samples:
                place = f"{source}: trajectory {index}, turn {its_turns[-1]}"
                if not set(its_turns) <= set(turns):
                    raise SystemExit(f"{place}: no such turn; name the file that step 1 read by --trajectories")
                supervised += [(source, index, turn) for turn in its_turns]
                what = trajectory.messages, trajectory.tools, its_turns, served_as
                look(its_turns, served_as, _compare(found, position, built[position], place, what, truth))
        if samples_of:
            raise SystemExit(
                f"{source}: has no usable trajectory {min(samples_of)}, of which there are samples; "
                "name the file that step 1 read by --trajectories"
            )
    found.counts["supervised turns"] = len(set(supervised))
    return supervised, tasks


def samples_by_trajectory(provenance, trajectories: str | None) -> dict:
    """{source: (how step 1 read it, {trajectory: [(position, turns, served_as)]})}"""
    wanted, readings = defaultdict(lambda: defaultdict(list)), {}
    for position, sample in enumerate(provenance):
        source = trajectories or sample["source"]
        if not (source and sample["turns"] and sample["trajectory"] is not None and sample["served_as"] in SERVED_AS):
            raise SystemExit(
                f"sample {position} does not say which turns of which trajectory it is; write it with step 2"
            )
        wanted[source][sample["trajectory"]].append((position, sample["turns"], sample["served_as"]))
        if readings.setdefault(source, sample["reading"]) != sample["reading"]:
            raise SystemExit(
                f"sample {position}: {source} was read by other options of step 1 than for those before it"
            )
    return {source: (Reading.of(json.loads(readings[source])), samples) for source, samples in wanted.items()}


def _why_no_trace(trajectory: Trajectory, reading: Reading) -> str:
    """Why neither step 2's samples nor its list of turns that are left out know of a trajectory."""
    if reading.validate_tools:
        refuse_breaks(trajectory.messages, trajectory.tools)
    if trajectory.thinking is False:
        return THINKING_OFF
    return "step 1 or step 2 set it aside; what they write beside their output says why"


def reasons_of(path: Path) -> dict:
    """Why step 2 left turns out, as it says beside its samples: {(source, trajectory, turn): reason}."""
    path = path.with_name(path.name + LEFT_OUT)
    rows = read_rows(str(path)) if path.is_file() else ()
    return {(row["source"], row["trajectory"], row["turn"]): row["reason"] for _, row, error in rows if not error}


def _set_aside(found: Findings, reason: str) -> None:
    found.counts["rows set aside"] += 1
    new = reason not in found.reasons and len(found.reasons) >= REASONS_KEPT
    found.reasons["other reasons" if new else reason] += 1


def _note_turns(found: Findings, trajectory: tuple, turns: list[int], samples: list, why: dict) -> None:
    found.counts["trajectories"] += 1
    found.counts["turns"] += len(turns)
    found.turns[len(turns)] += 1
    sampled = {turn for _, its_turns, _ in samples for turn in its_turns}
    left_out = [turn for turn in turns if turn not in sampled]
    found.left_out += [f"{trajectory[1]}:{turn}" for turn in left_out][: PLACES_KEPT - len(found.left_out)]
    found.why_left_out.update(why.get((*trajectory, turn), NOT_SAID) for turn in left_out)


def _compare(found: Findings, position: int, trained: dict, place: str, what: tuple, truth: Truth) -> list:
    """Returns (served prompt, target) of each turn, none where the template refuses it."""
    counts = found.counts
    found.lengths[position] = len(trained["input_ids"])
    counts["tokens"] += len(trained["input_ids"])
    counts["supervised tokens"] += len(trained["labels"]) - trained["labels"].count(IGNORE_INDEX)

    def mismatch(kind: str, at: int | None, text: str) -> None:
        counts["mismatched"] += 1
        found.kinds[kind] += 1
        if len(found.mismatches) < MISMATCHES_KEPT:
            found.mismatches[position] = (at, f"{place}: {text}")

    try:
        expected, targets, rendered = truth.expected(*what)
    except (jinja2.TemplateError, TrajectoryError) as error:
        mismatch(REFUSED, None, f"{REFUSED}: {error}")
        return []
    found.lengths[position] = len(expected["input_ids"])
    found.targets.update(targets)
    if all(expected[column] == trained[column] for column in expected):
        counts["exact"] += 1
        found.exact[position] = 1
    elif len(expected["input_ids"]) > truth.cutoff_len:
        counts["cut"] += 1
    else:
        _, kind, at = first_mismatch(expected, trained)
        mismatch(kind, at, describe_mismatch(expected, trained, truth.tokenizer.decode))
    return rendered


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first position at which two lists differ; None where they are equal."""
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def first_mismatch(expected: dict, trained: dict) -> tuple[str, str, int]:
    """(column, what is wrong, position) of the first difference of two samples that differ."""
    for column, what in (("input_ids", "the tokens differ"), ("labels", "the loss mask differs")):
        position = first_difference(expected[column], trained[column])
        if position is not None:
            return column, what, position


def describe_mismatch(expected: dict, trained: dict, decode) -> str:
    """The first difference of two samples ({"input_ids", "labels"}), as text on both sides."""
    column, what, position = first_mismatch(expected, trained)
    start, end = max(0, position - SHOWN_TOKENS), position + SHOWN_TOKENS
    lines = [f"{what} from token {position} of {len(expected['input_ids'])}:"]
    for side, sample in (("served ", expected), ("trained", trained)):
        ids, labels = sample["input_ids"], sample["labels"]
        loss = position < len(labels) and labels[position] != IGNORE_INDEX
        said = f" (loss: {loss})" if column == "labels" else ""
        lines.append(f"  {side}: …{decode(ids[start:position])!r} >>> {decode(ids[position:end])!r}{said}")
    return "\n".join(lines)
