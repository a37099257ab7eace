"""Where servers differ in what they make of a request before the chat template sees it: one table, `STYLES`.

Sources: vLLM 0.32.0 (ChatCompletionToolsParam, renderers/chat_utils.py, renderers/hf.py) and SGLang 0.5.23
(entrypoints/openai/protocol.py and serving_chat.py, function_call/utils.py), asked as well as read. `template` is the
chat template alone, as transformers applies it.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from served_tokens.marks import TrajectoryError

NULL = type(None)
# What servers know of a function, in vLLM's order, and the kinds that they take there.
FUNCTION_KINDS = {"name": str, "description": (str, NULL), "parameters": (dict, NULL), "strict": (bool, NULL)}
SHOWN_AS_NULL = ("description", "parameters")  # where they are missing


def _tool_of_vllm(tool: dict) -> dict:
    """As vLLM's own class dumps it: in the order of the class, without unknown keys."""
    _refuse_wrong_kinds(tool)
    return {"type": "function", "function": _shown(tool["function"], [*FUNCTION_KINDS])}


def _tool_of_sglang(tool: dict) -> dict:
    """As SGLang's own class dumps it: in the order of the request, missing keys behind it, and its mark."""
    _refuse_wrong_kinds(tool)
    return _read_by_sglang(json.dumps(tool, default=str))


@functools.lru_cache(4096)  # the rows of an environment share their tools, and to check a schema takes long
def _read_by_sglang(text: str) -> dict:
    """A tool out of the JSON of a request, in which integers over 64 bits become floats."""
    import jsonschema  # not for those who serve by vLLM

    try:
        function = orjson.loads(text)["function"]
        rename_types(parameters := function.get("parameters"))
        if parameters is not None:
            jsonschema.Draft202012Validator.check_schema(parameters)
    except (ValueError, TypeError, jsonschema.SchemaError) as error:
        why = getattr(error, "message", error)
        raise TrajectoryError(f"SGLang refuses a tool, {why}: write JSON Schema 2020-12 in {text[:80]}") from None
    shown = _shown(function, [*function, *FUNCTION_KINDS])
    return {"type": "function", "function": shown, "defer_loading": None}


TYPES = {  # of JSON Schema, and what SGLang prints by their names
    "string": "str text char varchar uuid enum date time datetime timestamp bytes binary varbinary bytea blob",
    "integer": "int uint long short unsigned bigint smallint tinyint",
    "number": "num float double decimal real numeric",
    "array": "list arr tuple set",
    "object": "dict map",
    "boolean": "bool",
}
TYPE_OF = {word: name for name, words in TYPES.items() for word in (name, *words.split())}
SIZED = re.compile(r"^(u?int|long|short|unsigned|num|float|list|dict)[0-9\[<( \t].*", re.DOTALL)  # list[str], int64
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SCHEMAS = frozenset(
    "anyOf oneOf allOf prefixItems items additionalProperties not if then else contains propertyNames "
    "unevaluatedItems unevaluatedProperties".split()
)


def rename_types(schema) -> None:
    """Give the types in a schema, or in a list of schemas, the names of JSON Schema, where SGLang does so."""
    for one in schema if isinstance(schema, list) else [schema]:
        for key, value in one.items() if isinstance(one, dict) else ():
            if key == "type" and isinstance(value, list):
                one[key] = [*dict.fromkeys(map(_type_name, value))]
            elif key == "type":
                one[key] = _type_name(value)
            elif key in SCHEMAS:
                rename_types(value)
            elif key in SCHEMAS_BY_NAME and isinstance(value, dict):
                rename_types([*value.values()])


def _type_name(name):
    word = name.partition("(")[0].strip().lower() if isinstance(name, str) else ""
    return TYPE_OF.get(SIZED.sub(r"\1", word), name)


def _refuse_wrong_kinds(tool: dict) -> None:
    """Raise TrajectoryError where a server refuses a tool for the kinds of its values."""
    function = tool["function"]
    wrong = [f"function.{key}" for key, kind in FUNCTION_KINDS.items() if not isinstance(function.get(key), kind)]
    if tool.get("type", "function") != "function":
        wrong.append("type")
    if wrong:
        raise TrajectoryError(
            f"tool {function.get('name')!r}: a server refuses its {', '.join(wrong)}; name and description are texts, "
            "parameters an object, strict a boolean, type `function`"
        )


def _shown(function: dict, keys: list) -> dict:
    """What a server prints of a function, in the order of these keys."""
    known = [key for key in dict.fromkeys(keys) if key in FUNCTION_KINDS]
    return {key: function.get(key) for key in known if key in SHOWN_AS_NULL or function.get(key) is not None}


def _refuse_arguments_of_sglang(given, arguments: dict) -> None:
    """SGLang reads them by orjson, which refuses NaN and makes floats of long integers; null it shows as null."""
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False, default=str)
    try:
        read = orjson.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict) or json.dumps(read) != json.dumps(arguments):
        raise TrajectoryError(f"tool call arguments are not the strict JSON of an object to SGLang: {text[:40]}")


@dataclass(frozen=True)
class Style:
    """What one server does; its functions raise TrajectoryError for what the server refuses."""

    tool: Callable  # (tool) -> the tool as the chat template prints it
    joined: Callable  # (the text parts of a message) -> its text
    # (the arguments of a past call as the row has them, the object that they are); raises where they would change too
    refuse_arguments: Callable = lambda given, arguments: None
    prints_tools_as_sent: bool = False  # with all their keys
    developer_is_system: bool = False  # a developer message is served as system message
    hidden: list | tuple = ()  # keys and parts of messages that the server takes and does not show
    tool_choices: tuple | None = None  # values of `tool_choice` that leave all tools in the prompt; None: any does
    last_is_user: bool = False  # a turn that comes last before the answer is shown as a user message


STYLES = {
    "vllm": Style(tool=_tool_of_vllm, joined=lambda texts: "\n".join(filter(None, texts)), developer_is_system=True),
    "sglang": Style(
        tool=_tool_of_sglang,
        joined=" ".join,
        refuse_arguments=_refuse_arguments_of_sglang,
        hidden="reasoning thinking thinking_blocks reasoning_details provider_specific_fields function_call tools "
        "functions".split(),
        tool_choices=(None, "", "auto", "required"),
        last_is_user=True,
    ),
    # Qwen3's template renders nothing for a list of parts, so their join is ours.
    "template": Style(tool=lambda tool: tool, joined="".join, prints_tools_as_sent=True),
}
