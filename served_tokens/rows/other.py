"""Rows of any known shape as one: which column holds the conversation, and what else of a row is part of it."""

from collections import Counter
from dataclasses import dataclass

from served_tokens.marks import TrajectoryError, decoded, says
from served_tokens.rows import sharegpt
from served_tokens.rows.anthropic import text_of
from served_tokens.rows.keys import CONVERT, RECORDED, Reader, objects_in, one_of, request_of
from served_tokens.rows.openai import Read, message_of, tools_of

CONVERSATIONS, TOOLS = ("messages", "conversations"), ("tools", "functions", "tool_defs")
CHAT = frozenset(  # roles that may be meant for a turn, or for what a turn answers
    "system developer user assistant model gpt chatgpt ai bot claude agent llm human function function_call".split()
)
IN_PROMPT = "they are in the prompt of a row of which the completion is trained"
BEHIND = "messages behind the last turn of a role that is no chat, which change no prompt"


@dataclass
class Shaped:
    """A row in the one shape (see `openai`)."""

    messages: list[dict]
    places: list[str]  # where in the row each message is, for people
    tools: list[dict] | None  # None where there are none
    not_trained: dict[int, str]  # {position of a turn in messages: why it is context only}
    thinking: bool | None  # what the row says of `enable_thinking`
    template_kwargs: dict  # what its request hands to the chat template
    # {position of a turn: {"prompt_token_ids": …, "token_ids": …}} as a server recorded them; one may lack
    recorded: dict[int, dict]
    shapes: Counter  # this and `known`: see `Reader`
    known: Counter


def holds_conversation(columns) -> bool:
    """Whether rows with these columns are of a known shape."""
    return any(column in columns for column in CONVERSATIONS) or {"prompt", "completion"} <= {*columns}


def in_one_shape(row: dict, reader: Reader) -> Shaped:
    """A row of any known shape as OpenAI messages and tools; raises TrajectoryError.

    An error names the first message that cannot be read, else all keys that nobody reads.
    """
    left = reader.opened(row, "row")
    template_kwargs, thinking = request_of(left)
    reads = _all_read(left, reader)
    tools = {column: tools_of(left.pop(column), column, reader) for column in TOOLS if column in left}
    tools |= {f"tools of message {position}": read.tools for position, read in enumerate(reads) if read.tools}
    if isinstance(left.get("function_call"), str):  # "auto": as tool_choice has it now
        del left["function_call"]
    if reader.style.tool_choices and left.get("tool_choice") not in reader.style.tool_choices:
        raise TrajectoryError("its tool_choice takes tools out of the prompt; leave them and the key out of the row")
    reads = _with_system(_joined(reads, reader), left, reader)
    turns = [read for read in reads if read.is_turn]
    _add_records(left, turns)
    cut = reader.closed(left, "row")
    if turns and not turns[-1].not_trained:
        turns[-1].not_trained = cut
    reader.refuse_unknown()
    reads = _developer_at_the_front(reads, reader)
    return Shaped(
        messages=[read.message for read in reads],
        places=[read.place for read in reads],
        tools=one_of(tools, "tools"),
        not_trained={position: read.not_trained for position, read in enumerate(reads) if read.not_trained},
        thinking=thinking,
        template_kwargs=template_kwargs,
        recorded={position: read.recorded for position, read in enumerate(reads) if read.recorded},
        shapes=reader.shapes,
        known=reader.known,
    )


def _all_read(left: dict, reader: Reader) -> list[Read]:
    """All messages of a row; turns in the prompt of a completion are context only."""
    reads, (given, in_prompt) = [], _conversation(left, reader)
    from_sharegpt = sharegpt.is_sharegpt(given)
    reader.shapes["ShareGPT conversations" if from_sharegpt else "OpenAI messages"] += 1
    for position, raw in enumerate(given):
        try:
            message = reader.opened(raw, "message")
            its_reads = message_of(sharegpt.as_openai(message) if from_sharegpt else message, reader)
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
        for read in its_reads:
            read.place = f"message {position}"
            if position < in_prompt and read.is_turn:
                read.not_trained = read.not_trained or IN_PROMPT
        reads += its_reads
    return reads


def _conversation(left: dict, reader: Reader) -> tuple[list, int]:
    """(the messages as given, how many of them are the prompt of a completion)"""
    found = [key for key in CONVERSATIONS if says(left.get(key))]
    if len(found) == 2:
        raise TrajectoryError(f"has {' beside '.join(found)}; leave one out by --ignore-key row.{found[1]}")
    if not found and says(left.get("completion")) and says(left.get("prompt")):
        label = "column {} (a list of messages) is".format
        prompt, completion = (decoded(left.pop(key), label(key)) for key in ("prompt", "completion"))
        reader.shapes["prompt and completion"] += 1
        return prompt + completion, len(prompt)
    column = found[0] if found else "messages"
    if column not in left:
        has = [f"{key} ({CONVERT[f'row.{key}'].format(key)})" for key in left if f"row.{key}" in CONVERT]
        holding = (key for key in left if any(its.keys() & {"role", "from"} for its in objects_in(left[key])))
        way_out = "" if has else f"; read the one that holds them by --read-as {next(holding, 'KEY')}=messages"
        raise TrajectoryError(f"the row has no column messages; it has {', '.join(has or left) or 'none'}{way_out}")
    return decoded(left.pop(column), f"column {column} is"), 0


