"""Alpaca samples: the served prompt and the target of a turn, in the columns of which LlamaFactory makes the same
tokens.

Its source is LlamaFactory 0.9.5, data/template.py and data/converter.py.
"""

import itertools
import json
from collections import defaultdict

from served_tokens.marks import BLOCK_END, BLOCK_START, TrajectoryError, in_json

OF_STEP_1 = {"source", "trajectory", "reading", "enable_thinking", "turns", "drop", "template", "given"}
IDS = ("input_ids", "attention_mask", "labels")  # of samples that are token ids; axolotl takes these and no others
PROVENANCE = ("source", "trajectory", "turns", "served_as", "reading")
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}


class NoSample(Exception):
    """Why a turn cannot become a sample, or is not to become one."""


def sample_schema(of_tokens: bool):
    """The columns of a sample, for pyarrow."""
    import pyarrow as pa

    kinds = {"trajectory": pa.int64(), "turns": pa.list_(pa.int64()), "history": pa.list_(pa.list_(pa.string()))}
    kinds |= dict.fromkeys(IDS, pa.list_(pa.int32())) | {"attention_mask": pa.list_(pa.int8())}
    columns = IDS if of_tokens else ("instruction", "input", "output", "system", "history")
    return pa.schema({column: kinds.get(column, pa.string()) for column in (*columns, *PROVENANCE)})


def told_of(served: dict, turns: list[int], served_as: str) -> dict:
    """Where a sample that supervises these turns comes from."""
    its = {"source": served["source"], "trajectory": served["trajectory"], "turns": turns}
    return its | {"served_as": served_as, "reading": json.dumps(served["reading"])}


def step1_columns(row: dict) -> tuple[list[dict], dict]:
    """The columns `messages` and `served`: a Parquet file of step 1 holds JSON strings. Raises TrajectoryError."""
    messages, served = in_json(row.get("messages")), in_json(row.get("served"))
    if not (isinstance(messages, list) and isinstance(served, dict) and served.keys() >= OF_STEP_1):
        raise TrajectoryError("the row is not one of step 1; run step1_apply_tool_template.py first")
    return messages, served


def to_samples(
    messages: list[dict], served: dict, served_as: str = "drop", merge_turns: bool = False
) -> tuple[list[dict], dict[int, str]]:
    """The samples of one trajectory, and the reasons for which its other turns are left out.

    Args:
        messages, served: the columns of step 1, see `step1_columns`.
        served_as: "drop" (the history has no reasoning), "template" (it has what the chat template keeps) or
            "no-thinking" (no reasoning in the targets either; the served prompt ends with an empty think block).
        merge_turns: a sample goes on, supervising turn after turn, while the served prompt of the next turn begins with
            the text so far. Its history then holds supervised turns only. Else each turn has a sample of its own.
    Returns (samples, {turn: why it is left out}); each turn of the trajectory is in one of the two.
    """
    given = "" if served_as == "no-thinking" else served["given"]
    samples, left_out = [], {}
    so_far, supervised = [], set()  # to merge: the blocks of the last sample, and which of them it supervises
    for turn, prompt in served_prompts(messages, served, served_as):
        pairs = ends_of_pairs(prompt, served_as, given)
        goes_on = bool(so_far) and prompt[: len(so_far)] == so_far and len(so_far) - 1 in pairs
        if merge_turns:
            pairs = supervised if goes_on else set()
        target = messages[turn["message"]]["content"]
        try:
            if turn["left_out"]:
                raise NoSample(turn["left_out"])
            columns = columns_of(prompt, pairs, given)
            columns["output"] = _output(generated(turn, target, served_as, given), served_as)
        except NoSample as reason:
            left_out[turn["turn"]] = str(reason)
            so_far = []
            continue
        turns = [turn["turn"]]
        if goes_on:
            turns = samples.pop()["turns"] + turns
        samples.append(columns | told_of(served, turns, served_as))
        if merge_turns:
            so_far, supervised = [*prompt, ("assistant", target)], {*pairs, len(prompt)}
    return samples, left_out


