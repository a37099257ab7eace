"""Rows in the shapes that public data has: each is read right, or set aside with a reason; none is silently another."""

import json
import shlex

import pytest
from conftest import assistant, tool, user, write_jsonl

from served_tokens.marks import TrajectoryError
from served_tokens.rows import notes
from served_tokens.rows.keys import request_of
from served_tokens.rows.other import BEHIND, IN_PROMPT
from served_tokens.rows.trajectory import EMPTY, UNCLOSED, Reading, read_trajectory

FLAT = {"name": "f", "description": "d", "parameters": {}}
TOOLS = [{"type": "function", "function": FLAT}]
F = {"name": "f", "arguments": {"x": 1}}
TEXT = {"type": "text", "text": "a"}
BLOCKS = [{"type": "thinking", "thinking": "x", "signature": "s"}]
OFF = "their weight, loss or train says not to train on them"


def read(row: dict, **options):
    return read_trajectory(row, Reading(**options))


def reason(row: dict, **options) -> str:
    with pytest.raises(TrajectoryError) as error:
        read(row, **options)
    return str(error.value)


def row(*messages, **columns) -> dict:
    return {"messages": [*messages] or [user("q"), assistant("a", "r")], "tools": TOOLS, **columns}


def turn(**keys) -> dict:
    """A row of one turn with these keys."""
    return row(user("q"), {"role": "assistant", "content": "a", **keys})


def of_call(**keys) -> dict:
    return turn(tool_calls=[{"type": "function", **keys}])


def not_trained(row: dict, **options) -> dict:
    return read(row, **options).not_trained


# ---------------------------------------------------------------- shapes


def test_sharegpt_conversations_are_read_as_messages():
    for human, value, thought, output, turn in (
        ("human", json.dumps(F), None, "observation", {"from": "gpt", "value": "<think>r</think>a"}),
        ("human", f"<think>\ns\n</think>\n\n{json.dumps(F)}", "s", "tool", {"from": "gpt", "value": "r</think>a"}),
        ("user", [F], None, "tool", {"from": "assistant", "value": "a", "reasoning_content": "r"}),
    ):
        calls = [{"from": human, "value": "q"}, {"from": "function_call", "value": value}]
        conversations = [*calls, {"from": output, "value": "3"}, turn]
        trajectory = read({"messages": [], "conversations": conversations, "tools": [FLAT]})
        called = assistant("", thought, [{"function": F}])
        assert trajectory.messages == [user("q"), called, tool("3"), assistant("a", "r")]
        assert trajectory.tools == TOOLS


def test_only_turns_of_a_completion_are_trained_also_behind_a_system_column():
    prompt = [user("q"), assistant("old"), user("q2")]
    trajectory = read({"prompt": json.dumps(prompt), "completion": [assistant("a"), user("q3"), assistant("b")]})
    assert trajectory.messages == [*prompt, assistant("a"), user("q3"), assistant("b")]
    assert trajectory.not_trained == {1: IN_PROMPT}
    assert not_trained({"prompt": prompt, "completion": [assistant("a")], "system": "s"}) == {2: IN_PROMPT}


SCHEMA = {"name": "f", "description": "d", "input_schema": {}}


@pytest.mark.parametrize("given", [FLAT, {**FLAT, "type": "function"}, json.dumps(FLAT), SCHEMA])
def test_flat_tools_are_wrapped_also_in_a_json_string_an_object_or_a_system_message(given):
    for tools in ([given], json.dumps([given]), {"f": given}):
        assert read(row(tools=tools)).tools == TOOLS
        in_message = [{"role": "system", "content": "s", "tools": tools}, user("q"), assistant("a")]
        assert read({"messages": in_message}).tools == TOOLS


def part(identity: str, content=None, **more) -> dict:
    return {"role": "assistant", "id": identity, "content": content, **more}


def test_messages_of_one_id_are_one_answer_also_around_the_outputs_of_its_calls():
    first = part("m", reasoning_content="r"), part("m", "a"), part("m", tool_calls=[F])
    trajectory = read(row(user("q"), *first, tool("3"), part("m", tool_calls=[F]), tool("4"), part("n", "b")))
    merged = assistant("a", "r", [{"function": F}] * 2)
    assert trajectory.messages == [user("q"), merged, tool("3"), tool("4"), assistant("b")]
    assert trajectory.given.shapes["answers cut into several messages"] == 3


