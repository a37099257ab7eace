import json

import pytest
from conftest import GOLDEN, ROOT, assistant, call, golden, tool, user
from hypothesis import given
from hypothesis import strategies as st
from reading_rows import served_trajectory

from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.echo import answer_to, echoed_history
from served_tokens.prompts.turns import apply_chat_template, without_reasoning
from served_tokens.proof.echo import echoed_turn
from served_tokens.proof.turn import echoed_messages, served_turn

RECORDED = json.loads((ROOT / "tests" / "server" / "vllm_echo.json").read_text(encoding="utf-8"))["prompts"]
CASES = {case["name"]: case for case in GOLDEN}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a":  1.50, "é": "\\u00e9"}}\n</tool_call>'


def prompts_of(case: dict, echo: str) -> tuple:
    messages, tools = served_trajectory(*golden(case["name"]))
    targets = {turn["turn"]: turn["target"] for turn in case["turns"]}
    by_hand = [
        echoed_turn(targets[k], echo, bool(tools)) if k in targets else message for k, message in enumerate(messages)
    ]
    return tools, echoed_history(messages, targets, echo, tools), by_hand


def recorded_name(prompt: dict) -> str:
    return f"{prompt['name']}, turn {prompt['turn']}, {prompt['echo']}, {prompt['reasoning_sent_as']}"


@pytest.mark.parametrize("prompt", RECORDED, ids=recorded_name)
def test_the_prompts_of_an_echoing_agent_are_those_of_the_server_by_both_definitions(prompt):
    render = load_chat_template(read_chat_template(str(QWEN3)))
    tools, *histories = prompts_of(CASES[prompt["name"]], prompt["echo"])
    for history in histories:
        sent = history if prompt["reasoning_sent_as"] else without_reasoning(history)
        assert render(sent[: prompt["turn"]], tools, add_generation_prompt=True) == prompt["prompt"]


@pytest.mark.parametrize(
    "target, whole, streamed, reasoning",
    [  # what vLLM 0.32.0 answers, asked for this
        ("<think>\nr\n</think>\n\nHi<|im_end|>\n", "\n\nHi", "\n\nHi", "\nr\n"),
        ("<think>\n\n</think>\n\nanswer<|im_end|>\n", "\n\nanswer", "\n\nanswer", "\n\n"),
        ("<think>\nr\n</think>\n\nLet me.\n" + CALL, "\n\nLet me.\n", "\n\nLet me.\n", "\nr\n"),
        ("<think>\nr\n</think>\n\n" + CALL, None, "\n\n", "\nr\n"),
        ("<think></think>x", "x", "x", None),
        ("<think>\nr", None, None, "\nr"),
        ("no think block", None, None, "no think block"),
        ("<think>\na </think> b </think>\n\nc", " b \n\nc", " b </think>\n\nc", "\na "),
        ("<think>\na <think> b\n</think>\n\nc <think> d", "\n\nc <think> d", "\n\nc <think> d", "\na  b\n"),
        ("<think>\nr\n</think>\n\nend <tool", "\n\nend <tool", "\n\nend ", "\nr\n"),
        ("<think>\nr\n</think>\n\nsay <tool_call> x", "\n\nsay <tool_call> x", "\n\nsay ", "\nr\n"),
    ],
)
def test_an_answer_is_parsed_as_the_server_parses_it(target, whole, streamed, reasoning):
    for echo, content in (("vllm", whole), ("vllm-stream", streamed)):
        answer = answer_to(target, echo, tools=True)
        assert (answer["content"], answer.get("reasoning_content")) == (content, reasoning)


@pytest.mark.parametrize("prompt", RECORDED, ids=recorded_name)
def test_the_check_renders_the_same_prompts(prompt):
    render = load_chat_template(read_chat_template(str(QWEN3)))
    messages, tools = served_trajectory(*golden(prompt["name"]))
    served_as = "template" if prompt["reasoning_sent_as"] else "drop"
    came_back = echoed_messages(messages, tools, served_as, prompt["echo"], render)
    assert served_turn(messages, tools, prompt["turn"], served_as, render, came_back)[0] == prompt["prompt"]


