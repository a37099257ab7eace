"""What of a trajectory is served as it is and may still be a mistake: counted, and named at the end of step 1."""

import functools
import json
from collections import Counter

from served_tokens.chat_template import time_limit
from served_tokens.trajectory import is_text_parts

PARTS = "messages have several text parts; they are concatenated here, while vLLM puts a newline between them"
SERIALIZED = "tool outputs are objects or lists; they are rendered as JSON, as clients send them"
NO_QUERIES = "user messages are one <tool_response> block, which Qwen3's template does not take for a query"
UNKNOWN_TOOL = "tool calls name a tool that their trajectory does not offer"
BAD_ARGUMENTS = "tool calls have arguments that break the JSON schema of their tool"
BAD_SCHEMA = "tool calls could not be validated: the schema of their tool is broken, or takes too long"
NO_OUTPUT = "tool calls are followed by another message than their output"
NO_CALL = "tool outputs follow no tool call"
UNKNOWN_ID = "tool outputs have a tool_call_id that no call before them has"
NOTES = (PARTS, SERIALIZED, NO_QUERIES, UNKNOWN_TOOL, BAD_ARGUMENTS, BAD_SCHEMA, NO_OUTPUT, NO_CALL, UNKNOWN_ID)


def unusual(as_given: list, messages: list[dict], tools: list[dict] | None) -> Counter:
    """What is served as it is and may still be a mistake in the data: {note: how many}.

    Args:
        as_given: the messages of the row.
        messages, tools: the same as `served_trajectory` returns them.
    """
    notes, known = Counter(), [tool_function(tool).get("name") for tool in tools or []]
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
        waiting = len(calls)
        for call in calls:
            notes[UNKNOWN_TOOL] += bool(known) and tool_function(call)["name"] not in known
            if isinstance(call.get("id"), str):
                ids.add(call["id"])
    return notes


def schema_breaks(messages: list[dict], tools: list[dict] | None) -> Counter:
    """How many tool calls break the JSON schema of their tool: {note: how many}."""
    notes, schemas = Counter(), {}
    for function in map(tool_function, tools or []):
        if isinstance(function.get("name"), str):
            schemas[function["name"]] = function.get("parameters")
    for call in (tool_function(call) for message in messages for call in message.get("tool_calls", [])):
        schema = schemas.get(call["name"])
        try:
            with time_limit():  # a pattern may take for ever
                notes[BAD_ARGUMENTS] += schema is not None and not _validator(json.dumps(schema)).is_valid(
                    call["arguments"]
                )
        except Exception:  # a broken schema raises many kinds; what it says of the arguments is not known
            notes[BAD_SCHEMA] += 1
    return notes


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
    """What a tool or a tool call says of its function, wrapped or not."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool
