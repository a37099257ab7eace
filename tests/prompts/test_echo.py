"""Echoed history: what a server's answers look like when an agent sends them back."""

import pytest
from conftest import assistant, call, golden, tool, user
from hypothesis import given
from hypothesis import strategies as st
from reading_rows import served_trajectory
from recorded import ECHOED_BY_SGLANG, ECHOED_BY_VLLM, read

from served_tokens.prompts import turns
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.echo import ECHOES, answer_sent_back
from served_tokens.prompts.turns import apply_chat_template
from served_tokens.proof.echo import echoed_turn
from served_tokens.proof.turn import echoed_messages, served_turn

RENDER = load_chat_template(read_chat_template(str(QWEN3)))
OF_SGLANG = [its for its in ECHOED_BY_SGLANG if its["name"] != "two_assistant_turns_in_a_row"]  # which is left out
CALL = '<tool_call>\n{"name": "f", "arguments": {"a":  1.50, "é": "\\u00e9"}}\n</tool_call>'
as_recorded = pytest.mark.parametrize(
    "prompt",
    ECHOED_BY_VLLM + OF_SGLANG,
    ids=lambda its: f"{its['name']}, turn {its['turn']}, {its['echo']}, {its['reasoning_sent_as']}",
)


def history_of(prompt: dict) -> str:
    return "template" if prompt["reasoning_sent_as"] else "drop"


def conversation_of(prompt: dict) -> tuple:
    """(messages, tools, echo); SGLang streams ordinary answers as vLLM does."""
    style = prompt["echo"].partition("-")[0]
    echo = prompt["echo"].replace("sglang-stream", "vllm-stream")
    return *served_trajectory(*golden(prompt["name"]), server_style=style), echo


@as_recorded
def test_the_check_renders_the_prompts_that_the_server_made_of_an_echoing_agent(prompt):
    messages, tools, echo = conversation_of(prompt)
    came_back = echoed_messages(messages, tools, history_of(prompt), echo, RENDER)
    assert served_turn(messages, tools, prompt["turn"], history_of(prompt), RENDER, came_back)[0] == prompt["prompt"]


@pytest.mark.parametrize("by_chains", [True, False])
@as_recorded
def test_plain_messages_and_edits_make_up_the_same_prompts(prompt, by_chains, monkeypatch):
    monkeypatch.setattr(turns, "renders_by_chains", lambda render: by_chains)
    messages, tools, echo = conversation_of(prompt)
    plain, served = apply_chat_template(messages, tools, RENDER, echo)
    place = next(turn["message"] for turn in served["turns"] if turn["turn"] == prompt["turn"])
    shown = [message["content"] for message in plain[:place]]
    for edit in served[history_of(prompt)]:
        if edit["turn"] <= prompt["turn"]:
            shown[edit["message"]] = edit["content"]
    blocks = [f"<|im_start|>{message['role']}\n{text}<|im_end|>\n" for message, text in zip(plain, shown)]
    assert "".join(blocks) + "<|im_start|>assistant\n" == prompt["prompt"]


@pytest.mark.parametrize(
    "target, whole, streamed, reasoning",
    [  # what vLLM 0.32.0 answers, asked for this
        ("<think>\nr\n</think>\n\nHi", "\n\nHi", "\n\nHi", "\nr\n"),
        ("<think>\n\n</think>\n\nanswer", "\n\nanswer", "\n\nanswer", "\n\n"),
        ("<think>\nr\n</think>\n\nLet me.\n" + CALL, "\n\nLet me.\n", "\n\nLet me.\n", "\nr\n"),
        ("<think>\nr\n</think>\n\n" + CALL, "", "\n\n", "\nr\n"),
        ("<think></think>x", "x", "x", None),
        ("<think>\nr", "", "", "\nr"),
        ("no think block", "", "", "no think block"),
        ("<think>\na </think> b </think>\n\nc", " b \n\nc", " b </think>\n\nc", "\na "),
        ("<think>\na <think> b\n</think>\n\nc <think> d", "\n\nc <think> d", "\n\nc <think> d", "\na  b\n"),
        ("<think>\nr\n</think>\n\nend <tool", "\n\nend <tool", "\n\nend ", "\nr\n"),
        ("<think>\nr\n</think>\n\nsay <tool_call> x", "\n\nsay <tool_call> x", "\n\nsay ", "\nr\n"),
    ],
)
def test_an_answer_is_parsed_as_the_server_parses_it(target, whole, streamed, reasoning):
    for content, echo in ((whole, "vllm"), (streamed, "vllm-stream")):
        answer = answer_sent_back(target, echo, ["f"])
        assert (answer["content"], answer.get("reasoning_content")) == (content, reasoning)


