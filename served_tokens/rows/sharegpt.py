"""ShareGPT's conversations: {"from", "value"} in place of role and content, calls as JSON in a text."""

from served_tokens.marks import decoded
from served_tokens.rows.keys import one_of

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def is_sharegpt(messages: list) -> bool:
    """Whether any message says whom it is from."""
    return any(isinstance(message, dict) and "from" in message for message in messages)


def as_openai(left: dict) -> dict:
    """A message as OpenAI has it; a function_call holds calls behind its reasoning. Raises TrajectoryError."""
    has_text, who, value = "value" in left, left.pop("from", None), left.pop("value", None)
    role = ROLES.get(who, who) if isinstance(who, str) else who
    message = {**left, "role": one_of({"from": role, "role": left.get("role")}, "the role")}
    if who == "function_call":
        thought, closed, calls = value.rpartition("</think>") if isinstance(value, str) else ("", "", value)
        calls = decoded(calls, "value", (list, dict))
        calls = calls if isinstance(calls, list) else [calls]
        message["content"] = one_of({"value": thought + closed, "content": left.get("content")}, "the text")
        message["tool_calls"] = one_of({"value": calls, "tool_calls": left.get("tool_calls")}, "a call")
    elif has_text:
        message["content"] = one_of({"value": value, "content": left.get("content")}, "the text")
    return message
