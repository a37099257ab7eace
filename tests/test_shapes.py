"""Rows in the shapes that public data has: each is read right, or set aside with a reason; none is silently another."""

import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, assistant, call, read_jsonl, tool, user, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from served_tokens.rows.message_shapes import CONTINUED, SWITCHED_OFF
from served_tokens.rows.shapes import IN_PROMPT, holds_conversation

from served_tokens.files.read import Place, read_rows
from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, read_chat_template
from served_tokens.rows import notes as unusual
from served_tokens.rows.trajectory import EMPTY, NO_TOOLS, UNCLOSED, Reading, read_trajectory
from served_tokens.samples.select import HELD_OUT, THINKING_OFF, TOO_LONG
from step1_apply_tool_template import plain_row

CASES = Path(__file__).parent / "cases"
TEMPLATE = read_chat_template(str(QWEN3))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": SCHEMA},
}
OSLO = call("get_weather", {"city": "Oslo"}, id="c1")
BARE_OSLO = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
QUERY = user("weather in Oslo?")
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


def case(name: str) -> list[dict]:
    [path] = CASES.glob(f"{name}-*.jsonl")
    return read_jsonl(path)


def read(row: dict, **options):
    return read_trajectory(row, Reading(**options))


def reason(row: dict, **options) -> str:
    with pytest.raises(TrajectoryError) as error:
        read(row, **options)
    return str(error.value)


def turn(**keys) -> dict:
    """A row of one turn with these keys."""
    return {"messages": [user("q"), {"role": "assistant", "content": "a", **keys}], "tools": TOOLS}


def row(**columns) -> dict:
    return {"messages": [user("q"), assistant("a", "r")], "tools": TOOLS, **columns}


def of_call(**keys) -> dict:
    return turn(tool_calls=[{"type": "function", **keys}])


def not_read(kind: str, key: str, what: str, field: str | None = None) -> str:
    way = f"read it by --read-as {key}={field}, or " if field else ""
    return (
        f"a {kind} has the key {key}, which looks like {what} and is not read: {way}leave it out by --ignore-key {key}"
    )


def shapes(row: dict, **options) -> dict:
    return {name: number for name, number in read(row, **options).shapes.items() if number}


def unread(row: dict, **options) -> list:
    return [(kind, key) for kind, key, _ in read(row, **options).unread]


def notes(row: dict) -> dict:
    """What step 1 would name at its end of a row that is kept."""
    counts = unusual.counted(read(row))
    return {note: counts[note] for note in unusual.NOTES if counts[note]}


# ---------------------------------------------------------------- the case files

LOOKED_UP = [QUERY, assistant("", "I should call the tool.", [OSLO]), {**tool("3 C"), "tool_call_id": "c1"}]
THOUGHT = [*LOOKED_UP, assistant("3 degrees.", "Now answer.")]
SECRET = [QUERY, assistant("3 degrees.", "SECRET REASONING. ")]
SIMPLE = [user("hi"), assistant("hello")]
BAD = [user("hi"), assistant("BAD ANSWER"), user("again"), assistant("good answer")]
BOTH_HOT = [call("get_weather", {"city": "Oslo"}, id="c1"), call("get_weather", {"city": "Rome"}, id="c2")]
AFTER_ARROW = {"city": "Oslo", "query": None, "limit": None}


def flat_call(**more) -> list[dict]:
    return [user("hi"), assistant("", None, [{**more, **BARE_OSLO}]), tool("3"), assistant("3")]


def with_reasoning(*between, last="r") -> list[dict]:
    return [*between, assistant("3", last)]