def test_messages_of_one_id_that_make_no_answer_for_sure_set_the_row_aside():
    for other in (part("m", "b", reasoning_content="r"), part("m", [TEXT])):
        assert "in another order than reasoning, text, calls" in reason(row(user("q"), part("m", "a"), other))
    parts = part("m", tool_calls=[F]), tool("3"), part("m", "b")
    assert "all its answers have one id" in reason(row(user("q"), *parts))


def test_turns_whose_id_is_not_that_of_one_answer_stay_apart():
    for messages in (
        [{**user("q"), "id": "m"}, part("m", "a"), part("m", "b")],  # the id is that of the whole row
        [user("q"), part("m", "a"), user("q2"), part("m", "b")],  # another prompt came between
        [user("q"), part("m", "a"), part("n", "b")],
    ):
        assert sum(message["role"] == "assistant" for message in read(row(*messages)).messages) == 2


def test_a_role_behind_the_last_turn_is_dropped_where_it_is_no_chat_and_set_aside_where_it_may_be():
    trajectory = read(row(user("q"), assistant("a"), {"role": "exit", "content": "x"}))
    assert (trajectory.messages, trajectory.given.shapes[BEHIND]) == ([user("q"), assistant("a")], 1)
    assert len(read(row(user("q"), assistant("a"), tool("x"))).messages) == 3
    for role in ("gpt", "environment-tool"):
        assert f"unknown role {role!r}" in reason(row(user("q"), assistant("a"), {"role": role, "content": "x"}))


# ---------------------------------------------------------------- one place in several readings


@pytest.mark.parametrize(
    "one, why",
    [
        (row(functions=[{"name": "g"}]), "tools stands in both tools and functions, and they differ"),
        (of_call(function={**F, "args": {"x": 2}}), "the arguments stands in both arguments and args, and they"),
        (of_call(function=F, arguments={"x": 2}), "stands in both arguments and arguments beside the function"),
        (turn(tool_calls=[F], function_call={"name": "f", "arguments": "{}"}), "a call stands in both tool_calls and"),
        (row({"role": "system", "content": "x"}, assistant("a"), system="y"), "stands in both column system and the"),
        (row({"from": "gpt", "value": "a", "content": "b"}), "the content stands in both content and value, and they"),
        (turn(weight=1, train=False), "whether the turn is trained stands in both weight and train, and they differ"),
        (row(enable_thinking=True, metadata={"enable_thinking": False}), "its switches differ about whether the model"),
        (row(extra_body={"chat_template_kwargs": {"tools": []}}), "chat_template_kwargs has tools, which no request"),
        (turn(thinking_blocks=BLOCKS, reasoning_content="y"), "in both reasoning_content and thinking_blocks, and"),
        (row({"from": "human", "role": "system", "value": "q"}), "the role stands in both role and from, and they"),
    ],
)
def test_two_readings_that_disagree_set_the_row_aside(one, why):
    assert why in reason(one)


@pytest.mark.parametrize(
    "one, plain",
    [
        (turn(reasoning_content="x", thinking="x", reasoning="x"), turn(reasoning_content="x")),
        (turn(reasoning_details=[{"type": "reasoning.text", "text": "x"}, {"text": "y"}]), turn(reasoning="xy")),
        (turn(reasoning="x", reasoning_details=[{"type": "reasoning.encrypted"}]), turn(reasoning="x")),
        (turn(thinking_blocks=BLOCKS, reasoning_content="x"), turn(reasoning_content="x")),
        (turn(provider_specific_fields={"thinking_blocks": BLOCKS, "citations": None}), turn(reasoning_content="x")),
        (row({"role": "system", "content": "s"}, assistant("a"), system="s "), row(assistant("a"), system="s")),
        (row(functions=[FLAT], tool_defs=json.dumps([FLAT]), system="", conversations=[], completion=None), row()),
        (of_call(function={"name": "f", "arguments": '{"x":1}', "args": {"x": 1}}), of_call(function=F)),
    ],
)
def test_two_readings_that_agree_are_one(one, plain):
    assert (read(one).messages, read(one).tools) == (read(plain).messages, read(plain).tools)


# ---------------------------------------------------------------- loss switches and how an answer ended


