"""Whether step 1 reads a row rightly: a plain one as the check's own rules do, any other without losing a text."""

import json

from served_tokens.proof.findings import Learnt
from served_tokens.proof.lost import lost_texts
from served_tokens.proof.own_reader import not_to_be_trained, plain_reading
from served_tokens.rows.trajectory import Reading, Trajectory

READ_OF_PLAIN_ROWS = frozenset(
    "messages tools role content reasoning_content tool_calls function name arguments description parameters".split()
)


def check_reading(
    learnt: Learnt, row: dict, name: str, reading: Reading, trajectory: Trajectory, shown: dict, thinking: bool
) -> None:
    """Compare what step 1 reads of a row with the row itself, and note what is wrong.

    Args:
        row: as its file has it; name: of the row, for people.
        reading: how step 1 reads it; trajectory: what it makes of it.
        shown: {number of a turn that is trained: what it shows}, see `lost_texts`.
        thinking: whether these are trained to think; a row may say that they are not to be.
    """
    turns, plain = len(trajectory.turns), None
    ignored = {key.rpartition(".")[2] for key in reading.ignore_keys if "." in key}
    if not (reading.read_as or ignored & READ_OF_PLAIN_ROWS):
        plain = plain_reading(row, reading.server_style)
    otherwise = []
    if plain is None:
        _note_lost_texts(learnt, row, name, reading, turns, shown)
    else:
        learnt.rows_read_twice += 1
        if plain != as_plain(trajectory):
            otherwise.append(f"{name}: step 1 reads it otherwise than the check itself does")
    if thinking and not reading.read_as and not_to_be_trained(row, turns) & shown.keys():
        otherwise.append(f"{name}: turns are trained that the row says not to train on")
    learnt.read_otherwise += len(otherwise)
    learnt.lost += otherwise


def as_plain(trajectory: Trajectory) -> tuple[list, list, dict]:
    """What the chat template gets, as `plain_reading` says it."""
    messages = []
    for message in trajectory.messages:
        functions = [call["function"] for call in message.get("tool_calls", [])]
        calls = [(function["name"], json.dumps(function["arguments"])) for function in functions]
        messages.append((message["role"], message["content"], message.get("reasoning_content", ""), calls))
    return messages, [json.dumps(tool) for tool in trajectory.tools or []], trajectory.given.template_kwargs


def _note_lost_texts(learnt: Learnt, row: dict, name: str, reading: Reading, turns: int, shown: dict) -> None:
    try:
        lost = lost_texts(row, shown, turns, dict(reading.read_as), reading.ignore_keys)
    except RecursionError:
        lost = None
    if lost is None:
        learnt.lost_under["messages"] += 1
        learnt.lost.append(f"{name}: its turns cannot be told in the raw row; bring it into a shape of docs/rows.md")
    else:
        learnt.lost_under.update(loss.key for loss in lost)
        learnt.lost += [f"{name}: {loss}" for loss in lost]