READ = {  # (case, row): (messages, names of the tools, {turn that is left out: why})
    ("01", 0): (
        [{"role": "system", "content": "Be brief."}, QUERY, assistant("", None, [BARE_OSLO])],
        ["get_weather"],
        {},
    ),
    ("02", 0): ([{"role": "system", "content": "Be brief."}, *BAD], ["get_weather"], {2: SWITCHED_OFF}),
    ("02", 1): (BAD, [], {1: SWITCHED_OFF}),
    ("02", 2): (BAD, [], {1: SWITCHED_OFF}),
    ("03", 0): (THOUGHT, ["get_weather"], {}),
    ("03", 1): (THOUGHT, ["get_weather"], {}),
    ("04", 0): (SECRET, ["get_weather"], {}),
    ("04", 1): (SECRET, ["get_weather"], {}),
    ("05", 0): (
        [QUERY, assistant("", "call", [OSLO]), LOOKED_UP[2], assistant("3 degrees.", "answer")],
        ["get_weather"],
        {},
    ),
    ("07", 0): ([QUERY, assistant("<think>\nLet me see, the weather is")], ["get_weather"], {1: UNCLOSED}),
    ("12", 0): (SIMPLE, [], {}),
    **{("13", index): ([QUERY, assistant("3", "r")], ["get_weather"], {}) for index in range(4)},
    ("14", 5): ([{"role": "system", "content": "x"}, QUERY, tool("3"), assistant("3")], ["get_weather"], {}),
    ("15", 0): (
        [
            {"role": "system", "content": "Be brief."},
            user("weather?"),
            assistant("Looking.", "call it", [call("get_weather", {"city": "Oslo"}, id="t1")]),
            {**tool("3 C"), "tool_call_id": "t1"},
            assistant("3 degrees."),
        ],
        ["get_weather"],
        {},
    ),
    ("15b", 0): (
        [{"role": "system", "content": "ANSWER IN FRENCH."}, user("weather?"), assistant("3 degres.")],
        [],
        {},
    ),
    ("16", 0): ([QUERY, assistant("3")], ["get_weather"], {}),
    ("19", 2): ([QUERY, assistant("3")], ["get_weather"], {}),
    ("22", 0): ([user("hi"), assistant("partial answer, to be continu")], [], {1: CONTINUED}),
    ("22", 1): (
        [user("hi"), assistant("", "only thinking, cut by max_tokens")],
        [],
        {1: "their finish_reason is length, so they were cut off"},
    ),
    **{("22", index): ([user("hi"), assistant("")], [], {1: EMPTY}) for index in (2, 3, 4)},
    ("25", 0): (
        with_reasoning({"role": "system", "content": "s"}, user("hi"), assistant("", "r", [OSLO]), tool("3")),
        ["get_weather"],
        {},
    ),
    ("26", 0): (flat_call(id="1", type="tool_call"), ["get_weather"], {}),
    ("26", 1): (flat_call(id="1"), ["get_weather"], {}),
    ("26", 2): (flat_call(), ["get_weather"], {}),
    ("27", 0): (
        [
            user("go"),
            assistant("", "r", [call("weather", AFTER_ARROW, id="c1")]),
            {**tool("ok"), "tool_call_id": "c1"},
            assistant("done", "r"),
        ],
        ["weather", "search"],
        {},
    ),
    ("27", 1): (
        [
            user("go"),
            assistant("", "r", [call("search", {"city": None, "query": "x", "limit": "3"}, id="c1")]),
            {**tool("ok"), "tool_call_id": "c1"},
            assistant("done", "r"),
        ],
        ["weather", "search"],
        {},
    ),
    ("30", 0): ([user("2+2?"), assistant("The answer is 4.", "2+2 equals 4.")], [], {}),
    ("30", 1): (
        [
            QUERY,
            assistant("", "r", BOTH_HOT),
            {**tool("3"), "tool_call_id": "c1"},
            {**tool("20"), "tool_call_id": "c2"},
            user("and now?"),
            assistant("3 and 20", "rr"),
        ],
        ["get_weather"],
        {},
    ),
    ("30", 2): (with_reasoning(QUERY, assistant("", "r", [OSLO]), tool("3"), last="q"), ["get_weather"], {}),
    ("30", 3): ([QUERY, assistant("3", "r")], ["get_weather"], {}),
    ("31", 0): (with_reasoning(QUERY, assistant("", "r", [OSLO]), tool("3")), ["get_weather"], {}),
    ("31", 1): (
        with_reasoning(QUERY, assistant("", "r", [{"function": {"name": "get_weather", "arguments": {}}}]), tool("3")),
        ["get_weather"],
        {},
    ),
    ("11", 0): (
        with_reasoning(
            QUERY,
            assistant("", "r", [{"type": "function", "function": {"name": "get_weather", "arguments": AFTER_ARROW}}]),
            tool("3"),
        ),
        ["get_weather"],
        {},
    ),
    ("09", 0): (
        [
            {
                "role": "system",
                "content": "You are a function calling AI model. <tools> "
                + json.dumps([WEATHER])
                + " </tools> For each function call return a json object within <tool_call></tool_call> tags.",
            },
            QUERY,
            assistant("<tool_call>\n{'arguments': {'city': 'Oslo'}, 'name': 'get_weather'}\n</tool_call>"),
            tool('<tool_response>\n{"temp": 3}\n</tool_response>'),
            assistant("3 degrees."),
        ],
        ["get_weather"],
        {},
    ),
}
CUT_JSON = (
    "message 1: tool call arguments are not valid JSON (Unterminated string starting at: line 1 column 10 (char 9))"
)
UNKNOWN_ROLE = "message {}: unknown role {!r}; known are system, user, assistant, tool"
REFUSED = {
    ("03", 2): not_read("message", "thought", "reasoning", "reasoning_content"),
    ("03", 3): not_read("message", "reasoning_text", "reasoning", "reasoning_content"),
    ("05", 1): not_read("row", "available_tools", "tools", "tools"),
    ("05", 2): not_read("row", "function", "tools", "tools"),
    ("05", 3): not_read("row", "tool", "tools", "tools"),
    ("06", 0): "message 3: a user message has tool_calls: they are of a simulated user, and none of the model's",
    ("08", 0): "message 1: has a call of get_weather both as text and in tool_calls",
    **{
        ("14", index): UNKNOWN_ROLE.format(1, role)
        for index, role in enumerate(("tool_call", "tool-call", "function_call", "model", "gpt", None, "ai"))
        if role
    },
    ("17", 0): f"the trajectory {NO_TOOLS}",
    ("18", 0): "the row has no column messages; it has custom_id, body, response; read one of them by --read-as "
    "KEY=messages",
    ("19", 0): "column tools is not a list but a string",
    ("19", 1): "message 1: tool_calls is not a list but a string",
    ("19", 3): "tool 0 is not an object but a string",
    ("19", 4): "column tools is not a list but an object",
    ("19", 5): "column messages is not a list but an object",
    ("20", 0): "message 1: content has a part of type tool-call, which nobody reads; leave it out of the row",
    ("20", 1): "message 1: content has a part of type refusal, which nobody reads; leave it out of the row",
    ("24", 0): UNKNOWN_ROLE.format(0, "User"),
    ("24", 1): UNKNOWN_ROLE.format(0, "user "),
    ("26", 3): CUT_JSON,
}


@pytest.mark.parametrize("name, index", READ, ids=lambda value: str(value))
def test_case_is_read_as_these_messages_and_turns(name, index):
    messages, tools, left_out = READ[name, index]
    trajectory = read(case(name)[index])
    assert trajectory.messages == messages
    assert [tool["function"]["name"] for tool in trajectory.tools or []] == tools
    assert trajectory.not_trained == left_out


@pytest.mark.parametrize("name, index", REFUSED, ids=lambda value: str(value))
def test_case_is_set_aside_with_a_reason_and_the_way_out(name, index):
    assert reason(case(name)[index]) == REFUSED[name, index]


def test_every_row_of_every_case_file_is_tested_and_those_of_00_are_among_the_others():
    files = {path.name.split("-")[0]: read_jsonl(path) for path in CASES.glob("*.jsonl")}
    together = files.pop("00")
    assert {(name, index) for name, rows in files.items() for index in range(len(rows))} == {*READ, *REFUSED}
    others = [row for rows in files.values() for row in rows]
    assert len(together) == 17 and all(row in others for row in together)


@pytest.mark.parametrize("name", ["01", "03", "04", "05", "15", "16", "25", "26"])
def test_tools_of_a_case_are_wrapped_as_the_openai_api_has_them(name):
    description = "d" if name == "15" else "Weather of a city"
    schema = {"type": "object"} if name == "15" else SCHEMA
    function = {"name": "get_weather", "description": description, "parameters": schema}
    assert read(case(name)[0]).tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    "name, met",
    [
        ("01", {"OpenAI messages": 1, "flat tools": 1, "function_call": 1}),
        ("03", {"OpenAI messages": 1, "reasoning under thinking": 2}),
        ("04", {"OpenAI messages": 1, "content part reasoning": 1}),
        (
            "15",
            {
                "OpenAI messages": 1,
                "Anthropic tools": 1,
                "content part thinking": 1,
                "content part tool_use": 1,
                "content part tool_result": 1,
                "system column": 1,
            },
        ),
        ("16", {"prompt and completion": 1}),
        ("25", {"OpenAI messages": 1, "tools in the system message": 1}),
        ("26", {"OpenAI messages": 1, "calls with args": 1, "flat calls": 1}),
        ("30", {"OpenAI messages": 1}),
    ],
)
def test_shapes_that_are_met_are_counted(name, met):
    assert shapes(case(name)[0]) == met


def test_sharegpt_without_tools_is_read_where_its_system_text_is_said_to_hold_them():
    trajectory = read(case("17")[0], allow_calls_without_tools=True)
    assert trajectory.messages == [
        {"role": "system", "content": "s"},
        user("hi"),
        assistant("", None, [{"function": {"name": "f", "arguments": {}}}]),
        tool("3"),
        assistant("3"),
    ]
    assert trajectory.tools is None and trajectory.not_trained == {}


def test_case_09_names_that_tools_and_calls_are_in_the_text():
    assert notes(case("09")[0]) == {unusual.CALL_AS_TEXT: 1, unusual.TOOLS_TWICE: 1, unusual.NO_CALL: 1}


@pytest.mark.parametrize("name, index", [("11", 0), ("27", 0), ("27", 1)])
def test_nulls_of_arrow_are_counted_with_their_likely_cause(name, index):
    assert notes(case(name)[index]) == {unusual.NULL_ARGUMENTS: 1, unusual.NULL_SCHEMAS: 1}
    assert "as Arrow fills in" in unusual.NULL_ARGUMENTS and "as Arrow fills in" in unusual.NULL_SCHEMAS
    with pytest.raises(TrajectoryError, match="tool calls "):
        plain_row(case(name)[index], Place("x", 0), TEMPLATE, Reading(validate_tools=True))


@pytest.mark.parametrize("schema", [{"type": ["string", "null"]}, {"type": "string", "nullable": True}, {}])
def test_null_that_the_schema_allows_is_not_counted(schema):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}]
    assert notes({**of_call(function={"name": "f", "arguments": {"x": None}}), "tools": tools}) == {}


# ---------------------------------------------------------------- one place in several shapes

ROUND = [user("q"), assistant("", None, [call("f", {"x": 1})]), tool("3"), assistant("a", "r")]
PLAIN_ROUND = [user("q"), assistant("", None, [{"function": {"name": "f", "arguments": {"x": 1}}}]), *ROUND[2:]]


@pytest.mark.parametrize(
    "conversations",
    [
        [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "<think>r</think>a"},
        ],
        [
            {"from": "user", "value": "q"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}]'},
            {"from": "tool", "value": "3"},
            {"from": "assistant", "value": "a", "reasoning_content": "r"},
        ],
        [
            {"role": "user", "content": "q"},
            {"from": "function_call", "value": {"name": "f", "arguments": {"x": 1}}},
            {"from": "tool", "value": "3"},
            {"from": "gpt", "role": "assistant", "value": "a", "content": "a", "thinking": "r"},
        ],
    ],
)
def test_sharegpt_conversations_are_read_as_messages(conversations):
    tools = json.dumps([TOOLS[0]["function"]])
    trajectory = read({"conversations": conversations, "tools": tools})
    assert (trajectory.messages, trajectory.tools) == (PLAIN_ROUND, TOOLS)


def test_reasoning_before_a_sharegpt_call_is_the_reasoning_of_that_turn():
    value = "<think>\nr\n</think>\n\n" + '{"name": "f", "arguments": {}}'
    conversations = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
    messages = read({"conversations": conversations, "tools": TOOLS}).messages
    assert messages == [user("q"), assistant("", "r", [{"function": {"name": "f", "arguments": {}}}])]


def test_only_turns_of_a_completion_are_trained():
    prompt = [{"role": "system", "content": "s"}, user("q"), assistant("old"), user("q2")]
    trajectory = read({"prompt": prompt, "completion": [assistant("a"), user("q3"), assistant("b")]})
    assert trajectory.messages == [*prompt, assistant("a"), user("q3"), assistant("b")]
    assert trajectory.not_trained == {2: IN_PROMPT}
    columns = {"prompt": json.dumps(prompt), "completion": [assistant("a")], "system": "s"}
    assert read(columns).not_trained == {2: IN_PROMPT}
    assert read({**columns, "prompt": prompt[1:]}).not_trained == {2: IN_PROMPT}  # the column moves it by one


