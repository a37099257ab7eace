"""OpenAI's messages, calls and tools, in the spellings that clients and servers have for them.

The one shape that all adapters end in: {"role", "content"}, and of a turn "reasoning_content" and "tool_calls":
[{"id", "type", "function": {"name", "arguments"}}]; content is null, a text, a list of text parts or what a tool
returned.
"""

from dataclasses import dataclass

from served_tokens.marks import TrajectoryError, decoded, in_json, is_empty, kind_of, says
from served_tokens.rows import anthropic
from served_tokens.rows.keys import CUT, ENDS, SAYS_OFF, SAYS_ON, Reader, end_of, one_of

ARGUMENTS = ("arguments", "args", "input", "parameters")
SHOWN_OF_A_FUNCTION = ("name", "description", "parameters", "strict", "defer_loading")
LONGEST_SWITCH = 20  # characters
SCHEMAS = ("input_schema", "inputSchema")  # of Anthropic and MCP
RECORDED = ("prompt_token_ids", "token_ids")  # what a server was given and what the model wrote, as vLLM returns them
SWITCHES = ("weight", "loss", "train", "loss_mask", "trainable")  # of OpenAI, ms-swift, axolotl and others
FINISHED = frozenset(
    "stop tool_calls tool_call tool-calls function_call end_turn tool_use stop_sequence eos eos_token stop_token end "
    "complete completed".split()
)
CUT_FLAGS = ("truncated", "is_truncated", "interrupted", "incomplete", "is_partial")
OF_TURNS = frozenset((*SWITCHES, *ENDS, *CUT_FLAGS, "prefix", "partial"))
# Why a turn is context only.
SWITCHED_OFF = "their weight, loss or train says not to train on them"
CUT_BY_FLAG = "they say that they are {}"
NOT_FINISHED = "their finish_reason is {}, so they were cut off"
CONTINUED = "they are a prefix that the model was asked to go on from"


@dataclass
class Read:
    """What is read of one message.

    messages: in the one shape; the outputs of tools that a user message of Anthropic's holds come before it.
    not_trained: why the turn is context only, or None.
    tools: those of a system message, or None.
    answer: the id of the answer that a turn is a part of, or None.
    """

    messages: list[dict]
    not_trained: str | None = None
    tools: list | None = None
    answer: object = None


def tools_of(tools, name: str, reader: Reader) -> list[dict]:
    """Tools as {"type", "function": {"name", "description", "parameters"}}, whichever way they are given.

    Args:
        tools: a list or an object of tools by name, of objects or JSON strings; or a JSON string of it.
    Raises TrajectoryError, which calls the tools by this name.
    """
    tools = decoded(tools, name, (list, dict)) if says(tools) and tools != "null" else []
    if isinstance(tools, dict):
        tools = list(tools.values())
    read = []
    for position, given in enumerate(tools):
        if not isinstance(tool := in_json(given), dict):
            raise TrajectoryError(f"tool {position} is not an object but {kind_of(tool)}")
        tool = reader.opened(tool, "tool")
        if "function" not in tool:
            tool = _wrapped(tool, reader)
        elif isinstance(tool["function"], dict):
            tool["function"] = reader.opened(tool["function"], "tool")
        if not isinstance(tool["function"], dict):
            raise TrajectoryError(f"tool {position} has a `function` that is no object, so a server refuses it")
        if not reader.prints_tools_as_sent:
            for its, known in ((tool, ("type", "function")), (tool["function"], SHOWN_OF_A_FUNCTION)):
                reader.closed({key: value for key, value in its.items() if key not in known}, "tool")
        read.append(tool)
    return read


def _wrapped(tool: dict, reader: Reader) -> dict:
    """A flat tool with its function around it; Anthropic's has its schema under another key."""
    function = dict(tool)
    if given := [key for key in SCHEMAS if key in function]:
        schemas = {key: function.pop(key, None) for key in (*given, "parameters")}
        agreed = one_of(schemas, "the schema of a tool")
        function["parameters"] = schemas[given[0]] if agreed is None else agreed
        reader.shapes["Anthropic tools"] += 1
    else:
        reader.shapes["flat tools"] += 1
    kind = function.pop("type", None)
    if not isinstance(function.get("name"), str) or (kind == "custom" and not given):
        raise TrajectoryError(
            'a tool has no `function`, so a server refuses it; write {"type": "function", "function": {"name": …}}'
        )
    return {"type": "function", "function": function}


