"""Texts of a raw row that are in no sample that should hold them: for rows that are not plain (see `own_reader`).

Walks the JSON of the row and knows nothing of how step 1 reads it. A text of a turn must be in the target of its turn,
a text of any other message in the prompt of the next turn, between the turns that it stands between and behind the
messages before it; tools and a system column before the first turn.
"""

import json
import re
from dataclasses import dataclass

from served_tokens.marks import KNOWN_KEYS, in_json

ASSISTANT = "<|im_start|>assistant\n"
CONVERSATIONS = (("messages",), ("conversations",), ("prompt", "completion"))
ARGUMENTS = ("arguments", "args", "input", "parameters", "input_schema", "inputSchema")  # or schemas: all is shown
TOOLS = ("tools", "functions", "tool_defs")  # in whose schemas SGLang gives types other names
IN_JSON = (*TOOLS, "tool_calls", *ARGUMENTS)  # which may be JSON strings
ROLES, TURNS = ("role", "from"), ("assistant", "gpt", "function_call")
# Keys under which no text of a conversation stands, beside those that are known to say nothing: within messages and
# tools, where a name is that of a tool, and as columns.
WITHIN = frozenset("role from type tool_use_id finish_reason stop_reason defer_loading data format".split()).union(
    *(KNOWN_KEYS[level] - {"name"} for level in ("message", "call", "part", "tool"))
)
COLUMNS = KNOWN_KEYS["row"].union(
    "finish_reason stop_reason chat_template_kwargs enable_thinking think thinking reasoning reasoning_effort".split()
)
SYNTAX = ("properties", "type", "object")  # of a JSON schema, where a template writes another one around its texts
A_CALL = {"name", "arguments"}  # the keys of a call, which too are syntax
THINK = re.compile("</?think>")  # texts are read apart at these marks
LONG = 3  # characters: of shorter texts little can be said
SHOWN_TEXT = 60  # characters of a text that is lost, that are shown


@dataclass
class Loss:
    """A text that is not where it should be."""

    place: str  # of the message or column
    key: str  # under which the text stands
    text: str
    where: str  # the target or the prompt that lacks it

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.text[:SHOWN_TEXT]!r} is not in {self.where}"


def lost_texts(row: dict, shown: dict, turns: int, read_as: dict, ignored: tuple) -> list[Loss] | None:
    """The texts of a row that are lost; None where it has another number of turns than were read.

    Args:
        row: as its file has it.
        shown: {number of a turn: (served prompt, target and reasoning)} of those with a sample.
        turns: how many turns were read.
        read_as: {key: the field that it is read as}; ignored: keys that the user ignores, alone or as "message.note".
    """
    skipped = WITHIN | _ignored(ignored, "call", "part", "tool")
    row = _less(row, _ignored(ignored, "row"), read_as)
    columns = next((names for names in CONVERSATIONS if all(row.get(name) for name in names)), ())
    given = [in_json(message) for name in columns for message in in_json(row.pop(name))]
    messages = [_less(message, {"name"} | _ignored(ignored, "message"), read_as) for message in given]
    before = _turns_before(messages)
    if before[-1] != turns:
        return None
    lost, ends = [], [0] * (turns + 1)  # ends: where the messages that come behind so many turns end in the prompt

    def search(value, text: str, start: int, place: str, where: str) -> int:
        """Look for the texts of a value in what is shown from `start` on; returns where the last one ends."""
        found = [(key, one, _end(one, text, start)) for key, one in _texts(value, skipped)]
        lost.extend(Loss(place, key, one, where) for key, one, end in found if end < 0)
        return max([start, *(end for _, _, end in found)])

    for position, message in enumerate(messages):
        number = before[position]
        if _is_turn(message):
            number = before[position + 1] - 1
            if number in shown:
                search(message, shown[number][1], 0, f"message {position}", "the target of its turn")
            continue
        if message.get("role") == "developer":  # vLLM moves it to the front
            number = 0
        if following := [turn for turn in shown if turn >= number]:
            turn = min(following)
            text = _behind_turns(shown[turn][0], number, turn)
            for part in _parts(message):
                ends[number] = search(part, text, ends[number], f"message {position}", f"the prompt of turn {turn}")
    if shown:
        head = _behind_turns(shown[min(shown)][0], 0, min(shown))
        for column in row.keys() - COLUMNS:
            search({column: row[column]}, head, 0, f"column {column}", "the first prompt")
    return lost


def _ignored(keys: tuple, *levels: str) -> set[str]:
    """The keys that the user ignores in objects of these levels."""
    named = {key.partition(".")[2] for key in keys if key.partition(".")[0] in levels}
    return named | {key for key in keys if "." not in key}


def _less(value: dict, keys: set, read_as: dict) -> dict:
    return {read_as.get(key, key): item for key, item in value.items() if key not in keys}


def _is_turn(message: dict) -> bool:
    return any(message.get(key) in TURNS for key in ROLES)


def _is_output(message: dict) -> bool:
    """Whether a message holds outputs of tools alone."""
    parts = message.get("content")
    in_blocks = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
    return message.get("role") == "tool" or (in_blocks and all(part.get("type") == "tool_result" for part in parts))


def _parts(message: dict) -> list[dict]:
    """What stands in order in a message: each part of its content, then the rest of it."""
    if not isinstance(message.get("content"), list):
        return [message]
    parts = [{"content": [part]} for part in message["content"]]
    return [*parts, {key: value for key, value in message.items() if key != "content"}]


def _turns_before(messages: list[dict]) -> list[int]:
    """How many turns come before each message, and before the end.

    Messages of one id, with nothing but outputs between them, are parts of one turn, unless others have that id too.
    """
    shared = [None, *(message.get("id") for message in messages if not _is_turn(message))]
    numbers, turns, last = [], 0, None
    for message in messages:
        numbers.append(turns)
        if _is_turn(message):
            turns += message.get("id") in shared or message.get("id") != last
            last = message.get("id")
        elif not _is_output(message):
            last = None
    return [*numbers, turns]


def _behind_turns(prompt: str, number: int, turn: int) -> str:
    """What the prompt of a turn shows between so many turns and the next; all where texts hold marks of their own."""
    parts = prompt.split(ASSISTANT)
    return parts[number] if len(parts) == turn + 2 else prompt


def _texts(value, skipped: frozenset, key: str = "", all_shown: bool = False):
    """Yield (key, text) for each text that is to be looked for; key is the outermost one that it stands under.

    all_shown: inside arguments and schemas, where keys are texts as well.
    """
    if isinstance(value, str):
        if all_shown and value in SYNTAX:
            return
        pieces = [value] if all_shown else THINK.split(value)
        yield from ((key, piece.strip()) for piece in pieces if len(piece.strip()) >= LONG and piece != "null")
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, skipped, key, all_shown)
    elif isinstance(value, dict) and all_shown:
        items = [item for name, item in value.items() if name != "type" or isinstance(item, dict) or key not in TOOLS]
        yield from _texts([*value, *items], skipped, key, True)
    elif isinstance(value, dict):
        for name in [name for name in value if name not in skipped]:
            item = in_json(value[name]) if name in IN_JSON else value[name]
            if name in IN_JSON and isinstance(item, list):
                item = [in_json(one) for one in item]
            inside = name in ARGUMENTS or (name == "content" and isinstance(item, dict))
            yield from _texts(item, skipped, key or name, inside)


def _end(text: str, shown: str, start: int) -> int:
    """Where a text ends that is shown from `start` on, as it is, within JSON, or printed anew; -1 where it is not."""
    once = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    twice = [json.dumps(form)[1:-1] for form in once]
    found = [(shown.find(form, start), form) for form in (text, *once, *twice)]
    if ends := [place + len(form) for place, form in found if place >= 0]:
        return min(ends)
    value = in_json(text)
    if value is text:
        return -1
    is_call = isinstance(value, dict) and value.keys() == A_CALL
    ends = [_end(part, shown, start) for _, part in _texts(value, frozenset(), all_shown=not is_call)]
    return -1 if -1 in ends else max(ends, default=start)
