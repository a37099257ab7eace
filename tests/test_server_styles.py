import json
import unicodedata

import pytest
from conftest import ROOT, call

from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.rows.servers import (
    are_arguments,
    joined,
    served_arguments,
    served_reasoning,
    served_roles,
    served_text,
    served_tool,
)

RECORDED = json.loads((ROOT / "tests" / "server" / "vllm_render.json").read_text(encoding="utf-8"))
SET_ASIDE = {"role function": "a `function` message is not shown to the model"}  # although the server answered
REPAIRED = {  # as a client does it, where nothing of the prompt depends on it
    "user content null",
    "tool content null",
    "system content null",
    "user part without type",
    "arguments object",
    "arguments null",
    "arguments missing",
    "call without id",
    "call without type",
    "tools []",
}


def handed_over(messages: list[dict], tools: list[dict] | None, style: str) -> tuple:
    """A request as the server hands it to the chat template."""
    served = []
    for message, role in zip(messages, served_roles([message["role"] for message in messages], style)):
        new = {"role": role, "content": served_text(message.get("content"), style)}
        if role == "assistant" and (reasoning := served_reasoning(message, style)) is not None:
            new["reasoning_content"] = reasoning
        calls = [(one["function"]["name"], one["function"].get("arguments")) for one in message.get("tool_calls") or []]
        if calls:
            new["tool_calls"] = [call(name, served_arguments(arguments, style)) for name, arguments in calls]
        served.append(new)
    return served, [served_tool(tool, style) for tool in tools or []]


@pytest.fixture(scope="module")
def render():
    return load_chat_template(read_chat_template(str(QWEN3)))


def prompt(request: dict, render) -> str:
    text = render(*handed_over(request["messages"], request["tools"], "vllm"), add_generation_prompt=True)
    text.encode()  # half a character is in no prompt
    return unicodedata.normalize("NFC", text)  # as Qwen's tokenizer does, which the recorded prompts went through


def name_of(request: dict) -> str:
    return f"{request['name']}, {request['reasoning_sent_as']}"


@pytest.mark.parametrize("request_", [request for request in RECORDED if "prompt" in request], ids=name_of)
def test_the_prompt_of_a_recorded_request_is_that_of_the_server(request_, render):
    if reason := SET_ASIDE.get(request_["name"]):
        with pytest.raises(TrajectoryError, match=reason):
            prompt(request_, render)
    else:
        assert prompt(request_, render) == request_["prompt"]


@pytest.mark.parametrize("request_", [request for request in RECORDED if "refused" in request], ids=name_of)
def test_what_the_server_refused_is_set_aside_or_repaired(request_, render):
    if request_["name"] in REPAIRED:
        assert prompt(request_, render)
    else:
        with pytest.raises((TrajectoryError, UnicodeEncodeError, KeyError)):
            prompt(request_, render)


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def printed(tool: dict, style: str) -> str:
    return json.dumps(served_tool(tool, style))


def test_a_standard_tool_is_printed_as_it_is_and_by_sglang_with_its_mark():
    assert printed(TOOL, "vllm") == printed(TOOL, "template") == json.dumps(TOOL)
    assert printed(TOOL, "sglang") == (
        '{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}, "defer_loading": null}'
    )


def test_sglang_keeps_the_order_of_the_request_and_puts_nulls_behind_it():
    tool = {"function": {"parameters": {}, "x": 1, "strict": True, "name": "f"}, "y": 2}
    assert printed(tool, "sglang") == (
        '{"type": "function", "function": {"parameters": {}, "strict": true, "name": "f", "description": null}, '
        '"defer_loading": null}'
    )


