"""Faults planted in the reading, the rendering, the columns and the writing: the check FAILS for each, in both ways.

A fault stays planted while the check runs, so what the check shares with the steps is wrong on both sides.
"""

import copy
import functools
import json

import pytest
from conftest import assistant, call, tool, user
from llamafactory.data.processor import SupervisedDatasetProcessor

import step1_apply_tool_template as step1
import step2_to_alpaca_mask_history as step2
from served_tokens.files import processes
from served_tokens.prompts import turns
from served_tokens.proof import compare
from served_tokens.rows import servers
from served_tokens.rows import trajectory as reading
from served_tokens.samples import select

SCHEMA = {"type": "object", "properties": {"zip": {"type": "string"}, "all": {"type": "boolean"}}}
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Find\na parcel.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "move", "description": "Move it.", "parameters": {}}},
]
LOOKUPS = [call("find", {"zip": "Å1", "all": 7}), call("find", {"zip": "B", "all": 8})]
PLAIN = [
    {"role": "system", "content": "Serve.\nBe brief."},
    user("Hello."),
    user(" Where are parcels A and B? "),
    assistant("Let me look. ", "two lookups\n", LOOKUPS),
    tool("A lies in Lund\n"),
    tool("B lies in Umeå"),
    assistant("In Lund and Umeå.\n", "tell both places"),
    user("Move A to Umeå"),
    assistant(None, "move it now", [call("move", {"to": "Umeå", "a": "A"})]),
    tool("moved"),
    assistant("Moved.", "say that it is done"),
    user("Twice?  No."),
    {**assistant("Yes.", "guess"), "weight": 0},
    user("Thanks."),
    assistant("You are welcome.", "end it"),
]
USE = {"type": "tool_use", "id": "t1", "name": "find", "input": {"zip": "C45"}}
IN_BLOCKS = [
    user("Where is parcel C?"),
    assistant([{"type": "thinking", "thinking": "look for C"}, USE]),
    user([{"type": "tool_result", "tool_use_id": "t1", "content": "C lies in Oslo"}]),
    assistant([{"type": "thinking", "thinking": "found C"}, {"type": "text", "text": "In Oslo."}]),
]
ROWS = [{"messages": PLAIN, "tools": TOOLS}, {"messages": IN_BLOCKS, "tools": TOOLS}]
HISTORIES = {"drop": ([], []), "template": (["--history-thinking", "template"], ["template=qwen3_nothink"])}


def plant(fault: tuple, monkeypatch) -> None:
    """A fault: (module, name of a function in it, change of what that returns, in place)."""
    module, name, change = fault
    function = getattr(module, name)

    @functools.wraps(function)
    def faulty(*args, **options):
        result = copy.deepcopy(function(*args, **options))
        change(result)
        return result

    monkeypatch.setattr(module, name, faulty)


def swap(dicts: list[dict], key: str) -> None:
    if len(dicts) > 1:
        dicts[0][key], dicts[1][key] = dicts[1][key], dicts[0][key]


def change_text(its: dict, key: str, change) -> None:
    if key in its:
        its[key] = change(its[key])


def reverse(its: dict) -> None:
    pairs = [*its.items()]
    its.clear()
    its.update(reversed(pairs))


def of_messages(key: str, change):
    """A change of the list of a row's messages that have this key."""
    return lambda given: change([message for message in given.messages if key in message])


def leave_out_the_next(given) -> None:
    turns = [k for k, message in enumerate(given.messages) if message["role"] == "assistant"]
    given.not_trained = {turns[turns.index(turn) + 1]: why for turn, why in given.not_trained.items()}


def edit_too_late(result) -> None:
    _, served = result
    for edits in (served["drop"], served["template"]):
        if edits:
            edits[0]["turn"] = served["turns"][-1]["turn"]
            edits.sort(key=lambda edit: edit["turn"])


def of_column(name: str, change):
    """A change of a column of each sample."""
    return lambda result: [change_text(sample, name, change) for sample in result[0]]


def exchange_turns(result) -> None:
    samples = [row for _, row in result[1] if "output" in row]
    for row, turns_of_another in zip(samples, [row["turns"] for row in reversed(samples)]):
        row["turns"] = turns_of_another