@pytest.mark.parametrize("key", ["weight", "loss", "train", "loss_mask", "trainable"])
def test_loss_switch_leaves_its_turn_out_or_says_nothing(key):
    for value in (0, False, 0.0):
        assert not_trained(turn(**{key: value})) == {1: OFF}
    for value in (1, True, None):
        assert not_trained(turn(**{key: value})) == {}
    for value in (0.5, -1, "false", [0], float("nan")):
        why = f"message 1: {key} is {value!r}; write 1 or true to train the turn, 0 or false to leave it out"
        assert reason(turn(**{key: value})) == why


def test_loss_switch_of_another_message_than_a_turn_changes_nothing():
    for keys in ({"weight": 0}, {"loss": None}, {"loss_mask": [0, 0]}, {"finish_reason": "stop"}, {"truncated": True}):
        one = row({**user("q"), **keys}, assistant("a"))
        assert not_trained(one) == {} and read(one).given.known == {}


@pytest.mark.parametrize("ended", ["length", "MAX_TOKENS", "content_filter", "model_length"])
def test_turn_that_was_cut_off_is_left_out_wherever_that_is_said(ended):
    for one in (
        turn(finish_reason=ended),
        turn(finishReason={"type": ended, "length": 16}),  # SGLang's
        turn(response_metadata={"done_reason": [ended]}),
        turn(extra=json.dumps({"stop_reason": ended})),
        row(finish_reason=ended),
        row(metadata={"finish_reason": ended}),
    ):
        assert not_trained(one) == {1: f"their finish_reason is {ended.lower()}, so they were cut off"}
    later = row(user("q"), {**assistant("a"), "finish_reason": ended}, user("q2"), assistant("b"))
    assert read(later).messages == [user("q"), assistant("a"), user("q2"), assistant("b")]


@pytest.mark.parametrize("ended", ["stop", "STOP", "tool_calls", "end_turn", "stop_sequence", "", None])
def test_turn_that_ended_by_itself_is_trained(ended):
    assert not_trained(turn(finish_reason=ended)) == {} == not_trained(row(stop_reason=ended))


def test_end_of_an_answer_that_nobody_knows_sets_the_row_aside():
    assert reason(turn(finish_reason="foo")).startswith("nobody reads its keys message.finish_reason; ")
    assert not_trained(turn(finish_reason="foo"), ignore_keys=("finish_reason",)) == {}


def test_turn_that_is_no_whole_answer_is_left_out():
    for key in ("prefix", "partial", "truncated", "interrupted"):
        assert [*not_trained(turn(**{key: True}))] == [1] and not_trained(turn(**{key: False})) == {}
    assert not_trained(turn(content="<think>\nso", tool_calls=[F])) == {1: UNCLOSED}
    for content in ("<think>so</think>", "  \n"):
        assert not_trained(turn(content=content)) == {1: EMPTY}
    for keys in ({"content": "", "tool_calls": [F]}, {"content": "a <think> in between"}):
        assert not_trained(turn(**keys)) == {}


# ---------------------------------------------------------------- what would be trained wrongly


def test_reasoning_under_other_marks_sets_the_row_aside_where_there_is_none_beside_it():
    why = "message 1: opens with {}: reasoning that would be trained as text; convert it to reasoning_content"
    for mark in ("<thinking>", "◁think▷", "<seed:think>", "&lt;think&gt;", "**Think"):
        assert reason(turn(content=f"\n{mark}hm")) == why.format(mark)
        assert read(turn(content=f"{mark}hm", reasoning_content="r")).messages[1] == assistant(f"{mark}hm", "r")
        assert read(turn(content=f"The mark {mark} opens it.")).messages[1]["content"] == f"The mark {mark} opens it."


