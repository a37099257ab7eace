"""Messages, calls and tools of all known shapes as OpenAI has them.

What is read of an object is taken out of a copy of it (`Reader.copied`); what is left over is noted (`Reader.leave`).
"""

import contextlib
import json
from collections import Counter
from typing import NamedTuple

from served_tokens.marks import MEDIA, TrajectoryError, decoded, is_number, is_text_parts, kind_of, says

# What --read-as can give another key to: {field: the objects that have it}.
FIELDS = {
    **dict.fromkeys(("messages", "tools", "system"), "row"),
    **dict.fromkeys(("role", "content", "reasoning_content", "tool_calls", "weight"), "message"),
    "arguments": "tool call",
}
SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
REASONING = ("reasoning_details", "reasoning_content", "reasoning", "thinking")
ARGUMENTS = ("arguments", "args", "input", "parameters")
RECORDED = ("prompt_token_ids", "token_ids")  # what a server was given and what the model wrote, as vLLM returns them
SWITCHES = ("weight", "loss", "train")  # of OpenAI, ms-swift and axolotl
CUT = ("length", "max_tokens", "content_filter", "error", "abort", "aborted", "cancelled", "pause_turn", "refusal")
CUT_FLAGS = ("truncated", "is_truncated", "interrupted", "incomplete", "is_partial")
FINISHED = ("stop", "tool_calls", "function_call", "end_turn", "tool_use", "stop_sequence", "eos")
# Keys that are known, and change nothing of what is served or trained. Of `task_info` step 2 makes the validation set.
KNOWN = {
    "row": ("task_info", "tool_choice", "parallel_tool_calls", "system_fingerprint"),
    "message": ("name", "tool_call_id"),
    "tool call": ("index",),
    "content part": ("cache_control", "citations", "signature", "is_error"),
}
NO_CONTENT = ("id", "timestamp", "refusal")  # that no message without content has it under
# Why a turn is context only.
SWITCHED_OFF = "their weight, loss or train says not to train on them"
NOT_FINISHED = "their finish_reason is {}, so they were cut off"
CUT_BY_FLAG = "they say that they are {}"
CONTINUED = "they are a prefix that the model was asked to go on from"


class Reader(NamedTuple):
    """How objects are read, and what was met on the way."""

    read_as: tuple
    ignore_keys: tuple
    shapes: Counter
    unread: list

    def copied(self, value, kind: str) -> dict:
        """A copy to take out of, with the keys of --read-as renamed and those of --ignore-key gone."""
        if not isinstance(value, dict):
            raise TrajectoryError(f"is not an object but {kind_of(value)}")
        left = dict(value)
        for key in self.ignore_keys:
            left.pop(key, None)
        for key, field in self.read_as:
            if FIELDS[field] == kind and key in left:
                left[field] = one_of({field: left.get(field), key: left.pop(key)}, field)
        return left

    def leave(self, left: dict, kind: str) -> None:
        for key, value in left.items():
            if key not in KNOWN[kind] and says(value):
                self.unread.append((kind, key, value))


def one_of(readings: dict, what: str):
    """The one value that readings of one thing, {where: value}, agree on; None where all are empty."""
    said = {where: value for where, value in readings.items() if says(value)}
    (first, value), *others = said.items() or [("", None)]
    for other, its_value in others:
        if _bare(its_value) != _bare(value):
            raise TrajectoryError(f"{what} stands in both {first} and {other}, and they differ")
    return value


def _bare(value):
    return value.strip() if isinstance(value, str) else value


def tools_of(tools, column: str, wrap: bool, reader: Reader) -> list:
    """Tools as given, and those of other APIs as {"type", "function": {"name", "description", "parameters"}}."""
    tools, wrap = decoded(tools, column), wrap or column == "functions"
    for position, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise TrajectoryError(f"tool {position} is not an object but {kind_of(tool)}")
        if "function" in tool:
            continue
        function = dict(tool)
        if "input_schema" in function:
            function["parameters"] = one_of(
                {key: function.pop(key, None) for key in ("input_schema", "parameters")}, "the schema of a tool"
            )
            function.pop("type", None)
            reader.shapes["Anthropic tools"] += 1
        elif wrap:
            reader.shapes["flat tools"] += 1
        else:
            continue
        tools = [*tools[:position], {"type": "function", "function": function}, *tools[position + 1 :]]
    return tools