def test_anthropic_content_is_read_in_the_order_in_which_the_model_writes_it():
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}
    text, thought = {"type": "text", "text": "a"}, {"type": "thinking", "thinking": "r", "signature": "s"}
    assert read(turn(content=[thought, text, call])).messages[1] == assistant(
        "a", "r", [{"id": "t", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    )
    for parts, kind in (([text, thought], "thinking"), ([call, text], "text")):
        assert f"message 1: a part of type {kind} comes after others" in reason(turn(content=parts))
    outputs = [{"type": "tool_result", "tool_use_id": "t", "content": [text]}, {"type": "tool_result", "content": "3"}]
    messages = [user("q"), assistant(None, None, [OSLO]), user([*outputs, text]), assistant("b")]
    assert read({"messages": messages, "tools": TOOLS}).messages[2:] == [
        {**tool("a"), "tool_call_id": "t"},
        tool("3"),
        user("a"),
        assistant("b"),
    ]
    late = [user("q"), user([text, *outputs]), assistant("b")]
    assert reason({"messages": late}) == "message 1: a part of type tool_result comes after text"


@pytest.mark.parametrize(
    "part, why",
    [
        (
            {"type": "redacted_thinking", "data": "x"},
            "content has a part of type redacted_thinking, which nobody reads",
        ),
        ({"type": "thinking", "thinking": "", "signature": "s"}, "a part of type thinking has no text but signature"),
        ({"type": "reasoning", "summary": [{"text": "x"}]}, "a part of type reasoning has no text but summary"),
        ({"type": "thinking", "xq7": "secret"}, "a part of type thinking has no text but xq7"),
        ({"type": "thinking", "thinking": ["x"]}, "reasoning is not a string but a list"),
        ({"type": "thinking", "thinking": "x", "text": "y"}, "the reasoning stands in both thinking and text"),
        ({"type": "tool_use", "name": "f", "xq7": {"x": 1}}, "a tool call has no arguments but xq7"),
        ({"type": "tool_use", "name": "f", "input": {}, "args": {"x": 1}, "arguments": {"x": 2}}, "stands in both"),
        ({"type": "output_text", "text": "a"}, "content has a part of type output_text, which nobody reads"),
        ({"text": "secret", "thought": True}, "content is not text but a list"),
        ({"functionCall": {"name": "f", "args": {}}}, "content is not text but a list"),
        ({"toolUse": {"name": "f", "input": {}}}, "content is not text but a list"),
        ({"type": "image_url"}, "content is not text but a list with a part of type image_url"),
    ],
)
def test_part_that_cannot_be_read_whole_sets_the_row_aside(part, why):
    assert why in reason(turn(content=[part]))


@pytest.mark.parametrize(
    "one, why",
    [
        (turn(reasoning_content="x", thinking="y"), "the reasoning stands in both reasoning_content and thinking"),
        (
            turn(content=[{"type": "thinking", "text": "x"}], reasoning="y"),
            "the reasoning stands in both reasoning and",
        ),
        (row(functions=[{"name": "g"}]), "tools stands in both tools and functions, and they differ"),
        (
            of_call(function={"name": "f", "arguments": {"x": 1}, "args": {"x": 2}}),
            "a call's arguments stands in both arguments and args, and they differ",
        ),
        (
            of_call(function={"name": "f", "arguments": {"x": 1}}, arguments={"x": 2}),
            "arguments of a call stands in both",
        ),
        (
            turn(tool_calls=[OSLO], function_call={"name": "f", "arguments": "{}"}),
            "a call stands in both tool_calls and",
        ),
        (
            {"system": "y", "messages": [{"role": "system", "content": "x"}, user("q"), assistant("a")]},
            "the system prompt stands in both column system and the first message, and they differ",
        ),
        (row(conversations=[{"from": "human", "value": "q"}]), "has messages beside conversations; ignore one by"),
        (row(completion=[assistant("b")]), "has messages beside completion; ignore one by --ignore-key"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "content": "b"}]},
            "the text stands in both value and content, and they differ",
        ),
        (
            {"conversations": [{"from": "human", "role": "system", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "the role stands in both from and role, and they differ",
        ),
        (row(enable_thinking=True, chat_template_kwargs={"enable_thinking": False}), "enable_thinking stands in both"),
    ],
)
def test_two_readings_that_disagree_set_the_row_aside(one, why):
    assert why in reason(one)


@pytest.mark.parametrize(
    "one, plain",
    [
        (turn(reasoning_content="x", thinking="x", reasoning="x"), turn(reasoning_content="x")),
        (turn(reasoning_content="x", thinking="", reasoning_details=None), turn(reasoning_content="x")),
        (turn(reasoning_details=[{"type": "reasoning.text", "text": "x"}, {"text": "y"}]), turn(reasoning="xy")),
        (turn(reasoning="x", reasoning_details=[{"type": "reasoning.encrypted"}]), turn(reasoning="x")),
        (row(functions=[TOOLS[0]["function"]]), row()),
        (row(functions=None, system="", conversations=[], completion=None), row()),
        (
            of_call(function={"name": "f", "arguments": '{"x":1}', "args": {"x": 1}}),
            of_call(function={"name": "f", "arguments": {"x": 1}}),
        ),
        (of_call(function={"name": "f"}, arguments={"x": 1}), of_call(function={"name": "f", "arguments": {"x": 1}})),
    ],
)
def test_two_readings_that_agree_are_one(one, plain):
    assert read(one)[:2] == read(plain)[:2]


def test_column_system_that_the_messages_have_too_is_not_said_twice():
    messages = [{"role": "system", "content": "x"}, user("q"), assistant("a")]
    assert read({"system": "x ", "messages": messages}).messages == messages


def test_calls_without_tools_are_kept_only_by_the_option():
    one = {**of_call(function={"name": "f", "arguments": {}}), "tools": []}
    assert reason(one) == (
        "the trajectory calls tools and offers none, so it was served with others; add them to the row, or keep it by "
        "--allow-calls-without-tools where the system text holds them"
    )
    kept = read(one, allow_calls_without_tools=True)
    assert kept.tools is None and kept.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


# ---------------------------------------------------------------- loss switches and how an answer ended


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
@pytest.mark.parametrize("value, why", [(0, SWITCHED_OFF), (False, SWITCHED_OFF), (0.0, SWITCHED_OFF), (1, None)])
def test_loss_switch_leaves_its_turn_out(key, value, why):
    trajectory = read(turn(**{key: value}))
    assert trajectory.not_trained == ({1: why} if why else {})
    assert trajectory.messages == [user("q"), assistant("a")]


@pytest.mark.parametrize("value", [0.5, 2, -1, "false", "0", "no", [0], float("nan")])
@pytest.mark.parametrize("key", ["weight", "loss", "train"])
def test_loss_switch_that_is_neither_on_nor_off_sets_the_row_aside(key, value):
    assert reason(turn(**{key: value})) == (
        f"message 1: {key} is {value!r}; a turn is trained (1 or true) or it is not (0 or false)"
    )


def test_loss_switches_of_a_turn_that_disagree_set_the_row_aside():
    assert reason(turn(weight=1, train=False)) == (
        "message 1: weight and train differ about whether the turn is trained"
    )
    assert read(turn(weight=0, train=False, loss=None)).not_trained == {1: SWITCHED_OFF}


def test_loss_switch_of_another_message_than_a_turn_changes_nothing():
    for value in (0, False, 1, True):
        one = {"messages": [{**user("q"), "weight": value}, assistant("a")]}
        assert read(one).messages == [user("q"), assistant("a")] and read(one).not_trained == {}
    assert reason({"messages": [{**user("q"), "weight": 0.5}, assistant("a")]}) == not_read(
        "message", "weight", "a loss switch"
    )


@pytest.mark.parametrize("ended", ["length", "LENGTH", "max_tokens", "content_filter", "error", "abort", "refusal"])
def test_turn_that_was_cut_off_is_left_out_and_stays_as_context(ended):
    why = f"their finish_reason is {ended.lower()}, so they were cut off"
    one = {"messages": [user("q"), {**assistant("a"), "finish_reason": ended}, user("q2"), assistant("b")]}
    assert read(one).not_trained == {1: why}
    assert read(one).messages == [user("q"), assistant("a"), user("q2"), assistant("b")]
    assert read(turn(stop_reason=ended)).not_trained == {1: why}
    assert read(row(finish_reason=ended)).not_trained == {1: why}


@pytest.mark.parametrize("ended", ["stop", "STOP", "tool_calls", "end_turn", "stop_sequence", "", None])
def test_turn_that_ended_by_itself_is_trained(ended):
    assert read(turn(finish_reason=ended)).not_trained == {} == read(row(stop_reason=ended)).not_trained
    assert unread(turn(finish_reason=ended)) == []


def test_end_of_an_answer_that_nobody_knows_sets_the_row_aside():
    assert reason(turn(finish_reason="foo")) == (
        "message 1: finish_reason is 'foo', which says neither that the answer is whole nor that it was cut off; leave "
        "it out by --ignore-key finish_reason"
    )
    assert read(turn(finish_reason="foo"), ignore_keys=("finish_reason",)).not_trained == {}


@pytest.mark.parametrize("key", ["prefix", "partial"])
def test_prefix_that_the_model_was_asked_to_go_on_from_is_left_out(key):
    assert read(turn(**{key: True})).not_trained == {1: CONTINUED}
    assert read(turn(**{key: False})).not_trained == {}


@pytest.mark.parametrize(
    "keys, why",
    [
        ({"content": " <think>\nso"}, UNCLOSED),
        ({"content": "<think>\nso", "tool_calls": [OSLO]}, UNCLOSED),
        ({"content": "<think>so</think>"}, EMPTY),
        ({"content": "  \n"}, EMPTY),
        ({"content": None, "reasoning_content": "r"}, EMPTY),
        ({"content": "", "tool_calls": [OSLO]}, None),
        ({"content": "a <think> in between"}, None),
        ({"content": "<think> is a tag", "reasoning_content": "r"}, None),
    ],
)
def test_turn_that_is_no_whole_answer_is_left_out(keys, why):
    assert read(turn(**keys)).not_trained == ({1: why} if why else {})


# ---------------------------------------------------------------- keys that nobody reads


@pytest.mark.parametrize(
    "one, kind, key, what, field",
    [
        *(
            (turn(**{key: "x"}), "message", key, "reasoning", "reasoning_content")
            for key in (
                *("reasoningContent", "ReasoningContent", "THINKING", "thought", "thoughts", "cot", "CoT", "my_cot"),
                *("analysis", "rationale", "scratchpad", "inner_monologue", "reflection", "chainOfThought", "reason"),
                *("raw_reasoning", "rawreasoning"),
            )
        ),
        (turn(thinking_blocks=[{"thinking": "r"}]), "message", "thinking_blocks", "reasoning", "reasoning_content"),
        *(
            (turn(**{key: [{"name": "f"}]}), "message", key, "tools", "tool_calls")
            for key in ("toolCalls", "toolcalls", "tool_call", "function", "invalid_tool_calls", "api_calls", "tools")
        ),
        *(
            (turn(**{key: [{"function": {"name": "f"}}]}), "message", key, "tools", "tool_calls")
            for key in ("xq7", "calls")
        ),
        (turn(actions=[{"name": "f", "args": {}}]), "message", "actions", "tools", "tool_calls"),
        (row(toolList=["f"]), "row", "toolList", "tools", "tools"),
        (row(available_tools=json.dumps(TOOLS)), "row", "available_tools", "tools", "tools"),
        (row(api_list={"f": {}}), "row", "api_list", "tools", "tools"),
        (row(system_prompt="s"), "row", "system_prompt", "a system prompt", "system"),
        (row(systemMessage="s"), "row", "systemMessage", "a system prompt", "system"),
        *(
            (turn(**{key: value}), "message", key, "a loss switch", "weight")
            for key in ("trainable", "lossMask", "loss_weight", "do_train", "is_supervised", "label")
            for value in (False, 0, 0.5)
        ),
        *(
            (turn(**{key: value}), "message", key, "a loss switch", None)  # read as a weight it would say the opposite
            for key in ("mask", "masked", "exclude_from_loss", "ignore_loss", "noLoss", "unsupervised")
            for value in (False, 1)
        ),
        (row(loss_mask=[0, 1]), "row", "loss_mask", "a loss switch", None),
        (row(thinking={"type": "disabled"}), "row", "thinking", "reasoning", None),
        (row(reasoning={"effort": "none"}), "row", "reasoning", "reasoning", None),
        (row(reasoning={"content": "r"}), "row", "reasoning", "reasoning", None),
        (row(train=False), "row", "train", "a loss switch", None),
        (row(reasoning="on"), "row", "reasoning", "reasoning", None),
        (
            of_call(function={"name": "f", "arguments": {"x": 1}, "kwargs": {"y": 1}}),
            "tool call",
            "kwargs",
            "arguments",
            "arguments",
        ),
        (
            turn(content=[{"type": "text", "text": "a", "reasoning": "x"}]),
            "content part",
            "reasoning",
            "reasoning",
            None,
        ),
    ],
)
def test_key_that_looks_like_what_must_not_be_lost_sets_the_row_aside(one, kind, key, what, field):
    assert reason(one) == not_read(kind, key, what, field)
    assert unread(one, ignore_keys=(key,)) == []


@pytest.mark.parametrize(
    "one, kind, key, known",
    [
        (turn(Content="x"), "message", "Content", "content"),
        (turn(Prefix=True), "message", "Prefix", "prefix"),
        (turn(finishReason="length"), "message", "finishReason", "finish_reason"),
        (row(stopReason="max_tokens"), "row", "stopReason", "stop_reason"),
        (row(enableThinking=False), "row", "enableThinking", "enable_thinking"),
        (row(chatTemplateKwargs={"enable_thinking": False}), "row", "chatTemplateKwargs", "chat_template_kwargs"),
    ],
)
def test_key_that_is_read_but_spelled_otherwise_sets_the_row_aside(one, kind, key, known):
    assert reason(one) == (
        f"a {kind} has the key {key}, which is not read, as {known} is: rename it, or leave it out by "
        f"--ignore-key {key}"
    )


def test_harmless_look_alikes_are_kept_and_named():
    keys = {
        "tool_count": 3,
        "constraints": ["x"],
        "timestamp": "2024",
        "cost": 0.1,
        "label": "good",
        "reasoning_tokens": 5,
        "scotland": "x",
        "cottage": "x",
        "attachments": [{"name": "a.txt"}],
    }
    assert unread(turn(**keys, thinking=True, finish_reason="stop")) == [
        ("message", key) for key in (*keys, "thinking")
    ]
    assert unread(row(**keys, thinking=True, id=7, task_info={"tools": 1})) == [
        ("row", key) for key in (*keys, "thinking", "id")
    ]
    assert unread(turn(name="n", tool_call_id="c", timestamp=None, cost="", tags=[])) == []
    assert unread(of_call(function={"name": "f", "arguments": {"x": 1}}, index=0)) == []


@pytest.mark.parametrize("role", ["system", "tool", "user", "assistant"])
def test_key_of_a_text_part_is_named_in_every_message(role):
    part = {"type": "text", "text": "x", "mime": "text/plain"}
    messages = [{"role": role, "content": [part]}, user("q"), assistant("a")]
    assert unread({"messages": messages}) == [("content part", "mime")]


def test_tool_whose_function_is_null_is_no_error_to_a_template():
    one = row(tools=[{"type": "function", "function": None}])
    assert "null" in plain_row(one, Place("x", 0), TEMPLATE, Reading(server_style="template"))[1][0]["content"]


def test_settings_of_a_request_that_asks_to_think_are_kept_and_named():
    keys = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "reasoning": {"effort": "high", "summary": None},
        "reasoning_effort": "high",
        "termination_reason": "agent_stop",
    }
    assert unread(row(**keys)) == [("row", key) for key in keys]


def test_keys_that_nobody_reads_are_named_with_the_number_of_rows():
    counts = unusual.counted(read({"messages": [{**user("q"), "cost": 1}, {**assistant("a"), "cost": 1, "at": "x"}]}))
    counts += unusual.counted(read({**turn(at="x"), "id": 1}))
    assert unusual.unread_keys(counts) == [
        "1 rows have columns that nobody reads: id (1)",
        "2 rows have message keys that nobody reads: at (2), cost (1)",
    ]


@pytest.mark.parametrize(
    "one",
    [
        {"function": {"name": "f", "xq7": {"x": 1}}},
        {"function": {"name": "f", "xq7": '{"x": 1}'}},
        {"function": {"name": "f"}, "xq7": {"x": 1}},
        {"name": "f", "xq7": {"x": 1}},
        {"name": "f", "arguments": {}, "xq7": {"x": 1}},
        {"function": {"name": "f", "arguments": None}, "xq7": {"x": 1}},
    ],
)
def test_call_whose_arguments_may_stand_under_another_key_sets_the_row_aside(one):
    assert reason(turn(tool_calls=[one])) == (
        "message 1: a tool call has no arguments but xq7; read it by --read-as xq7=arguments, or leave it out by "
        "--ignore-key xq7"
    )
    [read_call] = read(turn(tool_calls=[one]), read_as=(("xq7", "arguments"),)).messages[1]["tool_calls"]
    assert read_call["function"] == {"name": "f", "arguments": {"x": 1}}
    [read_call] = read(turn(tool_calls=[one]), ignore_keys=("xq7",)).messages[1]["tool_calls"]
    assert read_call["function"] == {"name": "f", "arguments": {}}


def test_call_without_arguments_is_kept_beside_harmless_keys():
    assert "no arguments but xq7" in reason(turn(tool_calls=[{"name": "f", "arguments": "{ }", "xq7": '{"x": 1}'}]))
    for one in ({"name": "f", "arguments": "{}", "status": "done"}, {"name": "f", "id": "c", "index": 0, "ms": 3}):
        assert read(turn(tool_calls=[one])).messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("key, value", [("parts", [{"text": "q"}]), ("xq7", "q")])
def test_message_whose_content_may_stand_under_another_key_sets_the_row_aside(key, value):
    for message in ({"role": "user", key: value}, {"role": "assistant", key: value}):
        assert reason({"messages": [user("q"), message, assistant("a")]}) == (
            f"message 1: a message has no content but {key}; read it by --read-as {key}=content, or leave it out by "
            f"--ignore-key {key}"
        )
    for message in ({"role": "assistant", "id": "m", "timestamp": "2024"}, {"role": "assistant", "refusal": "no"}):
        assert read({"messages": [user("q"), message]}).not_trained == {1: EMPTY}


@pytest.mark.parametrize(
    "messages, why",
    [
        (
            [{"type": "human", "content": "q"}, {"type": "ai", "content": "a"}],
            "message 0: has no role but the type human",
        ),
        ([user("q"), {"type": "function_call", "name": "f"}], "message 1: has no role but the type function_call"),
        ([user("q"), {"role": "ai", "tool_calls": [OSLO]}], "message 1: unknown role 'ai'"),
        (
            [user("q"), {"role": "assistant", "content": "a", "tool_calls": [{"custom": {"name": "f"}}]}],
            "no function name",
        ),
        ([user("q"), assistant([{"type": "output_text", "text": "a"}])], "a part of type output_text"),
    ],
)
def test_messages_of_other_libraries_are_set_aside_with_a_reason(messages, why):
    assert why in reason({"messages": messages, "tools": TOOLS})


# ---------------------------------------------------------------- keys under other names

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "You are."},
            user("question"),
            {**assistant("Let me look.", "a thought", [{**OSLO, "index": 0}]), "weight": 0, "finish_reason": "stop"},
            {**tool("output"), "tool_call_id": "c1", "name": "get_weather"},
            {"role": "assistant", "content": [{"type": "text", "text": "an answer"}], "prefix": True},
            user("again"),
            {"role": "assistant", "content": "whole", "reasoning_details": [{"text": "deep"}], "train": True},
        ],
        "tools": [WEATHER],
        "enable_thinking": True,
        "task_info": {"task_id": 1},
    },
    {
        "system": "You are.",
        "conversations": [
            {"from": "human", "value": "question"},
            {
                "from": "function_call",
                "value": '<think>deep</think>{"name": "get_weather", "arguments": {"city": "O"}}',
            },
            {"from": "observation", "value": "output"},
            {"from": "gpt", "value": "an answer", "loss": False},
        ],
        "tools": json.dumps([WEATHER]),
    },
    {
        "system": "You are.",
        "messages": [
            user("question"),
            assistant(
                [
                    {"type": "thinking", "thinking": "deep", "signature": "s"},
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Oslo"}},
                ]
            ),
            user([{"type": "tool_result", "tool_use_id": "t", "content": "output"}, {"type": "text", "text": "so?"}]),
            {**assistant("an answer"), "stop_reason": "max_tokens"},
        ],
        "tools": [WEATHER],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "prompt": [user("question"), assistant("old")],
        "completion": [{"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "O"}'}}],
        "functions": [WEATHER["function"]],
    },
]
ARGUMENT_KEYS = ("arguments", "input")  # of calls: what stands under another name must never be lost
OTHER_NAMES = {
    "messages": ["conversations", "dialogue", "message"],
    "tools": ["functions", "tool_list", "apis"],
    "reasoning_content": ["reasoning", "thinking", "thought", "cot"],
    "arguments": ["args", "input", "parameters", "params", "kwargs"],
    "weight": ["loss", "train", "loss_mask"],
    "value": ["content", "text"],
    "from": ["role", "speaker"],
    "content": ["text", "value", "parts"],
    "tool_calls": ["calls", "function_call", "actions"],
}


def objects_of(value, *, below: str = "") -> list[dict]:
    """The row, its messages, their parts and calls: all objects but what tools and arguments hold."""
    if isinstance(value, list):
        return [found for item in value for found in objects_of(item, below=below)]
    if not isinstance(value, dict) or below in ("tools", "functions", "task_info", *ARGUMENT_KEYS):
        return []
    return [value, *(found for key, item in value.items() for found in objects_of(item, below=key))]


def camel(key: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), key)


