"""Plain messages: what each turn generates, and how the messages before it read in its served prompt."""

import functools
import itertools
import json
from dataclasses import dataclass

from served_tokens.marks import BLOCK_START, TrajectoryError
from served_tokens.prompts.chat_template import QUERY, RENDERS_KEPT, split_blocks
from served_tokens.prompts.echo import answer_sent_back

MARK, HIDDEN = "<|im_", "<|im+"  # how the marks of ChatML begin, and what hides them: as long, so offsets stay right
NO_QUERY = "the chat template renders this turn without a think block, as no user query comes before it"


@dataclass
class Rendered:
    """A trajectory as the chat template shows it; for plain and turns see `apply_chat_template`."""

    plain: list[dict]
    turns: list[dict]
    # {"drop": {turn: the texts of the blocks before it, as its served prompt shows them}, "template": …}
    prompts: dict[str, dict[int, list[str]]]


def apply_chat_template(
    messages: list[dict], tools: list[dict] | None, render, echo: str = "none"
) -> tuple[list[dict], dict]:
    """Plain messages of one trajectory, and the edits that turn them into the served prompt of each turn.

    Args:
        messages, tools: as a server hands them to the chat template, without control tokens.
        render: see `load_chat_template`.
        echo: how past turns come back to the server (see `echo`): "none", as the messages have them.
    Returns (plain, served):
        plain: [{"role", "content"}], one per block of the rendering; an assistant message holds its target.
        served: {"turns": [{"turn": k, "message": j, "answer": a, "left_out": reason or None}],
                 "drop": [{"turn": k, "message": j, "content": text}], "template": […], "given": text,
                 "given_without_thinking": text}
            A turn is messages[k] and plain[j]. Its target without the think block is plain[j]["content"][a:].
            Its served prompt is plain[:j], in which for each edit with a turn <= k, in order, the message reads
            `content` instead. `drop` and `template` are the two histories (README, "One question first"). `given` is
            the part of each target that the generation prompt holds already (nothing, or `<think>` and a newline); the
            last is what it holds with `enable_thinking=False`.
    Raises TrajectoryError where the template refuses the messages, or does not render ChatML.
    """
    rendered = _rendered(messages, tools, render)
    if echo != "none":
        history, refused = list(messages), None
        names = [tool["function"]["name"] for tool in tools or ()]
        for turn in rendered.turns:
            turn["left_out"] = turn["left_out"] or refused
            try:
                history[turn["turn"]] = answer_sent_back(rendered.plain[turn["message"]]["content"], echo, names)
            except TrajectoryError as error:
                refused = refused or f"the server refuses an answer before them: {error}"
        echoed = _rendered(history, tools, render)
        rendered.prompts = echoed.prompts
        for turn, sent_back in zip(rendered.turns, echoed.turns):
            turn["left_out"] = turn["left_out"] or sent_back["left_out"]
    edits = {history: _edits(rendered.plain, prompts) for history, prompts in rendered.prompts.items()}
    given = {"given": _given(render), "given_without_thinking": _given(render, enable_thinking=False)}
    return rendered.plain, {"turns": rendered.turns, **edits, **given}


def apply_despite_control_tokens(
    messages: list[dict], tools: list[dict] | None, render, echo: str = "none"
) -> tuple[list[dict], dict]:
    """`apply_chat_template` for texts that may hold the marks of ChatML, at which its renderings could not be split."""
    hidden = [_replaced(value, MARK, HIDDEN) for value in (messages, tools)]
    if render(*hidden).replace(HIDDEN, MARK) != render(messages, tools):
        raise TrajectoryError("the chat template alters texts with control tokens, so its rendering cannot be split")
    plain, served = apply_chat_template(*hidden, render, echo)
    return _replaced(plain, HIDDEN, MARK), _replaced(served, HIDDEN, MARK)


def _replaced(value, mark: str, other: str):
    """A JSON value with another mark in its texts, keys too; JSON writes neither mark with an escape."""
    return json.loads(json.dumps(value, ensure_ascii=False).replace(mark, other))