@pytest.mark.parametrize("by_chains", [True, False])
@pytest.mark.parametrize("prompt", RECORDED, ids=recorded_name)
def test_plain_messages_and_edits_make_up_the_same_prompts(prompt, by_chains):
    render = load_chat_template(read_chat_template(str(QWEN3)))
    messages, tools = served_trajectory(*golden(prompt["name"]))
    plain, served = apply_chat_template(messages, tools, render, by_chains, prompt["echo"])
    place = next(turn["message"] for turn in served["turns"] if turn["turn"] == prompt["turn"])
    shown = [message["content"] for message in plain[:place]]
    for edit in served["template" if prompt["reasoning_sent_as"] else "drop"]:
        if edit["turn"] <= prompt["turn"]:
            shown[edit["message"]] = edit["content"]
    blocks = [f"<|im_start|>{message['role']}\n{text}<|im_end|>\n" for message, text in zip(plain, shown)]
    assert "".join(blocks) + "<|im_start|>assistant\n" == prompt["prompt"]


def arguments_of(calls: str, echo: str) -> list:
    answer = answer_to("<think>\nr\n</think>\n\n" + calls, echo, tools=True)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in answer.get("tool_calls", ())]


@pytest.mark.parametrize(
    "calls, whole, streamed",
    [
        (CALL, [("f", '{"a": 1.5, "é": "é"}')], [("f", '{"a":  1.50, "é": "\\u00e9"}')]),
        ('<tool_call>{"name": "f"}</tool_call>', [], [("f", "")]),
        ('<tool_call>{"name": "f\\u00e9", "arguments": {}}</tool_call>', [("fé", "{}")], [("f\\u00e9", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', [], [("f", '{"a": "')]),
    ],
)
def test_calls_are_printed_anew_whole_and_sent_as_written_in_a_stream(calls, whole, streamed):
    assert arguments_of(calls, "vllm") == whole
    assert arguments_of(calls, "vllm-stream") == streamed


def test_without_tools_in_the_request_a_call_is_text():
    assert answer_to("<think>\nr\n</think>\n\n" + CALL, "vllm", tools=False)["content"] == "\n\n" + CALL


def test_without_thinking_all_is_content():
    assert answer_to("a </think> b", "vllm", tools=True, thinking=False) == {
        "role": "assistant",
        "content": "a </think> b",
    }


MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "<", "\n", " ", "a", "|", "é", '{"name": "f"}']
JSONS = ['{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": "s"}', '{"name": "", "arguments": []}']
LOOSE = [
    '{"arguments": {"b": [1]}, "name" : "h"}',
    '{"name": "a"b", "arguments": {"a": 1}}',
    "42",
    "{",
    "}",
    '"name": ',
]
WHOLE = ['\n<tool_call>\n{"name": "f", "arguments": {"x": "<é\\n"}}\n</tool_call>', "<think>\nr\n</think>\n\n"]


@given(st.lists(st.sampled_from(MARKS + JSONS + LOOSE + WHOLE), max_size=12).map("".join), st.booleans(), st.booleans())
def test_both_definitions_read_any_text_the_same(target, streamed, tools):
    echo = "vllm-stream" if streamed else "vllm"
    [ours] = echoed_history([{}], {0: target}, echo, [{}] if tools else None)
    for one in ours.get("tool_calls", ()):
        del one["id"]
    assert ours == echoed_turn(target, echo, tools)


TEXTS = st.sampled_from(["", "a", "\n", "\n\n a\n", "x <tool", "é<tool_call>\n{}", " b </think> c", "<think>"])
CALLS = st.lists(st.sampled_from([{}, {"x": "</tool_call>"}, {"x": [1.0, None, "\n"]}]), max_size=2)
TURN = st.tuples(TEXTS, st.none() | TEXTS, CALLS).map(
    lambda turn: assistant(turn[0], turn[1], [call("f", arguments) for arguments in turn[2]])
)
CONVERSATION = st.lists(st.one_of(TURN, st.just(user("q")), st.just(tool("t"))), min_size=1, max_size=7)


@given(CONVERSATION, TURN, st.sampled_from(["vllm", "vllm-stream"]))
def test_echoed_edits_are_the_same_however_they_are_rendered(messages, last, echo):
    render = load_chat_template(read_chat_template(str(QWEN3)))
    messages = [user("q"), *messages, last]
    assert apply_chat_template(messages, [{}], render, True, echo) == apply_chat_template(
        messages, [{}], render, False, echo
    )