def read_to(row: dict) -> tuple:
    trajectory = read(row)
    return trajectory.messages, trajectory.tools, trajectory.not_trained, trajectory.thinking


@given(data=st.data(), index=st.integers(0, len(ROWS) - 1), times=st.integers(1, 3))
def test_row_with_renamed_keys_is_the_same_or_set_aside_or_the_key_is_named(data, index, times):
    row, renamed = copy.deepcopy(ROWS[index]), {}
    for _ in range(times):
        where = data.draw(st.sampled_from(objects_of(row)))
        key = data.draw(st.sampled_from(list(where)))
        names = [camel(key), key.upper(), key.title(), key + "s", "my_" + key, "_" + key, *OTHER_NAMES.get(key, [])]
        name = data.draw(st.sampled_from([*names, "xq7"]))
        if name not in where:
            kept = {name if its == key else its: value for its, value in where.items()}
            where.clear()
            where.update(kept)
            renamed[name] = renamed.pop(key, key)
    try:
        now = read_to(row)
    except TrajectoryError as error:
        assert str(error)
        return
    named = {key for _, key in unread(row)}
    assert now == read_to(ROWS[index]) or named & {*renamed}
    calls_of = [[one.get("tool_calls") for one in messages] for messages in (now[0], read_to(ROWS[index])[0])]
    lost = {name for name, key in renamed.items() if key in ARGUMENT_KEYS}
    assert not lost & named or calls_of[0] == calls_of[1]


