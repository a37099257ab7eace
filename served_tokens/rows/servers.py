"""Where servers differ in what they make of a request before the chat template sees it: one table, `STYLES`.

Sources: vLLM 0.32.0 (ChatCompletionToolsParam, renderers/chat_utils.py, renderers/hf.py), asked as well as read; SGLang
0.5.23 (entrypoints/openai/protocol.py and serving_chat.py, parser/jinja_template_utils.py), read. `template` is the
chat template alone, as transformers applies it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from served_tokens.marks import TrajectoryError

NULL = type(None)
FUNCTION_KINDS = {"name": str, "description": (str, NULL), "strict": (bool, NULL), "defer_loading": (bool, NULL)}
FUNCTION_KEYS = ("name", "description", "parameters", "strict", "defer_loading")  # that servers know, in vLLM's order
SHOWN_AS_NULL = ("description", "parameters")  # where they are missing


def served_tool(tool: dict, style: str) -> dict:
    """A tool, {"type", "function": {…}}, as the chat template prints it; the inside of `parameters` is left as it is.

    Raises TrajectoryError where the server would refuse the request.
    """
    return STYLES[style].tool(tool)


def _tool_of_vllm(tool: dict) -> dict:
    """As vLLM's own class dumps it: in the order of the class, without unknown keys."""
    function = _known_function(tool, parameters=(dict, NULL))
    served = {"type": "function", "function": _shown(function, FUNCTION_KEYS)}
    return served if tool.get("defer_loading") is None else {**served, "defer_loading": tool["defer_loading"]}


def _tool_of_sglang(tool: dict) -> dict:
    """As SGLang's own class dumps it: in the order of the request, missing keys behind it, `defer_loading` always."""
    function = _known_function(tool, parameters=object)
    shown = _shown(function, (*tool["function"], *FUNCTION_KEYS))
    return {"type": "function", "function": shown, "defer_loading": tool.get("defer_loading")}


def _known_function(tool: dict, parameters) -> dict:
    """The function of a tool, loaded later if the tool is; raises TrajectoryError where a server refuses the tool.

    parameters: the kinds that the server takes there.
    """
    function = tool["function"]
    kinds = {**FUNCTION_KINDS, "parameters": parameters}
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
    if function.get("defer_loading") is None:
        return {**function, "defer_loading": tool.get("defer_loading")}
    return function


def _shown(function: dict, keys) -> dict:
    """What a server prints of a function, in the order of these keys."""
    known = [key for key in dict.fromkeys(keys) if key in FUNCTION_KEYS]
    return {key: function.get(key) for key in known if key in SHOWN_AS_NULL or function.get(key) is not None}


def _refuse_arguments_of_sglang(given, arguments: dict) -> None:
    """SGLang reads arguments by orjson, which refuses NaN and half a character and makes floats of long integers."""
    if given is None:
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


@dataclass(frozen=True)
class Style:
    """What one server does.

    tool: (tool) -> the tool as the chat template prints it; raises TrajectoryError where the server refuses it.
    joined: (the text parts of a message) -> its text.
    refuse_arguments: (the arguments of a call in the history as the row has them, the object that they are) -> None;
        raises TrajectoryError where the server would refuse them, or change them.
    prints_tools_as_sent: whether tools are printed with all their keys.
    developer_is_system: whether a developer message is served as system message.
    """

    tool: Callable
    joined: Callable
    refuse_arguments: Callable = lambda given, arguments: None
    prints_tools_as_sent: bool = False
    developer_is_system: bool = False


STYLES = {
    "vllm": Style(tool=_tool_of_vllm, joined=lambda texts: "\n".join(filter(None, texts)), developer_is_system=True),
    "sglang": Style(tool=_tool_of_sglang, joined=" ".join, refuse_arguments=_refuse_arguments_of_sglang),
    # Qwen3's template renders nothing for a list of parts, so their join is ours.
    "template": Style(tool=lambda tool: tool, joined="".join, prints_tools_as_sent=True),
}
