"""The comparison: each sample that LlamaFactory built with the served prompts and targets of its turns, by token."""

import functools
import json
import os
import re
from dataclasses import dataclass, field, replace

import jinja2

from served_tokens.files.processes import TOO_DEEP, in_processes
from served_tokens.files.read import Place, parse_row, progress, read_chunks
from served_tokens.marks import HELD_OUT, IGNORE_INDEX, Tokens, TrajectoryError
from served_tokens.proof.answers import answer_of, note_answer
from served_tokens.proof.findings import Findings, Learnt
from served_tokens.proof.reading import check_reading
from served_tokens.proof.tokens import Mismatch, mismatch_of, supervised_spans
from served_tokens.proof.told import Claim, claims_of, reasons_of
from served_tokens.proof.turn import echoed_messages, expected_sample, served_turn, task_of
from served_tokens.rows.trajectory import Reading, Trajectory, read_trajectory

NOT_SAID = "step 2 does not say why"
NO_TRACE = "it has no sample, and step 2 does not say why"
THINKING_OFF = "the row, or --template-kwargs, says that the model is not to think"
OWN_TOKEN = "the text holds a token of the tokenizer's own, or half a character"
OFF_RECORD = "differs from the token ids that the server recorded of it"
REFUSED = "the model's chat template refuses it"
HALF = re.compile("[\ud800-\udfff]")  # of a character
ROWS_AT_ONCE = 8  # trajectories that a process checks at a time


class OtherRows(SystemExit):
    """Samples are of rows or turns that the file does not have, so it is not what step 1 read."""


@dataclass(frozen=True)
class Truth:
    """What samples are compared with."""

    encode: Tokens  # of the model's tokenizer, with its chat template
    cutoff_len: int  # LlamaFactory's, in tokens
    trajectories: str | None  # the file that step 1 read, where it is not the one that the samples name
    is_cut: bool  # only the first samples of a data set are there

    @property
    def tokenizer(self):
        return self.encode.tokenizer

    def render(self, messages, tools, add_generation_prompt, **variables) -> str:
        variables["add_generation_prompt"] = add_generation_prompt
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables)

    def render_of(self, trajectory: Trajectory):
        """`render`, with what the chat template reads of the requests of a trajectory."""
        return functools.partial(self.render, **trajectory.template_kwargs)


@dataclass(frozen=True)
class Samples:
    """The samples of a data set, which processes inherit."""

    built: object  # what LlamaFactory made of them, a row for each
    claims: dict[Place, list[Claim]]  # of each trajectory
    readings: dict[str, Reading]  # how step 1 read each file
    why: dict[tuple[str, int, int], str]  # why step 2 left out a turn, (source, trajectory, turn)


@dataclass
class Part:
    """What a process tells of some rows."""

    learnt: Learnt = field(default_factory=Learnt)
    results: dict = field(default_factory=dict)  # position of a sample -> (its tokens as served, whether it is exact)
    answers: list = field(default_factory=list)  # an `Answer` of each turn


def check_dataset(found: Findings, provenance, built, truth: Truth) -> None:
    """Compare each sample with its turns, over processes, and note what is found.

    Of a data set for evaluation, only trajectories that have samples count. provenance, built: two data sets with the
    same rows, what step 2 says of the samples and what LlamaFactory made of them.
    """
    claims, readings = claims_of(provenance, truth.trajectories)
    samples = Samples(built=built, claims=claims, readings=readings, why=reasons_of(found.path, truth.trajectories))
    check, answers = functools.partial(_check_rows, found.trains, samples, truth), {}
    with progress(f"check {found.name}", " samples", len(provenance)) as bar:
        for part in in_processes(check, read_chunks([*readings], ROWS_AT_ONCE), os.cpu_count()):
            found.add(part.learnt)
            for position, (length, is_exact) in part.results.items():
                found.lengths[position], found.exact[position] = length, is_exact
            for answer in part.answers:
                note_answer(found, answers, answer)
            bar.update(len(part.results))
    turns = set(found.supervised)
    for place in sorted(claims.keys() - {Place(source, row) for source, row, _ in turns}):
        raise OtherRows(
            f"{place.source}: has no usable row {place.row}, of which there are samples, so it is not what "
            "step 1 read; run both steps again, or name the file that step 1 read by --trajectories"
        )
    found.supervised_turns = len(turns)


def _check_rows(trains: bool, samples: Samples, truth: Truth, rows: list) -> Part:
    """What there is to tell of some rows, (place, raw) of each."""
    part = Part()
    for place, raw in rows:
        if not (trains or place in samples.claims):
            continue
        try:
            trajectory = read_trajectory(parse_row(raw), samples.readings[place.source])
            _refuse_without_trace(place, trajectory, samples, truth)
        except (TrajectoryError, jinja2.TemplateError, RecursionError) as error:
            part.learnt.reasons[TOO_DEEP if isinstance(error, RecursionError) else str(error)] += 1
        else:
            _note_turns(part.learnt, place, trajectory, samples)
            if place in samples.claims:
                _check_trajectory(part, place, raw, trajectory, samples, truth)
    return part


