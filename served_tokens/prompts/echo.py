"""Echoed history: past turns as an agent has them that sends the server's answers back as they came.

A server parses what the model writes into reasoning, content and tool calls, and strips nothing. Sent back, the chat
template shows some newlines that the model never wrote there, and arguments printed anew. The rules are those of vLLM
0.32.0 with `--reasoning-parser qwen3 --tool-call-parser hermes --enable-auto-tool-choice` (parser/qwen3.py,
parser/abstract_parser.py, tool_parsers/hermes_tool_parser.py), one token at a time where the answer is streamed.
"""

import json
import re

from served_tokens.marks import BLOCK_END, TrajectoryError

ECHOES = ("none", "vllm", "vllm-stream")
CALL = "<tool_call>"
REASONING_ENDS = re.compile("</think>|(?=<tool_call>)")
CALLS = re.compile("<tool_call>(.*?)(?:</tool_call>|\\Z)", re.DOTALL)
NAME = re.compile(r'"name"\s*:\s*"([^"]+)"')
ARGUMENTS = re.compile(r'"arguments"\s*:\s*(.*)', re.DOTALL)


def echoed_history(messages: list[dict], targets: dict[int, str], echo: str, tools: list[dict] | None) -> list[dict]:
    """The messages with each turn k in `targets` as the server's answer to it, handed to the chat template again.

    Args:
        messages, tools: as `served_trajectory` returns them.
        targets: what the model writes at turn k after a generation prompt that opens no think block, by k.
        echo: one of ECHOES; "none" leaves the messages as they are.
    That is the `template` history; `without_reasoning` of it is what an agent sends that sends no reasoning back.
    """
    history = list(messages)
    for turn, target in targets.items() if echo != "none" else ():
        answer = answer_to(target, echo, bool(tools))
        history[turn] = {**answer, "content": answer["content"] or ""}
        for call in answer.get("tool_calls", ()):
            call["function"]["arguments"] = _read_again(call["function"]["arguments"])
    return history


def _read_again(arguments: str) -> dict:
    """What vLLM makes of arguments in the history: what is no object, or broken, is {}; raises TrajectoryError."""
    try:
        value = json.loads(arguments)
    except json.JSONDecodeError:
        return {}
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"tool call arguments cannot be read ({error}), so a server refuses them") from None
    return value if isinstance(value, dict) else {}


def answer_to(target: str, echo: str, tools: bool, thinking: bool = True) -> dict:
    """The message that a client gets for what the model wrote, up to <|im_end|>.

    Args:
        tools: whether the request had any; else a call is text.
        thinking: false where the request said `enable_thinking: false`: nothing is reasoning then.
    Returns {"role", "content": text or None}, with "reasoning_content" and "tool_calls" where there are such; arguments
    are strings.
    """
    written, streamed = target.partition(BLOCK_END)[0], echo == "vllm-stream"
    reasoning, content = _parsed_reasoning(written, streamed) if thinking else ("", written)
    calls = []
    if tools:
        content, calls = (_streamed_calls if streamed else _parsed_calls)(content)
    answer = {"role": "assistant", "content": content or None}
    if reasoning:
        answer["reasoning_content"] = reasoning
    if calls:
        answer["tool_calls"] = [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ]
    return answer


def _parsed_reasoning(written: str, streamed: bool) -> tuple[str, str]:
    """(reasoning, content). A call ends reasoning too; of further `</think>`, only those of a stream are kept."""
    reasoning, *content = REASONING_ENDS.split(written, maxsplit=1)
    content = "".join(content)
    return reasoning.replace("<think>", ""), content if streamed else content.replace("</think>", "")


def _parsed_calls(content: str) -> tuple[str, list]:
    """(content before the calls, [(name, arguments)]); where one call is broken, none is parsed."""
    calls = []
    try:
        for match in CALLS.finditer(content):
            call = json.loads(match[1])
            calls.append((call["name"] + "", json.dumps(call["arguments"], ensure_ascii=False)))
    except (ValueError, TypeError, KeyError, RecursionError):
        return content, []
    before = content.partition(CALL)[0]
    return before if before.strip() or not calls else "", calls


def _streamed_calls(content: str) -> tuple[str, list]:
    """The same of a stream, which is read while it comes: a call counts once it has a name, whole or not."""
    before, opened, _ = content.partition(CALL)
    calls = []
    for match in CALLS.finditer(content):
        call, name = match[1].strip(), NAME.search(match[1])
        if not name:
            break
        arguments = ARGUMENTS.search(call)
        calls.append((name[1], _streamed_arguments(arguments[1], call) if arguments else ""))
    return before if opened else before.removesuffix(_held_back(before)), calls


def _streamed_arguments(arguments: str, call: str) -> str:
    """Less the bracket that closes the call, if that is JSON; else it was sent before anybody knew."""
    try:
        json.loads(call)
    except (ValueError, RecursionError):
        return arguments
    return arguments.removesuffix("}").rstrip()


def _held_back(text: str) -> str:
    """The end of a stream that could be the start of a call, which is never sent."""
    return next((CALL[:size] for size in range(len(CALL) - 1, 0, -1) if text.endswith(CALL[:size])), "")