def served_prompts(messages: list[dict], served: dict, served_as: str):
    """Yield (turn, blocks) for each turn of a row of step 1: (role, text) of the blocks of its served prompt."""
    contents, edits = [message["content"] for message in messages], defaultdict(list)
    for edit in served["template" if served_as == "template" else "drop"]:
        edits[edit["turn"]].append(edit)
    roles = [message["role"] for message in messages]
    for turn in served["turns"]:
        for edit in edits[turn["turn"]]:
            contents[edit["message"]] = edit["content"]
        yield turn, list(zip(roles[: turn["message"]], contents))


def ends_of_pairs(prompt: list[tuple[str, str]], served_as: str, given: str) -> set[int]:
    """The blocks of a served prompt that can stand as assistant texts in LlamaFactory's history.

    LlamaFactory tokenizes each text by itself, so one that opens with whitespace would lose the token that this
    whitespace forms with the newline before it. Its `qwen3` template, which is for the histories without reasoning,
    removes think blocks from assistant texts.
    """
    ends = set()
    for at, ((role, text), (next_role, _)) in enumerate(itertools.pairwise(prompt)):
        if role == "assistant" and next_role == "user" and text.startswith(given):
            opens_with_space = text[len(given) : len(given) + 1].isspace()
            if not opens_with_space and (served_as == "template" or "<think>" not in text):
                ends.add(at)
    return ends


def columns_of(prompt: list[tuple[str, str]], pairs: set[int], given: str) -> dict:
    """The blocks of a served prompt in LlamaFactory's columns {"instruction", "input", "system", "history"}.

    LlamaFactory begins with a non-empty system text or a user text, and goes on in pairs of a user and an assistant
    text. What does not fit is written out, role marks and all.

    Args:
        pairs: positions of the assistant blocks that end a pair; a user block follows each.
        given: what the generation prompt puts before each assistant text of a pair.
    Raises NoSample with the reason.
    """
    query = next((at for at, (role, _) in enumerate(prompt) if role == "user"), len(prompt))
    system = ""
    if query > 0:
        role, system = prompt[0]
        if role != "system":
            opening = f"a block of {role}" if role else system
            raise NoSample(f"its prompt opens with {opening}, which LlamaFactory cannot write")
        if not system:
            raise NoSample("its system prompt is empty, and LlamaFactory writes no block for that")
        system += "".join(itertools.starmap(_written_out, prompt[1:query]))
    history, user = [], None
    for at, (role, text) in enumerate(prompt[query:], query):
        if "{{idx}}" in text:
            raise NoSample("its prompt holds {{idx}}, which LlamaFactory replaces by a number")
        if at in pairs:
            history.append([user, text.removeprefix(given)])
            user = None
        else:
            user = text if user is None else user + _written_out(role, text)
    if user is None:
        raise NoSample("no user block comes before it, and LlamaFactory's alpaca format needs one")
    return {"instruction": user, "input": "", "system": system, "history": history}


def _written_out(role: str, text: str) -> str:
    return f"{BLOCK_END}\n{BLOCK_START}{role}\n{text}"


def generated(turn: dict, target: str, served_as: str, given: str) -> str:
    """What the model writes of a target behind the generation prompt, which holds `given`. Raises NoSample."""
    if served_as == "no-thinking":
        if turn["answer"] is None:
            raise NoSample("the chat template shows its answer otherwise without reasoning")
        return target[turn["answer"] :]
    if not target.startswith(given):
        raise NoSample("its target does not begin as the generation prompt does, so the model cannot write it")
    return target.removeprefix(given)


def _output(text: str, served_as: str) -> str:
    """The same text, where LlamaFactory trains it as it is; raises NoSample where it does not."""
    if served_as == "no-thinking" and ("<think>" in text or "</think>" in text or text.startswith("\n")):
        raise NoSample("its answer holds a think tag or opens with a newline, which LlamaFactory removes")
    return text


def training_settings(served_as: str, given: str, all_think: bool, merge_turns: bool) -> list[str]:
    """What to override in qwen3_full_sft.yaml, so that LlamaFactory trains on the samples as they are.

    given: see step 1. all_think: every target of step 1 opens with a think block.
    """
    settings = []
    if served_as == "no-thinking" and all_think:
        settings.append("enable_thinking=false")
    elif served_as != "no-thinking" and given:  # LlamaFactory then reads the generation prompt from the model
        settings.append("template=null")
    elif served_as == "template" or not all_think:
        settings.append("template=qwen3_nothink")
    if merge_turns:
        settings.append("mask_history=false")
    return settings
