"""The comparison: each sample that LlamaFactory built with the served prompts and targets of its turns, by token."""

import contextlib
import functools
import itertools
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jinja2

from served_tokens.files.hub import local_copy
from served_tokens.files.processes import TOO_DEEP, in_processes
from served_tokens.files.read import LEFT_OUT, Place, parse_row, progress, read_rows, read_shards, rows_of
from served_tokens.marks import IGNORE_INDEX, TrajectoryError
from served_tokens.prompts.chat_template import time_limit
from served_tokens.proof.findings import PLACES_KEPT, Findings
from served_tokens.proof.lost import looking_for
from served_tokens.proof.turn import SERVED_AS, echoed_messages, expected_sample, served_turn, task_of
from served_tokens.rows.notes import refuse_breaks
from served_tokens.rows.trajectory import BLOCK_END, BLOCK_START, Reading, Trajectory, read_trajectory
from served_tokens.samples.dataset_info import name_of
from served_tokens.samples.select import THINKING_OFF, VALIDATION

NOT_SAID = "step 2 does not say why"
NO_TRACE = "it has no sample, and step 2 does not say why"
OFF_RECORD = "differs from the token ids that the server recorded of it"
REFUSED = "the model's chat template refuses it"
ROWS_AT_ONCE = 8  # trajectories that a process checks at a time
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


class Samples(NamedTuple):
    """The samples of a data set, by the trajectories that they are of; processes inherit it.

    built: what LlamaFactory made of them, a row for each.
    of: {source: (how step 1 read it, {trajectory: [(position, turns, served_as)]})}
    why: {(source, trajectory, turn): why step 2 left it out}
    """

    built: object
    of: dict
    why: dict


def check_dataset(found: Findings, path: Path, provenance, built, truth: Truth) -> tuple[list, set]:
    """Compare each sample with its turns, over processes, and note what is found; returns (what is supervised, the
    tasks of which it is).

    What is supervised: (source, trajectory, turn), as often as it is; the tasks: see `task_of`. Of a data set for
    evaluation, only trajectories that have samples count.

    Args:
        path: of the samples, beside which step 2 says why it left turns out.
        provenance, built: two data sets with the same rows, what step 2 says of the samples and what LlamaFactory
            made of them.
    """
    samples = Samples(
        built, samples_by_trajectory(provenance, truth.trajectories), reasons_of(path, truth.trajectories)
    )
    if found.trains:  # files of which all turns are left out or held out too
        reading = next(iter(samples.of.values()))[0]
        for source in {source for source, *_ in samples.why if (local_copy(source) or Path(source)).is_file()}:
            samples.of.setdefault(source, (reading, {}))
    supervised, tasks = [], set()
    check = functools.partial(_check_rows, found, samples, truth)
    with progress([*samples.of], "check") as bar:
        for part, used, its_tasks, size in in_processes(check, _batches(samples.of), os.cpu_count()):
            found.add(part)
            for place in used:
                its_samples = samples.of[place.source][1].pop(place.row)
                supervised += [(*place, turn) for _, turns, _ in its_samples for turn in turns]
            tasks |= its_tasks
            bar.update(size)
    for source, (_, unused) in samples.of.items():
        if unused:
            raise SystemExit(
                f"{source}: has no usable trajectory {min(unused)}, of which there are samples; "
                "name the file that step 1 read by --trajectories"
            )
    found.counts["supervised turns"] = len(set(supervised))
    return supervised, tasks


def _batches(sources):
    """Yield ([(place, raw), …], bytes of their file that are done with them)."""
    for shard in read_shards([*sources]):
        rows = [*rows_of(shard)]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield rows[start : start + ROWS_AT_ONCE], shard.size if start + ROWS_AT_ONCE >= len(rows) else 0