def test_a_tool_that_is_loaded_later_says_so_in_its_function_too():
    tool = {**TOOL, "defer_loading": True}
    shown = {**TOOL["function"], "defer_loading": True}
    for style in ("vllm", "sglang"):
        assert served_tool(tool, style) == {"type": "function", "function": shown, "defer_loading": True}
    assert served_tool(tool, "template") is tool
    assert printed({"function": {"name": "f"}, "defer_loading": True}, "sglang") == (
        '{"type": "function", "function": {"name": "f", "description": null, "parameters": null, '
        '"defer_loading": true}, "defer_loading": true}'
    )


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "description": "d", "parameters": {}},
        {"type": "function", "function": {"description": "d"}},
        {"type": "function", "function": {"name": "f", "description": 5}},
        {"type": "function", "function": {"name": "f", "strict": "yes"}},
        {"type": "custom", "function": {"name": "f"}},
    ],
)
def test_a_tool_that_a_server_refuses_is_an_error(tool):
    for style in ("vllm", "sglang"):
        with pytest.raises(TrajectoryError, match="a server refuses"):
            served_tool(tool, style)


def test_parameters_that_are_no_object_are_refused_by_vllm_only():
    tool = {"type": "function", "function": {"name": "f", "parameters": []}}
    with pytest.raises(TrajectoryError, match=r"'f': a server refuses its function\.parameters"):
        served_tool(tool, "vllm")
    assert served_tool(tool, "sglang")["function"]["parameters"] == []


def test_text_parts_are_joined_as_the_server_joins_them():
    texts = ["a", "", " ", "b"]
    assert [joined(texts, style) for style in ("vllm", "sglang", "template")] == ["a\n \nb", "a    b", "a b"]


def test_sglang_would_leave_a_thinking_part_out_so_it_is_an_error():
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]
    assert served_text(parts, "vllm") == "t\na"
    with pytest.raises(TrajectoryError, match="a part of type 'thinking'"):
        served_text(parts, "sglang")


@pytest.mark.parametrize("text", ["", "null", "[]", "[1]", "42", '"{}"', '{"a": ', '{"a": NaN}', '{"a": "\\ud83d"}'])
def test_sglang_refuses_arguments_that_are_no_object_of_strict_json(text):
    with pytest.raises(TrajectoryError, match="tool call arguments are not"):
        served_arguments(text, "sglang")


def test_sglang_reads_an_integer_over_64_bits_as_a_float():
    text = '{"a": [18446744073709551615, 18446744073709551616]}'
    assert json.dumps(served_arguments(text, "sglang")) == '{"a": [18446744073709551615, 1.8446744073709552e+19]}'
    assert served_arguments(json.loads(text), "sglang") == served_arguments(text, "sglang")
    assert json.dumps(served_arguments(text, "vllm")) == text


@pytest.mark.parametrize("text", ["[1]", "42", '"{}"', '{"a": '])
def test_arguments_that_no_target_can_show_are_nothing_to_vllm_and_an_error_by_the_template(text):
    assert not are_arguments(text)
    assert served_arguments(text, "vllm") == {}
    with pytest.raises(TrajectoryError, match="tool call arguments are not"):
        served_arguments(text, "template")


@pytest.mark.parametrize("nothing", [None, "", " ", "null", "[]", {}])
def test_arguments_that_say_that_there_are_none_are_an_empty_object(nothing):
    assert are_arguments(nothing)
    assert served_arguments(nothing, "vllm") == {}


def test_reasoning_is_read_where_the_server_reads_it():
    message = {"reasoning": "", "reasoning_content": "r"}
    assert [served_reasoning(message, style) for style in ("vllm", "sglang", "template")] == ["", "r", "r"]
    assert served_reasoning({"reasoning": None, "reasoning_content": "r"}, "vllm") == "r"
    assert served_reasoning({"reasoning": "r"}, "sglang") is None


def test_a_developer_message_is_the_system_message_of_vllm_where_it_opens():
    assert served_roles(["developer", "user"], "vllm") == ["system", "user"]
    for roles, style in ((["user", "developer"], "vllm"), (["system", "developer"], "vllm"), (["developer"], "sglang")):
        with pytest.raises(TrajectoryError, match="not shown in its place"):
            served_roles(roles, style)
