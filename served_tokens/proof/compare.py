"""The comparison: each sample that LlamaFactory built with the served prompts and targets of its turns, by token."""

import contextlib
import functools
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from served_tokens.files.hub import local_copy
from served_tokens.files.processes import TOO_DEEP, in_processes
from served_tokens.files.read import Place, parse_row, progress, read_chunks
from served_tokens.marks import BLOCK_END, IGNORE_INDEX, TrajectoryError
from served_tokens.proof.findings import PLACES_KEPT, Findings
from served_tokens.proof.lost import lost_texts
from served_tokens.proof.own_reader import not_to_be_trained, plain_reading, raw_row
from served_tokens.proof.tokens import Tokens, describe_mismatch, first_mismatch, supervised_spans
from served_tokens.proof.told import reasons_of, samples_by_trajectory
from served_tokens.proof.turn import echoed_messages, expected_sample, served_turn, task_of
from served_tokens.rows.trajectory import Reading, Trajectory, read_trajectory

NOT_SAID = "step 2 does not say why"
NO_TRACE = "it has no sample, and step 2 does not say why"
THINKING_OFF = "the row says that the model is not to think"
OFF_RECORD = "differs from the token ids that the server recorded of it"
REFUSED = "the model's chat template refuses it"
ROWS_AT_ONCE = 8  # trajectories that a process checks at a time
READ_OF_PLAIN_ROWS = frozenset(
    "messages tools role content reasoning_content tool_calls function name arguments description parameters".split()
)
SHOWN_TEXT = 60  # characters of a text that is lost


@dataclass(frozen=True)
class Truth:
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
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables)


@dataclass(frozen=True)
class Samples:
    """The samples of a data set, by the trajectories that they are of; processes inherit it.

    built: what LlamaFactory made of them, a row for each.
    of: {source: (how step 1 read it, {trajectory: [(position, turns, served_as)]})}
    why: {(source, trajectory, turn): why step 2 left it out}
    """

    built: object
    of: dict
    why: dict


@dataclass(frozen=True)
class Answer:
    """What a prompt is trained to, as digests of texts: of the whole target, and of what follows its reasoning."""

    target: int
    answer: int
    thinks: bool
    ends_row: bool  # the turn is the last of its row
    place: str  # its trajectory and turn, for people


@dataclass
class Checked:
    """What is learnt of some rows of a data set.

    supervised: (source, trajectory, turn) of each turn that a sample trains, as often as one does.
    used: the places of the trajectories that samples are of; tasks: theirs, see `task_of`.
    answers: (digest of a prompt, what it is trained to) of each turn.
    size: bytes of the file that are done with these rows.
    """

    found: Findings
    supervised: list = field(default_factory=list)
    used: list = field(default_factory=list)
    tasks: set = field(default_factory=set)
    answers: list = field(default_factory=list)
    size: int = 0


def check_dataset(found: Findings, path: Path, provenance, built, truth: Truth) -> Checked:
    """Compare each sample with its turns, over processes, and note what is found.

    Of a data set for evaluation, only trajectories that have samples count.

    Args:
        path: of the samples, beside which step 2 says why it left turns out.
        provenance, built: two data sets with the same rows, what step 2 says of the samples and what LlamaFactory
            made of them.
    """
    of, why = samples_by_trajectory(provenance, truth.trajectories), reasons_of(path, truth.trajectories)
    samples = Samples(built=built, of=of, why=why)
    if found.trains:  # files of which all turns are left out or held out too
        reading = next(iter(samples.of.values()))[0]
        for source in {source for source, *_ in samples.why if (local_copy(source) or Path(source)).is_file()}:
            samples.of.setdefault(source, (reading, {}))
    checked, check, answers = Checked(found), functools.partial(_check_rows, found, samples, truth), {}
    with progress([*samples.of], "check") as bar:
        for part in in_processes(check, _batches(samples.of), os.cpu_count()):
            found.add(part.found)
            for place in part.used:
                samples.of[place.source][1].pop(place.row)
            checked.supervised += part.supervised
            checked.tasks |= part.tasks
            _note_answers(found, answers, part.answers)
            bar.update(part.size)
    for source, (_, unused) in samples.of.items():
        if unused:
            raise SystemExit(
                f"{source}: has no usable trajectory {min(unused)}, of which there are samples; "
                "name the file that step 1 read by --trajectories"
            )
    found.counts["supervised turns"] = len(set(checked.supervised))
    return checked