@pytest.mark.parametrize(
    "calls, whole, streamed",
    [
        (CALL, [("f", {"a": 1.5, "é": "é"})], [("f", {"a": 1.5, "é": "é"})]),
        ('<tool_call>{"name": "f"}</tool_call>', [], [("f", {})]),
        ('<tool_call>{"name": "f\\u00e9", "arguments": {}}</tool_call>', [("fé", {})], [("f\\u00e9", {})]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', [], [("f", {})]),
    ],
)
def test_calls_come_back_parsed_and_from_a_stream_as_written(calls, whole, streamed):
    for expected, echo in ((whole, "vllm"), (streamed, "vllm-stream")):
        answer = answer_sent_back("<think>\nr\n</think>\n\n" + calls, echo, ["f"])
        functions = [one["function"] for one in answer.get("tool_calls", ())]
        assert [(function["name"], function["arguments"]) for function in functions] == expected


def test_without_tools_in_the_request_a_call_is_text():
    assert answer_sent_back("<think>\nr\n</think>\n\n" + CALL, "vllm", [])["content"] == "\n\n" + CALL


MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "<", "\n", " ", "a", "|", "é", '{"name": "f"}']
JSONS = ['{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": "s"}', '{"name": "", "arguments": []}']
LOOSE = ['{"arguments": {"b": [1]}, "name" : "h"}', '{"name": "a"b", "arguments": {"a": 1}}', "42", "{", '"name": ']
WHOLE = ['\n<tool_call>\n{"name": "f", "arguments": {"x": "<é\\n"}}\n</tool_call>', "<think>\nr\n</think>\n\n"]


def outcome(read, *arguments):
    """What it returns, or that the server refuses it."""
    try:
        return read(*arguments)
    except ValueError:
        return "refused"


@given(
    st.lists(st.sampled_from(MARKS + JSONS + LOOSE + WHOLE), max_size=12).map("".join),
    st.sampled_from(ECHOES[1:]),
    st.sampled_from([[], ["f"], ["f", "h"]]),
)
def test_both_definitions_read_any_text_the_same(target, echo, names):
    assert outcome(answer_sent_back, target, echo, names) == outcome(echoed_turn, target, echo, names)


@pytest.mark.parametrize("answer", read("sglang_answers"), ids=lambda its: its["name"])
def test_sglang_answers_so_and_its_own_answer_may_be_refused_when_it_comes_back(answer):
    refused = ("args big int", "args NaN", "args null", "args list", "args string", "args string of JSON")
    expected = "refused" if answer["name"] in refused else answer["message"]  # the first would come back as a float
    assert outcome(answer_sent_back, answer["wrote"], "sglang", ["f", "g"]) == expected


def test_turns_behind_an_answer_that_sglang_refuses_are_left_out():
    text = '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'
    messages = [user("q"), assistant(text, "r"), user("q"), assistant("a", "r")]
    _, served = apply_chat_template(messages, TOOLS, RENDER, "sglang")
    assert served["turns"][0]["left_out"] is None
    assert served["turns"][1]["left_out"].startswith("the server refuses an answer before them: tool call arguments ")
    came_back = echoed_messages(messages, TOOLS, "drop", "sglang", RENDER)
    with pytest.raises(ValueError, match="the server refuses an answer that comes before it"):
        served_turn(messages, TOOLS, 3, "drop", RENDER, came_back)


TEXTS = st.sampled_from(["", "a", "\n", "\n\n a\n", "x <tool", "é<tool_call>\n{}", " b </think> c", "<think>"])
CALLS = st.lists(st.sampled_from([{}, {"x": "</tool_call>"}, {"x": [1.0, None, "\n"]}]), max_size=2)
TURN = st.tuples(TEXTS, st.none() | TEXTS, CALLS).map(
    lambda turn: assistant(turn[0], turn[1], [call("f", arguments) for arguments in turn[2]])
)
CONVERSATION = st.lists(st.one_of(TURN, st.just(user("q")), st.just(tool("t"))), min_size=1, max_size=7)


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@given(CONVERSATION, TURN, st.sampled_from(ECHOES[1:]))
def test_echoed_edits_are_the_same_however_they_are_rendered(messages, last, echo):
    messages = [user("q"), *messages, last]
    by_chains = apply_chat_template(messages, TOOLS, RENDER, echo)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "renders_by_chains", lambda render: False)
        assert by_chains == apply_chat_template(messages, TOOLS, RENDER, echo)


def test_a_turn_before_any_query_comes_back_without_reasoning_as_the_check_has_it(checked):
    greeting = [{"role": "system", "content": "P"}, assistant("Hi", "greet them")]
    row = {"messages": [*greeting, user("q"), assistant("a", "r"), user("q2"), assistant("b", "s")]}
    assert "PASSED: 2 of 2 samples are exact" in checked([row], step1=("--echo", "vllm")).stdout
