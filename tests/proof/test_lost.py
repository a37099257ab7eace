"""Texts that a row has and its samples have not: each planted loss is found, and nothing else is taken for one."""

import copy
import json

import pytest
from conftest import assistant, call, tool, user
from hypothesis import assume, given
from hypothesis import strategies as st
from reading_rows import served_trajectory

from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.proof.lost import Loss, lost_texts
from served_tokens.proof.turn import served_turn

RENDER = load_chat_template(read_chat_template(str(QWEN3)))
MODES = ("drop", "template", "no-thinking")
FLAT = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}},
}
OSLO, ROME = {"city": "Oslo", "day": {"name": "Monday"}}, {"city": "Rome"}
ROW = {  # as Anthropic has it, and below what is read of it
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        user("How is the weather?"),
        assistant(
            [
                {"type": "thinking", "thinking": "I should ask.", "signature": "c2lnbmF0dXJl"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": OSLO},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": ROME},
            ]
        ),
        user(
            [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "rainy"}]},
                {"type": "text", "text": "And the wind?"},
            ]
        ),
        assistant([{"type": "thinking", "thinking": "Now answer."}, {"type": "text", "text": "No wind."}]),
        user("Thanks for that."),
        assistant("You are welcome.", "Be polite."),
    ],
    "tools": [FLAT],
}
AS_READ = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        user("How is the weather?"),
        assistant("Let me see.", "I should ask.", [call("get_weather", OSLO), call("get_weather", ROME)]),
        tool("sunny"),
        tool("rainy"),
        user("And the wind?"),
        assistant("No wind.", "Now answer."),
        user("Thanks for that."),
        assistant("You are welcome.", "Be polite."),
    ],
    "tools": [{"type": "function", "function": FLAT}],
}


def lost(row: dict, served_as: str = "drop", as_read: dict | None = None, ignored=(), left_out=()) -> list[Loss] | None:
    """The texts of a row that are lost where this is what step 1 made of it; left_out: numbers of turns."""
    messages, tools = served_trajectory(row if as_read is None else as_read, ())
    turns, shown = [k for k, message in enumerate(messages) if message["role"] == "assistant"], {}
    for number, turn in enumerate(turns):
        if number not in left_out:
            prompt, target = served_turn(messages, tools, turn, served_as, RENDER)
            reasoning = messages[turn].get("reasoning_content", "")
            shown[number] = prompt, f"{target}\0{reasoning}"  # as the check hands it on
    return lost_texts(row, shown, len(turns), {}, ignored)


def swap(messages: list, one: int, other: int, key: str = "content") -> None:
    messages[one][key], messages[other][key] = messages[other][key], messages[one][key]


def arguments_of(messages: list) -> dict:
    return messages[2]["tool_calls"][0]["function"]["arguments"]


TARGET, PROMPT, FIRST = "the target of its turn", "the prompt of turn 1", "the first prompt"
M0, M1, M2 = ((f"message {number}", "content") for number in range(3))
TOOLS = ("column tools", "tools")
LOSSES = {  # what the reading does with messages and tools, and (place, key, text, where) of what is said first
    "outputs swapped": (lambda m, _: swap(m, 3, 4), (*M2, "rainy", PROMPT)),
    "part lost": (lambda m, _: m[5].update(content=""), (*M2, "And the wind?", PROMPT)),
    "call lost": (lambda m, _: m[2]["tool_calls"].pop(), (*M1, "Rome", TARGET)),
    "argument lost": (lambda m, _: arguments_of(m).pop("day"), (*M1, "day", TARGET)),
    "reasoning lost": (lambda m, _: m[2].pop("reasoning_content"), (*M1, "I should ask.", TARGET)),
    "thoughts swapped": (
        lambda m, _: swap(m, 6, 8, "reasoning_content"),
        ("message 3", "content", "Now answer.", TARGET),
    ),
    "user messages swapped": (lambda m, _: swap(m, 1, 7), (*M0, "How is the weather?", "the prompt of turn 0")),
    "system column lost": (lambda m, _: m.pop(0), ("column system", "system", "Be brief.", FIRST)),
    "tool lost": (lambda _, t: t.pop(), (*TOOLS, "get_weather", FIRST)),
    "description lost": (lambda _, t: t[0]["function"].pop("description"), (*TOOLS, "Weather of a city", FIRST)),
    "key of a schema lost": (
        lambda _, t: t[0]["function"]["parameters"]["properties"]["city"].pop("description"),
        (*TOOLS, "Its name", FIRST),
    ),
}


