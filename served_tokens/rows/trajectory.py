"""A trajectory as served: what an OpenAI-compatible server hands to the chat template for the messages of a row."""

import itertools
import json
import re
from dataclasses import asdict, dataclass, field

from served_tokens.marks import CONTROL_TOKENS, TrajectoryError, decoded, in_json
from served_tokens.rows.anthropic import are_texts, text_of
from served_tokens.rows.keys import Reader
from served_tokens.rows.other import Shaped, in_one_shape
from served_tokens.rows.servers import STYLES, Style

ROLES = ("system", "user", "assistant", "tool")
NO_KWARGS = frozenset(  # what renders a chat template takes itself
    "messages conversation tools documents chat_template tokenize add_generation_prompt continue_final_message".split()
)
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
EMPTY_BEFORE_ANOTHER = "has neither text nor calls, and another answer follows it; join the two"
LAST_IS_USER = "they follow right on another turn, which the server shows them as a user message"
NO_TOOLS = "calls tools and offers none; add them to the row, or keep it by --allow-calls-without-tools"


@dataclass(frozen=True)
class Reading:
    """How step 1 reads rows, as in its command; its rows and samples carry it, so that the check reads them so too."""

    read_as: list = field(default_factory=list)  # (key, field) pairs
    ignore_keys: list = field(default_factory=list)
    allow_control_tokens: bool = False
    allow_calls_without_tools: bool = False
    server_style: str = "vllm"  # see `servers`
    echo: str = "none"  # see `echo`
    template_kwargs: dict = field(default_factory=dict)  # what the chat template gets too; those of a row win

    def told(self) -> dict:
        """What the prompts follow, and what else is not the default: its fields, which make it again."""
        default = asdict(Reading())
        changed = {key: value for key, value in asdict(self).items() if value != default[key]}
        return {"server_style": self.server_style, "echo": self.echo} | changed


AS_IT_IS = Reading()


@dataclass
class Trajectory:
    """A row as it is served: what the chat template gets, and what was met on the way."""

    messages: list[dict]
    tools: list[dict] | None  # None where there are none
    template_kwargs: dict
    given: Shaped  # the row before a server took it; messages at the same positions
    not_trained: dict[int, str]  # {position of a turn: why it is context only}

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
    style = STYLES[reading.server_style]
    given = in_one_shape(row, Reader(reading.read_as, reading.ignore_keys, style))
    tokens = () if reading.allow_control_tokens else control_tokens
    _refuse_control_tokens(given.tools or [], tokens)
    messages, not_trained = [], {}
    for position, message in enumerate(given.messages):
        try:
            messages.append(_served_message(message, style))
            _refuse_control_tokens(messages[-1].values(), tokens)
        except TrajectoryError as error:
            raise TrajectoryError(f"{given.places[position]}: {error}") from None
        if why := _unfinished(messages[-1]):
            not_trained[position] = why
    tools = [style.tool(tool) for tool in given.tools or ()] or None
    kwargs = reading.template_kwargs | given.template_kwargs
    if taken := sorted(kwargs.keys() & NO_KWARGS):
        raise TrajectoryError(f"chat_template_kwargs has {taken[0]}, which no request can hand to a chat template")
    if given.thinking is None:
        given.thinking = kwargs.get("enable_thinking")
    elif "enable_thinking" in kwargs:
        kwargs["enable_thinking"] = given.thinking
    context = not_trained | given.not_trained
    trajectory = Trajectory(messages, tools, template_kwargs=kwargs, given=given, not_trained=context)
    if not trajectory.turns:
        raise TrajectoryError("the trajectory has no assistant message, so there is nothing to train on")
    for before, turn in itertools.pairwise(trajectory.turns):
        if turn == before + 1 and not_trained.get(before) == EMPTY:  # no server made such a prompt
            raise TrajectoryError(f"{given.places[before]}: {EMPTY_BEFORE_ANOTHER}")
        if turn == before + 1 and style.last_is_user:
            trajectory.not_trained.setdefault(turn, LAST_IS_USER)
    if not (tools or reading.allow_calls_without_tools) and any("tool_calls" in message for message in messages):
        raise TrajectoryError(f"the trajectory {NO_TOOLS}")
    return trajectory


