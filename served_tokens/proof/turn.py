"""The check's own definition of a turn: its served prompt, its target, and the sample that they make.

The naive one, prefix by prefix, by the chat template that ships with the tokenizer: nothing of steps 1 and 2 is in it.
"""

import contextlib
import hashlib
import json

from served_tokens.marks import IGNORE_INDEX, TrajectoryError, in_json
from served_tokens.proof.echo import echoed_turn

ASSISTANT = "<|im_start|>assistant\n"
SERVED_AS = ("drop", "template", "no-thinking")


def served_turn(
    messages: list[dict], tools: list[dict] | None, turn: int, served_as: str, render, came_back: list | None = None
) -> tuple[str, str]:
    """The naive definition: (served prompt, target) of messages[turn].

    Args:
        messages, tools: what a server hands to the chat template.
        served_as: "drop", "template" or "no-thinking", as step 2 writes it.
        render: render(messages, tools, add_generation_prompt, **variables) -> str, the tokenizer's chat template.
        came_back: the messages as the agent has them where the turns are not what it sends, see `echoed_messages`.
    Raises TrajectoryError where the target cannot be told.
    """
    history, message, variables = (came_back or messages)[:turn], messages[turn], {}
    if any("refused" in past for past in history):
        raise TrajectoryError("the server refuses an answer that comes before it")
    if served_as != "template":
        history = [_without_reasoning(past) for past in history]
    if served_as == "no-thinking":
        message, variables = _without_reasoning(message), {"enable_thinking": False}
    prompt = render(history, tools, True, **variables)
    given = prompt.rpartition(ASSISTANT)[2]  # what the generation prompt holds already of the assistant block
    whole = render([*messages[:turn], message], tools, False)
    own_marks = sum(text.count(ASSISTANT) for text in (message["content"], message.get("reasoning_content", "")))
    generated = ASSISTANT.join(whole.split(ASSISTANT)[-1 - own_marks :])
    if not generated.startswith(given):
        raise TrajectoryError("the target does not begin as the generation prompt does, so the model cannot write it")
    return prompt, generated.removeprefix(given)


def _without_reasoning(message: dict) -> dict:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def echoed_messages(messages: list[dict], tools: list[dict] | None, served_as: str, echo: str, render) -> list[dict]:
    """The messages of an agent that sends back what the server answered: each turn as its target comes back.

    Args: as for `served_turn`; echo: as step 1 writes it, with "none" they are the messages as they are.
    A turn whose answer the server refuses is there with the key `refused`: no prompt comes behind it.
    """
    if echo == "none":
        return messages
    came_back, names = list(messages), [tool["function"]["name"] for tool in tools or ()]
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            with contextlib.suppress(ValueError):  # it has no sample; as history it stays
                _, target = served_turn(messages, tools, turn, served_as, render)
                came_back[turn] = {**message, "refused": True}
                came_back[turn] = echoed_turn(target, echo, names)
    return came_back


def expected_sample(spans: list[tuple[list[int], list[int]]]) -> dict:
    """{"input_ids", "labels"} of a sample that supervises these turns: token ids of (served prompt, target), in order.

    Each served prompt and target must be what the last ones begin with; else no loss mask is right, and there is none.
    """
    prompt, target = spans[-1]
    input_ids = prompt + target
    labels = [IGNORE_INDEX] * len(input_ids)
    for prompt, target in spans:
        start, end = len(prompt), len(prompt) + len(target)
        if input_ids[:end] != prompt + target:
            return {"input_ids": input_ids, "labels": []}
        labels[start:end] = target
    return {"input_ids": input_ids, "labels": labels}


def task_of(task_info, messages: list, tools: list | None) -> bytes:
    """A digest of what no two sides of a split may share: task_info.task_id, else what is served of the row."""
    task = in_json(task_info)
    task = task.get("task_id") if isinstance(task, dict) else None
    same = [messages, tools] if task is None else str(task)
    return hashlib.sha256(json.dumps(same, default=str).encode()).digest()
