"""One shape for all rows: OpenAI messages with `tools`, whichever of the known shapes they came in.

What is read of an object is taken out of a copy of it. So what is left over in the end is what nobody reads, whatever
its key is called; `refuse_suspicious` decides about it.
"""

from collections import Counter
from typing import NamedTuple

from served_tokens.marks import TrajectoryError, decoded, is_text_parts, kind_of, says
from served_tokens.rows.message_shapes import (
    RECORDED,
    Reader,
    message_of,
    message_of_sharegpt,
    one_of,
    tools_of,
    why_cut,
)

IN_PROMPT = "they are in the prompt of a row of which the completion is trained"


class Shaped(NamedTuple):
    """A row in the one shape.

    messages: [{"role", "content", …}]; content is None, a text, a list of text parts, or what a tool returned. A turn
        may have "reasoning_content" and "tool_calls": [{"function": {"name", "arguments"}, …}].
    tools: None where there are none.
    not_trained: {position of a turn in messages: why}
    thinking: what the row says of `enable_thinking`, or None.
    recorded: {position of a turn: {key of RECORDED: token ids}}
    shapes: {name: how often it was met}
    unread: [(kind of object, key, value)]
    """

    messages: list
    tools: list | None
    not_trained: dict
    thinking: bool | None
    recorded: dict
    shapes: Counter
    unread: list


def in_one_shape(row: dict, read_as: tuple = (), ignore_keys: tuple = ()) -> Shaped:
    """A row of any known shape as OpenAI messages and tools; raises TrajectoryError.

    Args:
        read_as: (key, field) pairs, see FIELDS.
        ignore_keys: keys that are read as if they were not there.
    """
    reader = Reader(read_as, ignore_keys, Counter(), [])
    left = reader.copied(row, "row")
    given, first_trained, from_sharegpt = _conversation(left, reader)
    thinking = _thinking(left)
    messages, not_trained = [], {}
    tools = {key: tools_of(left.pop(key), key, from_sharegpt, reader) for key in ("tools", "functions") if key in left}
    for position, raw in enumerate(given):
        try:
            message = message_of_sharegpt(reader.copied(raw, "message"), reader) if from_sharegpt else raw
            read, why, own_tools = message_of(reader.copied(message, "message"), reader)
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
        if own_tools is not None:
            tools["tools of the system message"] = own_tools
            reader.shapes["tools in the system message"] += 1
        is_turn = read[-1]["role"] == "assistant"
        if is_turn and (why or position < first_trained):
            not_trained[len(messages) + len(read) - 1] = why or IN_PROMPT
        messages += read
    if (system := _system(left, messages, reader)) is not None:
        messages.insert(0, system)
        not_trained = {position + 1: why for position, why in not_trained.items()}
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if turns and (why := why_cut(left)):
        not_trained.setdefault(turns[-1], why)
    recorded = _recorded(left, [messages[position] for position in turns])
    recorded = {position: its for position, its in zip(turns, recorded) if its}
    reader.leave(left, "row")
    return Shaped(messages, one_of(tools, "tools"), not_trained, thinking, recorded, reader.shapes, reader.unread)


def holds_conversation(columns) -> bool:
    """Whether rows with these columns are of a known shape."""
    return "messages" in columns or "conversations" in columns or {"prompt", "completion"} <= {*columns}


def _conversation(left: dict, reader: Reader) -> tuple[list, int, bool]:
    """(messages as given, the first of them that is trained, whether they are ShareGPT's)"""
    found = [key for key in ("messages", "conversations") if says(left.get(key))]
    if len(found) == 2 or (found and isinstance(left.get("completion"), list)):
        raise TrajectoryError(f"has {found[0]} beside {(found[1:] or ['completion'])[0]}; ignore one by --ignore-key")
    if not found and says(left.get("completion")):
        if "prompt" not in left:
            raise TrajectoryError("has a completion and no prompt")
        prompt, completion = (decoded(left.pop(key), key) for key in ("prompt", "completion"))
        reader.shapes["prompt and completion"] += 1
        return prompt + completion, len(prompt), False
    if not found and "messages" not in left:
        has = ", ".join(map(str, left)) or "none"
        raise TrajectoryError(
            f"the row has no column messages; it has {has}; read one of them by --read-as KEY=messages"
        )
    column = found[0] if found else "messages"
    messages = decoded(left.pop(column), column)
    from_sharegpt = any(isinstance(message, dict) and "from" in message for message in messages)
    reader.shapes["ShareGPT conversations" if from_sharegpt else "OpenAI messages"] += 1
    return messages, 0, from_sharegpt


def _thinking(left: dict) -> bool | None:
    key, kwargs = "enable_thinking", left.pop("chat_template_kwargs", None)
    kwargs = decoded(kwargs, "chat_template_kwargs", dict) if says(kwargs) else {}
    for other in kwargs:
        if other != key and kwargs[other] is not None:
            raise TrajectoryError(f"chat_template_kwargs has {other}, which step 1 does not pass to the chat template")
    thinking = one_of({"the row": left.pop("enable_thinking", None), "chat_template_kwargs": kwargs.get(key)}, key)
    if not isinstance(thinking, (bool, type(None))):
        raise TrajectoryError(f"{key} is not true or false but {kind_of(thinking)}")
    return thinking


def _recorded(left: dict, turns: list[dict]) -> list[dict]:
    """Of each turn, the token ids that a server recorded, in the turn or in the row: of each turn, or of the last."""
    recorded = [{key: turn.pop(key) for key in RECORDED if key in turn} for turn in turns]
    for key in RECORDED:
        of_row = left.pop(key, None) or []
        of_each = isinstance(of_row, list) and all(isinstance(ids, list) for ids in of_row)
        of_row = of_row if of_each else [of_row]
        if len(of_row) not in (0, 1, len(turns)):
            raise TrajectoryError(f"{key} of the row are those of {len(of_row)} turns, and it has {len(turns)}")
        for its, ids in zip(recorded[len(turns) - len(of_row) :], of_row):
            its[key] = one_of({"the turn": its.get(key), "the row": ids}, key)
    for its in recorded:
        if not all(isinstance(ids, list) and all(type(number) is int for number in ids) for ids in its.values()):
            raise TrajectoryError(f"{' and '.join(its)} are no lists of token ids")
    return recorded


def _system(left: dict, messages: list, reader: Reader) -> dict | None:
    """The column `system` as a message, where the messages do not have it."""
    content = left.pop("system", None)
    if not says(content):
        return None
    if not isinstance(content, str) and not is_text_parts(content):
        raise TrajectoryError(f"column system is not text but {kind_of(content)}")
    reader.shapes["system column"] += 1
    if messages and messages[0]["role"] in ("system", "developer"):
        one_of({"column system": content, "the first message": messages[0]["content"]}, "the system prompt")
        return None
    return {"role": "system", "content": content}
