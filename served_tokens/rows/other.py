"""Rows of any known shape as one: which column holds the conversation, and what else of a row is part of it."""

from collections import Counter
from dataclasses import dataclass, field

from served_tokens.marks import TrajectoryError, decoded, in_json, is_empty, kind_of, says
from served_tokens.rows import anthropic, sharegpt
from served_tokens.rows.keys import CONVERT, Reader, one_of, thinking_of
from served_tokens.rows.openai import NOT_FINISHED, RECORDED, Read, message_of, tools_of, why_cut

CONVERSATIONS, TOOLS = ("messages", "conversations"), ("tools", "functions", "tool_defs")
ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERS = ROLES + tuple("model gpt chatgpt ai bot claude agent llm human function tool_call function_call".split())
IN_PROMPT = "they are in the prompt of a row of which the completion is trained"
BEHIND = "messages behind the last turn of a role that is no chat, which change no prompt"


@dataclass
class Shaped:
    """A row in the one shape (see `openai`).

    messages, tools: tools is None where there are none.
    not_trained: {position of a turn in messages: why it is context only}.
    thinking: what the row says of `enable_thinking`, or None.
    recorded: {position of a turn: {"prompt_token_ids": …, "token_ids": …}} as a server recorded them; one may lack.
    shapes, known: see `Reader`.
    """

    messages: list[dict]
    tools: list[dict] | None
    not_trained: dict[int, str] = field(default_factory=dict)
    thinking: bool | None = None
    recorded: dict[int, dict] = field(default_factory=dict)
    shapes: Counter = field(default_factory=Counter)
    known: Counter = field(default_factory=Counter)


def holds_conversation(columns) -> bool:
    """Whether rows with these columns are of a known shape."""
    return any(column in columns for column in CONVERSATIONS) or {"prompt", "completion"} <= {*columns}


def in_one_shape(row: dict, reader: Reader) -> Shaped:
    """A row of any known shape as OpenAI messages and tools; raises TrajectoryError.

    An error names the first message that cannot be read, else all keys that nobody reads.
    """
    left = reader.opened(row, "row")
    thinking = thinking_of(left)
    given, first_trained = _conversation(left, reader)
    reads = _all_read(given, reader)
    tools = {column: tools_of(left.pop(column), column, reader) for column in TOOLS if column in left}
    tools |= {f"tools of message {position}": read.tools for position, read in enumerate(reads) if read.tools}
    reader.shapes["tools in the system message"] += sum(bool(read.tools) for read in reads)
    if isinstance(left.get("function_call"), str):  # "auto": as tool_choice has it now
        del left["function_call"]
    messages, not_trained = _joined(reads, first_trained, reader)
    if system := _system(left, messages, reader):
        messages.insert(0, system)
        not_trained = {position + 1: why for position, why in not_trained.items()}
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if turns and (why := why_cut(left)):
        not_trained.setdefault(turns[-1], why)
    recorded = _recorded(left, [messages[position] for position in turns])
    cut = reader.closed(left, "row")
    if cut and turns:
        not_trained.setdefault(turns[-1], NOT_FINISHED.format(cut))
    reader.refuse_unknown()
    return Shaped(
        messages=messages,
        tools=one_of(tools, "tools"),
        not_trained=not_trained,
        thinking=thinking,
        recorded={position: ids for position, ids in zip(turns, recorded) if ids},
        shapes=reader.shapes,
        known=reader.known,
    )


def _conversation(left: dict, reader: Reader) -> tuple[list, int]:
    """(the messages as given, the first of them that is trained)"""
    found = [key for key in CONVERSATIONS if not is_empty(left.get(key))]
    if len(found) == 2:
        raise TrajectoryError(f"has {' beside '.join(found)}; leave one out by --ignore-key row.{found[1]}")
    if not found and not is_empty(left.get("completion")) and not is_empty(left.get("prompt")):
        prompt, completion = (decoded(left.pop(key), f"column {key}") for key in ("prompt", "completion"))
        reader.shapes["prompt and completion"] += 1
        return prompt + completion, len(prompt)
    if not found and "messages" in left and not any(f"row.{key}" in CONVERT for key in left):
        found = ["messages"]  # an empty one
    if not found:
        converted = [f"{key} ({CONVERT[f'row.{key}'].format(key)})" for key in left if f"row.{key}" in CONVERT]
        has = ", ".join(converted or map(str, left)) or "none"
        holds = next((key for key in left if _are_messages(in_json(left[key]))), "KEY")
        way_out = "" if converted else f"; read the one that holds them by --read-as {holds}=messages"
        raise TrajectoryError(f"the row has no column messages; it has {has}{way_out}")
    return decoded(left.pop(found[0]), f"column {found[0]}"), 0


def _are_messages(value) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value)


def _all_read(given: list, reader: Reader) -> list[Read]:
    reads, from_sharegpt = [], sharegpt.is_sharegpt(given)
    reader.shapes["ShareGPT conversations" if from_sharegpt else "OpenAI messages"] += 1
    for position, raw in enumerate(given):
        try:
            left = reader.opened(raw, "message")
            reads.append(message_of(sharegpt.as_openai(left) if from_sharegpt else left, reader))
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
    return reads


def _joined(reads: list[Read], first_trained: int, reader: Reader) -> tuple[list[dict], dict[int, str]]:
    """(the messages of all, {position of a turn: why it is context only})

    Messages that are parts of one answer, as their id says, become one, before the outputs of its calls. A message of
    an unknown role behind the last turn is dropped.
    """
    messages, not_trained, last, answer = [], {}, None, None
    not_of_answers = [None, *(read.answer for read in reads if read.messages[-1]["role"] != "assistant")]
    answers = [read.answer for read in reads if read.messages[-1]["role"] == "assistant"]
    several = any(answer != answers[0] for answer in answers)
    for position, read in enumerate(reads):
        turn = read.messages[-1]
        if turn["role"] == "assistant":
            only_outputs = last is not None and all(message["role"] == "tool" for message in messages[last + 1 :])
            if only_outputs and read.answer == answer and read.answer not in not_of_answers:
                if messages[last + 1 :] and not several:
                    raise TrajectoryError("all its answers have one id, so which messages are one answer is not known")
                _join(messages[last], turn)
                reader.shapes["answers cut into several messages"] += 1
                if read.not_trained:
                    not_trained[last] = read.not_trained
                continue
            last, answer = len(messages), read.answer
            if read.not_trained or position < first_trained:
                not_trained[last] = read.not_trained or IN_PROMPT
        messages += read.messages
    while last is not None and len(messages) > last + 1 and _is_no_chat(messages[-1]["role"]):
        reader.shapes[BEHIND] += 1
        messages.pop()
    return messages, not_trained


def _is_no_chat(role) -> bool:
    return isinstance(role, str) and role.lower() not in ANSWERS and "tool" not in role.lower()


def _join(turn: dict, part: dict) -> None:
    """Add a further part of an answer to a turn; raises TrajectoryError where the parts are not in order."""
    late = turn.get("tool_calls") and (says(part["content"]) or part.get("reasoning_content"))
    if late or (says(turn["content"]) and part.get("reasoning_content")):
        raise TrajectoryError("an answer is cut into messages of one id, in another order than reasoning, text, calls")
    for key, empty in (("content", ""), ("reasoning_content", ""), ("tool_calls", [])):
        if says(part.get(key)) and not (key == "content" and part[key] == turn.get(key)):
            before = turn.get(key) or empty
            if key == "content" and isinstance(before or part[key], list) != isinstance(part[key], list):
                raise TrajectoryError("an answer is cut into messages of one id, some of texts and some of lists")
            turn[key] = before + part[key] if before else part[key]


def _recorded(left: dict, turns: list[dict]) -> list[dict]:
    """Of each turn, the token ids that a server recorded, in the turn or in the row: of each turn, or of the last."""
    recorded = [{key: turn.pop(key) for key in RECORDED if key in turn} for turn in turns]
    for key in RECORDED:
        of_row = left.pop(key, None) or []
        of_each = isinstance(of_row, list) and all(isinstance(ids, list) for ids in of_row)
        of_row = of_row if of_each else [of_row]
        if len(of_row) not in (0, 1, len(turns)):
            raise TrajectoryError(f"{key} of the row are those of {len(of_row)} turns, and it has {len(turns)}")
        for ids_of_turn, ids in zip(recorded[len(turns) - len(of_row) :], of_row):
            ids_of_turn[key] = one_of({"the turn": ids_of_turn.get(key), "the row": ids}, key)
    for ids_of_turn in recorded:
        for ids in ids_of_turn.values():
            if not (isinstance(ids, list) and all(type(number) is int for number in ids)):
                raise TrajectoryError(f"{' and '.join(ids_of_turn)} are no lists of token ids")
    return recorded


def _system(left: dict, messages: list[dict], reader: Reader) -> dict | None:
    """The column `system` as a message, where the messages do not have it."""
    content = left.pop("system", None)
    if is_empty(content):
        return None
    if not isinstance(content, str) and not anthropic.are_texts(content):
        raise TrajectoryError(f"column system is not text but {kind_of(content)}")
    reader.shapes["system column"] += 1
    if messages and messages[0]["role"] in ("system", "developer"):
        one_of({"column system": content, "the first message": messages[0]["content"]}, "the system prompt")
        return None
    return {"role": "system", "content": content}
