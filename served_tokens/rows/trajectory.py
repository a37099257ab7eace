"""A trajectory as served: what an OpenAI-compatible server hands to the chat template for the messages of a row."""

import functools
import itertools
import json
import re
from dataclasses import asdict, dataclass, field

from served_tokens.marks import CONTROL_TOKENS, TrajectoryError, in_json, kind_of
from served_tokens.rows.anthropic import MEDIA, are_texts
from served_tokens.rows.keys import Reader
from served_tokens.rows.other import Shaped, in_one_shape
from served_tokens.rows.servers import STYLES, joined, refuse_changed_arguments, served_tool

ROLES = ("system", "user", "assistant", "tool")
CALL_TEXT = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)
OTHER_THINKING = re.compile(  # reasoning at the start of an answer under marks that are not Qwen's
    r"\s*(?:(?:<|&lt;)\|?[a-z_:]*(?:think|thought|reason|reflect|scratchpad|analys|rationale|monolog|cot\b)[a-z_:]*[^>]*?"
    r"(?:>|&gt;)|\[[a-z_]*(?:think|thought|reason)[a-z_]*\]|\*\*think|◁think▷|<\|(?:channel|start)\|>)",
    re.IGNORECASE,
)
PARTS = ("text", "thinking", "reasoning", "redacted_thinking", "tool_use", "tool_result", "output_text", "input_text")
# Why a turn is context only, beside what the row says itself (see `openai`).
UNCLOSED = "they open a <think> and do not close it, so they were cut off"
EMPTY = "they have neither text nor calls"
NO_TOOLS = (
    "calls tools and offers none, so it was served with others; add them to the row, or keep it by "
    "--allow-calls-without-tools where the system text holds them"
)


@dataclass(frozen=True)
class Reading:
    """How step 1 reads rows, as in its command; its rows and samples carry it, so that the check reads them so too."""

    read_as: tuple = ()  # (key, field) pairs
    ignore_keys: tuple = ()
    allow_control_tokens: bool = False
    allow_calls_without_tools: bool = False
    server_style: str = "vllm"  # see `servers`
    echo: str = "none"  # see `echo`

    def told(self) -> dict:
        """What the prompts follow, and what else is not the default, as JSON has it."""
        default = asdict(Reading())
        changed = {key: value for key, value in asdict(self).items() if value != default[key]}
        return {"server_style": self.server_style, "echo": self.echo} | changed

    @classmethod
    def of(cls, told: dict) -> "Reading":
        """The one that `told` tells of; raises TypeError where another version told it."""
        pairs = tuple(map(tuple, told.get("read_as", ())))
        return cls(**{**told, "read_as": pairs, "ignore_keys": tuple(told.get("ignore_keys", ()))})


AS_IT_IS = Reading()


@dataclass
class Trajectory:
    """A row as it is served, and what was met on the way.

    messages, tools: what the chat template gets; tools is None where there are none.
    given: the row in the one shape, before a server took it; messages at the same positions.
    not_trained: {position of a turn: why it is context only}.
    """

    messages: list[dict]
    tools: list[dict] | None
    given: Shaped
    not_trained: dict[int, str] = field(default_factory=dict)

    @property
    def turns(self) -> list[int]:
        """The positions of the assistant messages."""
        return [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_trajectory(row: dict, reading: Reading = AS_IT_IS, control_tokens: tuple = CONTROL_TOKENS) -> Trajectory:
    """A row of any known shape as it is served.

    Tools are as the server prints them, and text parts joined as it does. What a client would mend before it sends the
    row is mended: null is no text, an object that a tool returned is its JSON. Reasoning, whether in its own field or
    inline in the content, comes out in `reasoning_content`.
    Raises TrajectoryError where the row is to be set aside, also where a text holds one of the control tokens.
    """
    style = reading.server_style
    reader = Reader(reading.read_as, reading.ignore_keys, STYLES[style].prints_tools_as_sent)
    given = _developer_as_system(in_one_shape(row, reader), style)
    if not given.messages:
        raise TrajectoryError("the trajectory has no messages")
    tokens = () if reading.allow_control_tokens else control_tokens
    _refuse_control_tokens(given.tools or [], tokens)
    messages = []
    for position, message in enumerate(given.messages):
        try:
            messages.append(_served_message(message, style))
            _refuse_control_tokens(messages[-1].values(), tokens)
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        raise TrajectoryError("the trajectory has no assistant message, so there is nothing to train on")
    _refuse_empty_answers(messages)
    tools = [served_tool(tool, style) for tool in given.tools or ()] or None
    if not (tools or reading.allow_calls_without_tools) and any(turn.get("tool_calls") for turn in turns):
        raise TrajectoryError(f"the trajectory {NO_TOOLS}")
    not_trained = {position: why for position, message in enumerate(messages) if (why := _unfinished(message))}
    return Trajectory(messages=messages, tools=tools, given=given, not_trained=not_trained | given.not_trained)


def _developer_as_system(given: Shaped, style: str) -> Shaped:
    """vLLM puts all system and developer messages into one at the front where there is a developer message.

    Seen on 0.32.0. Where one comes after a turn, the prompts before it are without it, so no place is right for all.
    """
    instructions = [k for k, message in enumerate(given.messages) if message["role"] in ("system", "developer")]
    if not any(given.messages[k]["role"] == "developer" for k in instructions):
        return given
    after_a_turn = any(message["role"] == "assistant" for message in given.messages[: instructions[-1]])
    if not STYLES[style].developer_is_system or after_a_turn:
        raise TrajectoryError("a developer message is not shown in its place; send it with the role system")
    texts = [_text(given.messages[k]["content"], "system", style) for k in instructions]
    others = [message for message in given.messages if message["role"] not in ("system", "developer")]
    earlier = len(instructions) - 1
    given.messages = [{"role": "system", "content": "\n\n".join(texts)}, *others]
    given.not_trained = {k - earlier: why for k, why in given.not_trained.items()}
    given.recorded = {k - earlier: ids for k, ids in given.recorded.items()}
    return given


def _unfinished(message: dict) -> str | None:
    if message["role"] != "assistant":
        return None
    content = message["content"].strip()
    if "reasoning_content" not in message and content.startswith("<think>") and "</think>" not in content:
        return UNCLOSED
    return None if content or message.get("tool_calls") else EMPTY


def _refuse_empty_answers(messages: list[dict]) -> None:
    """Raise TrajectoryError for an answer of nothing that another one follows: no server made such a prompt."""
    for position, (message, following) in enumerate(itertools.pairwise(messages)):
        empty = _unfinished(message) == EMPTY
        if empty and following["role"] == "assistant":
            raise TrajectoryError(
                f"message {position}: has neither text nor calls, and another answer follows it; join the two"
            )


def _refuse_control_tokens(values, control_tokens: tuple) -> None:
    dump = functools.partial(json.dumps, ensure_ascii=False, default=str)
    text = "\n".join(value if isinstance(value, str) else dump(value) for value in values)
    if control_tokens and _any_of(control_tokens).search(text):
        found = next(token for token in control_tokens if token in text)
        raise TrajectoryError(
            f"the text holds the control token {found}, which could forge a message; take it out of the row, or keep "
            "it by --allow-control-tokens of step 1"
        )


@functools.cache
def _any_of(tokens: tuple) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))


