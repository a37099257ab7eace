"""OpenAI's messages, calls and tools, in the spellings that clients and servers have for them.

The one shape that all adapters end in: {"role", "content"}, and of a turn "reasoning_content" and "tool_calls":
[{"id", "type", "function": {"name", "arguments"}}]; content is null, a text, a list of text parts or what a tool
returned.
"""

from dataclasses import dataclass, field

from served_tokens.marks import TrajectoryError, decoded, in_json, says
from served_tokens.rows import anthropic, keys
from served_tokens.rows.keys import Reader, one_of
from served_tokens.rows.servers import FUNCTION_KINDS

OLD_API = "calls of OpenAI's old API, function_call"
LOSS_SWITCHES = ("weight", "loss", "train", "loss_mask", "trainable")  # of OpenAI, ms-swift, axolotl and others
# Why a turn is context only.
SWITCHED_OFF = "their weight, loss or train says not to train on them"
NOT_WHOLE = {  # keys that are true of a turn which is no whole answer
    **dict.fromkeys(("prefix", "partial"), "they are a prefix that the model was asked to go on from"),
    **dict.fromkeys(("truncated", "is_truncated", "interrupted", "incomplete", "is_partial"), "they were cut off"),
}
OF_TURNS = frozenset((*LOSS_SWITCHES, *keys.ENDS, *NOT_WHOLE))


@dataclass
class Read:
    """What is read of one message."""

    message: dict  # in the one shape
    not_trained: str | None = None  # why the turn is context only
    tools: list | None = None  # of a system message
    answer: str | None = None  # the id of the answer that a turn is a part of
    recorded: dict = field(default_factory=dict)  # the token ids that a server recorded of the turn
    place: str = "column system"  # where in the row it is, for people

    @property
    def is_turn(self) -> bool:
        return self.message["role"] == "assistant"


def tools_of(tools, name: str, reader: Reader) -> list[dict]:
    """Tools as {"type", "function": {"name", "description", "parameters"}}; raises TrajectoryError with their name.

    They are a list, or an object of tools by name, of objects or JSON strings; or a JSON string of it.
    """
    tools = decoded(tools if says(tools) else None, f"{name} is", (list, dict))
    read = []
    for given in tools.values() if isinstance(tools, dict) else tools:
        tool = reader.opened(given, "tool")
        if "function" in tool:
            tool["function"] = reader.opened(tool["function"], "tool")
        else:
            tool = {"type": "function", "function": {key: its for key, its in tool.items() if key != "type"}}
            reader.shapes["tools without `function`"] += 1
        for key in ("input_schema", "inputSchema"):  # of Anthropic and MCP
            keys.rename(tool["function"], key, "parameters")
        if not reader.style.prints_tools_as_sent:
            for its, shown in ((tool, ("type", "function")), (tool["function"], FUNCTION_KINDS)):
                reader.closed({key: value for key, value in its.items() if key not in shown}, "tool")
        read.append(tool)
    return read


def message_of(left: dict, reader: Reader) -> list[Read]:
    """A message that was opened, behind those outputs of tools that Anthropic's user message has in its content.

    Raises TrajectoryError.
    """
    role = left.pop("role", None)
    if left.pop("requestor", "assistant") == "user":
        raise TrajectoryError("is a call, or its output, of a simulated user; convert it to what the model was shown")
    if role == "observation" or (role == "function" and isinstance(left.get("name"), str)):
        if role == "function" and not reader.shapes[OLD_API]:
            raise TrajectoryError("servers do not show the role function beside tool_calls; write the role tool")
        role = "tool"
    if isinstance(left.get("provider_specific_fields"), dict):  # LiteLLM's
        left = reader.opened(left.pop("provider_specific_fields") | left, "message")
    reader.closed({key: left.pop(key, None) for key in reader.style.hidden}, "message")
    message = {"role": role, "content": left.pop("content", None)}
    message |= {key: left.pop(key) for key in ("name", "tool_call_id") if left.get(key) is not None}
    read = Read(message, answer=left["id"] if isinstance(left.get("id"), str) else None)
    parts = anthropic.Parts()
    if role == "tool":
        message["content"] = anthropic.output_of(message["content"], reader)
    elif isinstance(message["content"], list):
        parts = anthropic.parts_of(message["content"], role, reader)
        message["content"] = parts.texts
        if parts.thoughts or parts.calls or parts.outputs:
            reader.shapes["messages with blocks as Anthropic has them"] += 1
    if role == "assistant":
        _complete_turn(read, left, parts, reader)
        return [read]
    if decoded(left.pop("tool_calls", None), "tool_calls is"):
        raise TrajectoryError(f"a {role} message has tool_calls: they are of a simulated user, not of the model")
    if role in ("system", "developer") and (given := left.pop("tools", None) or left.pop("functions", None)):
        read.tools = tools_of(given, "tools", reader)
    # How an answer ended says nothing here, where there is no loss.
    reader.closed({key: value for key, value in left.items() if key not in OF_TURNS}, "message")
    outputs = [Read(output) for output in parts.outputs]
    return outputs if outputs and not parts.texts else [*outputs, read]