@pytest.mark.parametrize("served_as", MODES)
@pytest.mark.parametrize("what", LOSSES)
def test_what_the_reading_loses_is_found_at_its_place(what, served_as):
    change, said = LOSSES[what]
    as_read = copy.deepcopy(AS_READ)
    change(as_read["messages"], as_read["tools"])
    assert Loss(*said) in lost(ROW, served_as, as_read)


@pytest.mark.parametrize("served_as", MODES)
def test_nothing_is_lost_of_a_row_that_is_read_right(served_as):
    assert lost(ROW, served_as) == lost(ROW, served_as, AS_READ) == []


def test_another_number_of_turns_than_the_raw_row_has_is_told():
    assert lost(ROW, as_read={**AS_READ, "messages": AS_READ["messages"][:7]}) is None


def test_a_text_between_two_turns_is_not_found_elsewhere():
    twice = {"messages": [user("yes, do it"), assistant("done", "fine"), user("yes, do it"), assistant("done", "fine")]}
    once = copy.deepcopy(twice)
    once["messages"][2]["content"] = ""
    assert lost(twice, as_read=once) == [Loss("message 2", "content", "yes, do it", "the prompt of turn 1")]


def test_texts_of_turns_without_a_sample_are_not_looked_for_and_those_before_them_are():
    less = copy.deepcopy(AS_READ)
    less["messages"][2]["content"] = less["messages"][4]["content"] = ""
    assert lost(ROW, as_read=less, left_out=(0,)) == [Loss("message 2", "content", "rainy", "the prompt of turn 1")]


@pytest.mark.parametrize("served_as", MODES)
@pytest.mark.parametrize("between", [[user("and then?")], [{**user("and then?"), "id": "m_1"}]])
def test_turns_of_one_id_that_are_no_one_answer_are_told_apart_as_the_reading_does(between, served_as):
    one, two = ({**assistant(text), "id": "m_1"} for text in ("first answer", "second answer"))
    assert lost({"messages": [user("hello"), one, *between, two]}, served_as) == []


def test_a_call_and_a_schema_are_not_lost_where_a_template_writes_them_as_xml_and_their_texts_are():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    row = {
        "conversations": [
            {"from": "human", "value": "Where?"},
            {"from": "function_call", "value": '{"name": "find", "arguments": {"city": "Rome"}}'},
        ],
        "tools": [{"name": "find", "parameters": schema}],
    }
    prompt = "<function=find><parameter=city>string</parameter></function>\nWhere?\n<|im_start|>assistant\n"
    call = "<function=find>\n<parameter=city>\nRome\n</parameter>\n</function>"
    assert lost_texts(row, {0: (prompt, call)}, 1, {}, ()) == []
    lost = lost_texts(row, {0: (prompt.replace("city", ""), call.replace("Rome", "Bonn"))}, 1, {}, ())
    assert [(loss.place, loss.key) for loss in lost] == [("message 1", "value"), ("column tools", "tools")]


def test_a_key_that_the_user_ignores_is_not_looked_for():
    row = {"messages": [user("hello"), {**assistant("hi there"), "note": "a long note"}]}
    as_read = {"messages": [user("hello"), assistant("hi there")]}
    assert lost(row, as_read=as_read) == [Loss("message 1", "note", "a long note", "the target of its turn")]
    for key in ("note", "message.note"):
        assert lost(row, as_read=as_read, ignored=(key,)) == []


