"""Alpaca samples: the served prompt and the target of a turn, in the columns of which LlamaFactory makes the same
tokens.

Its source is LlamaFactory 0.9.5, data/template.py and data/converter.py.
"""

import json
from collections import defaultdict

from served_tokens.marks import BLOCK_END, BLOCK_START, TrajectoryError, in_json

OF_STEP_1 = {"source", "trajectory", "reading", "enable_thinking", "turns", "drop", "template", "given"}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}


def sample_schema():
    """The columns of a sample, for pyarrow."""
    import pyarrow as pa

    texts = dict.fromkeys(("instruction", "input", "output", "system"), pa.string())
    told = {
        "source": pa.string(),
        "trajectory": pa.int64(),
        "turns": pa.list_(pa.int64()),
        "served_as": pa.string(),
        "reading": pa.string(),
    }
    return pa.schema({**texts, "history": pa.list_(pa.list_(pa.string())), **told})


def to_samples(
    messages: list, served: dict, served_as: str = "drop", merge_turns: bool = False, refuse=None
) -> tuple[list, list]:
    """The samples of one trajectory, and the reasons for which its other turns are left out.

    Args:
        messages, served: the columns of step 1, see `step1_columns`.
        served_as: "drop" (the history has no reasoning), "template" (it has what the chat template keeps) or
            "no-thinking" (no reasoning in the targets either; the served prompt ends with an empty think block).
        merge_turns: a sample goes on, supervising turn after turn, while the served prompt of the next turn begins with
            the text so far. Its history then holds supervised turns only. Else each turn has a sample of its own.
        refuse: refuse(turn, columns) -> a reason to leave a turn of `served` out, or None; `columns` are the texts of
            its sample.
    Returns (samples, reasons): the turns of the samples and the reasons add up to the turns of the trajectory.
    """
    given = "" if served_as == "no-thinking" else served["given"]
    roles = [message["role"] for message in messages]
    reading = json.dumps(served["reading"])
    samples, reasons, spans = [], [], []  # spans: the messages that the last sample supervises
    closing, seen = set(), 0
    for turn, contents, changed_from in served_prompts(messages, served, served_as):
        end = turn["message"]
        new = range(min(changed_from, seen), end)  # else as for the turn before
        closing = {j for j in closing if j < new.start}  # the assistant blocks that end a pair
        closing |= {j for j in new if can_close_pair(roles, contents, j, served_as, given)}
        seen = end
        goes_on = merge_turns and spans and _begins_with(roles, contents, spans[-1], end, changed_from, given)
        spans = [*(spans if goes_on else []), end]
        try:
            if turn["left_out"]:
                raise _Inexpressible(turn["left_out"])
            prompt = columns_of(list(zip(roles, contents))[:end], {*spans} if merge_turns else closing, given)
            columns = {**prompt, "output": _target(messages[end]["content"], turn["answer"], served_as, given)}
            if refuse and (reason := refuse(turn, columns)):
                raise _Inexpressible(reason)
        except _Inexpressible as reason:
            reasons.append(str(reason))
            spans = []
            continue
        turns = [*samples.pop()["turns"], turn["turn"]] if goes_on else [turn["turn"]]
        of_turns = {"source": served["source"], "trajectory": served["trajectory"], "turns": turns}
        samples.append({**columns, **of_turns, "served_as": served_as, "reading": reading})
    return samples, reasons


def served_prompts(messages: list[dict], served: dict, served_as: str):
    """Yield (turn, contents, changed_from) for each turn of a row of step 1.

    contents: the texts of all messages as its served prompt has them, which is those before the turn. The first
    `changed_from` of them are as in the served prompt of the turn before and its target. The list goes on changing.
    """
    contents, edits = [message["content"] for message in messages], defaultdict(list)
    for edit in served["template" if served_as == "template" else "drop"]:
        edits[edit["turn"]].append(edit)
    for turn in served["turns"]:
        for edit in edits[turn["turn"]]:
            contents[edit["message"]] = edit["content"]
        yield turn, contents, min((edit["message"] for edit in edits[turn["turn"]]), default=turn["message"])


def can_close_pair(roles: list[str], contents: list[str], at: int, served_as: str, given: str) -> bool:
    """Whether a block of a served prompt can stand as an assistant text in LlamaFactory's history.

    LlamaFactory (0.9.5, data/template.py) tokenizes each text by itself, so one that opens with whitespace would lose
    the token that this whitespace forms with the newline before it. Its `qwen3` template, which is for the histories
    without reasoning, removes think blocks from assistant texts.
    """
    text = contents[at]
    if roles[at : at + 2] != ["assistant", "user"] or not text.startswith(given) or text[len(given) :][:1].isspace():
        return False
    return served_as == "template" or "<think>" not in text


