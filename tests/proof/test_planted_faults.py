"""Faults planted in the reading, the rendering, the columns and the writing: the check FAILS for each, in both ways.

A fault stays planted while the check runs, so what the check shares with the steps is wrong on both sides.
"""

import copy
import functools
import json

import pytest
from conftest import assistant, call, tool, user

import step1_apply_tool_template as step1
import step2_to_alpaca_mask_history as step2
from served_tokens.prompts import turns
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


def around(module, name: str):
    """A fault that changes what a function returns: @around(module, "name") of change(result) -> result."""

    def decorate(change):
        def plant(monkeypatch) -> None:
            function = getattr(module, name)

            @functools.wraps(function)
            def faulty(*args, **options):
                return change(copy.deepcopy(function(*args, **options)))

            monkeypatch.setattr(module, name, faulty)

        plant.__name__ = change.__name__
        return plant

    return decorate


# ---------------------------------------------------------------- in the reading


@around(reading, "_served_message")
def strip_of_every_content(message):
    return {**message, "content": message["content"].strip()}


@around(reading, "_served_message")
def last_line_of_a_text_lost(message):
    return {**message, "content": message["content"].rpartition("\n")[0] or message["content"]}


@around(reading, "_served_message")
def accents_lost(message):
    return {**message, "content": message["content"].replace("å", "a")}


@around(reading, "_served_message")
def outputs_as_user_messages(message):
    return {**message, "role": "user"} if message["role"] == "tool" else message


@around(reading, "_served_message")
def reasoning_stripped(message):
    return {key: value.strip() if key == "reasoning_content" else value for key, value in message.items()}


@around(reading, "_served_message")
def reasoning_lost(message):
    return {key: value for key, value in message.items() if key != "reasoning_content"}


@around(reading, "_served_call")
def arguments_sorted(one):
    one["function"]["arguments"] = dict(sorted(one["function"]["arguments"].items()))
    return one


@around(reading, "_served_call")
def numbers_of_arguments_as_texts(one):
    its = one["function"]["arguments"]
    one["function"]["arguments"] = {key: str(value) if isinstance(value, int) else value for key, value in its.items()}
    return one


@around(reading, "_served_call")
def an_argument_lost(one):
    one["function"]["arguments"].popitem()
    return one


@around(reading, "served_tool")
def keys_of_tools_in_another_order(one):
    return {"type": one["type"], "function": dict(reversed(one["function"].items()))}


@around(reading, "served_tool")
def descriptions_of_tools_cut(one):
    return {**one, "function": {**one["function"], "description": one["function"]["description"].partition("\n")[0]}}


@around(reading, "in_one_shape")
def two_tool_outputs_swapped(given):
    first, second, *_ = [message for message in given.messages if message["role"] == "tool"] + [{}, {}]
    if second:
        first["content"], second["content"] = second["content"], first["content"]
    return given


@around(reading, "in_one_shape")
def a_tool_lost(given):
    given.tools = given.tools[:-1]
    return given


@around(reading, "in_one_shape")
def system_message_lost(given):
    if given.messages[0]["role"] == "system":
        del given.messages[0]
    return given


@around(reading, "in_one_shape")
def the_second_call_of_a_turn_lost(given):
    for message in given.messages:
        if "tool_calls" in message:
            message["tool_calls"] = message["tool_calls"][:1]
    return given


@around(reading, "in_one_shape")
def thoughts_of_two_turns_swapped(given):
    thinking = [message for message in given.messages if "reasoning_content" in message]
    first, second = thinking[0]["reasoning_content"], thinking[1]["reasoning_content"]
    thinking[0]["reasoning_content"], thinking[1]["reasoning_content"] = second, first
    return given


@around(reading, "in_one_shape")
def outputs_of_blocks_lost(given):
    for message in given.messages:
        if message.get("tool_call_id"):
            message["content"] = ""
    return given


@around(reading, "in_one_shape")
def turns_that_are_switched_off_trained(given):
    given.not_trained = {}
    return given


@around(reading, "in_one_shape")
def the_turn_after_one_that_is_switched_off_left_out(given):
    turns = [k for k, message in enumerate(given.messages) if message["role"] == "assistant"]
    given.not_trained = {turns[turns.index(turn) + 1]: why for turn, why in given.not_trained.items()}
    return given


def rows_parsed_otherwise(monkeypatch) -> None:
    from served_tokens.files import processes
    from served_tokens.proof import compare

    def parsed(raw, *_):
        return json.loads(raw.replace(b"  ", b" "))

    monkeypatch.setattr(processes, "parse_row", parsed)
    monkeypatch.setattr(compare, "parse_row", parsed)


