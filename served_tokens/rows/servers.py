"""What a server makes of a request before the chat template sees it: one table, by the server's name.

Sources: vLLM 0.32.0 (ChatCompletionToolsParam, renderers/chat_utils.py, renderers/hf.py), asked as well as read; SGLang
0.5.23 (entrypoints/openai/protocol.py and serving_chat.py, parser/jinja_template_utils.py), read. `template` is the
chat template alone, as transformers applies it.
"""

import json
from typing import NamedTuple

import orjson

from served_tokens.marks import TrajectoryError


class Style(NamedTuple):
    """Where servers differ.

    between: what joins the text parts of a message.
    empty_parts: whether a part without text is joined too.
    part_types: the types of content part that are text; it stands under the key of the same name.
    reasoning_keys: where reasoning is read; the first that is not null wins.
    function_keys: the keys of a tool's function that the server knows, in the order of its class; none: prints as sent.
    """

    between: str
    empty_parts: bool
    part_types: tuple
    reasoning_keys: tuple
    function_keys: tuple


STYLES = {
    "vllm": Style(
        between="\n",
        empty_parts=False,
        part_types=("text", "refusal", "thinking"),
        reasoning_keys=("reasoning", "reasoning_content"),
        function_keys=("name", "description", "parameters", "strict", "defer_loading"),
    ),
    "sglang": Style(
        between=" ",
        empty_parts=True,
        part_types=("text",),
        reasoning_keys=("reasoning_content",),
        function_keys=("description", "name", "parameters", "strict", "defer_loading"),
    ),
    "template": Style(
        between="",  # Qwen3's template renders nothing for a list, so this is ours
        empty_parts=True,
        part_types=("text",),
        reasoning_keys=("reasoning_content",),
        function_keys=(),
    ),
}
SHOWN_AS_NULL = ("description", "parameters")  # of a function, where they are missing
NULL = type(None)
FUNCTION_KINDS = {"name": str, "description": (str, NULL), "strict": (bool, NULL), "defer_loading": (bool, NULL)}


def served_tool(tool: dict, style: str) -> dict:
    """A tool as the chat template prints it, {"type", "function": {…}}; the tool itself is left alone.

    vLLM and SGLang print what their own classes dump: unknown keys are dropped, a missing description or parameters is
    null. vLLM has an order of its own (versions before 0.30 or so keep unknown keys, at the end). SGLang keeps that of
    the request, with missing keys behind it, and ends every tool with `defer_loading` (earlier versions have the order
    of their class). The inside of `parameters` stays as it is.
    Raises TrajectoryError where the server would refuse the request.
    """
    keys = STYLES[style].function_keys
    if not keys:
        return tool
    function, later = _known_function(tool, style), tool.get("defer_loading")
    if style == "sglang":
        keys = [key for key in {**function, **dict.fromkeys(keys)} if key in keys]
    if function.get("defer_loading") is None:
        function = {**function, "defer_loading": later}
    shown = {key: function.get(key) for key in keys if key in SHOWN_AS_NULL or function.get(key) is not None}
    served = {"type": tool.get("type", "function"), "function": shown}
    return served if style == "vllm" and later is None else {**served, "defer_loading": later}


def _known_function(tool: dict, style: str) -> dict:
    """The function of a tool that the server takes."""
    function = tool.get("function")
    if not isinstance(function, dict):
        raise TrajectoryError(
            'a tool has no `function`, so a server refuses it; write {"type": "function", "function": {"name": …}}'
        )
    kinds = FUNCTION_KINDS | ({"parameters": (dict, NULL)} if style == "vllm" else {})
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
    return STYLES[style].between.join(text for text in texts if text or STYLES[style].empty_parts)


def served_text(content, style: str) -> str:
    """The content of a message, a text or a list of parts, as one text; null and missing are empty.

    Raises TrajectoryError for a part that is no text, or that the server refuses or leaves out.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TrajectoryError(f"content is no text but {type(content).__name__}, which a server refuses")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get(kind) if kind in STYLES[style].part_types else None
        if not isinstance(text, str):
            raise TrajectoryError(
                f"content has a part of type {kind!r}, which is no text to the server; leave it out of the row"
            )
        texts.append(text)
    return joined(texts, style)


def served_arguments(arguments, style: str) -> dict:
    """The arguments of a call in the history, as the object that the chat template prints.

    vLLM reads strings with `json` and takes what is no object as {}: `""`, `null`, `[1]`, `42`, doubly encoded and
    broken ones. SGLang reads them with orjson and refuses all of these; NaN is an error there and an integer over 64
    bits a float. A client sends an object as a string, and nothing as `{}`. For `template`, which prints what it gets,
    strings are read all the same, and only what says that there are no arguments is {}.
    Raises TrajectoryError where the server would refuse the request. See `are_arguments` for targets.
    """
    if arguments is None or (isinstance(arguments, dict) and style != "sglang"):
        return arguments or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    try:
        value = orjson.loads(text) if style == "sglang" else json.loads(text)
    except json.JSONDecodeError as error:  # orjson's is one too
        value, wrong = None, f"are not valid JSON ({error})"
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"tool call arguments cannot be read ({error}), so a server refuses them") from None
    else:
        wrong = "are not a JSON object"
    if isinstance(value, dict):
        return value
    if style == "vllm" or (style == "template" and are_arguments(arguments)):
        return {}
    raise TrajectoryError(f"tool call arguments {wrong}: {text[:40]}")


def are_arguments(arguments) -> bool:
    """Whether they are an object, or say that there are none: else no target shows what the model wrote."""
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict) or arguments in (None, []) or not str(arguments).strip()


def served_reasoning(message: dict, style: str) -> str | None:
    """The reasoning that the server reads of a message that is sent to it."""
    return next((message[key] for key in STYLES[style].reasoning_keys if message.get(key) is not None), None)


def served_roles(roles: list[str], style: str) -> list[str]:
    """The roles of a conversation's messages, as the chat template of Qwen3 sees them.

    vLLM serves `developer` as system, and puts all system messages into one at the front: where that moves any, no
    message has its place any more. To SGLang and the template it is a role that they do not render.
    Raises TrajectoryError for a message that the model is not shown, or not in its place.
    """
    if "function" in roles:
        raise TrajectoryError("a `function` message is not shown to the model; send it with the role `tool`")
    systems = [position for position, role in enumerate(roles) if role in ("system", "developer")]
    if "developer" in roles and (style != "vllm" or systems != [0]):
        raise TrajectoryError("a `developer` message is not shown in its place; send it with the role `system`")
    return ["system" if role == "developer" else role for role in roles]
