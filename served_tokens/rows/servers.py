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
# What servers know of a function, in vLLM's order, and the kinds that vLLM takes there; SGLang takes any parameters.
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
    shown = _shown(tool["function"], [*tool["function"], *FUNCTION_KINDS])
    return {"type": "function", "function": shown, "defer_loading": None}


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