@pytest.mark.parametrize(
    "one, why",
    [
        (row(user("q"), tool([{"type": "image"}]), assistant("a")), "message 1: content has a part of type image"),
        (turn(reasoning="off"), "nobody reads its keys message.reasoning;"),
        (turn(content='{"role": "assistant", "content": "a"}'), "holds the JSON of content parts"),
        (row({**user("q"), "thinking": "r"}, assistant("a")), "nobody reads its keys message.thinking;"),
        (row(tools=[{**TOOLS[0], "input_schema": {"x": 1}}]), "nobody reads its keys tool.input_schema;"),
        (row(user("q"), assistant(""), assistant("a")), "has neither text nor calls, and another answer follows it"),
        (turn(content=[TEXT, *BLOCKS]), "message 1: a part of type thinking comes after others that belong behind it"),
        (turn(content=[{"type": "tool_use", "name": "f"}, TEXT]), "a part of type text comes after others"),
        (row(user([TEXT, {"type": "tool_result"}]), assistant("b")), "a part of type tool_result comes after others"),
        (turn(content=[{**BLOCKS[0], "thinking": [1]}]), "thinking holds no whole text"),
        (turn(content=[{"type": "thinking", "thinking": "x", "text": "y"}]), "stands in both thinking and text"),
        (turn(content=[{"text": "secret", "thought": True}]), "content is not text but a list"),
        (turn(tool_calls=[{"custom": F}]), "a tool call has no function name"),
        (row(user("q")), "no assistant message"),
        (row(user("q"), "hi"), "message 1: a message is not an object but a string"),
        (turn(content="so <think>x</think>a"), "message 1: has text before an inline <think>"),
        *((row(tools=[{"type": "function", "function": its}]), "tool") for its in (None, "f", {"name": ["f"]})),
        (row(tools=["f"]), "a tool is not an object but a string"),
    ],
)
def test_what_would_be_trained_wrongly_in_silence_sets_the_row_aside(one, why):
    assert why in reason(one)


def test_call_of_a_tool_that_is_not_offered_and_output_without_a_call_are_counted():
    one = row(user("q"), assistant("", None, [{**F, "name": "g"}]), tool("of g"), tool("of nothing"), assistant("a"))
    assert +notes.noted(read(one)).notes == {notes.UNKNOWN_TOOL: 1, notes.NO_CALL: 1}


def test_null_that_the_schema_allows_is_not_counted():
    for schema in ({"type": ["string", "null"]}, {"type": "string", "nullable": True}, {}):
        tools = [{"type": "function", "function": {**FLAT, "parameters": {"properties": {"x": schema}}}}]
        one = {**of_call(function={"name": "f", "arguments": {"x": None}}), "tools": tools}
        assert not +notes.noted(read(one)).notes


# ---------------------------------------------------------------- thinking


OFF_BY = [{"enable_thinking": False}, {"think": False}, {"reasoning_effort": "none"}, {"thinking_budget": 0}]
OFF_BY += [{"thinking": {"type": "disabled"}}, {"thinking": {"type": "enabled", "budget_tokens": 0}}]
ON_BY = [{"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning": {"effort": "high", "summary": None}}]


@pytest.mark.parametrize("place", [None, "metadata", "extra_body", "chat_template_kwargs"])
def test_what_a_row_says_of_thinking_is_understood_under_every_name_and_place(place):
    for thinks, its in ((False, OFF_BY), (True, ON_BY), (None, [{"enable_thinking": None}, {}])):
        for said in its:
            assert read(row(**said) if place is None else row(**{place: said})).given.thinking is thinks
            assert place is None or thinks is None or request_of({place: json.dumps(said)})[1] is thinks


@pytest.mark.parametrize(
    "columns, gets, thinks",
    [
        ({}, {"a": 1, "enable_thinking": False}, False),
        ({"chat_template_kwargs": {"a": 2, "b": None}}, {"a": 2, "enable_thinking": False}, False),
        ({"extra_body": {"chat_template_kwargs": '{"enable_thinking": 1}'}}, {"a": 1, "enable_thinking": 1}, True),
        ({"reasoning_effort": "low"}, {"a": 1, "enable_thinking": True, "reasoning_effort": "low"}, True),
    ],
)
def test_the_chat_template_gets_the_kwargs_of_the_command_and_those_of_the_row_win(columns, gets, thinks):
    trajectory = read(row(**columns), template_kwargs={"a": 1, "enable_thinking": False})
    assert (trajectory.template_kwargs, trajectory.given.thinking) == (gets, thinks)


def test_a_switch_of_the_row_costs_no_message_its_own_reasoning():
    one = row(user("q"), {"role": "assistant", "content": "a", "reasoning": "r"}, reasoning="on")
    assert read(one).messages[1] == assistant("a", "r")
    assert "nobody reads its keys row.reasoning" in reason(row(reasoning="A long text."))


# ---------------------------------------------------------------- keys