def _check_rows(found: Findings, samples: Samples, truth: Truth, batch: tuple) -> tuple:
    """(what is found, the places of the trajectories that samples are of, their tasks, size)"""
    rows, size = batch
    found, used, tasks = found.of_no_sample(), [], set()
    for place, raw in rows:
        reading, samples_of = samples.of[place.source]
        its_samples = samples_of.get(place.row, ())
        if not (found.trains or its_samples):
            continue
        found.counts["rows"] += 1
        try:
            row = parse_row(raw)
            trajectory = read_trajectory(row, reading)
            if not (its_samples or truth.is_cut or any((*place, turn) in samples.why for turn in trajectory.turns)):
                why = _why_no_trace(trajectory, reading, truth)
                found.counts[NO_TRACE] += why == NO_TRACE
                raise TrajectoryError(why)
        except (TrajectoryError, jinja2.TemplateError) as error:
            found.set_aside(str(error))
            continue
        except RecursionError:
            found.set_aside(TOO_DEEP)
            continue
        if its_samples:
            used.append(place)
            tasks.add(task_of(row.get("task_info"), trajectory.messages, trajectory.tools))
        _note_turns(found, place, trajectory.turns, its_samples, samples.why)
        columns = {dict(reading.read_as).get(column, column): value for column, value in row.items()}
        look = looking_for(found, columns, trajectory.messages, named(place), frozenset(reading.ignore_keys))
        _check_samples(found, place, trajectory, its_samples, (samples.built, truth, look, reading.echo))
    return found, used, tasks, size


def _check_samples(found: Findings, place: Place, trajectory: Trajectory, samples: list, against: tuple) -> None:
    """Compare the samples of one trajectory with its turns."""
    built, truth, look, echo = against
    tokenize, what = Tokens(truth.tokenizer), (trajectory.messages, trajectory.tools)
    came_back = None if echo == "none" else functools.cache(lambda as_: echoed_messages(*what, as_, echo, truth.render))
    for position, turns, served_as in samples:
        where = f"{named(place)}, turn {turns[-1]}"
        if not set(turns) <= set(trajectory.turns):
            raise SystemExit(f"{where}: no such turn; name the file that step 1 read by --trajectories")
        trained, rendered = built[position], []
        found.lengths[position] = len(trained["input_ids"])
        found.counts["tokens"] += len(trained["input_ids"])
        found.counts["supervised tokens"] += len(trained["labels"]) - trained["labels"].count(IGNORE_INDEX)
        decided = _compare_records(found, position, trained, [trajectory.recorded.get(turn) for turn in turns], where)
        try:
            history = came_back(served_as) if came_back else None
            rendered = [served_turn(*what, turn, served_as, truth.render, history) for turn in turns]
            spans = [(tokenize(prompt), tokenize(target)) for prompt, target in rendered]
        except (jinja2.TemplateError, TrajectoryError) as error:
            if not decided:
                found.mismatch(position, REFUSED, None, f"{where}: {REFUSED}: {error}")
        else:
            found.targets.update(len(target) for _, target in spans)
            if not decided:
                _compare(found, position, (expected_sample(spans), trained), where, truth)
        look(turns, served_as, rendered)


def _compare_records(found: Findings, position: int, trained: dict, records: list, where: str) -> bool:
    """Compare a sample with what a server recorded of its turns, which outranks any rendering; whether that decides."""
    spans, problem = supervised_spans(trained["labels"]), None
    for (start, end), record in zip(spans, records):
        if record and start:
            prompt, target = trained["input_ids"][:start], trained["input_ids"][start:end]
            wrote = record.get("token_ids", target)
            rest = len(target) - len(wrote)  # a server stops at <|im_end|>, with it or without
            exact = record.get("prompt_token_ids", prompt) == prompt and target[: len(wrote)] == wrote and rest <= 2
            found.counts["recorded turns"] += 1
            found.counts["exact by record"] += exact
            problem = problem or (None if exact else f"{where}: {OFF_RECORD}")
    if problem:
        found.mismatch(position, OFF_RECORD, None, problem)
    whole = len(spans) == len(records) and all(record and len(record) == 2 for record in records)
    if whole and not problem:
        found.counts["exact"] += 1
        found.exact[position] = 1
    return whole or bool(problem)


def supervised_spans(labels: list[int]) -> list[tuple[int, int]]:
    """The (start, end) of each run of supervised tokens."""
    marked = [IGNORE_INDEX, *labels, IGNORE_INDEX]
    edges = [k for k, (a, b) in enumerate(itertools.pairwise(marked)) if (a == IGNORE_INDEX) != (b == IGNORE_INDEX)]
    return [*zip(edges[::2], edges[1::2])]


