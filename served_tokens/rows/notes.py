"""What of a trajectory is served as it is and may still be a mistake: counted, and named at the end of step 1."""

import functools
import hashlib
import json
from collections import Counter

from served_tokens.marks import TrajectoryError, is_text_parts
from served_tokens.prompts.chat_template import time_limit
from served_tokens.rows.trajectory import CALL_TEXT, Trajectory

PARTS = "messages have several text parts, which servers join in different ways (--server-style)"
TOOLS = "trajectories have tools that the server prints otherwise than they are given (--server-style)"
SERIALIZED = "tool outputs are objects or lists; they are rendered as JSON, as clients send them"
NO_QUERIES = "user messages are one <tool_response> block, which Qwen3's template does not take for a query"
UNKNOWN_TOOL = "tool calls name a tool that their trajectory does not offer"
BAD_ARGUMENTS = "tool calls have arguments that break the JSON schema of their tool"
BAD_SCHEMA = "tool calls could not be validated: the schema of their tool is broken, or takes too long"
NO_OUTPUT = "tool calls are followed by another message than their output"
NO_CALL = "tool outputs follow no tool call"
UNKNOWN_ID = "tool outputs have a tool_call_id that no call before them has"
CALL_AS_TEXT = "turns write a call as text, <tool_call>…</tool_call>, and not in tool_calls; it is trained as that text"
TOOLS_TWICE = "trajectories offer tools both in the system text and beside it, so their prompts hold them twice"
NULL_ARGUMENTS = (
    "tool calls have null arguments that the schema of their tool does not allow, as Arrow fills in where objects of "
    "several shapes share a column; write arguments as JSON strings, or set them aside by --validate-tools"
)
NULL_SCHEMAS = (
    "trajectories have tools with null among their parameters' properties, as Arrow fills in where objects of several "
    "shapes share a column; write tools as JSON strings, or set them aside by --validate-tools"
)
NO_REASONING = (
    "no turn has reasoning: a thinking model would be trained not to think; step 2 makes samples for one that does not "
    "by --no-thinking, and leaves turns without reasoning out by --require-reasoning"
)
SHAPE, UNREAD = "shape", "unread"  # what is counted, beside the notes
UNREAD_KEYS = {"row": "columns"} | {kind: f"{kind} keys" for kind in ("message", "tool call", "content part")}
SHOWN_KEYS = 10
NOTES = (
    *(CALL_AS_TEXT, TOOLS_TWICE, NULL_ARGUMENTS, NULL_SCHEMAS, PARTS, SERIALIZED, NO_QUERIES),
    *(UNKNOWN_TOOL, BAD_ARGUMENTS, BAD_SCHEMA, NO_OUTPUT, NO_CALL, UNKNOWN_ID),
)


def counted(trajectory: Trajectory) -> Counter:
    """Of a row: what it was read as, keys that nobody reads, and what may be a mistake; see the functions below."""
    counts = unusual(trajectory.as_given, trajectory.messages, trajectory.tools)
    if ways := tools_printed_otherwise(trajectory.tools_given or [], trajectory.tools or []):
        counts.update([TOOLS, *((TOOLS, way) for way in ways)])
    counts.update({(SHAPE, name): number for name, number in trajectory.shapes.items() if number})
    for kind, key, _ in trajectory.unread:
        counts[UNREAD, kind, key] = counts[UNREAD, kind] = 1
    return counts


def digest(plain: list[dict]) -> int:
    """8 bytes that rows with the same plain messages share, and no others."""
    text = "\0".join(message["content"] for message in plain)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


def tools_printed_otherwise(given: list, served: list) -> dict:
    """{way: None} in which a server prints tools otherwise than they are given."""
    ways = {}
    for tool, shown in zip(given, served):
        before, after = (tool, tool.get("function") or {}), (shown, shown.get("function") or {})
        for old, new in zip(before, after):
            ways |= {f"without {key}": None for key in old if key not in new}
            ways |= {f"with {key}: {json.dumps(new[key])}": None for key in new if key not in old}
            if [key for key in old if key in new] != [key for key in new if key in old]:
                ways["in another order"] = None
    return ways


def shapes_met(counts: Counter) -> list[tuple[str, int]]:
    """[(name of a shape, how often rows, messages or parts had it)]"""
    return [(what[1], number) for what, number in counts.items() if what[0] == SHAPE]


def unread_keys(counts: Counter) -> list[str]:
    """A line for each kind of object: the keys that nobody reads, and in how many rows."""
    lines = []
    for kind, keys_are in UNREAD_KEYS.items():
        keys = Counter({what[2]: number for what, number in counts.items() if what[:2] == (UNREAD, kind) and what[2:]})
        more = f" and {len(keys) - SHOWN_KEYS} more" * (len(keys) > SHOWN_KEYS)
        shown = ", ".join(f"{key} ({number})" for key, number in keys.most_common(SHOWN_KEYS))
        if keys:
            lines.append(f"{counts[UNREAD, kind]} rows have {keys_are} that nobody reads: {shown}{more}")
    return lines


