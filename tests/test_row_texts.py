"""The check finds the texts of a row that are in no sample that should hold them, and takes nothing for lost."""

import copy
import json
from array import array

import pytest
from conftest import GOLDEN, ROOT, assistant, call, read_jsonl, tool, user
from hypothesis import assume, given
from hypothesis import strategies as st
from reading_rows import served_trajectory

from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.proof.findings import Findings
from served_tokens.proof.lost import Chain, common_length, forms, looking_for, unread_lines
from served_tokens.proof.row_texts import Text, Unit, row_texts
from served_tokens.proof.turn import served_turn

RENDER = load_chat_template(read_chat_template(str(QWEN3)))
CASES, SAMPLE = ROOT / "tests" / "cases", ROOT / "data" / "envscaler_sample.jsonl"
MODES = ("drop", "template", "no-thinking")
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}},
    },
}
CALLS = [call("get_weather", {"city": "Oslo", "day": {"name": "Monday"}})]
ROW = {
    "messages": [
        SYSTEM,
        user("How is the weather?"),
        assistant("Let me see.", "I should call get_weather.", CALLS),
        tool('{"sky": "clear"}'),
        assistant("It is clear.", "Now answer."),
        user([{"type": "text", "text": "Thanks, "}, {"type": "text", "text": "and tomorrow?"}]),
        assistant("Tomorrow too.", "No call is needed."),
    ],
    "tools": [WEATHER],
}


def learned(row: dict, served_as: str = "drop", as_read: dict | None = None, ignored=(), left_out=()) -> Findings:
    """What the check learns of a row with a sample of each turn.

    as_read: another row, which is what step 1 made of it.
    """
    found = Findings("x", True, "", array("q"), bytearray())
    messages, tools = served_trajectory(row if as_read is None else as_read, ())
    look = looking_for(found, row, messages, "x: trajectory 0", frozenset(ignored))
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn not in left_out:
            look([turn], served_as, [served_turn(messages, tools, turn, served_as, RENDER)])
    return found


def lost(row: dict, served_as: str = "drop", **options) -> list[str]:
    return learned(row, served_as, **options).lost


def changed(change) -> dict:
    """ROW after change(row)."""
    row = copy.deepcopy(ROW)
    change(row)
    return row


# ---------------------------------------------------------------- which texts there are


def test_texts_of_a_row_are_told_by_place_key_and_kind():
    texts = row_texts({**ROW, "tools": None, "id": 7})
    assert texts.turns[0] == Unit(
        "message 2",
        [
            Text(("content",), "Let me see.", "text"),
            Text(("reasoning_content",), "I should call get_weather.", "reasoning"),
            Text(("tool_calls", "0", "function", "name"), "get_weather", "call"),
            Text(("tool_calls", "0", "function", "arguments"), "city", "call"),
            Text(("tool_calls", "0", "function", "arguments", "city"), "Oslo", "call"),
            Text(("tool_calls", "0", "function", "arguments"), "day", "call"),
            Text(("tool_calls", "0", "function", "arguments", "day"), "name", "call"),
            Text(("tool_calls", "0", "function", "arguments", "day", "name"), "Monday", "call"),
        ],
    )
    assert [unit.place for unit in texts.others] == ["message 0", "message 1", "message 3", "message 5"]
    assert texts.before == [2, 3, 4] and texts.unread == {("columns", "id"): 1}


def test_text_is_read_apart_at_think_and_call_tags_and_in_json():
    content = '<think>\nhm hm\n</think>\n\nSo.\n<tool_call>\n{"name": "act", "arguments": {"x": "yes"}}\n</tool_call>'
    [unit] = row_texts({"messages": [assistant(content)]}).turns
    assert [text.text for text in unit.texts] == ["hm hm", "So.", '{"name": "act", "arguments": {"x": "yes"}}']
    assert [part.text for part in unit.texts[2].parts] == ["act", "yes"]


def test_columns_and_values_may_be_json_strings():
    texts = row_texts({"messages": json.dumps(ROW["messages"]), "tools": json.dumps(json.dumps(ROW["tools"]))})
    expected = row_texts(ROW)
    assert (texts.turns, texts.others, texts.shown_first) == (expected.turns, expected.others, expected.shown_first)


