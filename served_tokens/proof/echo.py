"""The check's own reading of how a server's answer comes back: what `echo.py` does, told once more and apart from it.

It walks through the text from mark to mark, as the parsers of vLLM 0.32.0 do (qwen3 for reasoning, hermes for calls),
and those of SGLang 0.5.23 (qwen3, qwen25).
"""

import json

END, OPEN, CLOSE = "<|im_end|>", "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


def echoed_turn(target: str, echo: str, names: list[str]) -> dict:
    """A past turn as the chat template gets it, after an agent sent back what the server answered to it.

    Args:
        target: what the model wrote.
        echo: "vllm", "vllm-stream" or "sglang", as step 1 writes it.
        names: of the tools that the request offers.
    Returns {"role": "assistant", "content", "reasoning_content", "tool_calls"}, the last two where there are such.
    Raises ValueError where the server refuses its own answer.
    """
    calls, (reasoning, content) = [], _reasoning_and_content(target.partition(END)[0], echo)
    if names and echo == "sglang":
        content, calls = _from_sglang(content, names)
    elif names and CALL in content:
        content, calls = _from_stream(content) if echo == "vllm-stream" else _from_whole(content)
    elif names and echo == "vllm-stream":
        content = _without_start_of_call(content)
    turn = {"role": "assistant", "content": content}
    if reasoning:
        turn["reasoning_content"] = reasoning
    if calls:
        functions = [{"name": name, "arguments": its if isinstance(its, dict) else {}} for name, its in calls]
        turn["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return turn


def _reasoning_and_content(text: str, echo: str) -> tuple[str, str]:
    """Reasoning lasts until the first </think> or call, for SGLang until a call only where there is no </think>."""
    before_call = text if echo == "sglang" and CLOSE in text else text.partition(CALL)[0]
    reasoning = before_call.partition(CLOSE)[0]
    content = text[len(reasoning) :].removeprefix(CLOSE)
    if echo == "sglang":
        return reasoning.removeprefix(OPEN), content
    return reasoning.replace(OPEN, ""), content if echo == "vllm-stream" else content.replace(CLOSE, "")


def _from_sglang(content: str, names: list[str]) -> tuple[str, list]:
    """The calls of these tools, each between lines of its marks; what is between and behind them is lost."""
    before, opened, _ = content.partition(f"{CALL}\n")
    calls = []
    for span in _spans(content, f"{CALL}\n", f"\n{CALLED}", closed_only=True):
        value = _json(span)
        for call in value if isinstance(value, list) else [{} if value is None else value]:
            if not isinstance(call, dict):
                raise ValueError("a call is no object")
            if call.get("name") in names:
                arguments = call.get("parameters") or call.get("arguments", {})
                json.dumps(arguments, allow_nan=False)  # raises ValueError
                if not isinstance(arguments, dict):
                    raise ValueError("arguments are no object")
                calls.append((call["name"], arguments))
    return before.strip() if opened else before, calls


def _spans(content: str, opening: str = CALL, closing: str = CALLED, closed_only: bool = False) -> list[str]:
    """The texts between <tool_call> and </tool_call>, the last one open or not."""
    spans, (_, opened, rest) = [], content.partition(opening)
    while opened:
        span, closed, rest = rest.partition(closing)
        if closed or not closed_only:
            spans.append(span)
        _, opened, rest = rest.partition(opening)
    return spans


def _from_whole(content: str) -> tuple[str, list]:
    """All calls, or where one cannot be read none, and the whole as text."""
    calls = []
    for span in _spans(content):
        call = _json(span)
        if not (isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call):
            return content, []
        calls.append((call["name"], call["arguments"]))
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
        calls.append((name, _json(sent[:-1] if _json(span) and sent.endswith("}") else sent)))
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


def _json(text: str):
    """The value of a JSON text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
