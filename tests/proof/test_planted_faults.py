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
from served_tokens.samples import alpaca, select

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
IN_BLOCKS = [
    user("Where is parcel C?"),
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "look for C"},
            {"type": "tool_use", "id": "t1", "name": "find", "input": {"zip": "C45"}},
        ],
    },
    user([{"type": "tool_result", "tool_use_id": "t1", "content": "C lies in Oslo"}]),
    assistant([{"type": "thinking", "thinking": "found C"}, {"type": "text", "text": "In Oslo."}]),
]
ROWS = [{"messages": PLAIN, "tools": TOOLS}, {"messages": IN_BLOCKS, "tools": TOOLS}]
HISTORIES = {"drop": ([], []), "template": (["--history-thinking", "template"], ["template=qwen3_nothink"])}


def plant(fault: tuple, monkeypatch) -> None:
    """A fault: (module, name of a function in it, change of what that returns, in place or returned)."""
    module, name, change = fault
    function = getattr(module, name)

    @functools.wraps(function)
    def faulty(*args, **options):
        result = copy.deepcopy(function(*args, **options))
        changed = change(result)
        return result if changed is None else changed

    monkeypatch.setattr(module, name, faulty)


def swap(dicts: list[dict], key: str) -> None:
    if len(dicts) > 1:
        dicts[0][key], dicts[1][key] = dicts[1][key], dicts[0][key]


def of_messages(change, key: str = "role", value: str | None = None):
    """A change of the list of a row's messages that have this key (with this value)."""

    def of_row(given) -> None:
        change([message for message in given.messages if key in message and value in (None, message[key])])

    return of_row


def of_content(change):
    return lambda message: {**message, "content": change(message["content"])}


def of_arguments(change):
    return lambda one: {**one, "function": {**one["function"], "arguments": change(one["function"]["arguments"])}}


def of_reasoning(change):
    return lambda its: {key: change(its[key]) if key == "reasoning_content" else its[key] for key in its}


def emptied(messages: list[dict]) -> None:
    for message in messages:
        message["content"] = ""


def of_one_call(messages: list[dict]) -> None:
    for message in messages:
        message["tool_calls"] = message["tool_calls"][:1]


def without_system(given) -> None:
    given.messages = [message for message in given.messages if message["role"] != "system"]


def train_all(given) -> None:
    given.not_trained = {}


def leave_out_the_next(given) -> None:
    turns = [k for k, message in enumerate(given.messages) if message["role"] == "assistant"]
    given.not_trained = {turns[turns.index(turn) + 1]: why for turn, why in given.not_trained.items()}


def without_a_tool(given) -> None:
    given.tools = given.tools[:-1]


def forget_an_edit(result) -> None:
    for mode in ("drop", "template"):
        result[1][mode] = result[1][mode][:-1]


def edit_too_late(result) -> None:
    _, served = result
    for edits in (served["drop"], served["template"]):
        if edits:
            edits[0]["turn"] = served["turns"][-1]["turn"]
            edits.sort(key=lambda edit: edit["turn"])


def of_column(name: str, change):
    """A change of a column of each sample."""

    def of_result(result) -> None:
        for sample in result[0]:
            sample[name] = change(sample[name])

    return of_result


def escape_a_character(result) -> None:
    for row in made_samples(result):
        row["output"] = row["output"].replace("å", "\\u00e5")


def exchange_turns(result) -> None:
    samples = made_samples(result)
    for row, turns_of_another in zip(samples, [row["turns"] for row in reversed(samples)]):
        row["turns"] = turns_of_another


def made_samples(result) -> list[dict]:
    return [row for _, row in result[1] if "output" in row]


def shift_the_mask(result):
    input_ids, labels = result
    start = next(k for k, label in enumerate(labels) if label >= 0)
    return input_ids, [*labels[: start - 1], input_ids[start - 1], *labels[start:]]


MESSAGE, CALL, ROW = ((reading, name) for name in ("_served_message", "_served_call", "in_one_shape"))
TOOL = (servers, "_shown")
RENDERED, SAMPLES, WRITTEN = (step1, "apply_chat_template"), (select, "to_samples"), (step2, "samples_of_row")
FAULTS = {
    # in the reading
    "every content stripped": (*MESSAGE, of_content(str.strip)),
    "last line of a text lost": (*MESSAGE, of_content(lambda text: text.rpartition("\n")[0] or text)),
    "accents lost": (*MESSAGE, of_content(lambda text: text.replace("å", "a"))),
    "outputs as user messages": (*MESSAGE, lambda its: {**its, "role": its["role"].replace("tool", "user")}),
    "reasoning stripped": (*MESSAGE, of_reasoning(str.strip)),
    "reasoning lost": (*MESSAGE, of_reasoning(lambda text: "")),
    "arguments sorted": (*CALL, of_arguments(lambda its: dict(sorted(its.items())))),
    "numbers of arguments as texts": (
        *CALL,
        of_arguments(lambda its: {key: str(its[key]) if isinstance(its[key], int) else its[key] for key in its}),
    ),
    "an argument lost": (*CALL, of_arguments(lambda its: dict([*its.items()][:-1]))),
    "keys of tools in another order": (*TOOL, lambda its: dict(reversed(its.items()))),
    "descriptions of tools cut": (
        *TOOL,
        lambda its: {**its, "description": its["description"].partition("\n")[0]},
    ),
    "two tool outputs swapped": (*ROW, of_messages(lambda outputs: swap(outputs, "content"), "role", "tool")),
    "a tool lost": (*ROW, without_a_tool),
    "system message lost": (*ROW, without_system),
    "the second call of a turn lost": (*ROW, of_messages(of_one_call, "tool_calls")),
    "thoughts of two turns swapped": (
        *ROW,
        of_messages(lambda turns: swap(turns, "reasoning_content"), "reasoning_content"),
    ),
    "outputs of blocks lost": (*ROW, of_messages(emptied, "tool_call_id")),
    "turns that are switched off trained": (*ROW, train_all),
    "the turn after one that is switched off left out": (*ROW, leave_out_the_next),
    # in the rendering
    "a forgotten edit": (*RENDERED, forget_an_edit),
    "an edit of one turn too late": (*RENDERED, edit_too_late),
    "newlines of blocks cut": (turns, "split_blocks", lambda its: [(role, text.rstrip("\n")) for role, text in its]),
    # in the columns
    "a pair of the history lost": (*SAMPLES, of_column("history", lambda pairs: pairs[1:])),
    "targets stripped": (*SAMPLES, of_column("output", str.strip)),
    "targets of two turns swapped": (*SAMPLES, lambda result: swap(result[0], "output")),
    "the first character of the prompt lost": (*SAMPLES, of_column("instruction", lambda text: text[1:])),
    "role marks of what is written out lost": (alpaca, "_written_out", lambda text: text.rpartition("\n")[2]),
    # in the writing
    "a sample written twice": (*WRITTEN, lambda result: (result[0], [result[1][0], *result[1]])),
    "a sample lost": (*WRITTEN, lambda result: (result[0], result[1][1:])),
    "an escaped character": (*WRITTEN, escape_a_character),
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