def columns_of(blocks: list[tuple[str, str]], in_pairs: set[int], given: str) -> dict:
    """The blocks of a served prompt in LlamaFactory's columns {"instruction", "input", "system", "history"}.

    LlamaFactory (0.9.5, data/template.py) begins with a non-empty system text or a user text, and goes on in pairs of a
    user and an assistant text. What does not fit is written out, role marks and all. Its user format replaces
    `{{idx}}`, so a prompt with such a text is beyond it.

    Args:
        blocks: (role, text) of each.
        in_pairs: positions of the assistant blocks that end a pair; a user block follows each.
        given: what the generation prompt puts before each assistant text of a pair.
    Raises _Inexpressible with the reason.
    """
    system, history, user, closed = "", [], None, False  # user: what the next pair begins with
    for at, (role, text) in enumerate(blocks):
        if user is None and role != "user":
            if at == 0 and role != "system":
                raise _Inexpressible(f"its prompt opens with a block of {role}, which LlamaFactory cannot write")
            if at == 0 and not text:
                raise _Inexpressible("its system prompt is empty, and LlamaFactory writes no block for that")
            system += text if at == 0 else _written_out(role, text)
            continue
        if user is not None and at in in_pairs:
            history.append([user, text.removeprefix(given)])
            closed = True
        else:
            user = text if user is None or closed else user + _written_out(role, text)
            closed = False
        if "{{idx}}" in text:
            raise _Inexpressible("its prompt holds {{idx}}, which LlamaFactory replaces by a number")
    if user is None:
        raise _Inexpressible("no user block comes before it, and LlamaFactory's alpaca format needs one")
    return {"instruction": user, "input": "", "system": system, "history": history}


class _Inexpressible(Exception):
    """Why a turn cannot become a sample."""


def _written_out(role: str, text: str) -> str:
    return f"{BLOCK_END}\n{BLOCK_START}{role}\n{text}"


def _begins_with(roles: list, contents: list, last: int, end: int, changed_from: int, given: str) -> bool:
    """Whether the prompt begins with the one before and its target, block `last`, in tokens as well as in text."""
    if changed_from <= last or end <= last + 1 or roles[last + 1] != "user" or not contents[last].startswith(given):
        return False
    return not contents[last][len(given) :][:1].isspace()


def _target(text: str, answer_start: int | None, served_as: str, given: str) -> str:
    if served_as != "no-thinking":
        if not text.startswith(given):
            raise _Inexpressible(
                "its target does not begin as the generation prompt does, so the model cannot write it"
            )
        return text.removeprefix(given)
    answer = None if answer_start is None else text[answer_start:]
    if answer is None or "<think>" in answer or "</think>" in answer or answer.startswith("\n"):
        raise _Inexpressible("its answer holds a think tag or opens with a newline, which LlamaFactory removes")
    return answer


def step1_columns(row: dict) -> tuple[list[dict], dict]:
    """The columns `messages` and `served`: a Parquet file of step 1 holds JSON strings. Raises TrajectoryError."""
    messages, served = (in_json(row.get(column)) for column in ("messages", "served"))
    whole = isinstance(messages, list) and isinstance(served, dict) and served.keys() >= OF_STEP_1
    if not whole or not all(
        isinstance(message, dict) and message.keys() >= {"role", "content"} for message in messages
    ):
        raise TrajectoryError("the row is not one of step 1; run step1_apply_tool_template.py first")
    return messages, served


def training_settings(served_as: str, given: str, all_think: bool, merge_turns: bool) -> list[str]:
    """What to override in qwen3_full_sft.yaml, so that LlamaFactory trains on the samples as they are.

    Args:
        given: see step 1.
        all_think: every target of step 1 opens with a think block.
    """
    if served_as == "no-thinking" and all_think:
        settings = ["enable_thinking=false"]
    elif served_as != "no-thinking" and given:  # LlamaFactory then reads the generation prompt from the model
        settings = ["template=null"]
    elif served_as == "template" or not all_think:
        settings = ["template=qwen3_nothink"]
    else:
        settings = []
    return settings + ["mask_history=false"] * merge_turns


def reasoning_of(target: str) -> str:
    """What a target of step 1 thinks before it answers."""
    return target.removeprefix("<think>").partition("</think>")[0].strip() if target.startswith("<think>") else ""
