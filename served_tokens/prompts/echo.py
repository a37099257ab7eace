"""Echoed history: past turns as an agent has them that sends the server's answers back as they came.

A server parses what the model writes into reasoning, content and tool calls, and strips little. Sent back, the chat
template shows some newlines that the model never wrote there, and arguments printed anew. The rules are those of vLLM
0.32.0 with `--reasoning-parser qwen3 --tool-call-parser hermes --enable-auto-tool-choice` (parser/qwen3.py,
parser/abstract_parser.py, tool_parsers/hermes_tool_parser.py), one token at a time where the answer is streamed; and
those of SGLang 0.5.23 with `--reasoning-parser qwen3 --tool-call-parser qwen25`, not streamed.
"""

import json
import re

from served_tokens.marks import TrajectoryError, kind_of
from served_tokens.rows.servers import STYLES

ECHOES = ("none", "vllm", "vllm-stream", "sglang")
CALL = "<tool_call>"
STARTS = [CALL[:size] for size in range(len(CALL) - 1, 0, -1)]
CALLS = re.compile("<tool_call>(.*?)(?:</tool_call>|\\Z)", re.DOTALL)
CALLS_FOR_SGLANG = re.compile("<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
NAME = re.compile(r'"name"\s*:\s*"([^"]+)"')
ARGUMENTS = re.compile(r'"arguments"\s*:\s*(.*)', re.DOTALL)


def answer_sent_back(target: str, echo: str, names: list[str]) -> dict:
    """A past turn as the chat template gets it; arguments are objects, which vLLM makes of all others too.

    Args:
        target: what the model wrote after a generation prompt that opens no think block.
        echo: one of ECHOES, but none.
        names: of the tools that the request offers; without any, a call is text.
    Raises TrajectoryError where the server refuses the answer when it comes back.
    """
    to_the_mark = echo == "sglang" and "</think>" in target  # else a call ends reasoning too
    reasoning, *rest = re.split("</think>" if to_the_mark else "</think>|(?=<tool_call>)", target, maxsplit=1)
    reasoning = reasoning.removeprefix("<think>") if echo == "sglang" else reasoning.replace("<think>", "")
    content, calls = "".join(rest), []
    if echo == "vllm":
        content = content.replace("</think>", "")
    if names and echo == "sglang":
        content, calls = _calls_for_sglang(content, names)
    elif names:
        content, calls = _streamed_calls(content) if echo == "vllm-stream" else _whole_calls(content)
    answer = {"role": "assistant", "content": content}
    if reasoning:
        answer["reasoning_content"] = reasoning
    if calls:
        functions = [{"name": name, "arguments": its if isinstance(its, dict) else {}} for name, its in calls]
        answer["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return answer


def _whole_calls(content: str) -> tuple[str, list]:
    """(content before the calls, [(name, arguments)]) for vLLM; where one call is broken, none is parsed."""
    read = [_read(call) for call in CALLS.findall(content)]
    if not all(isinstance(its, dict) and isinstance(its.get("name"), str) and "arguments" in its for its in read):
        return content, []
    calls = [(its["name"], its["arguments"]) for its in read]
    before = content.partition(CALL)[0]
    return before if before.strip() or not calls else "", calls


def _streamed_calls(content: str) -> tuple[str, list]:
    """The same of a stream, which is read while it comes: a call counts once it has a name, whole or not."""
    before, opened, _ = content.partition(CALL)
    calls = []
    for call in map(str.strip, CALLS.findall(content)):
        name, arguments = NAME.search(call), ARGUMENTS.search(call)
        if not name:
            break
        sent = arguments[1] if arguments else ""
        if _read(call) is not None:  # else the bracket that closes the call was sent before anybody knew
            sent = sent.removesuffix("}")
        calls.append((name[1], _read(sent)))
    held_back = [] if opened else filter(before.endswith, STARTS)  # what could become a call is never sent
    return before.removesuffix(next(iter(held_back), "")), calls


def _read(text: str):
    """The value of a JSON text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls_for_sglang(content: str, names: list) -> tuple[str, list]:
    """The same for SGLang: broken calls are lost, those of other names too, and so is what follows a call."""
    before, opened, _ = content.partition(f"{CALL}\n")
    calls = []
    for read in map(_read, CALLS_FOR_SGLANG.findall(content)):
        for call in read if isinstance(read, list) else [{} if read is None else read]:
            if not isinstance(call, dict):
                raise TrajectoryError(f"a call is {kind_of(call)}")
            if call.get("name") in names:
                arguments = call.get("parameters") or call.get("arguments", {})
                STYLES["sglang"].refuse_arguments(json.dumps(arguments, ensure_ascii=False), arguments)
                calls.append((call["name"], arguments))
    return before.strip() if opened else before, calls