def message_of(left: dict, reader: Reader) -> Read:
    """Read a message that was opened; raises TrajectoryError."""
    role, tools = left.pop("role", None), None
    if role is None and isinstance(left.get("type"), str):  # LangChain's messages, OpenAI's Responses
        raise TrajectoryError(f"has no role but the type {left['type']}; convert it to a message with a role")
    if left.pop("requestor", "assistant") == "user":
        raise TrajectoryError("is a call, or its output, of a simulated user; convert it to what the model was shown")
    if role in ("developer", "observation") or (role == "function" and isinstance(left.get("name"), str)):
        reader.shapes[f"role {role}"] += 1
        role = role if role == "developer" else "tool"
    if isinstance(left.get("provider_specific_fields"), dict):  # LiteLLM's
        left = reader.opened(left.pop("provider_specific_fields") | left, "message")
    has_content = "content" in left
    message = {"role": role, "content": left.pop("content", None)}
    message |= {key: left.pop(key) for key in ("name", "tool_call_id") if left.get(key) is not None}
    before, why, lacks = [], None, None if has_content else "content"
    if role == "assistant":
        message |= {key: left.pop(key) for key in RECORDED if left.get(key) is not None}
        _read_turn(message, left, reader)
        why, lacks = _why_not_trained(left), None if "tool_calls" in message else lacks
    else:
        if says(decoded(left.pop("tool_calls", None), "tool_calls")):
            raise TrajectoryError(f"a {role} message has tool_calls: they are of a simulated user, not of the model")
        left = {key: value for key, value in left.items() if key not in OF_TURNS}  # there is no loss there anyway
        if role == "user" and isinstance(message["content"], list):
            before, message["content"] = anthropic.tool_results(message["content"], reader)
        elif isinstance(message["content"], list) and (role != "tool" or anthropic.are_texts(message["content"])):
            message["content"] = anthropic.texts_of(message["content"], reader)
        if role in ("system", "developer") and (given := left.pop("tools", None) or left.pop("functions", None)):
            tools = tools_of(given, "tools", reader)
    cut = reader.closed(left, "message", message if role == "assistant" else None, lacks)
    why = why or (NOT_FINISHED.format(cut) if cut and role == "assistant" else None)
    messages = before if before and message["content"] == [] else [*before, message]
    return Read(messages, why, tools, left.get("id"))


def _read_turn(message: dict, left: dict, reader: Reader) -> None:
    """Complete a turn by its reasoning and calls."""
    readings = {key: _reasoning(left, key) for key in ("reasoning_content", "reasoning", "thinking")}
    readings["thinking_blocks"] = anthropic.reasoning_of_blocks(left.pop("thinking_blocks", None), reader)
    readings["reasoning_details"] = _reasoning_of_details(left, readings)
    calls = {"tool_calls": decoded(left.pop("tool_calls", None), "tool_calls")}
    if says(legacy := left.pop("function_call", None)):
        calls["function_call"] = [{"function": legacy}]
        reader.shapes["function_call"] += 1
    if isinstance(message["content"], list):
        parts = anthropic.parts_of_turn(message["content"], reader)
        message["content"], readings["content"], calls["content"] = parts.texts, parts.reasoning, parts.calls
    for key in ("thinking", "thinking_blocks", "reasoning_details"):
        reader.shapes[f"reasoning under {key}"] += bool(readings[key])
    if (reasoning := one_of(readings, "the reasoning")) is not None:
        message["reasoning_content"] = reasoning
    calls = {key: [call_of(call, reader) for call in given] for key, given in calls.items() if given}
    bare = {}
    for key, read in calls.items():
        bare[key] = [(call["function"]["name"], in_json(call["function"]["arguments"])) for call in read]
    if one_of(bare, "a call"):
        message["tool_calls"] = next(iter(calls.values()))


def _reasoning(left: dict, key: str) -> str | None:
    value = left.get(key)
    if key == "thinking" and not isinstance(value, str):  # a switch of that name, or what nobody knows
        return None
    left.pop(key, None)
    if not isinstance(value, (str, type(None))):
        raise TrajectoryError(f"reasoning is not a string but {kind_of(value)}")
    if value and len(value) < LONGEST_SWITCH and value.strip().lower() in SAYS_ON | SAYS_OFF:
        raise TrajectoryError(f"{key} is {value!r}, which is a switch and no reasoning; take it out of the message")
    return value


