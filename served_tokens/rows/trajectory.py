"""A trajectory as served: what an OpenAI-compatible server hands to the chat template for the messages of a row."""

import functools
import json
import random
import re
import string
from collections import Counter
from typing import NamedTuple

from served_tokens.marks import MEDIA, TrajectoryError, is_text_parts, kind_of, map_texts
from served_tokens.rows.leftovers import refuse_suspicious
from served_tokens.rows.servers import joined, served_arguments, served_tool
from served_tokens.rows.shapes import Shaped, in_one_shape

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
    server_style: str = "vllm"  # see `server_styles`
    echo: str = "none"  # see `echo`

    def told(self) -> dict:
        """What the prompts follow, and what else is not the default, as JSON has it."""
        told = {"server_style": self.server_style, "echo": self.echo}
        return told | {key: value for key, value in self._asdict().items() if value != Reading._field_defaults[key]}

    @classmethod
    def of(cls, told: dict) -> "Reading":
        """The one that `told` tells of."""
        texts = {key: tuple(map(_frozen, value)) for key, value in told.items() if isinstance(value, (list, tuple))}
        return cls(**{**told, **texts})


AS_IT_IS = Reading()


class Trajectory(NamedTuple):
    """A row as it is served, and what was met on the way.

    messages, tools: see `served_trajectory`.
    as_given, tools_given: the same before that, in the one shape; messages at the same positions.
    not_trained: {position of a turn: why it is context only}
    thinking: what the row says of `enable_thinking`, or None.
    recorded: {position of a turn: {"prompt_token_ids": …, "token_ids": …}}, as a server recorded them; one may lack.
    shapes: {name: how often it was met}
    unread: [(kind of object, key, value)] what nobody reads.
    """

    messages: list
    tools: list | None
    as_given: list
    tools_given: list | None
    not_trained: dict
    thinking: bool | None
    recorded: dict
    shapes: Counter
    unread: list

    @property
    def turns(self) -> list[int]:
        """The positions of the assistant messages."""
        return [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_trajectory(row: dict, reading: Reading = AS_IT_IS, control_tokens: tuple = CONTROL_TOKENS) -> Trajectory:
    """A row of any known shape as it is served; raises TrajectoryError where it is to be set aside."""
    shaped = _developer_as_system(in_one_shape(row, reading.read_as, reading.ignore_keys), reading.server_style)
    refuse_suspicious(shaped.unread)
    tokens = () if reading.allow_control_tokens else control_tokens
    messages, tools = served_trajectory(shaped._asdict(), reading.server_style, tokens)
    if not (tools or reading.allow_calls_without_tools) and any(message.get("tool_calls") for message in messages):
        raise TrajectoryError(f"the trajectory {NO_TOOLS}")
    not_trained = {k: why for k, message in enumerate(messages) if (why := _unfinished(message))} | shaped.not_trained
    return Trajectory(messages, tools, shaped.messages, shaped.tools, not_trained, *shaped[3:])


def _developer_as_system(shaped: Shaped, style: str) -> Shaped:
    """vLLM puts all system and developer messages into one at the front where there is a developer message.

    Seen on 0.32.0. Where one comes after a turn, the prompts before it are without it, so no place is right for all.
    """
    instructions = [k for k, message in enumerate(shaped.messages) if message["role"] in ("system", "developer")]
    if not any(shaped.messages[k]["role"] == "developer" for k in instructions):
        return shaped
    if style != "vllm" or any(message["role"] == "assistant" for message in shaped.messages[: instructions[-1]]):
        raise TrajectoryError("a developer message is not shown in its place; send it with the role system")
    texts = [_text(shaped.messages[k]["content"], "system", style) for k in instructions]
    others = [message for message in shaped.messages if message["role"] not in ("system", "developer")]
    earlier = len(instructions) - 1
    return shaped._replace(
        messages=[{"role": "system", "content": "\n\n".join(texts)}, *others],
        not_trained={k - earlier: why for k, why in shaped.not_trained.items()},
        recorded={k - earlier: ids for k, ids in shaped.recorded.items()},
    )


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def _unfinished(message: dict) -> str | None:
    if message["role"] != "assistant":
        return None
    content = message["content"].strip()
    if "reasoning_content" not in message and content.startswith("<think>") and "</think>" not in content:
        return UNCLOSED
    return None if content or message.get("tool_calls") else EMPTY


def served_trajectory(row: dict, style: str, control_tokens: tuple) -> tuple[list[dict], list[dict] | None]:
    """The messages and tools of a row in the one shape as a server hands them to the chat template.

    Tools are as the server prints them, and text parts joined as it does (see `server_styles`). What a client would
    mend before it sends the row is mended: null is no text, an object that a tool returned is its JSON. Reasoning,
    whether in `reasoning_content` or inline in `content`, comes out in `reasoning_content`.

    Returns (messages, tools): new dicts, the row is left alone; tools is None where there are none.
    Raises TrajectoryError, also where a text holds one of `control_tokens`.
    """
    if not row["messages"]:
        raise TrajectoryError("the trajectory has no messages")
    _refuse_control_tokens({"tools": row["tools"]}, control_tokens)
    served = []
    for position, message in enumerate(row["messages"]):
        try:
            served.append(_served_message(message, style))
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
    for position, message in enumerate(served):
        _refuse_control_tokens(message, control_tokens, f"message {position}: ")
    if not any(message["role"] == "assistant" for message in served):
        raise TrajectoryError("the trajectory has no assistant message, so there is nothing to train on")
    return served, [served_tool(tool, style) for tool in row["tools"] or ()] or None


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


def _served_message(message: dict, style: str) -> dict:
    role = message["role"]
    if role not in ROLES:
        raise TrajectoryError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    served = {key: value for key, value in message.items() if key not in ("reasoning_content", "tool_calls")}
    served["content"] = _text(message["content"], role, style)
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
            served["tool_calls"] = [_served_call(call, style) for call in calls]
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


def _served_call(call: dict, style: str) -> dict:
    arguments = given = call["function"]["arguments"]
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"tool call arguments are not valid JSON ({error})") from None
    if not arguments and not isinstance(arguments, (bool, int, float)):  # missing, null, "" and [] are no arguments
        arguments = {}
    if not isinstance(arguments, dict):
        raise TrajectoryError(f"tool call arguments are not a JSON object but {kind_of(arguments)}")
    if style == "sglang" and json.dumps(served_arguments(given, style)) != json.dumps(arguments):
        raise TrajectoryError("tool call arguments hold an integer over 64 bits, which SGLang shows as a float later")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _text(content, role: str, style: str) -> str:
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
        return joined([part["text"] for part in content], style)
    if role == "tool" and isinstance(content, (dict, list)):  # what a client sends; a template would render nothing
        return json.dumps(content, ensure_ascii=False, default=str)
    raise TrajectoryError(f"content is not text but {kind_of(content)}")