def shift_the_mask(result) -> None:
    input_ids, labels = result
    last = next(k for k, label in enumerate(labels) if label >= 0) - 1  # of the prompt
    labels[last] = input_ids[last]


def cut_newlines(blocks: list) -> None:
    blocks[:] = [(role, text.rstrip("\n")) for role, text in blocks]


MESSAGE, CALL, ROW = ((reading, name) for name in ("_served_message", "_served_call", "in_one_shape"))
FUNCTION = (servers, "_shown")
RENDERED, SAMPLES, WRITTEN = (step1, "apply_chat_template"), (select, "to_samples"), (step2, "samples_of_row")
FAULTS = {
    # in the reading
    "every content stripped": (*MESSAGE, lambda its: change_text(its, "content", str.strip)),
    "accents lost": (*MESSAGE, lambda its: change_text(its, "content", lambda text: text.replace("å", "a"))),
    "outputs as user messages": (*MESSAGE, lambda its: its.update(role=its["role"].replace("tool", "user"))),
    "reasoning stripped": (*MESSAGE, lambda its: change_text(its, "reasoning_content", str.strip)),
    "reasoning lost": (*MESSAGE, lambda its: its.pop("reasoning_content", None)),
    "arguments in another order": (*CALL, lambda its: reverse(its["function"]["arguments"])),
    "an argument lost": (*CALL, lambda its: its["function"]["arguments"].popitem()),
    "keys of tools in another order": (*FUNCTION, reverse),
    "descriptions of tools cut": (*FUNCTION, lambda its: change_text(its, "description", lambda it: it[:4])),
    "a tool lost": (*ROW, lambda given: given.tools.pop()),
    "the first message lost": (*ROW, lambda given: given.messages.pop(0)),
    "the last call of a turn lost": (*ROW, of_messages("tool_calls", lambda its: its[0]["tool_calls"].pop())),
    "two thoughts swapped": (*ROW, of_messages("reasoning_content", lambda its: swap(its, "reasoning_content"))),
    "outputs of blocks lost": (*ROW, of_messages("tool_call_id", lambda its: [one.update(content="") for one in its])),
    "turns that are switched off trained": (*ROW, lambda given: given.not_trained.clear()),
    "the turn after one that is switched off left out": (*ROW, leave_out_the_next),
    # in the rendering
    "a forgotten edit": (*RENDERED, lambda result: [result[1][mode] and result[1][mode].pop() for mode in HISTORIES]),
    "an edit of one turn too late": (*RENDERED, edit_too_late),
    "newlines of blocks cut": (turns, "split_blocks", cut_newlines),
    # in the columns
    "a pair of the history lost": (*SAMPLES, of_column("history", lambda pairs: pairs[1:])),
    "targets stripped": (*SAMPLES, of_column("output", str.strip)),
    "targets of two turns swapped": (*SAMPLES, lambda result: swap(result[0], "output")),
    "the first character of the prompt lost": (*SAMPLES, of_column("instruction", lambda text: text[1:])),
    # in the writing
    "a sample written twice": (*WRITTEN, lambda result: result[1].append(result[1][0])),
    "a sample lost": (*WRITTEN, lambda result: result[1].pop(0)),
    "samples under the wrong turn": (*WRITTEN, exchange_turns),
    "a shifted mask": (SupervisedDatasetProcessor, "_encode_data_example", shift_the_mask),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_the_same_rows_pass_without_a_fault(history, checked):
    output = checked(ROWS, *HISTORIES[history]).stdout
    assert "PASSED: 7 of 7 samples are exact" in output
    assert "1 of 2 rows the check reads by its own rules too" in output


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_check(fault, history, checked, monkeypatch):
    plant(FAULTS[fault], monkeypatch)
    assert "FAILED" in checked(ROWS, *HISTORIES[history], expect=1).stderr


@pytest.mark.parametrize("history", HISTORIES)
def test_rows_that_are_parsed_otherwise_fail_the_check(history, checked, monkeypatch):
    for module in (processes, compare):
        monkeypatch.setattr(module, "parse_row", lambda raw, *_: json.loads(raw.replace(b"  ", b" ")))
    assert "FAILED" in checked(ROWS, *HISTORIES[history], expect=1).stderr
