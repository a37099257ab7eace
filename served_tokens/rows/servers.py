"""Where servers differ in what they make of a request before the chat template sees it: one table.

Sources: vLLM 0.32.0 (ChatCompletionToolsParam, renderers/chat_utils.py, renderers/hf.py), asked as well as read; SGLang
0.5.23 (entrypoints/openai/protocol.py and serving_chat.py, parser/jinja_template_utils.py), read. `template` is the
chat template alone, as transformers applies it.
"""

import json
from dataclasses import dataclass

import orjson

from served_tokens.marks import TrajectoryError


@dataclass(frozen=True)
class Style:
    """What one server does.

    between: what joins the text parts of a message.
    joins_empty_parts: whether a part without text is joined too.
    function_keys: the keys of a tool's function that the server knows, in the order of its class.
    keeps_key_order: whether known keys stay in the order of the request, and missing ones follow.
    ends_tools_with_defer_loading: whether each tool ends so, be it null.
    prints_tools_as_sent: whether tools are printed with all their keys.
    strict_arguments: whether arguments in the history are read by orjson, which refuses NaN, and what is no object.
    strict_parameters: whether a tool is refused whose parameters are no object.
    developer_is_system: whether a developer message is served as system message.
    """

    between: str
    joins_empty_parts: bool = True
    function_keys: tuple = ("name", "description", "parameters", "strict", "defer_loading")
    keeps_key_order: bool = False
    ends_tools_with_defer_loading: bool = False
    prints_tools_as_sent: bool = False
    strict_arguments: bool = False
    strict_parameters: bool = False
    developer_is_system: bool = False


STYLES = {
    "vllm": Style(between="\n", joins_empty_parts=False, strict_parameters=True, developer_is_system=True),
    "sglang": Style(
        between=" ",
        function_keys=("description", "name", "parameters", "strict", "defer_loading"),
        keeps_key_order=True,
        ends_tools_with_defer_loading=True,
        strict_arguments=True,
    ),
    "template": Style(between="", prints_tools_as_sent=True),  # Qwen3's renders nothing for a list, so the join is ours
}
SHOWN_AS_NULL = ("description", "parameters")  # of a function, where they are missing
NULL = type(None)
FUNCTION_KINDS = {"name": str, "description": (str, NULL), "strict": (bool, NULL), "defer_loading": (bool, NULL)}


def served_tool(tool: dict, style: str) -> dict:
    """A tool as the chat template prints it, {"type", "function": {…}}; the tool itself is left alone.

    vLLM and SGLang print what their own classes dump: unknown keys are dropped, a missing description or parameters is
    null. The inside of `parameters` stays as it is.
    Raises TrajectoryError where the server would refuse the request.
    """
    server = STYLES[style]
    if server.prints_tools_as_sent:
        return tool
    function, later = _known_function(tool, server), tool.get("defer_loading")
    keys = server.function_keys
    if server.keeps_key_order:
        keys = [key for key in {**function, **dict.fromkeys(keys)} if key in keys]
    if function.get("defer_loading") is None:
        function = {**function, "defer_loading": later}
    shown = {key: function.get(key) for key in keys if key in SHOWN_AS_NULL or function.get(key) is not None}
    served = {"type": tool.get("type", "function"), "function": shown}
    if later is None and not server.ends_tools_with_defer_loading:
        return served
    return {**served, "defer_loading": later}


def _known_function(tool: dict, server: Style) -> dict:
    """The function of a tool that the server takes."""
    function = tool["function"]
    kinds = FUNCTION_KINDS | ({"parameters": (dict, NULL)} if server.strict_parameters else {})
    wrong = [f"function.{key}" for key, kind in kinds.items() if not isinstance(function.get(key), kind)]
    if not isinstance(tool.get("defer_loading"), (bool, NULL)):
        wrong.append("defer_loading")
    if tool.get("type", "function") != "function":
        wrong.append("type")
    if wrong:
        raise TrajectoryError(
            f"tool {function.get('name')!r}: a server refuses its {', '.join(wrong)}; name and description are texts, "
            "parameters an object, strict a boolean, type `function`"
        )
    return function


def joined(texts: list[str], style: str) -> str:
    """The text parts of a message as one text."""
    return STYLES[style].between.join(text for text in texts if text or STYLES[style].joins_empty_parts)


def refuse_changed_arguments(given, arguments: dict, style: str) -> None:
    """Raise TrajectoryError where the server would refuse the arguments of a call in the history, or change them.

    Args:
        given: as the row has them, an object or its JSON; arguments: the object that they are.
    """
    if given is None or not STYLES[style].strict_arguments:
        return
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False, default=str)
    try:
        read = orjson.loads(text)
    except ValueError as error:
        raise TrajectoryError(f"tool call arguments are not valid JSON ({error}): {text[:40]}") from None
    if not isinstance(read, dict):
        raise TrajectoryError(f"tool call arguments are not a JSON object: {text[:40]}")
    if json.dumps(read) != json.dumps(arguments):
        raise TrajectoryError("tool call arguments hold an integer over 64 bits, which SGLang shows as a float later")
