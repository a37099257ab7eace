"""Content lists: Anthropic's blocks of reasoning, text, calls and tool results, and the text parts of all APIs."""

from dataclasses import dataclass, field

from served_tokens.marks import TrajectoryError, kind_of
from served_tokens.rows.keys import Reader, one_of
from served_tokens.rows.servers import Style

MEDIA = frozenset(
    "image image_url input_image video video_url audio audio_url input_audio file document tool_reference".split()
)
CONVERTED = {  # parts of shapes that are not read: what they must be converted to
    **dict.fromkeys(("tool-call", "functionCall"), "convert calls to tool_calls"),
    "redacted_thinking": 'its reasoning is not to be had: take the part out, and give the message "weight": 0',
    **dict.fromkeys(("reasoningContent", "thinking", "reasoning"), "convert reasoning to reasoning_content"),
}
ORDER = {"tool_result": 0, "thinking": 0, "reasoning": 0, "text": 1, "tool_use": 2}  # in which they come in a message
PARTS_OF = {"assistant": ("thinking", "reasoning", "tool_use"), "user": ("tool_result",)}  # beside texts


@dataclass
class Parts:
    """The parts of a content: texts, reasoning and calls of a turn, and outputs of tools as messages of role tool."""

    texts: list[dict] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    outputs: list[dict] = field(default_factory=list)


def parts_of(content: list, role: str, reader: Reader) -> Parts:
    """Read a content list; raises TrajectoryError, also where reasoning, text and calls stand in another order."""
    parts, last, kinds = Parts(), 0, {*PARTS_OF.get(str(role), ())} - {*reader.style.hidden}
    for part in content:
        kind = _type_of(part) if _type_of(part) in kinds else "text"
        if ORDER[kind] < last:
            order = "write reasoning, text and calls, or outputs and text, in this order"
            raise TrajectoryError(f"a part of type {kind} comes after others that belong behind it; {order}")
        last = ORDER[kind]
        if kind == "text":
            parts.texts.append(_text_part(part, reader))
        elif kind == "tool_use":
            parts.calls.append({**part, "type": "function"})
        elif kind == "tool_result":
            its = reader.read(part, "part", ("type", "content", "tool_use_id"))
            output = {"role": "tool", "content": output_of(its.get("content"), reader)}
            parts.outputs.append(output | {"tool_call_id": its["tool_use_id"]} if its.get("tool_use_id") else output)
        else:
            parts.thoughts.append(thought_of(part, reader))
    return parts


def are_texts(parts) -> bool:
    """Whether this is a list of text parts; objects that a tool returned may have texts too."""
    return isinstance(parts, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and (part["type"] == "text" if "type" in part else len(part) == 1)
        for part in parts
    )


def text_of(content, style: Style) -> str:
    """The text that a server makes of a content; raises TrajectoryError where it is none."""
    if content is None:
        return ""
    if are_texts(content):
        return style.joined([part["text"] for part in content])
    if not isinstance(content, str):
        raise TrajectoryError(f"content is not text but {kind_of(content)}")
    return content


def output_of(content, reader: Reader):
    """What a tool returned, of which text parts are read; raises TrajectoryError for parts that are pictures or so."""
    if are_texts(content) or (isinstance(content, list) and any(_type_of(part) in MEDIA for part in content)):
        return [_text_part(part, reader) for part in content]
    return content


def thought_of(part, reader: Reader) -> str:
    """The reasoning of a part of a turn; raises TrajectoryError."""
    kind = _type_of(part)
    if kind not in ("thinking", "reasoning"):
        raise _unread(part)
    its = reader.read(part, "part", ("type", kind, "text", "closed"))
    thought = one_of({kind: its.get(kind), "text": its.get("text")}, "the reasoning")
    if are_texts(thought):  # Magistral's list
        thought = "".join(text["text"] for text in thought)
    if not (isinstance(thought, str) and thought):  # all that there is of it may be a signature
        raise TrajectoryError(f"a part of type {kind} holds no whole text; leave the turn out by weight: 0")
    return thought


def _text_part(part, reader: Reader) -> dict:
    if not are_texts([part]):
        raise _unread(part)
    return reader.read(part, "part", ("type", "text"))


def _type_of(part) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def _unread(part) -> TrajectoryError:
    """The error of a part that is no text, and what to do about it."""
    kind = _type_of(part)
    if kind is None and isinstance(part, dict):
        kind = next((key for key in CONVERTED if key in part), None)
    if kind is None:
        return TrajectoryError("content is not text but a list")
    way_out = CONVERTED.get(kind, "write what it says as text, or leave it out of the row")
    return TrajectoryError(f"content has a part of type {kind}, which nobody reads; {way_out}")