# ---------------------------------------------------------------- through both scripts and the check


@pytest.fixture
def scripts(run, tmp_path):
    """scripts(rows, step 1's options, step 2's options) -> what both print, and why step 2 left turns out, counted."""

    def scripts(rows: list, reading: tuple = (), options: tuple = ()) -> tuple[str, str, dict]:
        write_jsonl(tmp_path / "rows.jsonl", rows)
        read = run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", *reading)
        made = run("step2_to_alpaca_mask_history.py", "plain.jsonl", "out.parquet", "--dataset-dir", ".", *options)
        listed = tmp_path / "out.parquet.left_out.jsonl"
        reasons = Counter(row["reason"] for row in read_jsonl(listed)) if listed.exists() else {}
        return read.stdout, made.stdout, dict(reasons)

    return scripts


def lines(output: str, *starts: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.strip().startswith(starts)]


def accounted_for(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if " in = " in line]


def test_all_that_is_kept_of_the_rows_that_failed_silently_is_exact(scripts, check, tmp_path):
    read, made, left_out = scripts(case("00"))
    assert accounted_for(read) == [
        "17 rows in = 13 rows out + 4 set aside: plain.jsonl",
        "21 turns in = 20 turns for samples + 1 left out",
    ]
    assert lines(read, "read as") == [
        "read as: OpenAI messages (13), flat tools (1), function_call (1), reasoning under thinking (2), reasoning "
        "under reasoning_details (2), content part reasoning (1), content part thinking (1), tools in the system "
        "message (1), calls with args (1), flat calls (3), calls with input (1), calls with parameters (1)"
    ]
    assert f"1 turns left out: {UNCLOSED}" in read and f"2 {unusual.NULL_ARGUMENTS}" in read
    assert "4 rows have the same messages and tools as another row" in read
    reasons = [(row["row"], row["reason"]) for row in read_jsonl(tmp_path / "plain.jsonl.rejects.jsonl")]
    assert reasons == [(3, REFUSED["03", 2]), (4, REFUSED["03", 3]), (11, CUT_JSON), (15, REFUSED["08", 0])]
    assert accounted_for(made) == [
        "13 rows in = 11 rows out as samples + 1 set aside + 1 of which all turns are left out",
        "20 turns in = 19 turns in samples + 1 left out",
    ]
    assert [row["reason"] for row in read_jsonl(tmp_path / "out.parquet.rejects.jsonl")] == [THINKING_OFF]
    assert left_out == {UNCLOSED: 1}
    output = check("out")
    assert "PASSED: 19 of 19 samples are exact" in output
    assert accounted_for(output) == [
        "17 rows in = 12 rows checked for samples + 5 set aside",
        "20 turns in = 19 turns in samples + 1 left out",
    ]
    assert f"1 left out: {UNCLOSED}" in output
    samples = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [sample["output"] for sample in samples if sample["trajectory"] in (0, 1, 5)] == [
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "<think>\nI should call the tool.\n</think>\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "<think>\nNow answer.\n</think>\n\n3 degrees.",
        "<think>\nSECRET REASONING. \n</think>\n\n3 degrees.",
    ]