def _served_message(message: dict, style: str) -> dict:
    role = message["role"]
    if role not in ROLES:
        raise TrajectoryError(f"unknown role {role!r}; convert it to one of {', '.join(ROLES)}")
    served = {key: value for key, value in message.items() if key not in ("reasoning_content", "tool_calls")}
    served["content"] = _text(message["content"], role, style)
    if role in ("user", "assistant"):
        _refuse_written_out_parts(served["content"])
    if role == "assistant":
        reasoning, served["content"] = _reasoning_and_answer(message.get("reasoning_content") or "", served["content"])
        if reasoning:
            served["reasoning_content"] = reasoning
        if "<tool_response>" in served["content"] or "<tool_response>" in reasoning:
            raise TrajectoryError(
                "has the output of a tool inside the answer (<tool_response>), which would be trained as the model's "
                "own words; convert it to messages"
            )
        if calls := message.get("tool_calls"):
            served["tool_calls"] = [_served_call(call, style) for call in calls]
            _refuse_twice(served)
    return served


def _reasoning_and_answer(reasoning: str, content: str) -> tuple[str, str]:
    """Reasoning from its own field or inline, and the answer without it; raises TrajectoryError where marks lie."""
    if not reasoning:
        other = OTHER_THINKING.match(content)
        if other and not content.lstrip().startswith("<think>"):
            raise TrajectoryError(
                f"its answer opens with {other[0].strip()}: reasoning that would be trained as text; convert it "
                "to reasoning_content"
            )
        inline, answer = _inline_reasoning(content)
        return inline or "", answer
    if "</think>" in reasoning or reasoning.lstrip().startswith("<think>"):
        raise TrajectoryError("has think marks inside its reasoning field; take <think> and </think> out of it")
    if content.lstrip().startswith(("<think>", "</think>")):
        inline, answer = _inline_reasoning(content)
        if inline is None or inline.strip() != reasoning.strip():
            what = "stray think marks" if not (inline or "").strip() else "other reasoning"
            raise TrajectoryError(f"has {what} in content beside its reasoning field; take one of them out")
        content = answer
    return reasoning, content


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


def _refuse_written_out_parts(content: str) -> None:
    """Raise TrajectoryError for a text that is the JSON of content parts."""
    parts = in_json(content) if content.lstrip()[:1] in ("[", "{") else None
    parts = [parts] if isinstance(parts, dict) else parts
    if isinstance(parts, list) and parts and all(map(_is_part, parts)):
        raise TrajectoryError("content is a text that holds the JSON of content parts; write the list itself")


def _is_part(part) -> bool:
    return isinstance(part, dict) and (part.get("type") in PARTS or part.keys() >= {"role", "content"})


def _refuse_twice(turn: dict) -> None:
    """A call in the text and in the field would be made twice."""
    for text in CALL_TEXT.findall(turn["content"]):
        for function in (call["function"] for call in turn["tool_calls"]):
            if json.dumps(function["name"]) in text:
                raise TrajectoryError(f"has a call of {function['name']} both as text and in tool_calls")


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
    refuse_changed_arguments(given, arguments, style)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _text(content, role: str, style: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    for kind in (part.get("type") for part in parts if isinstance(part, dict)):
        if isinstance(kind, str) and kind in MEDIA:
            raise TrajectoryError(f"content has a part of type {kind}, which is no text; leave it out of the row")
    if are_texts(content):
        return joined([part["text"] for part in content], style)
    if role == "tool" and isinstance(content, (dict, list)):  # what a client sends; a template would render nothing
        return json.dumps(content, ensure_ascii=False, default=str)
    raise TrajectoryError(f"content is not text but {kind_of(content)}")
