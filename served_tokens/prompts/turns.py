"""Plain messages: what each turn generates, and how the messages before it read in its served prompt."""

import contextlib
import functools
import itertools
from dataclasses import dataclass

from served_tokens.marks import BLOCK_START, TrajectoryError, map_texts
from served_tokens.prompts.chat_template import QUERY, ChatTemplate, load_chat_template, split_blocks, with_stand_ins
from served_tokens.prompts.echo import echoed_history

OUTPUT = {"role": "tool", "content": "t"}
NO_QUERY = "the chat template renders this turn without a think block, as no user query comes before it"


@dataclass
class Rendered:
    """A trajectory as the chat template shows it.

    blocks: (role, text) of each message, in one rendering of the whole.
    targets: what the model writes at each turn; answers: the same with `enable_thinking=False`.
    left_out: why a turn cannot be trained, or None.
    edits: {"drop": […], "template": […]}, see `apply_chat_template`.
    """

    blocks: list[tuple[str, str]]
    targets: list[str]
    answers: list[str]
    left_out: list[str | None]
    edits: dict[str, list[dict]]


def apply_chat_template(
    messages: list[dict], tools: list[dict] | None, render, by_chains: bool = True, echo: str = "none"
) -> tuple[list[dict], dict]:
    """Plain messages of one trajectory, and the edits that turn them into the served prompt of each turn.

    Args:
        messages, tools: as a server hands them to the chat template, without control tokens.
        render: see `load_chat_template`.
        by_chains: see `renders_by_chains`; the result is the same.
        echo: how past turns come back to the server (see `echo`): "none", as the messages have them.
    Returns (plain, served):
        plain: [{"role", "content"}], one per block of the rendering; an assistant message holds its target.
        served: {"turns": [{"turn": k, "message": j, "answer": a, "left_out": reason or None}],
                 "drop": [{"turn": k, "message": j, "content": text}], "template": […], "given": text}
            A turn is messages[k] and plain[j]. Its target without the think block is plain[j]["content"][a:].
            Its served prompt is plain[:j], in which for each edit with a turn <= k, in order, the message reads
            `content` instead. `drop` and `template` are the two histories (README, "Which history"). `given` is
            the part of each target that the generation prompt holds already (nothing, or `<think>` and a newline).
    Raises TrajectoryError where the template refuses the messages, or does not render ChatML.
    """
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    way = rendered_by_chains if by_chains and is_ordinary(messages) else rendered_by_prefix
    rendered = way(messages, tools, turns, render, echo)
    plain = [{"role": role, "content": text} for role, text in rendered.blocks]
    served = {"turns": [], **rendered.edits, "given": _given(render)}
    for number, (k, j) in enumerate(zip(turns, _places(rendered.blocks, turns))):
        target, answer = rendered.targets[number], rendered.answers[number]
        plain[j]["content"] = target
        start = len(target) - len(answer) if target.endswith(answer) else None
        served["turns"].append({"turn": k, "message": j, "answer": start, "left_out": rendered.left_out[number]})
    return plain, served


def apply_despite_control_tokens(
    messages: list[dict], tools: list[dict] | None, render, by_chains: bool = True, echo: str = "none"
) -> tuple[list[dict], dict]:
    """`apply_chat_template` for texts that may hold control tokens, at which its renderings could not be split."""
    hidden, hidden_tools, reveal = with_stand_ins(messages, tools)
    if not reveal:
        return apply_chat_template(messages, tools, render, by_chains, echo)
    if reveal(render(hidden, hidden_tools)) != render(messages, tools):
        raise TrajectoryError("the chat template alters texts with control tokens, so its rendering cannot be split")
    plain, served = apply_chat_template(hidden, hidden_tools, render, by_chains, echo)
    return map_texts(plain, reveal), map_texts(served, reveal)