def test_rows_that_a_validation_of_tools_sets_aside_are_counted_alike(scripts, check):
    read, made, _ = scripts(case("31"), ("--validate-tools",))
    assert accounted_for(read) == [
        "2 rows in = 1 rows out + 1 set aside: plain.jsonl",
        "2 turns in = 2 turns for samples + 0 left out",
    ]
    assert accounted_for(made) == [
        "1 rows in = 1 rows out as samples + 0 set aside",
        "2 turns in = 2 turns in samples + 0 left out",
    ]
    output = check("out")
    assert accounted_for(output) == [
        "2 rows in = 1 rows checked for samples + 1 set aside",
        "2 turns in = 2 turns in samples + 0 left out",
    ]
    assert "PASSED: 2 of 2 samples are exact" in output


def test_rows_that_switch_thinking_off_are_kept_only_without_thinking_and_counted_alike(scripts, check, run, tmp_path):
    rows = [*case("12"), {"messages": [QUERY, assistant("3", "r"), user("and?"), assistant("4", "r")]}]
    read, made, _ = scripts(rows)
    assert accounted_for(read)[1] == "3 turns in = 3 turns for samples + 0 left out"
    assert accounted_for(made) == [
        "2 rows in = 1 rows out as samples + 1 set aside",
        "2 turns in = 2 turns in samples + 0 left out",
    ]
    output = check("out")
    assert accounted_for(output) == [
        "2 rows in = 1 rows checked for samples + 1 set aside",
        "2 turns in = 2 turns in samples + 0 left out",
    ]
    _, made, _ = scripts(rows, (), ("--no-thinking",))
    output = check("out", "enable_thinking=false")
    assert accounted_for(made) == [
        "2 rows in = 2 rows out as samples + 0 set aside",
        "3 turns in = 3 turns in samples + 0 left out",
    ]
    assert accounted_for(output) == [
        "2 rows in = 2 rows checked for samples + 0 set aside",
        "3 turns in = 3 turns in samples + 0 left out",
    ]


def test_turns_that_are_switched_off_held_out_or_too_long_are_counted_alike(scripts, check, tiny_model):
    rows = [
        {"messages": [user(f"q{number}"), assistant("a", "r"), user("q " * 300), assistant("b", "s")], "id": number}
        for number in range(12)
    ]
    rows += [{"messages": [user("q"), {**assistant("a", "r"), "weight": 0}, user("q2"), assistant("b", "s")]}]
    options = ("--val-ratio", "0.4", "--cutoff-len", "300", "--tokenizer", tiny_model)
    read, made, left_out = scripts(rows, (), options)
    assert accounted_for(read)[1] == "26 turns in = 25 turns for samples + 1 left out"
    assert left_out[TOO_LONG] == 12 and left_out[SWITCHED_OFF] == 1 and 2 <= left_out[HELD_OUT] <= 9
    output = check("out", "cutoff_len=300")
    for why, number in left_out.items():
        assert re.search(rf"^ +{number} left out: {re.escape(why)}$", output, re.MULTILINE)
    trained, out = 26 - sum(left_out.values()), sum(left_out.values())
    assert accounted_for(output)[1] == f"26 turns in = {trained} turns in samples + {out} left out"
    assert f"PASSED: {trained} of {trained} samples are exact" in output
    assert accounted_for(made)[1] == f"26 turns in = {trained + left_out[HELD_OUT]} turns in samples + 13 left out"


def test_options_of_reading_reach_step_1_and_the_check(scripts, check, run, tmp_path):
    rows = [
        {
            "dialogue": [user("q"), {**assistant("a"), "thought": "r", "loss_scale": 0.5}],
            "api_list": TOOLS,
            "policy_system": "s",
        },
        {
            "dialogue": [user("q2"), {**assistant("b"), "thought": "s", "mask": 0, "tool_log": "x"}],
            "api_list": [],
        },
        {"dialogue": [user("q3"), {**assistant("", None, [OSLO]), "thought": "t"}]},
    ]
    renamed = (
        "dialogue=messages",
        "thought=reasoning_content",
        "api_list=tools",
        "policy_system=system",
        "mask=weight",
    )
    reading = [part for pair in renamed for part in ("--read-as", pair)]
    reading += ["--ignore-key", "loss_scale", "--ignore-key", "tool_log", "--allow-calls-without-tools"]
    read, _, left_out = scripts(rows, reading)
    assert accounted_for(read) == [
        "3 rows in = 3 rows out + 0 set aside: plain.jsonl",
        "3 turns in = 2 turns for samples + 1 left out",
    ]
    assert left_out == {SWITCHED_OFF: 1}
    samples = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [sample["output"].split("\n")[1] for sample in samples] == ["r", "t"]
    assert samples[0]["system"].startswith("s\n\n# Tools") and samples[1]["system"] == ""
    assert json.loads(samples[0]["reading"]) == {
        "server_style": "vllm",
        "echo": "none",
        "read_as": [pair.split("=") for pair in renamed],
        "ignore_keys": ["loss_scale", "tool_log"],
        "allow_calls_without_tools": True,
    }
    output = check("out")
    assert accounted_for(output) == [
        "3 rows in = 3 rows checked for samples + 0 set aside",
        "3 turns in = 2 turns in samples + 1 left out",
    ]
    assert "PASSED: 2 of 2 samples are exact" in output