def test_other_shapes_have_turns_too():
    share_gpt = [
        {"from": "human", "value": "hello"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "observation", "value": "clear"},
        {"from": "gpt", "value": "It is clear."},
    ]
    texts = row_texts({"conversations": share_gpt, "system": "Be brief.", "tools": "[]"})
    assert len(texts.turns) == 2 and [part.text for part in texts.turns[0].texts[0].parts] == ["look", "sky"]
    assert texts.shown_first == [[Unit("column system", [Text(("system",), "Be brief.", "text")])], []]
    texts = row_texts({"prompt": [user("hello"), assistant("hi there")], "completion": [assistant("bye")]})
    assert [unit.texts[0].text for unit in texts.turns] == ["hi there", "bye"] and texts.before == [1, 1]


def test_tools_are_told_by_their_looks_in_any_column_and_in_a_message():
    for row in ({"my_column": [WEATHER]}, {"functions": [WEATHER["function"]]}, {"tools": {"get_weather": WEATHER}}):
        [[unit]] = row_texts({"messages": [], **row}).shown_first
        assert "Weather of a city" in [text.text for text in unit.texts]
    texts = row_texts({"messages": [{**SYSTEM, "tools": [WEATHER]}]})
    assert texts.shown_first[0][0].place == "message 0: tools: tool 0" and len(texts.others[0].texts) == 1


def test_text_may_be_shown_as_json_of_one_or_two_levels():
    assert forms("plain") == ["plain"]
    assert forms('a "b"') == ['a "b"', 'a \\"b\\"', 'a \\\\\\"b\\\\\\"']
    assert forms("é") == ["é", "\\u00e9", "\\\\u00e9"]


# ---------------------------------------------------------------- nothing is taken for lost


@pytest.mark.parametrize("served_as", MODES)
def test_nothing_is_lost_of_a_row_that_is_read_as_it_is(served_as):
    found = learned(ROW, served_as)
    assert found.lost == [] and found.counts["lost texts"] == 0 and not found.unread
    assert dict(+found.not_trained) == ({"reasoning, by --no-thinking": 3} if served_as == "no-thinking" else {})


def test_nothing_is_lost_of_the_golden_cases_and_of_the_cases_that_are_right():
    rows = [*GOLDEN, *read_jsonl(CASES / "30-fine.jsonl")]
    assert [lost(row, mode) for row in rows for mode in MODES[:2]] == [[]] * 2 * len(rows)


def test_one_text_under_two_keys_may_be_shown_once():
    message = {**assistant("Hi there.", "Greet them."), "reasoning": "Greet them."}
    details = [{"type": "reasoning.text", "text": "Greet "}, {"type": "reasoning.text", "text": "them."}]
    for more in ({}, {"reasoning_details": details}):
        assert lost({"messages": [user("hello"), {**message, **more}]}) == []


def test_messages_in_another_order_than_in_the_row_are_found():
    row = {"messages": [user("one more"), SYSTEM, user("two more"), assistant("hello", "hm hm")]}
    as_read = {"messages": [SYSTEM, user("two more"), user("one more"), assistant("hello", "hm hm")]}
    assert lost(row, as_read=as_read) == []