# ---------------------------------------------------------------- in the rendering


@around(step1, "apply_chat_template")
def a_forgotten_edit(result):
    plain, served = result
    return plain, {**served, "drop": served["drop"][:-1], "template": served["template"][:-1]}


@around(step1, "apply_chat_template")
def an_edit_of_one_turn_too_late(result):
    plain, served = result
    for edits in (served["drop"], served["template"]):
        if edits:
            edits[0]["turn"] = served["turns"][-1]["turn"]
            edits.sort(key=lambda edit: edit["turn"])
    return plain, served


@around(turns, "split_blocks")
def newlines_of_blocks_cut(blocks):
    return [(role, text.rstrip("\n")) for role, text in blocks]


# ---------------------------------------------------------------- in the columns


@around(select, "to_samples")
def a_pair_of_the_history_lost(result):
    samples, reasons = result
    return [{**sample, "history": sample["history"][1:]} for sample in samples], reasons


@around(select, "to_samples")
def targets_stripped(result):
    samples, reasons = result
    return [{**sample, "output": sample["output"].strip()} for sample in samples], reasons


@around(select, "to_samples")
def targets_of_two_turns_swapped(result):
    samples, reasons = result
    samples[0]["output"], samples[1]["output"] = samples[1]["output"], samples[0]["output"]
    return samples, reasons


@around(select, "to_samples")
def the_first_character_of_the_prompt_lost(result):
    samples, reasons = result
    return [{**sample, "instruction": sample["instruction"][1:]} for sample in samples], reasons


@around(alpaca, "_written_out")
def role_marks_of_what_is_written_out_lost(text):
    return text.rpartition("\n")[2]


# ---------------------------------------------------------------- in the writing


@around(step2, "samples_of_row")
def a_sample_written_twice(result):
    counts, made = result
    return counts, [made[0], *made]


@around(step2, "samples_of_row")
def a_sample_lost(result):
    counts, made = result
    return counts, made[1:]


@around(step2, "samples_of_row")
def an_escaped_character(result):
    counts, made = result
    for _, row in made:
        if "output" in row:
            row["output"] = row["output"].replace("å", "\\u00e5")
    return counts, made


@around(step2, "samples_of_row")
def samples_under_the_wrong_turn(result):
    counts, made = result
    samples = [row for _, row in made if "output" in row]
    for row, turns_of_another in zip(samples, [row["turns"] for row in reversed(samples)]):
        row["turns"] = turns_of_another
    return counts, made


def a_shifted_mask(monkeypatch) -> None:
    from llamafactory.data.processor import SupervisedDatasetProcessor

    encode = SupervisedDatasetProcessor._encode_data_example

    def shifted(*args, **options):
        input_ids, labels = encode(*args, **options)
        start = next(k for k, label in enumerate(labels) if label >= 0)
        return input_ids, [*labels[: start - 1], input_ids[start - 1], *labels[start:]]

    monkeypatch.setattr(SupervisedDatasetProcessor, "_encode_data_example", shifted)


FAULTS = [
    *(strip_of_every_content, last_line_of_a_text_lost, accents_lost, outputs_as_user_messages, reasoning_stripped),
    *(reasoning_lost, arguments_sorted, numbers_of_arguments_as_texts, an_argument_lost),
    *(keys_of_tools_in_another_order, descriptions_of_tools_cut, two_tool_outputs_swapped, a_tool_lost),
    *(turns_that_are_switched_off_trained, the_turn_after_one_that_is_switched_off_left_out, rows_parsed_otherwise),
    *(system_message_lost, the_second_call_of_a_turn_lost, thoughts_of_two_turns_swapped, outputs_of_blocks_lost),
    *(a_forgotten_edit, an_edit_of_one_turn_too_late, newlines_of_blocks_cut, a_pair_of_the_history_lost),
    *(targets_stripped, targets_of_two_turns_swapped, the_first_character_of_the_prompt_lost),
    *(role_marks_of_what_is_written_out_lost, a_sample_written_twice, a_sample_lost, an_escaped_character),
    *(samples_under_the_wrong_turn, a_shifted_mask),
]


@pytest.mark.parametrize("history", HISTORIES)
def test_the_same_rows_pass_without_a_fault(history, checked):
    output = checked(ROWS, *HISTORIES[history]).stdout
    assert "PASSED: 7 of 7 samples are exact" in output
    assert "1 of 2 rows the check reads by its own rules too" in output


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_fails_the_check(plant, history, checked, monkeypatch):
    plant(monkeypatch)
    assert "FAILED" in checked(ROWS, *HISTORIES[history], expect=1).stderr