def tools_line(counts: Counter) -> str:
    """How tools are printed, and in how many trajectories."""
    ways = Counter({what[1]: number for what, number in counts.items() if what[0] == TOOLS})
    return f"{counts[TOOLS]} {TOOLS}: " + ", ".join(f"{way} ({n})" for way, n in ways.most_common(SHOWN_KEYS))


def refuse_breaks(messages: list[dict], tools: list[dict] | None) -> None:
    """Raise TrajectoryError where a call names no known tool, or breaks the schema of its tool."""
    counts = schema_breaks(messages, tools)
    for note in (UNKNOWN_TOOL, BAD_ARGUMENTS, BAD_SCHEMA):
        if counts[note]:
            raise TrajectoryError(f"{counts[note]} {note}; fix them, or drop --validate-tools")


def unusual(as_given: list, messages: list[dict], tools: list[dict] | None) -> Counter:
    """What is served as it is and may still be a mistake in the data: {note: how many}.

    Args:
        as_given: the messages of the row.
        messages, tools: the same as `served_trajectory` returns them.
    """
    notes = _nulls(messages, tools)
    notes[UNKNOWN_TOOL] = _unknown_tools(messages, tools)
    systems = " ".join(message["content"] for message in messages if message["role"] == "system")
    notes[TOOLS_TWICE] += bool(tools) and "<tools>" in systems
    ids, waiting = set(), 0  # of the calls so far; calls whose output is still to come
    for given, message in zip(as_given, messages):
        role, content = message["role"], given.get("content")
        if isinstance(content, (list, dict)):
            parts = is_text_parts(content)
            notes[PARTS if parts else SERIALIZED] += not parts or len(content) > 1
        if role == "user" and message["content"].startswith("<tool_response>"):
            notes[NO_QUERIES] += message["content"].endswith("</tool_response>")
        if role == "tool":
            notes[NO_CALL] += not waiting
            identity = message.get("tool_call_id")
            notes[UNKNOWN_ID] += bool(ids) and isinstance(identity, str) and identity not in ids
            waiting = max(0, waiting - 1)
            continue
        notes[NO_OUTPUT] += waiting
        calls = message.get("tool_calls", [])
        notes[CALL_AS_TEXT] += role == "assistant" and bool(CALL_TEXT.search(message["content"]))
        waiting = len(calls)
        for call in calls:
            if isinstance(call.get("id"), str):
                ids.add(call["id"])
    return notes


def _nulls(messages: list[dict], tools: list[dict] | None) -> Counter:
    """Nulls that nobody wrote: a JSON file made from an Arrow table has them for all keys of other rows."""
    notes, schemas = Counter(), _schemas(tools)
    properties = {
        name: schema["properties"]
        for name, schema in schemas.items()
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict)
    }
    notes[NULL_SCHEMAS] += any(None in its.values() for its in properties.values())
    for function in _functions(messages):
        its = properties.get(function["name"], {})
        nulls = [key for key, value in function["arguments"].items() if value is None]
        notes[NULL_ARGUMENTS] += bool(its) and not all(_allows_null(its.get(key)) for key in nulls)
    return notes


def _unknown_tools(messages: list[dict], tools: list[dict] | None) -> int:
    """How many calls name a tool that is not offered, where any are."""
    known = [tool_function(tool).get("name") for tool in tools or []]
    return sum(function["name"] not in known for function in _functions(messages)) if known else 0


def _allows_null(schema) -> bool:
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type", "null")
    return "null" in (kinds if isinstance(kinds, list) else [kinds]) or schema.get("nullable") is True


def schema_breaks(messages: list[dict], tools: list[dict] | None) -> Counter:
    """How many tool calls break the JSON schema of their tool: {note: how many}."""
    notes, schemas = Counter({UNKNOWN_TOOL: _unknown_tools(messages, tools)}), _schemas(tools)
    for call in _functions(messages):
        schema = schemas.get(call["name"])
        try:
            with time_limit():  # a pattern may take for ever
                valid = schema is None or _validator(json.dumps(schema)).is_valid(call["arguments"])
                notes[BAD_ARGUMENTS] += not valid
        except Exception:  # a broken schema raises many kinds; what it says of the arguments is not known
            notes[BAD_SCHEMA] += 1
    return notes


def _schemas(tools: list[dict] | None) -> dict:
    functions = [function for function in map(tool_function, tools or []) if isinstance(function.get("name"), str)]
    return {function["name"]: function.get("parameters") for function in functions}


def _functions(messages: list[dict]) -> list[dict]:
    return [call["function"] for message in messages for call in message.get("tool_calls", [])]


@functools.lru_cache(maxsize=1024)  # many trajectories share their tools
def _validator(schema: str):
    import jsonschema
    import referencing

    schema = json.loads(schema)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(
        schema, registry=referencing.Registry()
    )  # an empty one: without it, a $ref would be fetched from anywhere


def tool_function(tool: dict) -> dict:
    """What a tool says of its function, wrapped or not."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool
