"""ShareGPT's conversations: {"from", "value"} in place of role and content, calls as JSON in a text."""

from served_tokens.marks import decoded
from served_tokens.rows.keys import one_of, rename

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def is_sharegpt(messages: list) -> bool:
    """Whether any message says whom it is from."""
    return any(isinstance(message, dict) and "from" in message for message in messages)


def as_openai(left: dict) -> dict:
    """An opened message as OpenAI has it; a function_call holds calls behind its reasoning. Raises TrajectoryError."""
    who = left.get("from")
    if who == "function_call":
        value = left.get("value")
        thought, closed, calls = value.rpartition("</think>") if isinstance(value, str) else ("", "", value)
        calls = decoded(calls, "the calls in the value of a function_call are", (list, dict))
        calls = calls if isinstance(calls, list) else [calls]
        left["value"] = thought + closed
        left["tool_calls"] = one_of({"value": calls, "tool_calls": left.get("tool_calls")}, "a call")
    if isinstance(who, str):
        left["from"] = ROLES.get(who, who)
    rename(left, "from", "role")
    rename(left, "value", "content")
    return left
