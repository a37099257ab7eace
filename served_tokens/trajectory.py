"""A trajectory as served: what an OpenAI-compatible server hands to the chat template for the messages of a row."""

import functools
import json
import random
import re
import string

ROLES = ("system", "user", "assistant", "tool")
BLOCK_START, BLOCK_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (  # of Qwen's tokenizers: in a text they are no text but a mark, to the model
    BLOCK_START,
    BLOCK_END,
    "<|endoftext|>",
    *(f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
)
MEDIA = (
    "image",
    "image_url",
    "input_image",
    "video",
    "video_url",
    "audio",
    "audio_url",
    "input_audio",
    "file",
)  # parts


class TrajectoryError(ValueError):
    """What is wrong with one trajectory, and in which message."""


def served_trajectory(row: dict, control_tokens: tuple = CONTROL_TOKENS) -> tuple[list[dict], list[dict] | None]:
    """The messages and tools of a row as an OpenAI-compatible server hands them to the chat template.

    vLLM and SGLang parse tool-call `arguments` strings into objects and read `content: null` as empty. A list of text
    parts becomes their concatenation; another list or an object that a tool returned, its JSON. Reasoning, whether in
    `reasoning_content`, `reasoning` or inline in `content`, comes out in `reasoning_content`. See README, "What the
    server sees".

    Returns (messages, tools): new dicts, the row is left alone; tools is None where there are none.
    Raises TrajectoryError, also where a text holds one of `control_tokens`.
    """
    messages = decoded_messages(row)
    if not messages:
        raise TrajectoryError("the trajectory has no messages")
    tools = _served_tools(row.get("tools"), control_tokens)
    served = []
    for position, message in enumerate(messages):
        try:
            served.append(_served_message(message))
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
    for position, message in enumerate(served):
        _refuse_control_tokens(message, control_tokens, f"message {position}: ")
    if not any(message["role"] == "assistant" for message in served):
        raise TrajectoryError("the trajectory has no assistant message, so there is nothing to train on")
    return served, tools


def decoded_messages(row: dict) -> list:
    """The column `messages` as a list, whether it is one or a JSON string of one; raises TrajectoryError."""
    if "messages" not in row:
        raise TrajectoryError(f"the row has no column messages; it has {', '.join(row) or 'none'}")
    return _decoded(row["messages"], "messages")


def without_reasoning(messages: list[dict]) -> list[dict]:
    """The messages as an agent sends them that does not send reasoning back: the `drop` history."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def with_stand_ins(messages: list[dict], tools: list[dict] | None) -> tuple:
    """The same with plain words in place of the control tokens that ChatML is split at, so that a rendering can be
    split.

    Returns (messages, tools, reveal): reveal(text) puts the tokens back; it is None where there are none. The words are
    as long as the tokens, occur nowhere else, and cannot overlap one another.
    """
    text = json.dumps([messages, tools], ensure_ascii=False, default=str)
    if BLOCK_START not in text and BLOCK_END not in text:
        return messages, tools, None
    words = {}
    for token, opening in ((BLOCK_START, "Qs"), (BLOCK_END, "Qe")):
        while (word := opening + "".join(random.choices(string.ascii_lowercase, k=len(token) - 2))) in text:
            pass
        words[token] = word

    def hide(text: str) -> str:
        return text.replace(BLOCK_START, words[BLOCK_START]).replace(BLOCK_END, words[BLOCK_END])

    def reveal(text: str) -> str:
        return text.replace(words[BLOCK_START], BLOCK_START).replace(words[BLOCK_END], BLOCK_END)

    return map_texts(messages, hide), map_texts(tools, hide), reveal


def map_texts(value, change):
    """A JSON value with change(text) for each text in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    return value


def _served_tools(tools, control_tokens: tuple) -> list[dict] | None:
    tools = _decoded(tools, "tools") or None
    for position, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise TrajectoryError(f"tool {position} is not an object but {_kind(tool)}")
    _refuse_control_tokens({"tools": tools}, control_tokens)
    return tools


def _refuse_control_tokens(message: dict, control_tokens: tuple, where: str = "") -> None:
    values = [value for value in message.values() if value]
    text = "\n".join(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str) for value in values
    )
    if control_tokens and _any_of(control_tokens).search(text):
        found = next(token for token in control_tokens if token in text)
        raise TrajectoryError(
            f"{where}the text holds the control token {found}, which could forge a message; take it out of the "
            "row, or keep it by --allow-control-tokens of step 1"
        )


@functools.cache
def _any_of(tokens: tuple) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))


def _served_message(message: dict) -> dict:
    if not isinstance(message, dict):
        raise TrajectoryError(f"is not an object but {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise TrajectoryError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    served = {
        key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content", "tool_calls")
    }
    served["content"] = _text(message.get("content"), role)
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(reasoning, str):
            raise TrajectoryError(f"reasoning is not a string but {_kind(reasoning)}")
        # Beside reasoning in its own field, which templates read first, a think tag further on is text of the answer.
        reads_inline = not reasoning or served["content"].lstrip().startswith("<think>")
        inline, answer = _inline_reasoning(served["content"]) if reads_inline else (None, "")
        if reasoning and inline:
            if inline.strip() != reasoning.strip():
                raise TrajectoryError("has reasoning both in its own field and inline in content, and they differ")
            served["content"] = answer
        elif not reasoning and inline is not None:
            reasoning, served["content"] = inline, answer
        if reasoning:
            served["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if not isinstance(calls, (list, type(None))):
            raise TrajectoryError(f"tool_calls is not a list but {_kind(calls)}")
        if calls:
            served["tool_calls"] = [_served_call(call) for call in calls]
    return served


def _inline_reasoning(content: str) -> tuple[str | None, str]:
    """Split `<think>…</think>answer` into (reasoning, answer); (None, content) without one.

    The edges are cut as in Qwen3's template. That would lose what stands before the first `<think>` or between two
    `</think>`: the first is an error here, the second stays in the answer.
    """
    before, close, answer = content.partition("</think>")
    if not close:
        return None, content
    lead, opened, reasoning = before.partition("<think>")
    if opened and lead.strip():
        raise TrajectoryError("has text before an inline <think> block, which the chat template would lose")
    return (reasoning if opened else before).strip("\n"), answer.lstrip("\n")


def _served_call(call: dict) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TrajectoryError("a tool call has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"tool call arguments are not valid JSON ({error})") from None
    if not arguments and not isinstance(arguments, (bool, int, float)):  # missing, null, "" and [] are no arguments
        arguments = {}
    if not isinstance(arguments, dict):
        raise TrajectoryError(f"tool call arguments are not a JSON object but {_kind(arguments)}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _text(content, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") in MEDIA:
            raise TrajectoryError(
                f"content is not text but a list with a part of type {part['type']}; leave it out of the row"
            )
    if is_text_parts(content):
        return "".join(part["text"] for part in content)
    if role == "tool" and isinstance(content, (dict, list)):  # what a client sends; a template would render nothing
        return json.dumps(content, ensure_ascii=False, default=str)
    raise TrajectoryError(f"content is not text but {_kind(content)}")


def is_text_parts(content) -> bool:
    """Whether the content of a message is a list of text parts."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )


def _decoded(value, column: str) -> list:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"column {column} is not valid JSON ({error})") from None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise TrajectoryError(f"column {column} is not a list but {_kind(value)}")
    return value


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