def test_all_unknown_keys_are_named_at_once_by_level():
    one = row(
        {**user("q"), "mood": "x"},
        {**assistant([{"type": "text", "text": "a", "mime": "t"}]), "tool_calls": [{**F, "ms": 3}], "note": 1},
        tools=[{"type": "function", "function": {**FLAT, "gives": "x"}}],
        xq7={"a": [False]},
    )
    assert reason(one) == (
        "nobody reads its keys message.mood, part.mime, call.ms, message.note, tool.gives, row.xq7; read them by "
        "--read-as, or leave them out by --ignore-key message.mood --ignore-key part.mime --ignore-key call.ms "
        "--ignore-key message.note --ignore-key tool.gives --ignore-key row.xq7"
    )
    assert read(one, ignore_keys=("mood", "mime", "ms", "note", "gives", "xq7")).given.known["tool.gives"] == 1


def test_known_keys_are_kept_and_counted_at_their_level_alone():
    part, called = {"type": "text", "text": "a", "citations": "x"}, {**F, "status": "x"}
    it = {"role": "assistant", "content": [part], "tool_calls": [called], "sender": "x"}
    one = row(user("q"), it, tools=[{**TOOLS[0], "returns": "x"}], domain="x", xq7=None, xq8="", xq9=[{"a": None}])
    known = ("row.domain", "message.sender", "part.citations", "call.status", "tool.returns")
    assert read(one).given.known == dict.fromkeys(known, 1)
    assert reason(turn(domain="x", citations="x")).startswith(
        "nobody reads its keys message.domain, message.citations;"
    )


@pytest.mark.parametrize(
    "one, name, holds",
    [
        (turn(extra={"response": {"choices": [{"message": assistant("other")}]}}), "message.extra", "a message"),
        (turn(extra=json.dumps({"a": [assistant("other")]})), "message.extra", "a message"),
        *((turn(extra={key: "r"}), "message.extra", "a message") for key in ("reasoning_content", "thinking")),
        (turn(extra={"reasoning_details": [{"text": "r"}]}), "message.extra", "a message"),
        (turn(extra={"name": "f", "args": {"x": 1}}), "message.extra", "a tool call"),
        (row(metadata={"tools": TOOLS}), "row.metadata", "tools"),
    ],
)
def test_a_message_or_tools_within_a_known_key_sets_the_row_aside_whatever_is_ignored(one, name, holds):
    for options in ({}, {"ignore_keys": (name.partition(".")[2],)}):
        assert reason(one, **options) == (
            f"nobody reads its keys {name} (it holds {holds}: bring that into messages and tools)"
        )
    assert read(one, ignore_keys=(name,)).given.known == {}


def test_what_an_api_answered_beside_the_turn_that_says_the_same_is_no_loss():
    answer = {"choices": [{"finish_reason": "stop", "message": assistant("a", "r", [{"function": F}])}]}
    one = turn(reasoning_content="r", tool_calls=[F], extra=answer)
    assert read(one).given.known == {"message.extra": 1}


def test_a_bare_ignored_key_never_removes_what_is_read():
    one = row(conversations=[{"from": "gpt", "value": "x"}])
    for options in ({}, {"ignore_keys": ("conversations", "message.conversations")}):
        assert "has messages beside conversations; leave one out by --ignore-key row.conversations" in reason(
            one, **options
        )
    assert read(one, ignore_keys=("row.conversations",)).messages == [user("q"), assistant("a", "r")]


def test_a_key_that_is_ignored_at_its_level_is_kept_at_others():
    one = row({"role": "system", "content": "s", "tools": TOOLS}, user("q"), assistant("a"), tools=[{"name": "g"}])
    assert "tools stands in both tools and tools of message 0" in reason(one, ignore_keys=("tools",))
    assert read(one, ignore_keys=("row.tools",)).tools == TOOLS
    assert [it["function"]["name"] for it in read(one, ignore_keys=("message.tools",)).tools] == ["g"]
    tools = [{"type": "function", "function": {**FLAT, "gives": "x"}, "beta": 1}]
    assert read(row(tools=tools), ignore_keys=("tool.gives", "tool.beta")).tools == TOOLS


XQ7 = {"xq7": {"x": 1}}