def _unfinished(message: dict) -> str | None:
    if message["role"] != "assistant":
        return None
    content = message["content"].strip()
    if "reasoning_content" not in message and content.startswith("<think>") and "</think>" not in content:
        return UNCLOSED
    return None if content or message.get("tool_calls") else EMPTY


def _refuse_control_tokens(values, control_tokens: tuple) -> None:
    text = "\n".join(value if isinstance(value, str) else _json(value) for value in values)
    if found := next((token for token in control_tokens if token in text), None):
        raise TrajectoryError(
            f"the text holds the control token {found}; take it out, or keep it by --allow-control-tokens of step 1"
        )


_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # json.dumps would make one for every call


def _served_message(message: dict, style: Style) -> dict:
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise TrajectoryError(f"unknown role {role!r}; convert it to one of {', '.join(ROLES)}")
    if role == "tool" and isinstance(content, (dict, list)) and not are_texts(content):
        content = _json(content)  # what a client sends; a template would render nothing
    served = {**message, "content": text_of(content, style)}
    if role in ("user", "assistant"):
        _refuse_written_out_parts(served["content"])
    if role == "assistant":
        given = served.pop("reasoning_content", None) or ""
        reasoning, served["content"] = _reasoning_and_answer(given, served["content"])
        if "<tool_response>" in served["content"] or "<tool_response>" in reasoning:
            raise TrajectoryError(
                "has the output of a tool inside the answer (<tool_response>); convert it to a message of role tool"
            )
        if reasoning:
            served["reasoning_content"] = reasoning
        if "tool_calls" in served:
            served["tool_calls"] = [_served_call(call, style) for call in served["tool_calls"]]
            _refuse_twice(served)
    return served


def _reasoning_and_answer(reasoning: str, content: str) -> tuple[str, str]:
    """Reasoning from its own field or inline, and the answer without it; raises TrajectoryError where marks lie.

    The edges of inline reasoning are cut as in Qwen3's template. That would lose what stands before the first `<think>`
    or between two `</think>`: the first is an error here, the second stays in the answer.
    """
    if reasoning:
        if "</think>" in reasoning or reasoning.lstrip().startswith("<think>"):
            raise TrajectoryError("has think marks inside its reasoning field; take <think> and </think> out of it")
        if content.lstrip().startswith(("<think>", "</think>")):
            raise TrajectoryError("has stray think marks in content beside its reasoning field; take one of them out")
        return reasoning, content
    other = OTHER_THINKING.match(content)
    if other and not content.lstrip().startswith("<think>"):
        raise TrajectoryError(
            f"opens with {other[0].strip()}: reasoning that would be trained as text; convert it to reasoning_content"
        )
    before, close, answer = content.partition("</think>")
    if not close:
        return "", content
    lead, opened, reasoning = before.partition("<think>")
    if opened and lead.strip():
        raise TrajectoryError("has text before an inline <think> block, which the chat template would lose")
    return (reasoning if opened else before).strip("\n"), answer.lstrip("\n")


def _refuse_written_out_parts(content: str) -> None:
    """Raise TrajectoryError for a text that is the JSON of content parts."""
    value = in_json(content)
    parts = value if isinstance(value, list) else [value]
    if parts and all(
        isinstance(part, dict) and (part.get("type") in PARTS or part.keys() >= {"role", "content"}) for part in parts
    ):
        raise TrajectoryError("content is a text that holds the JSON of content parts; write the list itself")


def _refuse_twice(turn: dict) -> None:
    """A call in the text and in the field would be made twice."""
    in_text = "\n".join(CALL_TEXT.findall(turn["content"]))
    for name in (call["function"]["name"] for call in turn["tool_calls"]):
        if json.dumps(name) in in_text:
            raise TrajectoryError(f"has a call of {name} both as text and in tool_calls")


def _served_call(call: dict, style: Style) -> dict:
    given = call["function"]["arguments"]
    arguments = decoded(given, "tool call arguments are", dict)
    style.refuse_arguments(given, arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}