def message_of_sharegpt(left: dict, reader: Reader) -> dict:
    """{"from", "value"} as {"role", "content"}; a function_call has calls as JSON behind its reasoning, if any."""
    has_text, role, value = "value" in left, left.pop("from", None), left.pop("value", None)
    from_role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    message = {**left, "role": one_of({"from": from_role, "role": left.get("role")}, "the role")}
    if role != "function_call" and has_text:
        message["content"] = one_of({"value": value, "content": left.get("content")}, "the text")
    if role == "function_call":
        thought, closed, calls = value.rpartition("</think>") if isinstance(value, str) else ("", "", value)
        message["content"] = one_of({"value": thought + closed, "content": left.get("content")}, "the text")
        calls = decoded(calls, "value", (list, dict))
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = one_of({"value": calls, "tool_calls": left.get("tool_calls")}, "a call")
    return message


def message_of(left: dict, reader: Reader) -> tuple[list, str | None, list | None]:
    """(messages, of which the last may be a turn; why that is not trained; tools that a system message has)"""
    role, tools = left.pop("role", None), None
    if role is None and isinstance(left.get("type"), str):  # LangChain's messages, OpenAI's Responses
        raise TrajectoryError(f"has no role but the type {left['type']}; write it as a message with a role")
    if role == "developer" or (role == "function" and isinstance(left.get("name"), str)):
        reader.shapes[f"role {role}"] += 1
        role = "tool" if role == "function" else role
    without_content = "content" not in left
    message = {"role": role, "content": left.pop("content", None)}
    message |= {key: left[key] for key in ("name", "tool_call_id") if left.get(key) is not None}
    outputs, why = [], None
    if role == "assistant":
        message |= {key: left.pop(key) for key in RECORDED if left.get(key) is not None}
        why = _read_turn(message, left, reader)
    elif says(left.pop("tool_calls", None)) and role in ("system", "developer", "user", "tool"):
        raise TrajectoryError(f"a {role} message has tool_calls: they are of a simulated user, and none of the model's")
    elif role == "user" and isinstance(message["content"], list):
        outputs, message["content"] = _tool_results(message["content"], reader)
    elif is_text_parts(message["content"]):
        message["content"] = [_text_part(part, reader) for part in message["content"]]
    if role in ("system", "developer") and says(left.get("tools")):
        tools = tools_of(left.pop("tools"), "tools", False, reader)
    if role != "assistant":
        for key in SWITCHES:  # there is no loss there anyway
            if left.get(key) in (0, 1) and left.pop(key):
                reader.unread.append(("message", key, None))
    if without_content and not message.get("tool_calls"):
        _refuse_lost(left, (*KNOWN["message"], *NO_CONTENT), "a message has no content", "content")
    reader.leave(left, "message")
    return [*outputs, message] if message["content"] != [] or not outputs else outputs, why, tools


def _read_turn(message: dict, left: dict, reader: Reader) -> str | None:
    """Complete a turn by its reasoning and calls; why it is not trained, or None."""
    readings = {key: _reasoning(key, left) for key in REASONING}
    calls = {"tool_calls": left.pop("tool_calls", None) or []}
    if not isinstance(calls["tool_calls"], list):
        raise TrajectoryError(f"tool_calls is not a list but {kind_of(calls['tool_calls'])}")
    if says(legacy := left.pop("function_call", None)):
        calls["function_call"] = [{"function": legacy}]
        reader.shapes["function_call"] += 1
    if isinstance(message["content"], list):
        message["content"], readings["content"], calls["content"] = _parts_of_turn(message["content"], reader)
    for key in ("thinking", "reasoning_details"):
        reader.shapes[f"reasoning under {key}"] += bool(readings[key])
    if (reasoning := one_of(readings, "the reasoning")) is not None:
        message["reasoning_content"] = reasoning
    calls = {key: [_call(call, reader) for call in its_calls] for key, its_calls in calls.items()}
    if len(by_key := [key for key in calls if calls[key]]) > 1:
        one_of({key: [call["function"] for call in calls[key]] for key in by_key}, "a call")
    if by_key:
        message["tool_calls"] = calls[by_key[0]]
    return _why_not_trained(left)