@pytest.mark.parametrize("one", [{"function": {"name": "f", **XQ7}}, {"name": "f", "arguments": "{ }", **XQ7}])
def test_call_whose_arguments_may_stand_under_another_key_is_set_aside_and_both_ways_out_work(one):
    assert "nobody reads its keys call.xq7; read them by --read-as, or leave" in reason(turn(tool_calls=[one]))
    for options, arguments in (({"read_as": (("xq7", "arguments"),)}, {"x": 1}), ({"ignore_keys": ("call.xq7",)}, {})):
        [called] = read(turn(tool_calls=[one]), **options).messages[1]["tool_calls"]
        assert called["function"] == {"name": "f", "arguments": arguments}


def test_keys_of_read_as_are_read_at_the_level_of_their_field():
    turns = [{"who": "user", "words": "q"}, {"who": "assistant", "words": "a", "thought": "r", "mask": 0}]
    pairs = "dialogue=messages who=role words=content thought=reasoning_content mask=weight apis=tools persona=system"
    read_as = tuple(tuple(pair.split("=")) for pair in pairs.split())
    trajectory = read({"dialogue": turns, "apis": TOOLS, "persona": "s"}, read_as=read_as)
    assert trajectory.messages == [{"role": "system", "content": "s"}, user("q"), assistant("a", "r")]
    assert (trajectory.tools, trajectory.not_trained) == (TOOLS, {2: OFF})
    assert read(turn(thought="x", reasoning_content="x"), read_as=read_as).messages[1] == assistant("a", "x")
    why = "reasoning_content stands in both reasoning_content and thought, and they differ"
    assert why in reason(turn(thought="x", reasoning_content="y"), read_as=read_as)


# ---------------------------------------------------------------- through the scripts


def test_the_line_of_step_1_leaves_all_unknown_keys_out_when_it_is_pasted(run, tmp_path):
    rows = [row(**{"a key": 1}), turn(note="x"), row(), of_call(function=F, ms=3), {**turn(note="y"), "mood": "x"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    process = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl")
    assert "5 rows in = 1 row out + 4 set aside" in process.stdout
    lines = process.stderr.splitlines()
    said = "rows are set aside for keys that nobody knows: message.note (2), row.a key (1), call.ms (1), row.mood (1)"
    assert said in lines
    [line] = [line for line in lines if line.startswith("  what does not: ")]
    options = shlex.split(line.removeprefix("  what does not: "))
    assert options[:2] == ["--ignore-key", "row.a key"] and len(options) == 8
    output = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl", *options).stdout
    assert "5 rows in = 5 rows out + 0 set aside" in output
    assert not (tmp_path / "y.jsonl.rejects.jsonl").exists()


def test_what_is_left_out_and_counted_is_said_by_step_1(run, tmp_path):
    rows = [turn(weight=0), turn(weight=0), row(user("q"), assistant("a"), user("q2"), assistant("b", "r"), cost=1)]
    rows += [row(user("q"), assistant("", "r", [{**F, "name": "g"}] * 2))] * 2
    other = {**tool("x"), "tool_call_id": "2"}
    rows.append(row(user("q"), assistant("", "r", [{**F, "id": "1"}]), other, assistant("a", "r"), tools=[FLAT]))
    write_jsonl(tmp_path / "x.jsonl", rows)
    said = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl").stdout
    for line in (
        "6 rows in = 6 rows out + 0 set aside: y.jsonl",
        "8 turns in = 6 turns for samples + 2 left out",
        "read as: OpenAI messages (6), tools without `function` (1)",
        f"2 turns left out: {OFF}",
        "keys that are no part of the conversation, so in no sample, and in how many rows: row.cost (1)",
        "1 of 6 turns have no reasoning (1 of 3 that answer, 0 of 3 that call tools): trained, they teach",
        "tool calls that name a tool which their row does not offer: 4, first in x.jsonl: row 3 (counted from 0)",
        "tool outputs whose id is not that of the call whose turn it is: 1, first in x.jsonl: row 5 (counted from 0)",
        "2 rows have the same messages and tools as another row",
    ):
        assert f"{line}" in said
    assert len(said.splitlines()) == 10


@pytest.mark.parametrize("wrong", ["thought", "=content", "a=b=c"])
def test_option_that_cannot_be_read_is_refused_and_says_why(wrong, run):
    said = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl", "--read-as", wrong, expect=1).stderr
    assert f"{wrong!r} is not KEY=FIELD with a FIELD of messages" in said