def _compare(found: Findings, position: int, sides: tuple[dict, dict], where: str, truth: Truth) -> None:
    expected, trained = sides
    found.lengths[position] = len(expected["input_ids"])
    if all(expected[column] == trained[column] for column in expected):
        found.counts["exact"] += 1
        found.exact[position] = 1
    elif len(expected["input_ids"]) > truth.cutoff_len:
        found.counts["cut"] += 1
    else:
        _, kind, at = first_mismatch(expected, trained)
        found.mismatch(position, kind, at, f"{where}: {describe_mismatch(expected, trained, truth.tokenizer.decode)}")


class Tokens:
    """The token ids of the texts of a trajectory, as the tokenizer makes them of a whole text.

    A tokenizer splits a text at its special tokens first, and tokenizes what is between them by itself. So a stretch
    that several prompts share is tokenized once; of the longest text it is seen that this is so.
    """

    def __init__(self, tokenizer):
        self.of_whole = functools.partial(tokenizer.encode, add_special_tokens=False)
        marks = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if _splits(token)}
        self.known = {mark: [marks[mark]] for mark in (BLOCK_START, BLOCK_END) if mark in marks}
        self.split = (
            re.compile(f"({'|'.join(map(re.escape, self.known))})").split if self.known else lambda text: [text]
        )
        self.proven = 0  # characters of the longest text of which it was seen

    def __call__(self, text: str) -> list[int]:
        ids = []
        for stretch in filter(None, self.split(text)):
            if stretch not in self.known:
                self.known[stretch] = self.of_whole(stretch)
            ids += self.known[stretch]
        if len(text) > 2 * self.proven:
            self.proven = len(text)
            if ids != self.of_whole(text):
                raise SystemExit("the tokenizer makes other tokens of a text than of its parts between special tokens")
        return ids


def _splits(token) -> bool:
    """Whether a text is split at this added token, whatever is beside it."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def named(place: Place) -> str:
    """A trajectory, for people."""
    return f"{place.source}: trajectory {place.row}"


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
    return {source: (_reading_of(readings[source], source), samples) for source, samples in wanted.items()}


def _reading_of(told: str, source: str) -> Reading:
    """How step 1 read the rows of samples."""
    try:
        return Reading.of(json.loads(told))
    except (ValueError, TypeError, AttributeError):
        raise SystemExit(
            f"{source}: its samples do not say how step 1 read it, or another version wrote them; run both steps again"
        ) from None


def _why_no_trace(trajectory: Trajectory, reading: Reading, truth: Truth) -> str:
    """Why neither step 2's samples nor its list of turns that are left out know of a trajectory."""
    if reading.validate_tools:
        refuse_breaks(trajectory.messages, trajectory.tools)
    if trajectory.thinking is False:
        return THINKING_OFF
    text = json.dumps([trajectory.messages, trajectory.tools], ensure_ascii=False, default=str)
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        if not any(token in text for token in truth.tokenizer.all_special_tokens):
            for turn in trajectory.turns:  # a template that refuses one raises the reason
                served_turn(trajectory.messages, trajectory.tools, turn, "drop", truth.render)
            return NO_TRACE
    return "the text holds a token of the tokenizer's own, or half a character"


def reasons_of(path: Path, trajectories: str | None = None) -> dict:
    """Why step 2 left turns out, as it says beside its samples: {(source, trajectory, turn): reason}.

    Beside those for validation it says nothing of its own. trajectories: the file that is read in place of the source.
    """
    name, suffix = name_of(path), path.name.removeprefix(name_of(path))
    beside, of_both = (path.with_name(of + suffix + LEFT_OUT) for of in (name, name.removesuffix(VALIDATION)))
    path = beside if beside.is_file() else of_both
    rows = read_rows(str(path)) if path.is_file() else ()
    rows = (row for _, row, error in rows if not error)
    return {(trajectories or row["source"], row["trajectory"], row["turn"]): row["reason"] for row in rows}


def _note_turns(found: Findings, trajectory: Place, turns: list[int], samples: list, why: dict) -> None:
    found.counts["trajectories"] += 1
    found.counts["turns"] += len(turns)
    found.turns[len(turns)] += 1
    sampled = {turn for _, its_turns, _ in samples for turn in its_turns}
    left_out = [turn for turn in turns if turn not in sampled]
    found.left_out += [f"{trajectory.row}:{turn}" for turn in left_out][: PLACES_KEPT - len(found.left_out)]
    found.why_left_out.update(why.get((*trajectory, turn), NOT_SAID) for turn in left_out)


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
