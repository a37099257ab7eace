"""The check's own reading of plain rows, straight from their JSON: each rule of the reading, written once more.

A plain row is as OpenAI's API has it: roles system, user, assistant and tool; contents that are texts or null;
reasoning under `reasoning_content` alone; calls with a name and arguments; tools of exactly type and function, with
name, description and parameters. Nothing of the reading that it is compared with is imported here.
"""

import json
import re

ROLES = ("system", "user", "assistant", "tool")
OTHER_COLUMNS = ("conversations", "prompt", "completion", "system", "functions", "tool_defs")
OF_A_MESSAGE = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "weight", "finish_reason"}
OF_A_CALL = {"id", "type", "function"}
SWITCHES = ("weight", "loss", "train", "loss_mask", "trainable")
TYPE = '"(?:boolean|object|array|number|string|integer|function)"'
# In the JSON of tools: a type to which SGLang may give another name, a number of which it may make a float.
ODD_TO_SGLANG = re.compile(rf'"type": (?!\{{|"null"|{TYPE}|\[{TYPE}, "null"\])|[0-9]{{19}}')
OF_A_TOOL, OF_A_FUNCTION = ["type", "function"], ["name", "description", "parameters"]


def plain_reading(row: dict, server_style: str = "vllm") -> tuple[list, list, dict] | None:
    """What the chat template gets of a plain row: (messages, tools, kwargs); None where the row is not plain.

    Args:
        row: as its file has it.
        server_style: as step 1 has it. SGLang marks each tool; to it a row is not plain where `tool_choice` may take
            tools away, or a schema has types or numbers that it prints otherwise.
    Returns messages as (role, content, reasoning or "", [(name, arguments as JSON)]) and tools as JSON, in which the
    order of keys is that of the row.
    """
    messages, tools = _decoded(row.get("messages")), _decoded(row.get("tools") or [])
    if any(row.get(column) for column in OTHER_COLUMNS) or not (isinstance(messages, list) and isinstance(tools, list)):
        return None
    read = [_message(message) for message in messages]
    hidden = "chat_template_kwargs" in json.dumps([row.get("metadata"), row.get("extra_body")], default=str)
    if None in read or hidden or not all(map(_is_plain_tool, tools)):
        return None
    if server_style == "sglang":
        if row.get("tool_choice") not in (None, "", "auto", "required") or ODD_TO_SGLANG.search(json.dumps(tools)):
            return None
        tools = [{**tool, "defer_loading": None} for tool in tools]
    kwargs = {"reasoning_effort": row.get("reasoning_effort")} | _decoded(row.get("chat_template_kwargs") or {})
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    return read, [json.dumps(tool) for tool in tools], kwargs


def not_to_be_trained(row: dict, number_of_turns: int) -> set[int]:
    """The numbers of the turns, counted from 0, that a row says not to train on, in the plainest ways of saying so.

    None where the row has another number of turns than were read, as where messages are parts of one turn.
    """
    turns = _turns(row)
    if len(turns) != number_of_turns:
        return set()
    if row.get("enable_thinking") is False:
        return {*range(len(turns))}
    in_prompt = 0 if row.get("messages") or row.get("conversations") else len(_turns({"messages": row.get("prompt")}))
    return {number for number, turn in enumerate(turns) if number < in_prompt or _is_off(turn)}


def _turns(row: dict) -> list[dict]:
    """The assistant messages of a row."""
    columns = [name for name in ("messages", "conversations") if row.get(name)][:1] or ["prompt", "completion"]
    given = [message for name in columns for message in _decoded(row.get(name)) or []]
    is_turn = ("assistant", "gpt", "function_call")
    return [message for message in map(_decoded, given) if message.get("role", message.get("from")) in is_turn]


def _is_off(turn: dict) -> bool:
    switched_off = any(turn.get(key) == 0 for key in SWITCHES)  # 0 or False
    return switched_off or turn.get("finish_reason") == "length" or turn.get("stop_reason") == "max_tokens"


def _message(message) -> tuple | None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return None
    content = "" if message.get("content") is None else message["content"]
    reasoning = message.get("reasoning_content") or ""
    others = [key for key, value in message.items() if key not in OF_A_MESSAGE and value not in (None, "", [], {})]
    if others or not isinstance(content, str) or not isinstance(reasoning, str):
        return None
    is_turn = message["role"] == "assistant"
    if is_turn and "think>" in content:  # its reasoning may be inline
        return None
    if not is_turn and (reasoning or message.get("tool_calls")):
        return None
    calls = [_call(call) for call in message.get("tool_calls") or []]
    return None if None in calls else (message["role"], content, reasoning, calls)


def _call(call) -> tuple | None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.keys() - OF_A_CALL or function.keys() - {"name", "arguments"}:
        return None
    arguments = _decoded(function.get("arguments") or {})
    return (function.get("name"), json.dumps(arguments)) if isinstance(arguments, dict) else None


def _is_plain_tool(tool) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and list(tool) == OF_A_TOOL and list(function) == OF_A_FUNCTION


def _decoded(value):
    """A value, out of the JSON string around it; the string itself where it is none."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