# ---------------------------------------------------------------- through both steps

CHAIN = [
    user([{"type": "text", "text": "where is it?"}]),
    assistant("I look.", "look it up", [call("act", {"at": "Oslo"})]),
    tool("it lies there"),
    assistant("It is there.", "tell them"),
    user("thank you"),
    assistant("Welcome.", "be kind"),
]
ROWS = [{"messages": CHAIN, "tools": [{"name": "act", "description": "Acts on it", "parameters": {"type": "object"}}]}]


@pytest.mark.parametrize(
    "columns, step1",
    [
        ({"messages": [], "conversations": CHAIN}, []),
        ({"conversations": CHAIN[:2]}, ["--ignore-key", "row.conversations"]),
    ],
)
def test_the_check_takes_nothing_for_lost_of_columns_that_are_not_read(columns, step1, checked):
    output = checked([{**ROWS[0], **columns}], step1=step1).stdout
    assert "PASSED: " in output and "in no sample that" not in output


def test_the_check_fails_where_a_text_is_lost_and_says_which(checked, monkeypatch, tmp_path):
    from served_tokens.rows import trajectory

    def without_outputs(row, reader, read=trajectory.in_one_shape):
        given = read(row, reader)
        return given.messages[2].update(content="") or given

    monkeypatch.setattr(trajectory, "in_one_shape", without_outputs)
    process = checked(ROWS, expect=1)
    assert "rows.jsonl: row 0: message 2: content: 'it lies there' is not in the prompt of turn 1" in process.stdout
    assert "1 of them under content" in process.stdout
    assert "FAILED: samples: 1 text of the rows is in no sample that should hold them (under content)" in process.stderr


# ---------------------------------------------------------------- random rows

WORDS = st.sampled_from(["ab", "a", "abab", "yes", '"', "\\", "\n", " ", "{", "[1]", "é", "好的", "act", "/"])
TEXTS = st.lists(WORDS, max_size=6).map("".join)
ARGUMENTS = st.recursive(
    st.one_of(TEXTS, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
OBJECTS = st.dictionaries(TEXTS, ARGUMENTS, max_size=3)
CONTENTS = st.one_of(TEXTS, st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3), st.none())
CALLS = st.builds(call, st.sampled_from(["act", "look_up"]), st.one_of(OBJECTS, OBJECTS.map(json.dumps)))
TURNS = st.builds(assistant, CONTENTS, st.one_of(st.none(), TEXTS), st.lists(CALLS, max_size=3))
OTHERS = st.one_of(CONTENTS.map(user), st.one_of(TEXTS, OBJECTS, OBJECTS.map(json.dumps)).map(tool))
RANDOM = st.tuples(OTHERS, TURNS, st.lists(st.one_of(OTHERS, TURNS), max_size=7)).map(
    lambda parts: {"messages": [*parts[:2], *parts[2]]}
)


@given(RANDOM, st.sampled_from(MODES))
def test_nothing_is_taken_for_lost_of_random_rows(row, served_as):
    try:
        assert lost(row, served_as) == []
    except TrajectoryError:
        assume(False)


@given(RANDOM, st.sampled_from(MODES), st.data())
def test_a_text_of_a_random_row_that_is_read_as_another_is_found(row, served_as, data):
    last = max(place for place, message in enumerate(row["messages"]) if message["role"] == "assistant")
    messages = row["messages"][: last + 1]
    texts = [place for place, message in enumerate(messages) if isinstance(message["content"], str)]
    assume(texts)
    place, as_read = data.draw(st.sampled_from(texts)), {"messages": copy.deepcopy(messages)}
    messages[place]["content"] = "a text that is not read"
    try:
        assert "a text that is not read" in [loss.text for loss in lost({"messages": messages}, served_as, as_read)]
    except TrajectoryError:
        assume(False)
