"""What servers make of tools, text parts and arguments: one table, and what each of them refuses."""

import json
import re

import pytest

from served_tokens.marks import TrajectoryError
from served_tokens.rows.servers import STYLES

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def printed(tool: dict, style: str) -> str:
    return json.dumps(STYLES[style].tool(tool))


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
    assert STYLES["template"].tool(tool) is tool


@pytest.mark.parametrize(
    "wrong, tool",
    [
        ("function.name", {"type": "function", "function": {"description": "d"}}),
        ("function.description", {"type": "function", "function": {"name": "f", "description": 5}}),
        ("function.strict", {"type": "function", "function": {"name": "f", "strict": "yes"}}),
        ("type", {"type": "custom", "function": {"name": "f"}}),
        ("function.parameters", {"type": "function", "function": {"name": "f", "parameters": []}}),
    ],
)
def test_a_tool_that_a_server_refuses_is_an_error_that_names_the_key(wrong, tool):
    for style in ("vllm", "sglang"):
        with pytest.raises(TrajectoryError, match=f": a server refuses its {wrong}; "):
            STYLES[style].tool(tool)


@pytest.mark.parametrize(
    "schema, shown",
    [
        (
            {"type": "dict", "properties": {"type": {"type": "Varchar (9)"}, "b": {"type": "STRING "}}},
            {"type": "object", "properties": {"type": {"type": "string"}, "b": {"type": "string"}}},
        ),
        ({"anyOf": [{"type": ["int32", "integer", "null"]}]}, {"anyOf": [{"type": ["integer", "null"]}]}),
        ({"$defs": {"a": {"items": {"type": "list[str]"}}}}, {"$defs": {"a": {"items": {"type": "array"}}}}),
        ({"default": {"type": "int"}, "x": {"type": "any"}}, {"default": {"type": "int"}, "x": {"type": "any"}}),
        ({"type": "internal"}, "'internal' is not valid under any of the given schemas"),
        ({"default": float("nan")}, "unexpected character"),
    ],
)
def test_sglang_gives_types_the_names_of_json_schema_and_refuses_what_is_none(schema, shown):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    if isinstance(shown, str):
        with pytest.raises(TrajectoryError, match=f"SGLang refuses a tool, {re.escape(shown)}.*: write JSON Schema"):
            STYLES["sglang"].tool(tool)
    else:
        assert STYLES["sglang"].tool(tool)["function"]["parameters"] == shown
        assert STYLES["vllm"].tool(tool)["function"]["parameters"] is schema


def test_text_parts_are_joined_as_the_server_joins_them():
    texts = ["a", "", " ", "b"]
    assert [STYLES[style].joined(texts) for style in ("vllm", "sglang", "template")] == ["a\n \nb", "a    b", "a b"]


@pytest.mark.parametrize("text", [None, "", "null", "[]", "[1]", "42", '"{}"', '{"a": NaN}', '{"a": "\\ud83d"}'])
def test_sglang_refuses_arguments_that_are_no_object_of_strict_json(text):
    with pytest.raises(TrajectoryError, match="tool call arguments are not"):
        STYLES["sglang"].refuse_arguments(text, {})