def _reasoning(key: str, left: dict) -> str | None:
    value = left.get(key)
    if key == "thinking" and not isinstance(value, str):  # a switch of that name, or what nobody knows
        return None
    left.pop(key, None)
    if key == "reasoning_details" and isinstance(value, list):  # OpenRouter's
        if not all(isinstance(detail, dict) and isinstance(detail.get("text"), str) for detail in value):
            if any(isinstance(left.get(other), str) and left[other] for other in REASONING):
                return None
            raise TrajectoryError("reasoning_details holds more than texts (a summary, or what is encrypted)")
        return "".join(detail["text"] for detail in value)
    if not isinstance(value, (str, type(None))):
        raise TrajectoryError(f"reasoning is not a string but {kind_of(value)}")
    return value


def _parts_of_turn(parts: list, reader: Reader) -> tuple:
    """(text parts, the reasoning, calls) of a content list; they must come in this order: reasoning, text, calls."""
    texts, thoughts, calls, last = [], [], [], 0
    for part in parts:
        if is_text_parts([part]) and part.get("type", "text") == "text":
            order = 1
            texts.append(_text_part(part, reader))
        elif (kind := _type_of(part)) in ("thinking", "reasoning"):
            order, left = 0, reader.copied(part, "content part")
            thoughts.append(one_of({key: left.pop(key, None) for key in (kind, "text")}, "the reasoning"))
            if not isinstance(thoughts[-1] or "", str):
                raise TrajectoryError(f"reasoning is not a string but {kind_of(thoughts[-1])}")
            del left["type"]
            if not thoughts[-1] and left:
                raise TrajectoryError(f"a part of type {kind} has no text but {', '.join(left)}")
            reader.leave(left, "content part")
        elif kind == "tool_use":
            order = 2
            left = reader.copied(part, "content part")
            function = {key: value for key, value in left.items() if key not in ("id", "type", *KNOWN["content part"])}
            if "arguments" not in function:
                function["arguments"] = function.pop("input", None)
            calls.append({"id": left.get("id"), "type": "function", "function": function})
        else:
            raise _unknown_part(part)
        if order < last:
            raise TrajectoryError(f"a part of type {part.get('type')} comes after others that the model writes later")
        last = order
        reader.shapes[f"content part {_type_of(part)}"] += order != 1
    only_texts = not thoughts and not calls
    return texts if texts or only_texts else None, "\n".join(filter(None, thoughts)) or None, calls


def _tool_results(parts: list, reader: Reader) -> tuple[list, list]:
    """(messages of role tool, the text parts behind them) of Anthropic's user content"""
    outputs, texts = [], []
    for part in parts:
        if _type_of(part) != "tool_result":
            if not is_text_parts([part]) or part.get("type", "text") != "text":
                raise _unknown_part(part)
            texts.append(_text_part(part, reader))
            continue
        if texts:
            raise TrajectoryError("a part of type tool_result comes after text")
        left = reader.copied(part, "content part")
        del left["type"]
        without_content = "content" not in left
        outputs.append({"role": "tool", "content": left.pop("content", None)})
        if (identity := left.pop("tool_use_id", None)) is not None:
            outputs[-1]["tool_call_id"] = identity
        if without_content and (lost := [key for key in left if key not in KNOWN["content part"]]):
            raise TrajectoryError(f"a part of type tool_result has no content but {', '.join(lost)}")
        reader.leave(left, "content part")
        reader.shapes["content part tool_result"] += 1
    return outputs, texts