def _reasoning_of_details(left: dict, readings: dict) -> str | None:
    """OpenRouter's list of reasoning texts; one that is summarised or encrypted adds nothing to what is said beside."""
    details = left.pop("reasoning_details", None)
    if details is None or isinstance(details, str):
        return details
    if not isinstance(details, list) or not all(isinstance(detail, dict) for detail in details):
        raise TrajectoryError("reasoning_details is no list of objects")
    readable = [detail for detail in details if not str(detail.get("type")).endswith("encrypted")]
    texts = [detail.get("text") or detail.get("summary") for detail in readable]
    if not all(isinstance(text, str) for text in texts):
        raise TrajectoryError("reasoning_details holds more than texts")
    whole = len(texts) == len(details) and not any(detail.get("summary") for detail in details)
    if not whole and not any(readings.values()):
        raise TrajectoryError(
            "reasoning_details holds a summary or what is encrypted, and no reasoning stands beside it"
        )
    return "".join(texts)


def call_of(call, reader: Reader) -> dict:
    """{"function": {"name", "arguments"}, "id", "type"} of a call in any spelling; raises TrajectoryError."""
    if not isinstance(call := in_json(call), dict):
        raise TrajectoryError("a tool call has no function name")
    left = reader.opened(call, "call")
    flat = not isinstance(left.get("function"), dict)
    body = left if flat else reader.opened(left.pop("function"), "call")
    reader.shapes["flat calls"] += flat
    read = {key: left.pop(key) for key in ("id", "type") if key in left}
    if not isinstance(name := body.pop("name", None), str):
        raise TrajectoryError("a tool call has no function name")
    if left.pop("requestor", "assistant") == "user":
        raise TrajectoryError("a tool call is of a simulated user")
    readings = {}
    for where, level in (("", body), (" beside the function", {} if flat else left)):
        readings |= {key + where: level.pop(key) for key in ARGUMENTS if key in level}
    for key in readings:
        reader.shapes[f"calls with {key}"] += key != "arguments"
    agreed = one_of({key: in_json(value) for key, value in readings.items()}, "a call's arguments")
    arguments = agreed if len(readings) > 1 else next(iter(readings.values()), None)
    lacks = "arguments" if is_empty(agreed) or agreed == "null" else None
    for rest in (left,) if flat else (left, body):
        reader.closed(rest, "call", lacks=lacks)
    return {**read, "function": {"name": name, "arguments": arguments}}


def _why_not_trained(left: dict) -> str | None:
    """By its loss switch, or by what it says of how the answer ended; raises TrajectoryError for what is not known."""
    said = {key: left.pop(key) for key in SWITCHES if key in left}
    said = {key: value for key, value in said.items() if value is not None}
    for key, value in said.items():
        if value not in (0, 1):
            raise TrajectoryError(
                f"{key} is {value!r}; a turn is trained whole (1 or true) or it is not (0 or false): write one of these"
            )
    if len(set(map(bool, said.values()))) > 1:
        raise TrajectoryError(f"{' and '.join(said)} differ about whether the turn is trained")
    prefixes = [left.pop(key) for key in ("prefix", "partial") if isinstance(left.get(key), bool)]
    flags = [key for key in CUT_FLAGS if isinstance(left.get(key), bool) and left.pop(key)]
    cut = why_cut(left) or (CUT_BY_FLAG.format(flags[0]) if flags else None)
    if said and not all(said.values()):
        return SWITCHED_OFF
    return cut or (CONTINUED if any(prefixes) else None)


def why_cut(left: dict) -> str | None:
    """By what an API says of the end of an answer; raises TrajectoryError for a reason that is not known."""
    for key in ENDS:
        reason = left.pop(key, None)
        end = end_of(reason)
        if is_empty(reason) or end in FINISHED:
            continue
        if end in CUT:
            return NOT_FINISHED.format(end)
        raise TrajectoryError(
            f"{key} is {reason!r}, which says neither that the answer is whole nor that it was cut off; write stop or "
            "length in its place"
        )
    return None
