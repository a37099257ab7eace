"""The texts of a row as it was given, and where each belongs.

Walks the raw JSON and knows nothing of how step 1 reads it: a text that the reading lost is found missing, whatever its
key was called. A turn's texts belong into its target, all other texts into the served prompts of later turns.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

CONVERSATIONS = (("messages",), ("conversations",), ("prompt", "completion"))
TOOLS, PARAMETERS = ("tools", "functions"), ("parameters", "input_schema", "inputSchema")
ROLES = ("role", "from", "speaker", "sender", "type")
TURN = re.compile("assistant|gpt|chatgpt|bing|bard|claude|model|ai|bot|chatbot|agent|llm|function.call|tool.call")
STRUCTURE = re.compile("|".join(ROLES) + "|id|index|tool_call_id|tool_use_id|call_id|toolCallId|requestor")
HARMLESS = re.compile(  # by name: no text of the conversation
    r"name|timestamp|time|date|created|created_at|updated_at|cost|model|provider|usage|logprobs|finish_reason|"
    r"stop_reason|object|uuid|message_id|turn_id|latency|signature|cache_control|format"
)
ENCRYPTED = "reasoning.encrypted"  # OpenRouter's, beside the reasoning that can be read
ARGUMENTS = {"arguments", "args", "input", "parameters", "tool_input", "action_input", "kwargs", "params"}
REASONING = re.compile("reason|think|thought|analysis|scratchpad|^cot", re.IGNORECASE)
KNOWN = {"content", "value", "reasoning_content", "tool_calls", "function_call"}  # that step 1 reads as they are
MARKS = re.compile(
    r"</?(?:think|thinking|tool_call|function_call|tool_response|tools)>"
)  # texts are read apart at these, and printed anew
LONG = 3  # bytes of UTF-8: of shorter texts little can be said


class Text(NamedTuple):
    """A text of a row.

    keys: the way to it from its message or tool.
    kind: "reasoning", "call" or "text", by its keys.
    parts: the texts in it, where it is itself JSON.
    also: another way to show it.
    """

    keys: tuple
    text: str
    kind: str
    parts: tuple = ()
    also: str = ""


class Unit(NamedTuple):
    """The texts of one message, one tool or one column."""

    place: str
    texts: list[Text]


class RowTexts(NamedTuple):
    """The texts of a row.

    turns: of each turn, in order; others: of the other messages, in order.
    before: how many of the others come before each turn.
    shown_first: [[Unit, …], …], what each prompt must hold: the tools, the system column.
    extras: of the tools, what some servers drop.
    unread: {("columns" | "message keys" | …, name): how often}, what is looked for nowhere.
    """

    turns: list[Unit]
    others: list[Unit]
    before: list[int]
    shown_first: list[list[Unit]]
    extras: list[Text]
    unread: Counter


# ---------------------------------------------------------------- the texts of a row


def row_texts(row: dict, ignored: frozenset = frozenset()) -> RowTexts:
    """The texts of a row as it was given.

    Args:
        ignored: columns and keys that the user chose not to read.
    """
    read = RowTexts([], [], [], [], [], Counter())
    columns = next((names for names in CONVERSATIONS if row.get(names[0]) is not None), ())
    given = [_decoded(row[column]) for column in columns if column in row]
    messages = [message for part in given for message in (part if isinstance(part, list) else [part])]
    for position, message in enumerate(map(_decoded, messages)):
        _read_message(read, message if isinstance(message, dict) else {"content": message}, position, ignored)
    for column in [column for column in row if column not in columns and row[column] not in (None, "", [], {})]:
        value = _decoded(row[column])
        if column == "system" and column not in ignored:
            read.shown_first.append([Unit("column system", [*texts_of(value, ignored, read.unread, (column,))])])
        elif column not in ignored and (column in TOOLS or _are_tools(value)):
            _read_tools(read, value, f"column {column}", ignored)
        else:
            read.unread["columns", column] += 1
    return read


def texts_of(value, ignored: frozenset, skipped: Counter, keys: tuple = (), inside: bool = False) -> list[Text]:
    """Each text in a JSON value that is to be looked for.

    Args:
        skipped: counts the keys whose values are not looked for.
        inside: whether it is an argument of a call or the schema of a tool, where any key is a text.
    """
    found = []

    def walk(value, keys: tuple, kind: str, inside: bool) -> None:
        if isinstance(value, str):
            found.extend(_pieces(value, keys, kind, lambda value: texts_of(value, ignored, Counter(), keys, inside)))
        elif isinstance(value, list):
            for position, item in enumerate(value):
                walk(item, (*keys, str(position)), kind, inside)
        elif isinstance(value, dict):
            kind = "call" if not inside and ARGUMENTS & value.keys() else kind
            kind = "reasoning" if kind == "text" and REASONING.search(str(value.get("type", ""))) else kind
            for key, item in value.items():
                if inside:
                    walk_pair(key, item, keys, kind)
                    continue
                if STRUCTURE.fullmatch(key) or (key in ARGUMENTS and _says_none(item)):
                    continue
                of_no_text = HARMLESS.fullmatch(key) and (key != "name" or not keys)
                if key in ignored or of_no_text or (key == "data" and value.get("type") == ENCRYPTED):
                    skipped["message keys", key] += item is not None
                    continue
                thought = kind == "text" and REASONING.search(key)
                within = key in ARGUMENTS or (key == "content" and not _are_parts(item))
                walk(item, (*keys, key), "reasoning" if thought else kind, within)

    def walk_pair(key: str, item, keys: tuple, kind: str) -> None:
        before = len(found)
        walk(key, keys, kind, True)
        walk(item, (*keys, key), kind, True)
        if len(found) == before:  # {"x": 3}: short texts and numbers are looked for together
            printed = json.dumps(item, ensure_ascii=False, default=str)
            in_xml = f"={key}>\n{item if isinstance(item, str) else printed}\n</"
            pair = f"{json.dumps(key, ensure_ascii=False)}: {printed}"
            found.append(Text((*keys, key), pair, kind, also=in_xml))

    walk(value, keys, "call" if inside else "text", inside)
    return found


def _says_none(arguments) -> bool:
    """Whether arguments of a call are the text of none, which is shown as {}."""
    return isinstance(arguments, str) and "".join(arguments.split()) in ("null", "[]")


def _are_parts(content) -> bool:
    """Whether the content of a message is text; an object or list that a tool returned is shown with its keys."""
    if isinstance(content, list):
        return any(not isinstance(part, dict) or part.keys() & {"type", "text"} for part in content)
    return not isinstance(content, dict)


def _pieces(text: str, keys: tuple, kind: str, texts_within: Callable) -> list[Text]:
    """What a template or a reader of answers leaves of a text: no edges, and what is between the marks."""
    found, text = [], text.strip()
    for piece in [text] if json_in(text) is not None else map(str.strip, MARKS.split(text)):
        if len(piece.encode(errors="surrogatepass")) >= LONG:
            value = json_in(piece)
            found.append(Text(keys, piece, kind, tuple(texts_within(value)) if value is not None else ()))
    return found


def json_in(text: str) -> list | dict | None:
    """The list or object that a text writes out, if it does."""
    value = _decoded(text) if text[:1] in ("[", "{") else text
    return None if value is text else value


def _read_message(read: RowTexts, message: dict, position: int, ignored: frozenset) -> None:
    role = next((message[key] for key in ROLES if isinstance(message.get(key), str)), "")
    is_turn, place = TURN.fullmatch(role.strip().lower()), f"message {position}"
    for key in () if is_turn else TOOLS:
        if message.get(key) is not None and key not in ignored:
            _read_tools(read, _decoded(message[key]), f"{place}: {key}", ignored)
            message = {name: value for name, value in message.items() if name != key}
    unit = Unit(place, texts_of(message, ignored, read.unread))
    (read.turns if is_turn else read.others).append(unit)
    read.before.extend([len(read.others)] if is_turn else [])


def _are_tools(value) -> bool:
    """Whether this is a list of tools by its looks, whatever its name."""
    functions = [_function(tool) for tool in value] if isinstance(value, list) else []
    return bool(functions) and all("name" in tool and any(key in tool for key in PARAMETERS) for tool in functions)


def _function(tool) -> dict:
    tool = _decoded(tool)
    tool = tool.get("function", tool) if isinstance(tool, dict) else {}
    return tool if isinstance(tool, dict) else {}


def _read_tools(read: RowTexts, tools, place: str, ignored: frozenset) -> None:
    """A chain of its own: where a row gives its tools twice, they are shown once."""
    tools = list(tools.values()) if isinstance(tools, dict) and not tools.keys() & {"name", "function"} else tools
    chain = []
    for position, tool in enumerate(tools if isinstance(tools, list) else [tools]):
        function, tool = _function(tool), _decoded(tool)
        keyed = {**tool, **function} if isinstance(tool, dict) else {"description": tool}
        has_schema, texts = any(key in function for key in PARAMETERS), []
        for key, item in keyed.items():
            if STRUCTURE.fullmatch(key) or key in ignored or item is function:
                continue
            must = key in ("name", "description", *PARAMETERS) or (not has_schema and isinstance(item, (dict, list)))
            within = texts_of(_decoded(item), ignored, Counter(), (key,), inside=True)
            (texts if must else read.extras).extend(within)
        chain.append(Unit(f"{place}: tool {position}", texts))
    read.shown_first.append(chain)


def _decoded(value):
    """A value, out of the JSON strings around it: what is no object or list then stays the text that it is."""
    inner = value
    while isinstance(inner, str):
        try:
            inner = json.loads(inner)
        except (ValueError, RecursionError):
            return value
    return inner if isinstance(inner, (dict, list)) else value