def without_reasoning(messages: list[dict]) -> list[dict]:
    """The messages as an agent sends them that does not send reasoning back: the `drop` history."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def _rendered(messages: list[dict], tools: list[dict] | None, render) -> Rendered:
    if is_ordinary(messages) and renders_by_chains(render):
        return rendered_by_chains(messages, tools, render)
    return rendered_by_prefix(messages, tools, render)


def rendered_by_prefix(messages: list[dict], tools: list[dict] | None, render) -> Rendered:
    """The naive definition: each turn is rendered in its place, and the prompt before it in both histories."""
    rendered = _begun(messages, split_blocks(render(messages, tools)))
    roles = [message["role"] for message in rendered.plain]
    for turn in rendered.turns:
        k, j = turn["turn"], turn["message"]
        alone = target = _alone(messages[k], render)
        try:  # some templates refuse messages without a query
            target = split_blocks(render(messages[: k + 1], tools))[-1][1]
            if target != alone:
                turn["left_out"] = NO_QUERY
            for history, past in (("drop", without_reasoning(messages[:k])), ("template", messages[:k])):
                prompt = split_blocks(render(past, tools, add_generation_prompt=True))
                if [role for role, _ in prompt] != roles[:j]:
                    raise TrajectoryError("the chat template renders other messages before this turn than later")
                rendered.prompts[history][k] = [text for _, text in prompt]
        except TrajectoryError as error:
            turn["left_out"] = str(error)
        rendered.plain[j]["content"] = target
        turn["answer"] = _answer_start(target, _answer(messages[k], render))
    return rendered


def rendered_by_chains(messages: list[dict], tools: list[dict] | None, render) -> Rendered:
    """The same for an ordinary trajectory, with each message rendered twice.

    A chain is a user message and what follows it up to the next one. A turn has two looks: the prompts of its own chain
    show it as a rendering of the chain alone does, those of later chains as one of the whole without reasoning does.
    """
    rendered = _begun(messages, split_blocks(render([*without_reasoning(messages), QUERY], tools))[:-1])
    past = [message["content"] for message in rendered.plain]
    kept = list(past)
    queries = [k for k, message in enumerate(messages) if message["role"] == "user"]
    for start, end in itertools.pairwise([*queries, len(messages)]):
        turns = [turn for turn in rendered.turns if start < turn["turn"] < end]
        if not turns:
            continue
        in_chain = [text for role, text in split_blocks(render(messages[start:end], None)) if role == "assistant"]
        for turn, text in zip(turns, in_chain):
            k, j, first = turn["turn"], turn["message"], turns[0]["message"]
            kept[j] = text
            rendered.prompts["drop"][k] = past[:j]
            rendered.prompts["template"][k] = past[:first] + kept[first:j]
            thinks = messages[k].get("reasoning_content", "").strip()
            target = text if thinks else _alone(messages[k], render)
            opens_with_text = past[j][:1].strip()  # else the template may strip it behind a think block
            answer = past[j] if opens_with_text else _answer(messages[k], render)
            rendered.plain[j]["content"], turn["answer"] = target, _answer_start(target, answer)
    return rendered


def is_ordinary(messages: list[dict]) -> bool:
    """Whether a user query comes first, no turn follows on another, and no text holds what templates look for."""
    roles = [message["role"] for message in messages]
    if roles[:1] != ["user"] and roles[:2] != ["system", "user"]:
        return False
    both = ((message["role"], message["content"]) for message in messages)
    marked = any("</think>" in text or (role == "user" and text.startswith("<tool_response>")) for role, text in both)
    return not marked and ("assistant", "assistant") not in itertools.pairwise(roles)


@functools.lru_cache(maxsize=RENDERS_KEPT)
def renders_by_chains(render) -> bool:
    """Whether rendering by chains gives what rendering by prefix gives, on a conversation with all that templates look
    at, with tools and without. It does for Qwen3 and most of its relatives.
    """
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}] * 2
    chain = [
        QUERY,
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": calls},
        {"role": "tool", "content": "1" * 3000},  # a template might shorten it
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "\n\nb", "tool_calls": calls[:1]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": " c\n", "reasoning_content": "\nr \n"},
    ]
    system, blank = {"role": "system", "content": "s"}, {"role": "assistant", "content": "c", "reasoning_content": "\n"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    bare = [QUERY, blank, *chain, *chain[:4], system, *chain[4:], QUERY, QUERY, blank, *chain[:3]]
    try:
        return all(
            rendered_by_chains(probe, its_tools, render) == rendered_by_prefix(probe, its_tools, render)
            for probe, its_tools in (([system, *bare], tools), (bare, None))
        )
    except TrajectoryError:
        return False


def _begun(messages: list[dict], blocks: list[tuple[str, str]]) -> Rendered:
    """The blocks of a rendering of all messages, in which the turns are yet to be filled in."""
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    places = [j for j, (role, _) in enumerate(blocks) if role == "assistant"]
    if len(places) != len(turns):
        raise TrajectoryError(f"the chat template renders {len(turns)} assistant messages as {len(places)} blocks")
    return Rendered(
        plain=[{"role": role, "content": text} for role, text in blocks],
        turns=[{"turn": k, "message": j, "answer": None, "left_out": None} for k, j in zip(turns, places)],
        prompts={"drop": {}, "template": {}},
    )


def _edits(plain: list[dict], prompts: dict[int, list[str]]) -> list[dict]:
    """What changes from `plain` to the served prompt of the first turn, and from each to the next."""
    edits, shown = [], [message["content"] for message in plain]
    for k, prompt in prompts.items():
        for j, text in enumerate(prompt):
            if text != shown[j]:
                edits.append({"turn": k, "message": j, "content": text})
                shown[j] = text
    return edits


def _alone(message: dict, render) -> str:
    """A turn as the answer to a query."""
    return split_blocks(render([QUERY, message], None))[-1][1]


def _answer(message: dict, render) -> str:
    """What the model generates in place of a message with `enable_thinking=False`."""
    [message] = without_reasoning([message])
    return _alone(message, render).removeprefix(_given(render, enable_thinking=False))


def _answer_start(target: str, answer: str) -> int | None:
    return len(target) - len(answer) if target.endswith(answer) else None


@functools.lru_cache(maxsize=RENDERS_KEPT)
def _given(render, **variables) -> str:
    """What the generation prompt holds of the assistant block."""
    return render([QUERY], None, add_generation_prompt=True, **variables).rpartition(f"{BLOCK_START}assistant\n")[2]
