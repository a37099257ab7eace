"""A trajectory as served: what an OpenAI-compatible server hands to the chat template for the messages of a row."""

import functools
import json
import random
import re
import string
from collections import Counter
from typing import NamedTuple

from served_tokens.shapes import in_one_shape, refuse_suspicious
from served_tokens.values import MEDIA, TrajectoryError, is_text_parts, kind_of, map_texts

ROLES = ("system", "user", "assistant", "tool")
BLOCK_START, BLOCK_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (  # of Qwen's tokenizers: in a text they are no text but a mark, to the model
    BLOCK_START,
    BLOCK_END,
    "<|endoftext|>",
    *(f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
)
CALL_TEXT = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)
# Why a turn is context only, beside what the row says itself (see `shapes`).
UNCLOSED = "they open a <think> and do not close it, so they were cut off"
EMPTY = "they have neither text nor calls"
NO_TOOLS = (
    "calls tools and offers none, so it was served with others; add them to the row, or keep it by "
    "--allow-calls-without-tools where the system text holds them"
)


class Reading(NamedTuple):
    """How step 1 reads rows, as in its command; its rows and samples carry it, so that the check reads them so too."""

    read_as: tuple = ()  # (key, field) pairs
    ignore_keys: tuple = ()
    allow_control_tokens: bool = False
    allow_calls_without_tools: bool = False
    validate_tools: bool = False

    def told(self) -> dict:
        """What is not the default, as JSON has it."""
        return {key: value for key, value in self._asdict().items() if value != Reading._field_defaults[key]}

    @classmethod
    def of(cls, told: dict) -> "Reading":
        """The one that `told` tells of."""
        texts = {key: tuple(map(_frozen, value)) for key, value in told.items() if isinstance(value, (list, tuple))}
        return cls(**{**told, **texts})


AS_IT_IS = Reading()


class Trajectory(NamedTuple):
    """A row as it is served, and what was met on the way.

    messages, tools: see `served_trajectory`.
    as_given: the messages before that, in the one shape; at the same positions.
    not_trained: {position of a turn: why it is context only}
    thinking: what the row says of `enable_thinking`, or None.
    shapes: {name: how often it was met}
    unread: [(kind of object, key, value)] what nobody reads.
    """

    messages: list
    tools: list | None
    as_given: list
    not_trained: dict
    thinking: bool | None
    shapes: Counter
    unread: list

    @property
    def turns(self) -> list[int]:
        """The positions of the assistant messages."""
        return [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_trajectory(row: dict, reading: Reading = AS_IT_IS, control_tokens: tuple = CONTROL_TOKENS) -> Trajectory:
    """A row of any known shape as it is served; raises TrajectoryError where it is to be set aside."""
    shaped = in_one_shape(row, reading.read_as, reading.ignore_keys)
    refuse_suspicious(shaped.unread)
    messages, tools = served_trajectory(shaped._asdict(), () if reading.allow_control_tokens else control_tokens)
    if not (tools or reading.allow_calls_without_tools) and any(message.get("tool_calls") for message in messages):
        raise TrajectoryError(f"the trajectory {NO_TOOLS}")
    not_trained = {k: why for k, message in enumerate(messages) if (why := _unfinished(message))} | shaped.not_trained
    return Trajectory(messages, tools, shaped.messages, not_trained, *shaped[3:])


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def _unfinished(message: dict) -> str | None:
    if message["role"] != "assistant":
        return None
    content = message["content"].strip()
    if "reasoning_content" not in message and content.startswith("<think>") and "</think>" not in content:
        return UNCLOSED
    return None if content or message.get("tool_calls") else EMPTY


def served_trajectory(row: dict, control_tokens: tuple = CONTROL_TOKENS) -> tuple[list[dict], list[dict] | None]:
    """The messages and tools of a row in the one shape as an OpenAI-compatible server hands them to the chat template.

    vLLM and SGLang parse tool-call `arguments` strings into objects and read `content: null` as empty. A list of text
    parts becomes their concatenation; another list or an object that a tool returned, its JSON. Reasoning, whether in
    `reasoning_content` or inline in `content`, comes out in `reasoning_content`. See README, "What the server sees".

    Returns (messages, tools): new dicts, the row is left alone; tools is None where there are none.
    Raises TrajectoryError, also where a text holds one of `control_tokens`.
    """
    if not row["messages"]:
        raise TrajectoryError("the trajectory has no messages")
    _refuse_control_tokens({"tools": row["tools"]}, control_tokens)
    served = []
    for position, message in enumerate(row["messages"]):
        try:
            served.append(_served_message(message))
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
    for position, message in enumerate(served):
        _refuse_control_tokens(message, control_tokens, f"message {position}: ")
    if not any(message["role"] == "assistant" for message in served):
        raise TrajectoryError("the trajectory has no assistant message, so there is nothing to train on")
    return served, row["tools"] or None


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
    role = message["role"]
    if role not in ROLES:
        raise TrajectoryError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    served = {key: value for key, value in message.items() if key not in ("reasoning_content", "tool_calls")}
    served["content"] = _text(message["content"], role)
    if role == "assistant":
        reasoning = message.get("reasoning_content") or ""
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
        if calls := message.get("tool_calls"):
            served["tool_calls"] = [_served_call(call) for call in calls]
            _refuse_twice(served)
    return served


def _refuse_twice(turn: dict) -> None:
    """A call in the text and in the field would be made twice."""
    for text in CALL_TEXT.findall(turn["content"]):
        for function in (call["function"] for call in turn["tool_calls"]):
            if json.dumps(function["name"]) in text:
                raise TrajectoryError(f"has a call of {function['name']} both as text and in tool_calls")


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
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"tool call arguments are not valid JSON ({error})") from None
    if not arguments and not isinstance(arguments, (bool, int, float)):  # missing, null, "" and [] are no arguments
        arguments = {}
    if not isinstance(arguments, dict):
        raise TrajectoryError(f"tool call arguments are not a JSON object but {kind_of(arguments)}")
    return {**call, "function": {**call["function"], "arguments": arguments}}


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
    raise TrajectoryError(f"content is not text but {kind_of(content)}")