def _text_part(part: dict, reader: Reader) -> dict:
    left = reader.copied(part, "content part")
    kept = {key: left.pop(key) for key in ("type", "text") if key in left}
    reader.leave(left, "content part")
    return kept


def _type_of(part) -> str | None:
    return part.get("type") if isinstance(part, dict) else None


def _unknown_part(part) -> TrajectoryError:
    kind = _type_of(part)
    if kind in MEDIA:
        return TrajectoryError(f"content is not text but a list with a part of type {kind}; leave it out of the row")
    if kind is None:
        return TrajectoryError("content is not text but a list")
    return TrajectoryError(f"content has a part of type {kind}, which nobody reads; leave it out of the row")


def _call(call, reader: Reader) -> dict:
    """{"function": {"name", "arguments"}, "id", "type"} of a call in any known shape."""
    if not isinstance(call, dict):
        raise TrajectoryError("a tool call has no function name")
    left = reader.copied(call, "tool call")
    flat = not isinstance(left.get("function"), dict)
    body = left if flat else reader.copied(left.pop("function"), "tool call")
    read = {key: left.pop(key) for key in ("id", "type") if key in left}
    if not isinstance(name := body.pop("name", None), str):
        raise TrajectoryError("a tool call has no function name")
    for key in ARGUMENTS if not flat else ():
        if key in left:
            where = {"the call": left.pop(key), "its function": body.get(key)}
            body[key] = one_of(where, f"{key} of a call")
    readings = {key: body.pop(key) for key in ARGUMENTS if key in body}
    for key in readings:
        reader.shapes[f"calls with {key}"] += key != "arguments"
    reader.shapes["flat calls"] += flat
    if all(map(_is_empty, readings.values())):
        rest = {key: value for its in (left, body) for key, value in its.items() if not readings or _is_object(value)}
        _refuse_lost(rest, KNOWN["tool call"], "a tool call has no arguments", "arguments")
    if len(readings) > 1:
        readings = {"": one_of({key: _bare_arguments(value) for key, value in readings.items()}, "a call's arguments")}
    for rest in (left,) if flat else (left, body):
        reader.leave(rest, "tool call")
    return {**read, "function": {"name": name, "arguments": next(iter(readings.values()), None)}}


def _bare_arguments(value):
    """Arguments to be compared: a JSON string is what it says."""
    with contextlib.suppress(ValueError, RecursionError):  # one that is cut is named later
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    return value


def _is_empty(arguments) -> bool:
    short = isinstance(arguments, str) and len(arguments) < 9
    return not says("".join(arguments.split()).strip("{}[]") if short else arguments) or arguments == "null"


def _is_object(value) -> bool:
    return isinstance(_bare_arguments(value), dict)


def _refuse_lost(left: dict, known: tuple, what: str, field: str) -> None:
    """Raise TrajectoryError where what is left over may be what is missing."""
    for key, value in left.items():
        if key not in known and says(value) and not is_number(value):
            raise TrajectoryError(
                f"{what} but {key}; read it by --read-as {key}={field}, or leave it out by --ignore-key {key}"
            )


def _why_not_trained(left: dict) -> str | None:
    said = {key: left.pop(key) for key in SWITCHES if key in left}
    said = {key: value for key, value in said.items() if value is not None}
    for key, value in said.items():
        if value not in (0, 1):
            raise TrajectoryError(f"{key} is {value!r}; a turn is trained (1 or true) or it is not (0 or false)")
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
    for key in ("finish_reason", "stop_reason"):
        reason = left.get(key)
        if isinstance(reason, str) and reason.lower() in (*CUT, *FINISHED):
            del left[key]
            if reason.lower() in CUT:
                return NOT_FINISHED.format(reason.lower())
        elif isinstance(reason, str) and reason:
            raise TrajectoryError(
                f"{key} is {reason!r}, which says neither that the answer is whole nor that it was cut off; leave it "
                f"out by --ignore-key {key}"
            )
    return None