def _note_answers(found: Findings, known: dict, answers: list) -> None:
    """Note prompts that are trained to several targets, and those of which two differ by their reasoning alone.

    Where the turn with reasoning ends its row and the one without is a past turn of another, that is the sign of a log
    with a row for each call, in which past turns have lost their reasoning.
    """
    for prompt, answer in answers:
        others = known.setdefault(prompt, [])
        if answer.target in (other.target for other in others):
            continue
        for other in others:
            if other.answer != answer.answer or other.thinks == answer.thinks:
                continue
            found.counts["with and without reasoning"] += 1
            with_it, without = (answer, other) if answer.thinks else (other, answer)
            if with_it.ends_row and not without.ends_row:
                found.counts["reasoning lost"] += 1
                found.reasoning_lost = found.reasoning_lost or f"{with_it.place}, and {without.place}"
        if others:
            found.counts["other targets"] += 1
            found.other_targets = found.other_targets or f"{others[0].place}, and {answer.place}"
        others.append(answer)


def _batches(sources):
    """Yield ([(place, raw), …], bytes of their file that are done with them)."""
    for chunk in read_chunks([*sources]):
        for start in range(0, len(chunk.rows), ROWS_AT_ONCE):
            is_last = start + ROWS_AT_ONCE >= len(chunk.rows)
            yield chunk.rows[start : start + ROWS_AT_ONCE], chunk.size if is_last else 0


def _check_rows(found: Findings, samples: Samples, truth: Truth, batch: tuple) -> Checked:
    """What is learnt of some rows, (place, raw) of each."""
    rows, size = batch
    checked = Checked(found.of_no_sample(), size=size)
    found = checked.found
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
                why = _why_no_trace(trajectory, truth)
                found.counts[NO_TRACE] += why == NO_TRACE
                raise TrajectoryError(why)
        except (TrajectoryError, jinja2.TemplateError) as error:
            found.set_aside(str(error))
            continue
        except RecursionError:
            found.set_aside(TOO_DEEP)
            continue
        _note_turns(found, place, trajectory.turns, its_samples, samples.why)
        found.unread.update(trajectory.given.known.keys())
        if its_samples:
            checked.used.append(place)
            checked.supervised += [(*place, turn) for _, turns, _ in its_samples for turn in turns]
            checked.tasks.add(task_of(row.get("task_info"), trajectory.messages, trajectory.tools))
            shown = _check_samples(checked, place, trajectory, its_samples, samples.built, truth, reading.echo)
            own = raw_row(raw)
            _check_reading(found, place, own, reading, trajectory, shown)
            thinks = any(served_as != "no-thinking" for *_, served_as in its_samples)
            if thinks and not reading.read_as and not_to_be_trained(own, len(trajectory.turns)) & shown.keys():
                found.lose("read otherwise", f"{named(place)}: turns are trained that the row says not to train on")
    return checked


def _check_reading(found: Findings, place: Place, row: dict, reading: Reading, trajectory: Trajectory, shown) -> None:
    """Compare the reading of a row with the check's own, or where the row is not plain look for each of its texts."""
    chosen = {key.rpartition(".")[2] for key in reading.ignore_keys if "." in key}
    plain = None
    if not (reading.read_as or chosen & READ_OF_PLAIN_ROWS):
        plain = plain_reading(row, tools_as_given=reading.server_style != "sglang")
    if plain is not None:
        found.counts["rows read twice"] += 1
        if plain != _as_plain(trajectory):
            found.lose("read otherwise", f"{named(place)}: step 1 reads it otherwise than the check itself does")
        return
    try:
        lost = lost_texts(row, shown, len(trajectory.turns), dict(reading.read_as), reading.ignore_keys)
    except RecursionError:
        lost = None
    if lost is None:
        turns = "its turns cannot be told in the raw row; bring it into a shape of docs/rows.md"
        found.lose("lost texts", f"{named(place)}: {turns}")
    for loss in lost or ():
        text = loss.text[:SHOWN_TEXT] + ("…" if len(loss.text) > SHOWN_TEXT else "")
        found.lose("lost texts", f"{named(place)}: {loss.place}: {loss.key}: {text!r} is not in {loss.where}")
        found.lost_under[loss.key] += 1


def _as_plain(trajectory: Trajectory) -> tuple[list, list]:
    """What the chat template gets, as `plain_reading` says it."""
    messages = []
    for message in trajectory.messages:
        functions = [call["function"] for call in message.get("tool_calls", [])]
        calls = [(function["name"], json.dumps(function["arguments"])) for function in functions]
        messages.append((message["role"], message["content"], message.get("reasoning_content", ""), calls))
    return messages, [json.dumps(tool) for tool in trajectory.tools or []]


