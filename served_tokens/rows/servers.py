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

from served_tokens.marks import TrajectoryError, in_json

NULL = type(None)
# What servers know of a function, in vLLM's order, and the kinds that they take there.
FUNCTION_KINDS = {"name": str, "description": (str, NULL), "parameters": (dict, NULL), "strict": (bool, NULL)}
SHOWN_AS_NULL = ("description", "parameters")  # where they are missing


def served_tool(tool: dict, style: str) -> dict:
    """A tool, {"type", "function": {…}}, as the chat template prints it; the inside of `parameters` is left as it is.

    Raises TrajectoryError where the server would refuse the request.
    """
    return STYLES[style].tool(tool)


def _tool_of_vllm(tool: dict) -> dict:
    """As vLLM's own class dumps it: in the order of the class, without unknown keys."""
    _refuse_wrong_kinds(tool, FUNCTION_KINDS)
    return {"type": "function", "function": _shown(tool["function"], [*FUNCTION_KINDS])}


def _tool_of_sglang(tool: dict) -> dict:
    """As SGLang's own class dumps it: in the order of the request, missing keys behind it, and its mark."""
    _refuse_wrong_kinds(tool, {**FUNCTION_KINDS, "parameters": object})
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
    except (ValueError, jsonschema.SchemaError) as error:
        why = getattr(error, "message", error)
        name = json.loads(text)["function"]["name"]
        raise TrajectoryError(f"tool {name!r}: SGLang refuses its parameters, no JSON Schema 2020-12: {why}") from None
    shown = _shown(function, [*function, *FUNCTION_KINDS])
    return {"type": "function", "function": shown, "defer_loading": None}


# Names of types that SGLang prints as those of JSON Schema; FOLLOWED ones also before what counts or holds: list[str].
TYPES = {
    "string": "str text char varchar uuid enum date time datetime timestamp bytes binary varbinary bytea blob",
    "integer": "int uint long short unsigned bigint smallint tinyint",
    "number": "num float double decimal real numeric",
    "array": "list arr tuple set",
    "object": "dict map",
    "boolean": "bool",
    "null": "",
}
TYPE_OF = {word: name for name, words in TYPES.items() for word in (name, *words.split())}
FOLLOWED = re.compile(r"(u?int|long|short|unsigned|num|float|list|dict)[0-9\[<( \t].*", re.DOTALL)
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SCHEMAS = (
    "anyOf oneOf allOf prefixItems items additionalProperties not if then else contains propertyNames "
    "unevaluatedItems unevaluatedProperties"
).split()


def rename_types(schema) -> None:
    """Give the types in a schema, a list of schemas or anything else the names of JSON Schema, where SGLang does so."""
    if isinstance(schema, list):
        for one in schema:
            rename_types(one)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if isinstance(kind, str):
        schema["type"] = _type_name(kind)
    elif isinstance(kind, list):
        names = [_type_name(one) if isinstance(one, str) else one for one in kind]
        schema["type"] = [name for place, name in enumerate(names) if name not in names[:place]]
    for key in SCHEMAS_BY_NAME:
        if isinstance(schema.get(key), dict):
            rename_types([*schema[key].values()])
    for key in SCHEMAS:
        rename_types(schema.get(key))


def _type_name(name: str) -> str:
    word = name.partition("(")[0].strip().lower()
    return TYPE_OF.get(FOLLOWED.sub(r"\1", word), name)


def _tools_chosen_by_sglang(tools: list | None, choice) -> list | None:
    """The tools that a prompt shows where a request has this `tool_choice`; raises TrajectoryError if it is refused."""
    choice = in_json(choice)
    if choice == "none":
        return None
    if choice in (None, "", "auto") or (choice == "required" and tools):
        return tools
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools or () if name and tool["function"].get("name") == name]
    if not named:
        raise TrajectoryError(f"SGLang refuses its tool_choice, {json.dumps(choice)}: it is not of its tools")
    return named


def _refuse_wrong_kinds(tool: dict, kinds: dict) -> None:
    """Raise TrajectoryError where a server that takes these kinds of values refuses a tool."""
    function = tool["function"]
    wrong = [f"function.{key}" for key, kind in kinds.items() if not isinstance(function.get(key), kind)]
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
    """SGLang reads arguments by orjson, which refuses NaN and half a character and makes floats of long integers."""
    if given is None:
        raise TrajectoryError("tool call arguments are null, which SGLang shows as null later; write {}")
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False, default=str)
    try:
        read = orjson.loads(text)
    except ValueError as error:
        raise TrajectoryError(f"tool call arguments are not valid JSON ({error}): {text[:40]}") from None
    if not isinstance(read, dict):
        raise TrajectoryError(f"tool call arguments are not a JSON object: {text[:40]}")
    if json.dumps(read) != json.dumps(arguments):
        raise TrajectoryError("tool call arguments hold an integer over 64 bits, which SGLang shows as a float later")


@dataclass(frozen=True)
class Style:
    """What one server does.

    tool: (tool) -> the tool as the chat template prints it; raises TrajectoryError where the server refuses it.
    joined: (the text parts of a message) -> its text.
    refuse_arguments: (the arguments of a call in the history as the row has them, the object that they are) -> None;
        raises TrajectoryError where the server would refuse them, or change them.
    chosen: (tools or None, `tool_choice`) -> those that the prompt shows.
    prints_tools_as_sent: whether tools are printed with all their keys.
    developer_is_system: whether a developer message is served as system message.
    takes_what_it_does_not_show: whether reasoning, calls and tools of a message under other keys than
        `reasoning_content` and `tool_calls` are no error to the server, and in no prompt.
    last_is_user: whether a turn that comes last before the answer is shown as a user message.
    """

    tool: Callable
    joined: Callable
    refuse_arguments: Callable = lambda given, arguments: None
    chosen: Callable = lambda tools, choice: tools
    prints_tools_as_sent: bool = False
    developer_is_system: bool = False
    takes_what_it_does_not_show: bool = False
    last_is_user: bool = False


STYLES = {
    "vllm": Style(tool=_tool_of_vllm, joined=lambda texts: "\n".join(filter(None, texts)), developer_is_system=True),
    "sglang": Style(
        tool=_tool_of_sglang,
        joined=" ".join,
        refuse_arguments=_refuse_arguments_of_sglang,
        chosen=_tools_chosen_by_sglang,
        takes_what_it_does_not_show=True,
        last_is_user=True,
    ),
    # Qwen3's template renders nothing for a list of parts, so their join is ours.
    "template": Style(tool=lambda tool: tool, joined="".join, prints_tools_as_sent=True),
}