FLAT = {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "x": {"y": 1}}}
TOOL = {"type": "function", "function": FLAT}
SHAPES = {  # columns of a row, and the messages that they mean; both have the tool above
    "legacy": (
        {
            "messages": [
                user("weather?"),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "act", "arguments": '{"city": "Oslo"}'},
                },
                {"role": "function", "name": "act", "content": "clear"},
                assistant("It is clear."),
            ],
            "functions": [FLAT],
        },
        [
            user("weather?"),
            assistant("", None, [call("act", {"city": "Oslo"})]),
            tool("clear"),
            assistant("It is clear."),
        ],
    ),
    "Anthropic": (
        {
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                user("weather?"),
                assistant(
                    [
                        {"type": "thinking", "thinking": "call it", "signature": "c2lnbmF0dXJl"},
                        {"type": "text", "text": "Looking."},
                        {"type": "tool_use", "id": "t1", "name": "act", "input": {"city": "Oslo", "x": 3}},
                    ]
                ),
                user(
                    [
                        {"type": "text", "text": "Go on."},
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "clear"}]},
                    ]
                ),
                assistant([{"type": "text", "text": "It is "}, {"type": "text", "text": "clear."}]),
            ],
            "tools": [{"name": FLAT["name"], "description": FLAT["description"], "input_schema": FLAT["parameters"]}],
        },
        [
            SYSTEM,
            user("weather?"),
            assistant("Looking.", "call it", [call("act", {"city": "Oslo", "x": 3})]),
            tool("clear"),
            user("Go on."),
            assistant("It is clear."),
        ],
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": '{"name":"act","arguments":{"city":"Oslo","x":3}}'},
                {"from": "observation", "value": "clear"},
                {"from": "gpt", "value": "<think>so it is</think>It is clear."},
            ],
            "system": "Be brief.",
            "tools": json.dumps([FLAT]),
        },
        [
            SYSTEM,
            user("weather?"),
            assistant("", None, [call("act", {"city": "Oslo", "x": 3})]),
            tool("clear"),
            assistant("It is clear.", "so it is"),
        ],
    ),
    "TRL": (
        {
            "prompt": [user("hello"), assistant("hi there"), user("weather?")],
            "completion": [{**assistant("It is clear."), "thinking": "so it is"}],
            "tools": [TOOL],
        },
        [user("hello"), assistant("hi there"), user("weather?"), assistant("It is clear.", "so it is")],
    ),
    "calls of LangChain": (
        {
            "messages": [
                {"type": "human", "content": "weather?"},
                {
                    "type": "ai",
                    "content": "",
                    "tool_calls": [{"name": "act", "args": {"x": 3}, "id": "1", "type": "tool_call"}],
                },
                {"type": "tool", "content": "clear"},
                {
                    "type": "ai",
                    "content": "It is clear.",
                    "reasoning_details": [{"type": "reasoning.text", "text": "so it is"}],
                },
            ],
            "tools": [TOOL],
        },
        [
            user("weather?"),
            assistant("", None, [call("act", {"x": 3})]),
            tool("clear"),
            assistant("It is clear.", "so it is"),
        ],
    ),
}


@pytest.mark.parametrize("served_as", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_lost_of_other_shapes_that_are_read_right(shape, served_as):
    row, messages = SHAPES[shape]
    assert lost(row, served_as, as_read={"messages": messages, "tools": [TOOL]}) == []
    for place, message in enumerate(messages):  # and what is not read of them is
        less = [*messages[:place], {**message, "content": "", "reasoning_content": None, "tool_calls": None}]
        assert lost(row, served_as, as_read={"messages": [*less, *messages[place + 1 :]], "tools": [TOOL]})


# ---------------------------------------------------------------- what is lost is found

LOSSES = {  # what the reading does to the row, and what is said
    "reasoning": (lambda row: row["messages"][2].pop("reasoning_content"), "message 2: reasoning_content: 'I should"),
    "answer": (lambda row: row["messages"][4].update(content="Hm."), "message 4: content: 'It is clear.'"),
    "call": (lambda row: row["messages"][2].pop("tool_calls"), "tool_calls.0.function.name: 'get_weather'"),
    "argument": (lambda row: arguments_of(row).pop("day"), "tool_calls.0.function.arguments.day.name: 'Monday'"),
    "content part": (lambda row: row["messages"][5]["content"].pop(0), "content.0.text: 'Thanks,'"),
    "user message": (lambda row: row["messages"].pop(5), "message 5: content.0.text: 'Thanks,' is not in the served"),
    "tool output": (lambda row: row["messages"][3].update(content="x"), """message 3: content: '{"sky": "clear"}'"""),
    "system message": (
        lambda row: row["messages"].pop(0),
        "message 0: content: 'Be brief.' is not in the served",
    ),
    "tool": (lambda row: row.pop("tools"), "column tools: tool 0: description: 'Weather of a city'"),
    "description": (
        lambda row: row["tools"][0]["function"].pop("description"),
        "column tools: tool 0: description: 'Weather of a city' is not in the served prompt",
    ),
    "description in a schema": (
        lambda row: row["tools"][0]["function"]["parameters"]["properties"]["city"].pop("description"),
        "parameters.properties.city.description: 'Its name' is not in the served prompt",
    ),
}


def arguments_of(row: dict) -> dict:
    return row["messages"][2]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("served_as", MODES)
@pytest.mark.parametrize("what", LOSSES)
def test_what_the_reading_loses_is_found(what, served_as, monkeypatch):
    monkeypatch.setattr("served_tokens.proof.lost.LOSSES_KEPT", 100)
    change, said = LOSSES[what]
    assert any(said in text for text in lost(ROW, served_as, as_read=changed(change)))


def test_text_that_is_lost_where_another_place_holds_the_same_is_found():
    twice = {"messages": [user("yes, do it"), assistant("done", "fine"), user("yes, do it"), assistant("done", "fine")]}
    once = copy.deepcopy(twice)
    once["messages"][2]["content"] = ""
    assert len(lost(twice, as_read=once)) == 1
    calls = [call("act", {"on": "this"}), call("act", {"on": "this"})]
    row = {"messages": [user("go on"), assistant("", "I act on this.", calls)]}
    assert lost(row) == []
    for kept in ([], calls[:1]):
        as_read = {"messages": [user("go on"), assistant("", "I act on this.", kept)]}
        assert any("tool_calls.0.function.name: 'act'" in text for text in lost(row, as_read=as_read))


def test_arguments_of_short_names_and_numbers_are_looked_for_together():
    row = {"messages": [user("add"), assistant("", "I add.", [call("add", {"x": 3, "y": "b"})])]}
    assert lost(row) == []
    for arguments, said in (({"x": 3}, 'y: \'"y": "b"\''), ({"x": 4, "y": "b"}, "x: '\"x\": 3'")):
        [text] = lost(row, as_read={"messages": [user("add"), assistant("", "I add.", [call("add", arguments)])]})
        assert f"arguments.{said} is not in the target" in text


def test_reasoning_that_became_the_answer_is_lost():
    parts = [{"type": "thinking", "text": "A secret."}, {"type": "text", "text": "3 degrees."}]
    as_read = {"messages": [user("weather?"), assistant("A secret.3 degrees.")]}
    [said] = lost({"messages": [user("weather?"), assistant(parts)]}, as_read=as_read)
    assert "message 1: content.0.text: 'A secret.' is not in the target of its turn" in said


def test_encrypted_reasoning_beside_reasoning_that_can_be_read_is_not_lost():
    details = [{"type": "reasoning.text", "text": "because"}, {"type": "reasoning.encrypted", "data": "gAAAAB"}]
    row = {"messages": [user("query"), {**assistant("answer"), "reasoning": "because", "reasoning_details": details}]}
    assert lost(row) == []
    details[1]["type"] = "reasoning.summary"
    assert lost(row)


def test_loss_names_the_way_out():
    message = {**assistant("hello"), "inner_voice": "A long reasoning. " * 9}
    [said] = lost({"messages": [user("hi there"), message]})
    beginning = ("A long reasoning. " * 4)[:60]
    assert said == (
        f"x: trajectory 0: message 1: inner_voice: '{beginning}…' is not in the target of its turn; read reasoning by "
        "step 1 --read-as inner_voice=reasoning_content; leave other keys out by --ignore-key inner_voice"
    )
    assert lost({"messages": [user("hi there"), message]}, ignored=["inner_voice"]) == []


def test_text_that_only_one_prompt_lacks_is_found():
    units = [Unit("a", [Text((), "one", "text")]), Unit("b", [Text((), "two", "text")])]
    chain = Chain(units)
    assert chain.missing("one two", 2) == [] and chain.missing("one two three", 2) == []
    assert chain.missing("one tw", 2) == [("b", units[1].texts[0])]
    assert chain.missing("one tw", 2) == []  # told already
    assert Chain(units).missing("two one", 2) == []
    chain = Chain(units)
    assert chain.missing("two one", 2) == [] and chain.missing("one and one", 2) == [("b", units[1].texts[0])]
    assert Chain([units[0], units[0]]).missing("one", 2) == [("b" if False else "a", units[0].texts[0])]


def test_other_number_of_turns_is_a_loss():
    as_read = {"messages": ROW["messages"][:5], "tools": ROW["tools"]}
    [said] = lost(ROW, as_read=as_read)
    assert "has 3 turns by the roles of its messages, but 2 are read" in said


def test_texts_of_turns_without_a_sample_are_counted():
    found = learned({"messages": [user("hello"), assistant("hi there", "hm hm")]}, left_out=[1])
    assert found.not_trained == {
        "in turns without a sample": 2,
        "in other messages that no sample shows": 1,
    }
    found = learned({"messages": [*ROW["messages"], user("###STOP###")], "tools": ROW["tools"]})
    assert dict(+found.not_trained) == {"in other messages that no sample shows": 1}
    assert found.lost == []


def test_what_is_not_looked_for_is_named():
    row = changed(lambda row: row["messages"][2].update(timestamp="Monday", cost=0.1, id="x"))
    tools = [{**WEATHER, "function": {**WEATHER["function"], "returns": "the sky"}}]
    found = learned({**row, "tools": tools, "steps": 3, "id": None}, as_read=row)
    assert found.lost == [] and unread_lines(found) == [
        "columns steps (1)",
        "message keys cost (1), timestamp (1)",
        "tool keys returns (1)",
    ]


def test_common_length_is_that_of_the_longest_common_beginning():
    for one, other, length in (("", "a", 0), ("abc", "abd", 2), ("ab", "abcd", 2), ("same", "same", 4), ("x", "y", 0)):
        assert common_length(one, other) == common_length(other, one) == length


# ---------------------------------------------------------------- random rows

WORDS = st.sampled_from(
    ["ab", "a", "abab", "yes", '"', "\\", "\n", " ", "{", "}", "[1]", "é", "好的", "act", "<think>", "/"]
)
TEXTS = st.lists(WORDS, max_size=6).map("".join)
JSON_TEXTS = st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.lists(TEXTS, max_size=2)), max_size=3)
ARGUMENTS = st.recursive(
    st.one_of(TEXTS, st.booleans(), st.none(), JSON_TEXTS.map(json.dumps)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
OBJECTS = st.dictionaries(TEXTS, ARGUMENTS, max_size=3)
CONTENTS = st.one_of(TEXTS, st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3), st.none())
CALL = st.builds(call, st.sampled_from(["act", "ab", "look_up"]), st.one_of(OBJECTS, OBJECTS.map(json.dumps)))
REASONING = st.one_of(st.none(), TEXTS)
INLINE = st.tuples(TEXTS, TEXTS).map(lambda texts: f"<think>\n{texts[0]}\n</think>\n\n{texts[1]}")
TURNS = st.one_of(
    st.builds(assistant, CONTENTS, REASONING, st.lists(CALL, max_size=3)),
    st.builds(assistant, INLINE, st.none(), st.lists(CALL, max_size=2)),
    TEXTS.map(lambda text: {**assistant("ab", text), "reasoning": text}),
)
OTHERS = st.one_of(
    CONTENTS.map(user),
    st.one_of(TEXTS, OBJECTS, OBJECTS.map(json.dumps), st.lists(OBJECTS, max_size=2)).map(tool),
    TEXTS.map(lambda text: {"role": "system", "content": text}),
)
FUNCTION = st.fixed_dictionaries({"name": TEXTS, "description": TEXTS, "parameters": OBJECTS})
TOOLS = st.lists(FUNCTION.map(lambda function: {"type": "function", "function": function}), max_size=3)
ROWS = st.fixed_dictionaries(
    {
        "messages": st.tuples(OTHERS, TURNS, st.lists(st.one_of(OTHERS, TURNS), max_size=7)).map(
            lambda parts: [*parts[:2], *parts[2]]
        ),
        "tools": st.one_of(TOOLS, TOOLS.map(json.dumps)),
    }
)


@given(ROWS, st.sampled_from(MODES))
def test_nothing_is_taken_for_lost_of_random_rows(row, served_as):
    try:
        assert lost(row, served_as) == []
    except TrajectoryError:
        assume(False)


def places_of_texts(value, inside: bool = False) -> list[tuple]:
    """(object or list, key) of each text of a message or tools that is to be found."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in pairs:
        if isinstance(item, str) and (inside or key not in ("role", "type")):
            found.append((value, key))
        found += places_of_texts(item, inside or key in ("arguments", "parameters"))
    return found


@given(ROWS, st.sampled_from(MODES), st.data())
def test_planted_loss_in_random_rows_is_found(row, served_as, data):
    """A text that the row has and its reading has not, in any place."""
    row["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
    last = max(place for place, message in enumerate(row["messages"]) if message["role"] == "assistant")
    del row["messages"][last + 1 :]
    places = places_of_texts([row["messages"], row["tools"]])
    assume(places)
    where, key = data.draw(st.sampled_from(places))
    assume(where is not row["messages"] and not (key == "arguments" and where[key][:1] == "{"))
    as_read, where[key] = copy.deepcopy(row), "a text that is not read"
    try:
        found = learned(row, served_as, as_read=as_read)
    except TrajectoryError:
        assume(False)
    assert any("a text that is not read" in text for text in found.lost), found.lost
