"""Content lists: Anthropic's blocks of reasoning, text, calls and tool results, and the text parts of all APIs."""

from dataclasses import dataclass

from served_tokens.marks import TrajectoryError, kind_of
from served_tokens.rows.keys import Reader, one_of

MEDIA = frozenset("image image_url input_image video video_url audio audio_url input_audio file document".split())
CONVERTED = {  # parts of shapes that are not read: what they must be converted to
    **dict.fromkeys(("tool-call", "toolUse", "functionCall"), "convert calls to tool_calls"),
    **dict.fromkeys(("tool-result", "toolResult", "functionResponse"), "convert outputs to messages of role tool"),
    "redacted_thinking": "its reasoning is not to be had: take the part out, and leave the turn out by weight: 0",
    "reasoningContent": "convert reasoning to reasoning_content",
}


@dataclass
class Parts:
    """The content of a turn: text parts (None where it has calls or reasoning alone), reasoning, calls as given."""

    texts: list | None
    reasoning: str | None
    calls: list[dict]


def are_texts(parts) -> bool:
    """Whether this is a list of text parts; objects that a tool returned may have texts too."""
    return isinstance(parts, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and (part["type"] == "text" if "type" in part else len(part) == 1)
        for part in parts
    )


def texts_of(parts: list, reader: Reader) -> list[dict]:
    """The parts of a message that is no turn: texts alone; raises TrajectoryError."""
    return [_text_part(part, reader) for part in parts]


def parts_of_turn(parts: list, reader: Reader) -> Parts:
    """The parts of a turn, in the order in which the model writes them: reasoning, text, calls.

    Raises TrajectoryError where they come in another order.
    """
    texts, thoughts, calls, last = [], [], [], 0
    for part in parts:
        kind = _type_of(part)
        if kind in ("thinking", "reasoning"):
            order = 0
            thoughts.append(_thought(part, kind, reader))
        elif kind == "tool_use":
            order, left = 2, reader.opened(part, "part")
            arguments = one_of({key: left.pop(key, None) for key in ("input", "arguments")}, "a call's arguments")
            read = {"id": left.pop("id", None), "type": "function"}
            name = left.pop("name", None)
            calls.append({**read, "function": {"name": name, "arguments": arguments}})
            del left["type"]
            reader.closed(left, "part")
        else:
            order = 1
            texts.append(_text_part(part, reader))
        if order < last:
            raise TrajectoryError(f"a part of type {kind} comes after others that the model writes later")
        last = order
        reader.shapes[f"content part {kind}"] += order != 1
    none = not texts and (thoughts or calls)
    return Parts(None if none else texts, "\n".join(filter(None, thoughts)) or None, calls)


def tool_results(parts: list, reader: Reader) -> tuple[list[dict], list[dict]]:
    """(messages of role tool, the text parts behind them) of a user message's content; raises TrajectoryError."""
    outputs, texts = [], []
    for part in parts:
        if _type_of(part) != "tool_result":
            texts.append(_text_part(part, reader))
            continue
        if texts:
            raise TrajectoryError("a part of type tool_result comes after text")
        left = reader.opened(part, "part")
        content = left.pop("content", None)
        outputs.append({"role": "tool", "content": texts_of(content, reader) if are_texts(content) else content})
        if (identity := left.pop("tool_use_id", None)) is not None:
            outputs[-1]["tool_call_id"] = identity
        del left["type"]
        reader.closed(left, "part")
        reader.shapes["content part tool_result"] += 1
    return outputs, texts


def reasoning_of_blocks(blocks, reader: Reader) -> str | None:
    """The reasoning of a list of thinking blocks that stands beside the content (LiteLLM); raises TrajectoryError."""
    if blocks is None:
        return None
    if not isinstance(blocks, list):
        raise TrajectoryError(f"thinking_blocks is not a list but {kind_of(blocks)}")
    if any(_type_of(block) != "thinking" for block in blocks):
        raise _unread(next(block for block in blocks if _type_of(block) != "thinking"))
    return "\n".join(_thought(block, "thinking", reader) or "" for block in blocks)


def _thought(part: dict, kind: str, reader: Reader) -> str | None:
    left = reader.opened(part, "part")
    thought = one_of({key: left.pop(key, None) for key in (kind, "text")}, "the reasoning")
    if are_texts(thought):  # Magistral's list
        thought = "".join(text["text"] for text in thought)
    if not isinstance(thought or "", str):
        raise TrajectoryError(f"reasoning is not a string but {kind_of(thought)}")
    del left["type"]
    if left.get("closed") is True:
        del left["closed"]
    if not thought and left:
        raise TrajectoryError(f"a part of type {kind} has no text but {', '.join(left)}")
    reader.closed(left, "part")
    return thought


def _text_part(part, reader: Reader) -> dict:
    if not are_texts([part]) and not (_type_of(part) == "text" and isinstance(part.get("text"), str)):
        raise _unread(part)
    left = reader.opened(part, "part")
    kept = {key: left.pop(key) for key in ("type", "text") if key in left}
    reader.closed(left, "part")
    return kept


def _type_of(part) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def _unread(part) -> TrajectoryError:
    """The error of a part that is no text, and what to do about it."""
    kind = _type_of(part)
    kind = next((key for key in CONVERTED if isinstance(part, dict) and key in part), None) if kind is None else kind
    if kind in MEDIA:
        return TrajectoryError(f"content has a part of type {kind}, which is no text; leave it out of the row")
    if kind is None:
        return TrajectoryError("content is not text but a list")
    way_out = CONVERTED.get(kind, "write what it says as text, or leave it out of the row")
    return TrajectoryError(f"content has a part of type {kind}, which nobody reads; {way_out}")