def _check_samples(
    checked: Checked, place: Place, trajectory: Trajectory, samples: list, built, truth: Truth, echo: str
) -> dict:
    """Compare the samples of one trajectory with its turns; returns what `lost_texts` looks in, of those turns."""
    found, tokenize, shown = checked.found, Tokens(truth.tokenizer), {}
    what, numbers = (trajectory.messages, trajectory.tools), {turn: k for k, turn in enumerate(trajectory.turns)}
    came_back = None if echo == "none" else functools.cache(lambda as_: echoed_messages(*what, as_, echo, truth.render))
    for position, turns, served_as in samples:
        where = f"{named(place)}, turn {turns[-1]}"
        if not set(turns) <= numbers.keys():
            raise SystemExit(f"{where}: no such turn; name the file that step 1 read by --trajectories")
        trained = built[position]
        found.lengths[position] = len(trained["input_ids"])
        found.counts["tokens"] += len(trained["input_ids"])
        found.counts["supervised tokens"] += len(trained["labels"]) - trained["labels"].count(IGNORE_INDEX)
        decided = _compare_records(found, position, trained, [trajectory.given.recorded.get(k) for k in turns], where)
        try:
            history = came_back(served_as) if came_back else None
            rendered = [served_turn(*what, turn, served_as, truth.render, history) for turn in turns]
            spans = [(tokenize(prompt), tokenize(target)) for prompt, target in rendered]
        except (jinja2.TemplateError, TrajectoryError) as error:
            if not decided:
                found.mismatch(position, REFUSED, None, f"{where}: {REFUSED}: {error}")
            continue
        found.targets.update(len(target) for _, target in spans)
        if not decided:
            _compare(found, position, (expected_sample(spans), trained), where, truth)
        for turn, (prompt, target) in zip(turns, rendered):
            left_out = served_as == "no-thinking" or "</think>" not in target
            unshown = trajectory.messages[turn].get("reasoning_content", "") if left_out else ""
            shown[numbers[turn]] = prompt, f"{target}\0{unshown}"
            checked.answers.append((_digest(prompt), _answer(target, trajectory, place, turn)))
    _note_reasoning(found, trajectory, samples, shown)
    return shown


def _note_reasoning(found: Findings, trajectory: Trajectory, samples: list, shown: dict) -> None:
    """Count trained turns with reasoning, those without, and those without beside others that have some."""
    if any(served_as == "no-thinking" for *_, served_as in samples):
        return
    thinks = [bool(trajectory.messages[k].get("reasoning_content", "").strip()) for k in trajectory.turns]
    without = sum(not thinks[number] for number in shown)
    found.counts["with reasoning"] += len(shown) - without
    found.counts["without reasoning"] += without
    found.counts["beside reasoning"] += without if any(thinks) else 0


def _answer(target: str, trajectory: Trajectory, place: Place, turn: int) -> Answer:
    reasoning, closed, answer = target.partition(BLOCK_END)[0].rpartition("</think>")
    return Answer(
        target=_digest(target),
        answer=_digest(answer),
        thinks=bool(closed and reasoning.replace("<think>", "").strip()),
        ends_row=turn == trajectory.turns[-1],
        place=f"trajectory {place.row}, turn {turn}",
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


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


def named(place: Place) -> str:
    """A trajectory, for people."""
    return f"{place.source}: trajectory {place.row}"


def _why_no_trace(trajectory: Trajectory, truth: Truth) -> str:
    """Why neither step 2's samples nor its list of turns that are left out know of a trajectory."""
    if trajectory.given.thinking is False:
        return THINKING_OFF
    text = json.dumps([trajectory.messages, trajectory.tools], ensure_ascii=False, default=str)
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        if not any(token in text for token in truth.tokenizer.all_special_tokens):
            for turn in trajectory.turns:  # a template that refuses one raises the reason
                served_turn(trajectory.messages, trajectory.tools, turn, "drop", truth.render)
            return NO_TRACE
    return "the text holds a token of the tokenizer's own, or half a character"


def _note_turns(found: Findings, trajectory: Place, turns: list[int], samples: list, why: dict) -> None:
    found.counts["trajectories"] += 1
    found.counts["turns"] += len(turns)
    found.turns[len(turns)] += 1
    sampled = {turn for _, its_turns, _ in samples for turn in its_turns}
    left_out = [turn for turn in turns if turn not in sampled]
    found.left_out += [f"{trajectory.row}:{turn}" for turn in left_out][: PLACES_KEPT - len(found.left_out)]
    found.why_left_out.update(why.get((*trajectory, turn), NOT_SAID) for turn in left_out)
