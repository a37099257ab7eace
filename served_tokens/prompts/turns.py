"""Plain messages: what each turn generates, and how the messages before it read in its served prompt."""

import contextlib
import functools
import itertools

from served_tokens.marks import BLOCK_START, TrajectoryError, map_texts
from served_tokens.prompts.chat_template import QUERY, ChatTemplate, load_chat_template, split_blocks, with_stand_ins
from served_tokens.prompts.echo import echoed_history

OUTPUT = {"role": "tool", "content": "t"}
TURN = {"role": "assistant", "content": "a", "reasoning_content": "r"}
LONG = 3000  # characters of a text that a template might shorten
NO_QUERY = "the chat template renders this turn without a think block, as no user query comes before it"


def apply_chat_template(
    messages: list[dict], tools: list[dict] | None, render, linear: bool = True, echo: str = "none"
) -> tuple[list, dict]:
    """Plain messages of one trajectory, and the edits that turn them into the served prompt of each turn.

    Args:
        messages, tools: as `served_trajectory` returns them, without control tokens.
        render: see `load_chat_template`.
        linear: the template is one for which `renders_by_query` holds, so that an ordinary trajectory need not be
            rendered once for every turn. The result is the same.
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
    rendered = _rendered_by_query(messages, tools, turns, render, echo) if linear else None
    blocks, targets, answers, left_out, edits = rendered or _rendered_by_prefix(messages, tools, turns, render, echo)
    plain = [{"role": role, "content": text} for role, text in blocks]
    served = {"turns": [], **edits, "given": _given(render)}
    for k, j, target, answer, reason in zip(turns, _places(blocks, turns), targets, answers, left_out):
        plain[j]["content"] = target
        start = len(target) - len(answer) if target.endswith(answer) else None
        served["turns"].append({"turn": k, "message": j, "answer": start, "left_out": reason})
    return plain, served


def apply_despite_control_tokens(
    messages: list[dict], tools: list[dict] | None, render, linear: bool = True, echo: str = "none"
) -> tuple:
    """`apply_chat_template` for texts that may hold control tokens, at which its renderings could not be split."""
    hidden, hidden_tools, reveal = with_stand_ins(messages, tools)
    if not reveal:
        return apply_chat_template(messages, tools, render, linear, echo)
    if reveal(render(hidden, hidden_tools)) != render(messages, tools):
        raise TrajectoryError("the chat template alters texts with control tokens, so its rendering cannot be split")
    plain, served = apply_chat_template(hidden, hidden_tools, render, linear, echo)
    return map_texts(plain, reveal), map_texts(served, reveal)


def without_reasoning(messages: list[dict]) -> list[dict]:
    """The messages as an agent sends them that does not send reasoning back: the `drop` history."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def _places(blocks: list[tuple], turns: list[int]) -> list[int]:
    """Which blocks of the rendering are the turns."""
    places = [j for j, (role, _) in enumerate(blocks) if role == "assistant"]
    if len(places) != len(turns):
        raise TrajectoryError(f"the chat template renders {len(turns)} assistant messages as {len(places)} blocks")
    return places


def _rendered_by_prefix(messages: list[dict], tools, turns: list[int], render, echo: str):
    """The naive definition: every prefix rendered.

    Returns (blocks of the whole, targets, their part without a think block, reasons to leave turns out, the edits of
    both histories).
    """
    blocks, prompts = split_blocks(render(messages, tools)), {"drop": [], "template": []}
    targets, left_out = map(list, zip(*(_target(messages[: k + 1], tools, render) for k in turns)))
    history = echoed_history(messages, dict(zip(turns, targets)), echo, tools)
    histories = {"drop": without_reasoning(history), "template": history}
    for i, k in enumerate(turns):
        for mode, history in histories.items():
            try:
                prompts[mode].append(split_blocks(render(history[:k], tools, add_generation_prompt=True)))
            except TrajectoryError as error:
                prompts[mode].append([])
                left_out[i] = str(error)
    places = _places(blocks, turns)
    edits = {mode: _edits(blocks, dict(zip(places, targets)), turns, prompts[mode]) for mode in prompts}
    return blocks, targets, [_answer(messages[k], render) for k in turns], left_out, edits