def _complete_turn(read: Read, left: dict, parts: anthropic.Parts, reader: Reader) -> None:
    """Read the rest of an assistant message, of which role and content are read already; parts: those of a list."""
    message = read.message
    read.recorded = {key: left.pop(key) for key in keys.RECORDED if left.get(key) is not None}
    if (reasoning := one_of(_reasoning(left, parts, reader), "the reasoning")) is not None:
        message["reasoning_content"] = reasoning
    calls = {"tool_calls": decoded(left.pop("tool_calls", None), "tool_calls is"), "content": parts.calls}
    if says(legacy := left.pop("function_call", None)):
        calls["function_call"] = [{"function": legacy}]
        reader.shapes[OLD_API] += 1
    calls = {key: [call_of(call, reader) for call in given] for key, given in calls.items() if given}
    if one_of({key: [_called(call) for call in its] for key, its in calls.items()}, "a call"):
        message["tool_calls"] = next(iter(calls.values()))
    why = _why_not_trained(left)
    cut = reader.closed(left, "message", message)
    read.not_trained = why or cut


def _reasoning(left: dict, parts: anthropic.Parts, reader: Reader) -> dict:
    """{key: the reasoning of a turn under this key}, taken out of it; raises TrajectoryError."""
    names = (*keys.REASONING, "reasoning_details")
    texts = [key for key in names if isinstance(left.get(key), str) and keys.switch_of(left[key]) is None]
    readings = {key: left.pop(key) for key in texts}
    blocks = decoded(left.pop("thinking_blocks", None), "thinking_blocks is")  # of LiteLLM
    thoughts = {"thinking_blocks": [anthropic.thought_of(block, reader) for block in blocks], "content": parts.thoughts}
    readings |= {key: "\n".join(its) for key, its in thoughts.items()}
    details = decoded(left.pop("reasoning_details", None), "reasoning_details is")  # of OpenRouter
    details = [detail.get("text") if isinstance(detail, dict) else None for detail in details]
    if all(isinstance(text, str) for text in details):
        readings["its details"] = "".join(details)
    elif not any(readings.values()):
        raise TrajectoryError("reasoning_details holds a summary or is encrypted, and no reasoning stands beside it")
    return readings


def call_of(call, reader: Reader) -> dict:
    """{"function": {"name", "arguments"}, "id", "type"} of a call in any spelling; raises TrajectoryError."""
    left = reader.opened(call, "call")
    if isinstance(left.get("function"), dict):
        body = reader.opened(left.pop("function"), "call")
        for key in body.keys() & left.keys():
            body[key] = one_of({key: body[key], f"{key} beside the function": left[key]}, f"a call's {key}")
        left |= body
    read = {key: left.pop(key) for key in ("id", "type") if key in left}
    name, arguments = left.pop("name", None), left.pop("arguments", None)
    if not isinstance(name, str):
        raise TrajectoryError("a tool call has no function name")
    reader.closed(left, "call")
    return {**read, "function": {"name": name, "arguments": arguments}}


def _called(call: dict) -> tuple:
    """What a call calls, whatever its id is."""
    return call["function"]["name"], in_json(call["function"]["arguments"])


def _why_not_trained(left: dict) -> str | None:
    """By its loss switch, or as it says that it is no whole answer; raises TrajectoryError for what is not known."""
    said = {key: left.pop(key) for key in LOSS_SWITCHES if left.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1):
            raise TrajectoryError(f"{key} is {value!r}; write 1 or true to train the turn, 0 or false to leave it out")
    trained = one_of(said, "whether the turn is trained")
    flags = [key for key in NOT_WHOLE if isinstance(left.get(key), bool) and left.pop(key)]
    if said and not trained:
        return SWITCHED_OFF
    return NOT_WHOLE[flags[0]] if flags else None
