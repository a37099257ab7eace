"""What servers make of tools, text parts and arguments: one table, and what each of them refuses."""

import json

import pytest

from served_tokens.marks import TrajectoryError
from served_tokens.rows.servers import STYLES, served_tool

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
    assert printed(tool, "vllm") == (
        '{"type": "function", "function": {"name": "f", "description": null, "parameters": {}, "strict": true}}'
    )
    assert served_tool(tool, "template") is tool


@pytest.mark.parametrize(
    "wrong, tool",
    [
        ("function.name", {"type": "function", "function": {"description": "d"}}),
        ("function.description", {"type": "function", "function": {"name": "f", "description": 5}}),
        ("function.strict", {"type": "function", "function": {"name": "f", "strict": "yes"}}),
        ("type", {"type": "custom", "function": {"name": "f"}}),
    ],
)
def test_a_tool_that_a_server_refuses_is_an_error_that_names_the_key(wrong, tool):
    for style in ("vllm", "sglang"):
        with pytest.raises(TrajectoryError, match=f": a server refuses its {wrong}; "):
            served_tool(tool, style)


def test_parameters_that_are_no_object_are_refused_by_vllm_only():
    tool = {"type": "function", "function": {"name": "f", "parameters": []}}
    with pytest.raises(TrajectoryError, match=r"'f': a server refuses its function\.parameters"):
        served_tool(tool, "vllm")
    assert served_tool(tool, "sglang")["function"]["parameters"] == []


def test_text_parts_are_joined_as_the_server_joins_them():
    texts = ["a", "", " ", "b"]
    assert [STYLES[style].joined(texts) for style in ("vllm", "sglang", "template")] == ["a\n \nb", "a    b", "a b"]


@pytest.mark.parametrize("text", ["", "null", "[]", "[1]", "42", '"{}"', '{"a": NaN}', '{"a": "\\ud83d"}'])
def test_sglang_refuses_arguments_that_are_no_object_of_strict_json(text):
    with pytest.raises(TrajectoryError, match="tool call arguments are not"):
        STYLES["sglang"].refuse_arguments(text, {})
    for style in ("vllm", "template"):
        STYLES[style].refuse_arguments(text, {})


def test_sglang_refuses_an_integer_over_64_bits_which_it_would_show_as_a_float():
    fits, too_long = {"a": 18446744073709551615}, {"a": 18446744073709551616}
    for form in (dict, json.dumps):
        STYLES["sglang"].refuse_arguments(form(fits), fits)
        with pytest.raises(TrajectoryError, match="hold an integer over 64 bits"):
            STYLES["sglang"].refuse_arguments(form(too_long), too_long)
        STYLES["vllm"].refuse_arguments(form(too_long), too_long)