def _joined(reads: list[Read], reader: Reader) -> list[Read]:
    """All messages, of which those that are parts of one answer, as their id says, are one before its tool outputs.

    A message of an unknown role behind the last turn is dropped.
    """
    no_answers = {None, *(read.answer for read in reads if not read.is_turn)}
    answers = {read.answer for read in reads if read.is_turn}
    joined, turn = [], None  # the turn of which further parts may come
    for read in reads:
        if read.is_turn and turn and read.answer == turn.answer and read.answer not in no_answers:
            if joined[-1] is not turn and len(answers) == 1:
                raise TrajectoryError("all its answers have one id, so which messages are one answer is not known")
            _join(turn.message, read.message)
            turn.not_trained = read.not_trained or turn.not_trained
            reader.shapes["answers cut into several messages"] += 1
            continue
        if read.is_turn:
            turn = read
        elif read.message["role"] != "tool":
            turn = None
        joined.append(read)
    while answers and _is_no_chat(joined[-1].message["role"]):
        reader.shapes[BEHIND] += 1
        joined.pop()
    return joined


def _is_no_chat(role) -> bool:
    return isinstance(role, str) and role.lower() not in CHAT and "tool" not in role.lower()


def _join(turn: dict, part: dict) -> None:
    """Add a further part of an answer to a turn; raises TrajectoryError where the parts are not in order."""
    late = turn.get("tool_calls") and (part["content"] or part.get("reasoning_content"))
    mixed = turn["content"] and part["content"] and type(turn["content"]) is not type(part["content"])
    if late or mixed or (turn["content"] and part.get("reasoning_content")):
        raise TrajectoryError("an answer is cut into messages of one id, in another order than reasoning, text, calls")
    for key in ("reasoning_content", "content", "tool_calls"):
        if part.get(key) and not (key == "content" and part[key] == turn[key]):
            turn[key] = turn[key] + part[key] if turn.get(key) else part[key]


def _with_system(reads: list[Read], left: dict, reader: Reader) -> list[Read]:
    """The messages behind the column `system`, where they do not begin with it themselves."""
    if not says(content := left.pop("system", None)):
        return reads
    [system] = message_of({"role": "system", "content": content}, reader)
    if not (reads and reads[0].message["role"] in ("system", "developer")):
        return [system, *reads]
    one_of({"column system": content, "the first message": reads[0].message["content"]}, "the system prompt")
    return reads


def _developer_at_the_front(reads: list[Read], reader: Reader) -> list[Read]:
    """vLLM puts all system and developer messages into one at the front where there is a developer message.

    Seen on 0.32.0. Where one comes after a turn, the prompts before it are without it, so no place is right for all.
    """
    if not any(read.message["role"] == "developer" for read in reads):
        return reads
    places = [place for place, read in enumerate(reads) if read.message["role"] in ("system", "developer")]
    after_a_turn = any(read.is_turn for read in reads[: places[-1]])
    if not reader.style.developer_is_system or after_a_turn:
        raise TrajectoryError("a developer message is not shown in its place; send it with the role system")
    texts = [text_of(reads[place].message["content"], reader.style) for place in places]
    others = [read for place, read in enumerate(reads) if place not in places]
    return [Read({"role": "system", "content": "\n\n".join(texts)}, place=reads[places[0]].place), *others]


def _add_records(left: dict, turns: list[Read]) -> None:
    """Give each turn the token ids that a server recorded of it in the row: those of each turn, or of the last."""
    for key in RECORDED:
        of_row = left.pop(key, None) or []
        if not (isinstance(of_row, list) and all(isinstance(ids, list) for ids in of_row)):
            of_row = [of_row]
        if len(of_row) not in (0, 1, len(turns)):
            raise TrajectoryError(f"{key} of the row are those of {len(of_row)} turns, and it has {len(turns)}")
        for turn, ids in zip(turns[len(turns) - len(of_row) :], of_row):
            turn.recorded[key] = one_of({"the turn": turn.recorded.get(key), "the row": ids}, key)
    for key, ids in ((key, ids) for turn in turns for key, ids in turn.recorded.items()):
        if not (isinstance(ids, list) and all(type(number) is int for number in ids)):
            raise TrajectoryError(f"{key} are no lists of token ids")