def without_reasoning(messages: list[dict]) -> list[dict]:
    """The messages as an agent sends them that does not send reasoning back: the `drop` history."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def rendered_by_prefix(messages: list[dict], tools, turns: list[int], render, echo: str) -> Rendered:
    """The naive definition: every prefix rendered."""
    blocks, targets, left_out, edits = split_blocks(render(messages, tools)), [], [], {}
    for k in turns:
        target, in_place = _alone(messages[k], render), None
        with contextlib.suppress(TrajectoryError):  # some templates refuse messages without a query
            in_place = split_blocks(render(messages[: k + 1], tools))[-1][1]
        left_out.append(None if in_place == target else NO_QUERY)
        targets.append(target if in_place is None or "reasoning_content" in messages[k] else in_place)
    history = echoed_history(messages, dict(zip(turns, targets)), echo, tools)
    contents = [text for _, text in blocks]
    for j, target in zip(_places(blocks, turns), targets):
        contents[j] = target
    for mode, past in (("drop", without_reasoning(history)), ("template", history)):
        prompts = []
        for number, k in enumerate(turns):
            try:
                prompt = split_blocks(render(past[:k], tools, add_generation_prompt=True))
            except TrajectoryError as error:
                prompt, left_out[number] = [], str(error)
            if [role for role, _ in prompt] != [role for role, _ in blocks[: len(prompt)]]:
                raise TrajectoryError(f"the chat template renders other messages before turn {k} than later")
            prompts.append([text for _, text in prompt])
        edits[mode] = _edits(turns, contents, prompts, range(len(blocks)))
    answers = [_answer(messages[k], render) for k in turns]
    return Rendered(blocks=blocks, targets=targets, answers=answers, left_out=left_out, edits=edits)


def rendered_by_chains(messages: list[dict], tools, turns: list[int], render, echo: str) -> Rendered:
    """The same for an ordinary trajectory, each message rendered twice.

    A chain is what lies between two user messages. A turn has two looks: `kept` in the prompts of its chain, as the
    chain alone is rendered, and `past` in those of later chains, as the whole is rendered without reasoning.
    """
    blocks = split_blocks(render([*without_reasoning(messages), QUERY], tools))[:-1]
    places, chains = _places(blocks, turns), _chains(messages)
    past, kept = [blocks[j][1] for j in places], []
    for start, of_chain in chains:
        kept += _assistants(render(messages[start : of_chain[-1] + 1], None))
    targets, lasts = list(kept), {of_chain[-1] for _, of_chain in chains}
    for number, k in enumerate(turns):  # the last turn of a chain stands there as its target, and any with reasoning
        if k not in lasts and not messages[k].get("reasoning_content", "").strip():
            targets[number] = _alone(messages[k], render)
    answers = [text if text[:1].strip() else _answer(messages[k], render) for k, text in zip(turns, past)]
    if echo != "none":
        history = echoed_history(messages, dict(zip(turns, targets)), echo, tools)
        if not is_ordinary(history):  # a stream keeps the second </think> of a turn
            return rendered_by_prefix(messages, tools, turns, render, echo)
        echoed = [history[k] for k in turns]
        looks = _assistants(render([QUERY, *without_reasoning(echoed), QUERY, *echoed, OUTPUT], None))
        past, kept = looks[: len(turns)], looks[len(turns) :]
    prompts = {"drop": [past[:number] for number in range(len(turns))], "template": []}
    for _, of_chain in chains:
        begun = len(prompts["template"])
        prompts["template"] += [past[:begun] + kept[begun : begun + more] for more in range(len(of_chain))]
    edits = {mode: _edits(turns, targets, prompts[mode], places) for mode in prompts}
    return Rendered(blocks=blocks, targets=targets, answers=answers, left_out=[None] * len(turns), edits=edits)


def is_ordinary(messages: list[dict]) -> bool:
    """Whether each turn answers a user query or tool outputs, and no text holds what templates look for."""
    first = 1 if messages[0]["role"] == "system" else 0
    for before, message in itertools.pairwise([{"role": "assistant"}, *messages[first:]]):
        if message["role"] == "assistant" and (before["role"] == "assistant" or "</think>" in message["content"]):
            return False
        if message["role"] == "user" and message["content"].startswith("<tool_response>"):
            return False
    return messages[first : first + 1] != [] and messages[first]["role"] == "user"


def _chains(messages: list[dict]) -> list[tuple[int, list[int]]]:
    """(user message, turns) of each chain that has turns, as positions in messages."""
    chains = []
    for k, message in enumerate(messages):
        if message["role"] == "user":
            chains.append((k, []))
        elif message["role"] == "assistant":
            chains[-1][1].append(k)
    return [chain for chain in chains if chain[1]]


def _edits(turns: list[int], contents: list[str], prompts: list[list[str]], places) -> list[dict]:
    """What changes from the served prompt of one turn to that of the next.

    Args:
        contents: the texts before any prompt, each of the message at its place; prompts: the first of them, in each.
    """
    edits, contents = [], list(contents)
    for k, prompt in zip(turns, prompts):
        for j, text in enumerate(prompt):
            if text != contents[j]:
                edits.append({"turn": k, "message": places[j], "content": text})
                contents[j] = text
    return edits


@functools.cache
def prepared_template(template: ChatTemplate) -> tuple:
    """(render, whether it renders by chains), made once in each process."""
    render = load_chat_template(template)
    return render, renders_by_chains(render)


def renders_by_chains(render) -> bool:
    """Whether rendering by chains gives what the naive definition gives, on a conversation with all that templates
    look at.

    It does for Qwen3 and most of its relatives. For a template that fails here, every prefix is rendered.
    """
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}] * 2
    chain = [
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": calls},
        {"role": "tool", "content": "1" * 3000},  # a template might shorten it
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "\n\nb", "tool_calls": calls[:1]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": " c\n", "reasoning_content": "\nr \n"},
    ]
    system, blank = {"role": "system", "content": "s"}, {"role": "assistant", "content": "c", "reasoning_content": "\n"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    whole = [system, QUERY, *chain, QUERY, *chain[:3], system, *chain[3:], QUERY, QUERY, blank, QUERY, *chain[:2]]
    try:
        return all(
            apply_chat_template(probe, its_tools, render, True) == apply_chat_template(probe, its_tools, render, False)
            for probe, its_tools in ((whole, tools), (whole[1:], None), ([QUERY, chain[-1], QUERY, *chain], None))
        )
    except TrajectoryError:
        return False


def _places(blocks: list[tuple], turns: list[int]) -> list[int]:
    """Which blocks of the rendering are the turns."""
    places = [j for j, (role, _) in enumerate(blocks) if role == "assistant"]
    if len(places) != len(turns):
        raise TrajectoryError(f"the chat template renders {len(turns)} assistant messages as {len(places)} blocks")
    return places


def _assistants(rendered: str) -> list[str]:
    return [text for role, text in split_blocks(rendered) if role == "assistant"]


def _alone(message: dict, render) -> str:
    """A turn as the answer to a query."""
    return split_blocks(render([QUERY, message], None))[-1][1]


def _answer(message: dict, render) -> str:
    """What the model generates in place of a message with `enable_thinking=False`."""
    [message] = without_reasoning([message])
    return _alone(message, render).removeprefix(_given(render, enable_thinking=False))


@functools.cache
def _given(render, **variables) -> str:
    """What the generation prompt holds of the assistant block."""
    return render([QUERY], None, add_generation_prompt=True, **variables).rpartition(f"{BLOCK_START}assistant\n")[2]