def _target(messages: list[dict], tools, render) -> tuple[str, str | None]:
    """(what the model generates in place of the last message, why the turn cannot be trained or None)"""
    target, reason = _last_block([QUERY, messages[-1]], None, render), NO_QUERY
    with contextlib.suppress(TrajectoryError):  # some templates refuse messages without a query
        in_place = _last_block(messages, tools, render)
        if in_place == target:
            reason = None
        elif "reasoning_content" not in messages[-1]:
            target = in_place
    return target, reason


def _edits(blocks: list[tuple], targets: dict, turns: list[int], prompts: list[list]) -> list[dict]:
    """What changes from the served prompt of one turn to that of the next."""
    edits, contents = [], [targets.get(j, text) for j, (_, text) in enumerate(blocks)]
    for k, prompt in zip(turns, prompts):
        if [role for role, _ in prompt] != [role for role, _ in blocks[: len(prompt)]]:
            raise TrajectoryError(f"the chat template renders other messages before turn {k} than later")
        for j, (_, text) in enumerate(prompt):
            if text != contents[j]:
                edits.append({"turn": k, "message": j, "content": text})
                contents[j] = text
    return edits


def _rendered_by_query(messages: list[dict], tools, turns: list[int], render, echo: str):
    """The same, each message rendered a fixed number of times; None for a trajectory that is not ordinary.

    In an ordinary one a user query comes first, no turn follows right on another and no answer holds a think tag.
    Then a turn has two looks: `past` once a query came after it, as if it had no reasoning, and `kept` before that.
    One rendering, up to the last turn, shows the turns before the last query as past and those after it as kept; a
    second one, of the turns alone, shows each the other way.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    odd = any(messages[k - 1]["role"] == "assistant" or "</think>" in messages[k]["content"] for k in turns)
    if odd or first not in (queries := _queries(messages, render)):
        return None
    starts = [0]  # where the blocks of a message start, from messages[first] on; the outputs of a turn share one
    for before, message in zip(messages[first:], messages[first + 1 :]):
        starts.append(starts[-1] + (not before["role"] == message["role"] == "tool"))
    last = max(query for query in queries if query < turns[-1])
    early, late = [k for k in turns if k < last], [k for k in turns if k > last]
    try:
        blocks = split_blocks(render(messages[: turns[-1] + 1], tools))
        late_past = without_reasoning([messages[k] for k in late])
        turned = [*messages[:first], QUERY, *late_past, QUERY, *(messages[k] for k in early), OUTPUT]
        other = split_blocks(render(turned, None))
        opening = len(blocks) - 1 - starts[turns[-1] - first]
        places = [opening + starts[k - first] for k in turns]
        alone = _last_block([QUERY, messages[turns[-1]]], None, render)
        if places != _places(blocks, turns) or blocks[-1][1] != alone:  # a template may look at more than expected
            return None
        here, there = [blocks[j][1] for j in places], [text for role, text in other if role == "assistant"]
        past, kept = here[: len(early)] + there[: len(late)], there[len(late) :] + here[len(early) :]
        thinks = [k == turns[-1] or messages[k].get("reasoning_content", "").strip() for k in turns]
        targets = [
            text if as_kept else _last_block([QUERY, messages[k]], None, render)
            for k, text, as_kept in zip(turns, kept, thinks)
        ]
        answers = [text if text[:1].strip() else _answer(messages[k], render) for k, text in zip(turns, past)]
        if echo != "none":
            echoed = echoed_history(messages, dict(zip(turns, targets)), echo, tools)
            if any("</think>" in echoed[k]["content"] for k in turns):  # of a stream: the second one of a turn
                return None
            past, kept = _echoed_looks(echoed, turns, render)
        if after := starts[-1] - starts[turns[-1] - first]:
            blocks += split_blocks(render([QUERY, *messages[turns[-1] + 1 :]], None))[-after:]
    except TrajectoryError:
        return None
    return blocks, targets, answers, [None] * len(turns), _edits_by_query(turns, places, queries, targets, past, kept)


def _echoed_looks(history: list[dict], turns: list[int], render) -> tuple[list, list]:
    """(past, kept) of the turns as they come back."""
    echoed = [history[k] for k in turns]
    blocks = split_blocks(render([QUERY, *without_reasoning(echoed), QUERY, *echoed, OUTPUT], None))
    looks = [text for role, text in blocks if role == "assistant"]
    return looks[: len(turns)], looks[len(turns) :]


def _edits_by_query(
    turns: list[int], places: list[int], queries: list[int], targets: list, past: list, kept: list
) -> dict:
    """The edits of both histories, from the looks of each turn."""
    edits, shown, since_query = {"drop": [], "template": []}, targets[:], 0
    for i, (before, k) in enumerate(itertools.pairwise(turns)):
        if past[i] != targets[i]:
            edits["drop"].append({"turn": k, "message": places[i], "content": past[i]})
        new_query = any(before < query < k for query in queries)
        for j in range(since_query if new_query else i, i + 1):
            text = past[j] if new_query else kept[j]
            if text != shown[j]:
                edits["template"].append({"turn": k, "message": places[j], "content": text})
                shown[j] = text
        since_query = i + 1 if new_query else since_query
    return edits


def _queries(messages: list[dict], render) -> list[int]:
    """The user messages after which the template shows earlier turns differently; the first if it is like any query."""
    places = [k for k, message in enumerate(messages) if message["role"] == "user"]
    try:
        kept, target = _shown_turn(render)
        queries = [k for k in places[1:] if not render([QUERY, TURN, messages[k]], None).startswith(kept)]
        opens = render([*(messages[k] for k in places[:1]), TURN], None).endswith(target)
    except TrajectoryError:
        return []
    return places[:1] * opens + queries


@functools.cache
def _shown_turn(render) -> tuple[str, str]:
    """(how a rendering begins where a turn is before a tool output, how it ends where the turn is the last)"""
    before, _, _ = render([QUERY, TURN, OUTPUT], None).rpartition(BLOCK_START)
    _, opened, target = render([QUERY, TURN], None).rpartition(BLOCK_START)
    return before + BLOCK_START, opened + target


@functools.cache
def prepared_template(template: ChatTemplate) -> tuple:
    """(render, whether it renders by query), made once in each process."""
    render = load_chat_template(template)
    return render, renders_by_query(render)


def renders_by_query(render) -> bool:
    """Whether rendering by query gives what the naive definition gives, on a conversation with all that templates
    look at.

    It does for Qwen3 and most of its relatives. For a template that fails here, every prefix is rendered.
    """
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    chain = [
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "1" * LONG},
        {"role": "assistant", "content": "\n\nb", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "", "reasoning_content": "\nr \n", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": " c\n", "reasoning_content": "r"},
    ]
    system, response = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<tool_response>\n4\n</tool_response>"},
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    probes = [
        ([system, QUERY, *chain, QUERY, *chain, response, *chain, system, *chain[2:], QUERY, QUERY, chain[-1]], tools),
        ([QUERY, *chain[-1:], QUERY, *chain, QUERY], None),
        (
            [
                QUERY,
                *chain[:2],
                QUERY,
                {**chain[-1], "reasoning_content": "\n", "content": "c" * LONG},
                QUERY,
                *chain[:2],
            ],
            tools,
        ),
    ]
    try:
        return all(
            apply_chat_template(*probe, render, linear=True) == apply_chat_template(*probe, render, linear=False)
            for probe in probes
        )
    except TrajectoryError:
        return False


def _last_block(messages: list[dict], tools, render) -> str:
    return split_blocks(render(messages, tools))[-1][1]


def _answer(message: dict, render) -> str:
    """What the model generates in place of a message with `enable_thinking=False`."""
    whole = _last_block([QUERY, *without_reasoning([message])], None, render)
    return whole.removeprefix(_given(render, enable_thinking=False))


@functools.cache
def _given(render, **variables) -> str:
    """What the generation prompt holds of the assistant block."""
    return render([QUERY], None, add_generation_prompt=True, **variables).rpartition(f"{BLOCK_START}assistant\n")[2]