def _refuse_without_trace(place: Place, trajectory: Trajectory, samples: Samples, truth: Truth) -> None:
    """Raise the reason for which neither step 2's samples nor its list of turns left out know of a trajectory."""
    if truth.is_cut or place in samples.claims or any((*place, turn) in samples.why for turn in trajectory.turns):
        return
    if trajectory.given.thinking is False:
        raise TrajectoryError(THINKING_OFF)
    text = json.dumps([trajectory.messages, trajectory.tools], ensure_ascii=False, default=str)
    if HALF.search(text) or any(token in text for token in truth.tokenizer.all_special_tokens):
        raise TrajectoryError(OWN_TOKEN)
    for turn in trajectory.turns:  # a template that refuses one raises the reason
        served_turn(trajectory.messages, trajectory.tools, turn, "drop", truth.render_of(trajectory))
    raise TrajectoryError(NO_TRACE)


def _note_turns(learnt: Learnt, place: Place, trajectory: Trajectory, samples: Samples) -> None:
    turns, claims = trajectory.turns, samples.claims.get(place, [])
    learnt.turns[len(turns)] += 1
    learnt.unread.update(trajectory.given.known.keys())
    sampled = {turn for claim in claims for turn in claim.turns}
    why = {turn: samples.why.get((*place, turn), NOT_SAID) for turn in turns if turn not in sampled}
    left_out = [turn for turn in why if why[turn] != HELD_OUT]
    learnt.held_out += len(why) - len(left_out)
    learnt.left_out += [f"{place.row}:{turn}" for turn in left_out]
    learnt.why_left_out.update(why[turn] for turn in left_out)
    if any(claim.served_as != "no-thinking" for claim in claims):
        for turn in sampled.intersection(turns):
            learnt.reasoned.count(trajectory.messages[turn])


def _check_trajectory(part: Part, place: Place, raw, trajectory: Trajectory, samples: Samples, truth: Truth) -> None:
    """Compare the samples of one trajectory with its turns, and what was read of it with its row."""
    row, learnt = json.loads(raw) if isinstance(raw, bytes) else raw, part.learnt
    reading, claims = samples.readings[place.source], samples.claims[place]
    messages, tools, turns = trajectory.messages, trajectory.tools, trajectory.turns
    shown, render = {}, truth.render_of(trajectory)
    learnt.tasks.append(task_of(row.get("task_info"), messages, tools))

    @functools.cache
    def history(served_as: str) -> list[dict]:
        return echoed_messages(messages, tools, served_as, reading.echo, render)

    for claim in claims:
        turn, position, trained = claim.turns[-1], claim.position, samples.built[claim.position]
        where = f"{place}, turn {turn} (--show {place.row}:{turn})"
        if not set(turns) >= set(claim.turns):
            raise OtherRows(f"{where}: no such turn; name the file that step 1 read by --trajectories")
        learnt.supervised += [(*place, turn) for turn in claim.turns]
        length = len(trained["input_ids"])
        learnt.tokens += length
        learnt.supervised_tokens += len(trained["labels"]) - trained["labels"].count(IGNORE_INDEX)
        records = [trajectory.given.recorded.get(turn) for turn in claim.turns]
        by_record = _is_as_recorded(learnt, trained, records)
        mismatch = Mismatch(OFF_RECORD, None, OFF_RECORD) if by_record is False else None
        try:
            past = history(claim.served_as)
            texts = [served_turn(messages, tools, turn, claim.served_as, render, past) for turn in claim.turns]
        except (jinja2.TemplateError, TrajectoryError) as error:
            if by_record is None:
                mismatch = Mismatch(REFUSED, None, f"{REFUSED}: {error}")
            texts = []
        spans = [(truth.encode(prompt), truth.encode(target)) for prompt, target in texts]
        learnt.targets.update(len(target) for _, target in spans)
        if spans and by_record is None:
            expected = expected_sample(spans)
            length = len(expected["input_ids"])
            if expected != trained:
                mismatch = mismatch_of(expected, trained, truth.tokenizer.decode)
        part.results[position] = length, mismatch is None
        if mismatch and mismatch.at is not None and length > truth.cutoff_len:
            learnt.cut += 1
        elif mismatch:
            learnt.kinds[mismatch.kind] += 1
            learnt.mismatches.append((position, replace(mismatch, text=f"{where}: {mismatch.text}")))
        for turn, (prompt, target) in zip(claim.turns, texts):
            reasoning = messages[turn].get("reasoning_content", "")  # which not every target shows
            shown[turns.index(turn)] = prompt, f"{target}\0{reasoning}"
            its_place = f"row {place.row}, turn {turn}"
            part.answers.append(answer_of(prompt, target, turn == turns[-1], its_place))
    thinking = any(claim.served_as != "no-thinking" for claim in claims)
    check_reading(learnt, row, str(place), reading, trajectory, shown, thinking)


def _is_as_recorded(learnt: Learnt, trained: dict, records: list) -> bool | None:
    """Whether a sample is what a server recorded of its turns, which outranks any rendering; None where not all was."""
    spans, wrong = supervised_spans(trained["labels"]) if any(records) else [], 0
    for (start, end), record in zip(spans, records):
        if record and start:
            prompt, target = trained["input_ids"][:start], trained["input_ids"][start:end]
            wrote = record.get("token_ids", target)
            rest = len(target) - len(wrote)  # a server stops at <|im_end|>, with it or without
            exact = record.get("prompt_token_ids", prompt) == prompt and target[: len(wrote)] == wrote and rest <= 2
            learnt.recorded_turns += 1
            learnt.exact_by_record += exact
            wrong += not exact
    if wrong:
        return False
    return True if len(spans) == len(records) and all(record and len(record) == 2 for record in records) else None