def test_rows_of_every_shape_are_exact_and_counted_alike(scripts, check, tmp_path):
    rows = [row for row in ROWS if "chat_template_kwargs" not in row]
    rows += [{**row, "chat_template_kwargs": None} for row in ROWS if "chat_template_kwargs" in row]
    read, made, left_out = scripts(rows)
    assert accounted_for(read) == [
        "4 rows in = 4 rows out + 0 set aside: plain.jsonl",
        "9 turns in = 4 turns for samples + 5 left out",
    ]
    assert left_out == {
        SWITCHED_OFF: 2,
        CONTINUED: 1,
        IN_PROMPT: 1,
        "their finish_reason is max_tokens, so they were cut off": 1,
    }
    output = check("out")
    assert accounted_for(made)[1] == accounted_for(output)[1] == "9 turns in = 4 turns in samples + 5 left out"
    assert (
        "PASSED: 4 of 4 samples are exact" in output
        and "4 rows in = 4 rows checked for samples + 0 set aside" in output
    )
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
    assert [sample["output"] for sample in pq.read_table(tmp_path / "out.parquet").to_pylist()] == [
        "<think>\ndeep\n</think>\n\nwhole",
        "<think>\ndeep\n</think>\n\n" + call % "O",
        "<think>\n\n</think>\n\n" + call % "O",
        "<think>\ndeep\n</think>\n\nLet me look.\n" + call % "Oslo",
    ]


def test_equal_rows_of_two_shapes_are_one_task_to_the_check(scripts, run_check, run, tmp_path, tiny_model):
    for name, one in (
        ("one", {"messages": [QUERY, assistant("3", "r")]}),
        (
            "two",
            {"conversations": [{"from": "human", "value": QUERY["content"]}, {"from": "gpt", "value": "r</think>3"}]},
        ),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", [one])
        run("step1_apply_tool_template.py", f"{name}.jsonl", f"{name}_plain.jsonl")
        run("step2_to_alpaca_mask_history.py", f"{name}_plain.jsonl", f"{name}.parquet", "--dataset-dir", ".")
    settings = ("dataset=one", "eval_dataset=two", "preprocessing_num_workers=1", f"model_name_or_path={tiny_model}")
    process = run_check(ROOT / "qwen3_full_sft.yaml", f"dataset_dir={tmp_path}", *settings, expect=1)
    assert "FAILED: 1 tasks are both trained on and evaluated" in process.stderr


@pytest.mark.parametrize(
    "column, value",
    [
        ("conversations", [{"from": "function_call", "value": {"name": "f", "input": {"x": 1}}}]),
        ("completion", [assistant("", None, [call("f", {"x": 1}), call("g", {"y": 1})])]),
        ("prompt", [assistant([{"type": "tool_use", "name": "f", "input": {"x": 1}}])]),
        ("messages", [{"role": "system", "content": "s", "tools": [WEATHER]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"name": "f", "args": {"x": 1}}]}]),
        ("functions", [{"name": "f", "parameters": {"x": 1}}]),
    ],
)
def test_parquet_that_mixed_calls_or_tools_is_refused_in_every_shape(tmp_path, column, value):
    pq.write_table(pa.Table.from_pylist([{column: value, "x": 1}]), tmp_path / "x.parquet")
    with pytest.raises(SystemExit, match=f"column {column} holds objects as Arrow structs"):
        list(read_rows(str(tmp_path / "x.parquet")))


def test_parquet_of_conversations_without_calls_is_read(tmp_path):
    conversations = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    pq.write_table(pa.Table.from_pylist([{"conversations": conversations}]), tmp_path / "x.parquet")
    [(_, one, error)] = read_rows(str(tmp_path / "x.parquet"))
    assert not error and read(one).messages == [user("q"), assistant("a")]


@pytest.mark.parametrize(
    "columns, is_one",
    [
        (["id", "messages"], True),
        (["conversations", "tools"], True),
        (["prompt", "completion"], True),
        (["prompt", "chosen"], False),
        (["instruction", "output"], False),
    ],
)
def test_file_of_a_hub_data_set_holds_trajectories_in_any_shape(columns, is_one):
    assert holds_conversation(columns) is is_one


@pytest.mark.parametrize("option", ["thought", "=content", "thought=", "thought=thinking", "a=b=content"])
def test_wrong_read_as_is_a_clear_error(run, option):
    process = run("step1_apply_tool_template.py", "x.jsonl", "--read-as", option, expect=2)
    assert (
        f"{option!r} is not KEY=FIELD with a FIELD of messages, tools, system, role, content, reasoning_content, "
        "tool_calls, weight, arguments" in process.stderr
    )


def test_key_that_is_read_as_a_field_which_says_something_else_sets_the_row_aside():
    options = {"read_as": (("thought", "reasoning_content"),)}
    assert reason(turn(thought="x", reasoning_content="y"), **options) == (
        "message 1: reasoning_content stands in both reasoning_content and thought, and they differ"
    )
    assert read(turn(thought="x", reasoning_content="x"), **options).messages[1] == assistant("a", "x")


def test_summary_of_all_case_files_names_what_was_met_and_left_out(run, tmp_path):
    shutil.copytree(CASES, tmp_path / "cases")
    output = run("step1_apply_tool_template.py", "cases", "plain.jsonl").stdout
    assert accounted_for(output) == [
        "81 rows in = 52 rows out + 29 set aside: plain.jsonl",
        "79 turns in = 69 turns for samples + 10 left out",
    ]
    for line in (
        f"2 turns left out: {UNCLOSED}",
        f"3 turns left out: {SWITCHED_OFF}",
        f"1 turns left out: {CONTINUED}",
        "1 turns left out: their finish_reason is length, so they were cut off",
        f"3 turns left out: {EMPTY}",
        "1 rows have message keys that nobody reads: refusal (1)",
        f"1 {unusual.CALL_AS_TEXT}",
        f"1 {unusual.TOOLS_TWICE}",
        f"5 {unusual.NULL_ARGUMENTS}",
        f"5 {unusual.NULL_SCHEMAS}",
        f"2 {unusual.NO_CALL}",
        "25 rows have the same messages and tools as another row",
    ):
        assert line in output.splitlines()
    assert "read as: OpenAI messages (51), flat tools (2), function_call (2), reasoning under thinking (4)" in output


def test_rows_without_any_reasoning_are_named_with_the_ways_out(scripts):
    rows = [{"messages": [QUERY, assistant(f"{number}")]} for number in range(4)] + [
        {"messages": [QUERY, assistant("1")]}
    ]
    read, made, _ = scripts(rows)
    assert unusual.NO_REASONING in read.splitlines() and unusual.NO_REASONING in made.splitlines()
    assert "--no-thinking" in unusual.NO_REASONING and "--require-reasoning" in unusual.NO_REASONING
    assert "1 rows have the same messages and tools as another row" in read.splitlines()
    read, made, _ = scripts([*rows, row()])
    assert unusual.NO_REASONING not in read + made
