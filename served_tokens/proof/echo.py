"""The check's own reading of how a server's answer comes back: what `echo.py` does, told once more and apart from it.

It walks through the text from mark to mark, as the parsers of vLLM 0.32.0 do (qwen3 for reasoning, hermes for calls).
"""

import json

END, OPEN, CLOSE = "<|im_end|>", "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


def echoed_turn(target: str, echo: str, tools: bool, thinking: bool = True) -> dict:
    """A past turn as the chat template gets it, after an agent sent back what the server answered to it.

    Args:
        target: what the model wrote.
        echo: "vllm" or "vllm-stream", as step 1 writes it.
        tools: whether the request offers any.
        thinking: false where it says `enable_thinking: false`.
    Returns {"role": "assistant", "content", "reasoning_content", "tool_calls"}, the last two where there are such.
    """
    streamed, calls = echo == "vllm-stream", []
    reasoning, content = "", target.partition(END)[0]
    if thinking:
        reasoning, content = _reasoning_and_content(content, streamed)
    if tools and CALL in content:
        content, calls = _from_stream(content) if streamed else _from_whole(content)
    elif tools and streamed:
        content = _without_start_of_call(content)
    turn = {"role": "assistant", "content": content}
    if reasoning:
        turn["reasoning_content"] = reasoning
    if calls:
        functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
        turn["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return turn


def _reasoning_and_content(text: str, streamed: bool) -> tuple[str, str]:
    """Reasoning lasts until the first </think> or call; its own marks are no text of it."""
    before_call = text.partition(CALL)[0]
    reasoning = before_call.partition(CLOSE)[0]
    content = text[len(reasoning) :].removeprefix(CLOSE)
    return reasoning.replace(OPEN, ""), content if streamed else content.replace(CLOSE, "")


def _spans(content: str) -> list[str]:
    """The texts between <tool_call> and </tool_call>, the last one open or not."""
    spans, (_, opened, rest) = [], content.partition(CALL)
    while opened:
        span, _, rest = rest.partition(CALLED)
        spans.append(span)
        _, opened, rest = rest.partition(CALL)
    return spans


def _from_whole(content: str) -> tuple[str, list]:
    """All calls, or where one cannot be read none, and the whole as text."""
    calls = []
    for span in _spans(content):
        call = _json(span)
        if not (isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call):
            return content, []
        calls.append((call["name"], _object(call["arguments"])))
    before = content.partition(CALL)[0]
    return ("" if before.isspace() else before), calls


def _from_stream(content: str) -> tuple[str, list]:
    """The calls that have a name, up to the first that has none; their arguments are what was sent of them."""
    calls = []
    for span in map(str.strip, _spans(content)):
        names = [text[1:].split('"') for text in _behind(span, "name") if text.startswith('"')]
        name = next((name for name, *closed in names if name and closed), None)
        if name is None:
            break
        sent = next(_behind(span, "arguments"), "")
        calls.append((name, _object(_json(sent[:-1] if _json(span) and sent.endswith("}") else sent))))
    return content.partition(CALL)[0], calls


def _behind(span: str, key: str):
    """What follows each `"key":`."""
    while f'"{key}"' in span:
        span = span.partition(f'"{key}"')[2].lstrip()
        if span.startswith(":"):
            yield span[1:].lstrip()


def _without_start_of_call(content: str) -> str:
    """A stream holds back what may become a call."""
    starts = [CALL[:size] for size in range(1, len(CALL))]
    return content.removesuffix(max(filter(content.endswith, starts), key=len, default=""))


def _object(arguments) -> dict:
    """What vLLM makes of arguments in the history."""
    return arguments if isinstance(arguments, dict) else {}


def _json(text: str):
    """The value of a JSON text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
