"""What of a trajectory is served as it is and may still be a mistake in the data: counted, and named by step 1."""

import hashlib
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

from served_tokens.marks import Counts, many
from served_tokens.rows.trajectory import Trajectory

# What may be a mistake, {}: how often, and where first.
UNKNOWN_TOOL = "tool calls that name a tool which their row does not offer: {}"
CALL_AS_TEXT = "turns with a call as text, <tool_call>… or the like, not in tool_calls: {}; it is trained as that text"
NO_CALL = "tool outputs without a tool call: {}; where it is a text in the turn before, it is trained as that text"
SWAP = "tool outputs whose id is not that of the call whose turn it is: {}; prompts show outputs in their order alone"
TOOLS_TWICE = "rows with tools both in the system text and beside it, so that their prompts hold them twice: {}"
TWO_ANSWERS = "turns right behind another turn: {}; where both are parts of one answer, join them"
SAYS_NONE = 'turns with "None" or the like as text or reasoning: {}; it is trained as that text, so write null'
WRAPPED = "tool outputs that are in <tool_response> already, so that their prompts hold it twice: {}"
NULL_ARGUMENTS = (
    "calls with null arguments against their schema: {}; Arrow fills them in, so write them as JSON strings"
)
NULL_SCHEMAS = "rows with null properties in tools: {}; Arrow fills them in, so write tools as JSON strings"
NO_REASONING = "no turn has reasoning: step 2 --no-thinking makes samples for a model that does not think"
SOME_REASONING = (
    "{} of {} turns have no reasoning ({}): trained, they teach the model not to think; step 2 --require-reasoning "
    "leaves them out"
)
NOT_SHOWN = "keys that are no part of the conversation, so in no sample, and in how many rows"
CALL_LIKE = re.compile(
    r"<tool_?call|<function_?call|<function=|<invoke|\[TOOL_?CALLS?\]|<\|(?:tool_call|python_tag)|<｜tool|^Action:",
    re.IGNORECASE | re.MULTILINE,
)
SAYS_NOTHING = frozenset(("none", "null", "nan", "(no content)"))


@dataclass
class Reasoned(Counts):
    """{kind of turn: how many there are}, and how many of them have no reasoning."""

    turns: Counter = field(default_factory=Counter)
    without: Counter = field(default_factory=Counter)

    def count(self, turn: dict) -> None:
        kind = "that call tools" if turn.get("tool_calls") else "that answer"
        self.turns[kind] += 1
        self.without[kind] += not turn.get("reasoning_content", "").strip()

    @property
    def nowhere(self) -> bool:
        """Whether there are turns, and none has reasoning."""
        return 0 < self.turns.total() == self.without.total()

    def lines(self) -> list[str]:
        """What a person should know of it, no line or one."""
        kinds = ", ".join(f"{self.without[kind]} of {number} {kind}" for kind, number in sorted(self.turns.items()))
        some = SOME_REASONING.format(self.without.total(), self.turns.total(), kinds)
        return [NO_REASONING if self.nowhere else some] if self.without.total() else []


@dataclass
class Noted(Counts):
    """What step 1 counts of trajectories."""

    trajectories: int = 0
    turns: int = 0
    reasoned: Reasoned = field(default_factory=Reasoned)
    not_rendered: int = 0  # turns whose reasoning the chat template does not render
    left_out: Counter = field(default_factory=Counter)  # {why: turns}
    shapes: Counter = field(default_factory=Counter)  # {name: how often}
    known: Counter = field(default_factory=Counter)  # {"message.usage": trajectories}, which nobody reads
    notes: Counter = field(default_factory=Counter)  # {what may be a mistake: how often}
    first: dict = field(default_factory=dict)  # {the same: where}
    digests: array = field(default_factory=lambda: array("Q"))  # of plain messages, so that equal ones are found

    def lines(self) -> list[str]:
        """What a person should know of the data, a line each."""
        lines = [f"read as: {listed(self.shapes)}"]
        lines += [f"{many(number, 'turn')} left out: {why}" for why, number in self.left_out.items()]
        lines += [f"{NOT_SHOWN}: {listed(self.known)}"] if self.known else []
        lines += self.reasoned.lines()
        lines += [note.format(f"{number}, first in {self.first[note]}") for note, number in (+self.notes).items()]
        if equal := len(self.digests) - len(set(self.digests)):
            lines.append(f"{many(equal, 'row has', 'rows have')} the same messages and tools as another row")
        return lines


def listed(counted: Counter) -> str:
    """Names with their numbers."""
    return ", ".join(f"{name} ({number})" for name, number in sorted(counted.items()))


def noted(trajectory: Trajectory) -> Noted:
    """What is to be known of a trajectory before it is rendered."""
    messages, tools, given = trajectory.messages, trajectory.tools or [], trajectory.given
    reasoned = Reasoned()
    for turn in set(trajectory.turns) - trajectory.not_trained.keys():
        reasoned.count(messages[turn])
    return Noted(
        trajectories=1,
        turns=len(trajectory.turns),
        reasoned=reasoned,
        shapes=Counter(given.shapes),
        known=Counter(given.known.keys()),
        notes=_mistakes(messages, [tool["function"] for tool in tools]),
    )


def digest(plain: list[dict]) -> int:
    """8 bytes that rows with the same plain messages share, and no others."""
    text = "\0".join(message["content"] for message in plain)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _mistakes(messages: list[dict], functions: list[dict]) -> Counter:
    """{what may be a mistake in messages, and in the functions of tools: how often}"""
    notes, waiting, role_before = Counter(), [], None  # waiting: ids of the calls whose output is still to come
    schemas = {str(function.get("name")): _properties(function) for function in functions}
    notes[NULL_SCHEMAS] += any(None in properties.values() for properties in schemas.values())
    for message in messages:
        role, content, calls = message["role"], message["content"], message.get("tool_calls", [])
        if role == "assistant":
            texts = (content, message.get("reasoning_content", ""))
            notes[SAYS_NONE] += any(text[:20].strip().lower() in SAYS_NOTHING for text in texts)
            notes[CALL_AS_TEXT] += CALL_LIKE.search(content) is not None
            notes[TWO_ANSWERS] += role_before == "assistant"
            waiting += [call.get("id") for call in calls]
        elif role == "tool":
            notes[NO_CALL] += not waiting
            notes[WRAPPED] += content.lstrip().startswith("<tool_response>")
            expected, given = waiting.pop(0) if waiting else None, message.get("tool_call_id")
            notes[SWAP] += bool(expected and given and expected != given)
        elif role == "system" and functions:
            notes[TOOLS_TWICE] += "<tools>" in content
        for name, arguments in ((call["function"]["name"], call["function"]["arguments"]) for call in calls):
            notes[UNKNOWN_TOOL] += bool(functions) and name not in schemas
            notes[NULL_ARGUMENTS] += bool(schemas.get(name)) and _has_filled_nulls(arguments, schemas[name])
        role_before = role
    return notes


def _properties(function: dict) -> dict:
    """{name of a parameter: its schema}"""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _has_filled_nulls(arguments: dict, properties: dict) -> bool:
    """Whether arguments are null that must not be: JSON made from an Arrow table has a null for each key of others."""
    schemas = [properties.get(key) for key, value in arguments.items() if value is None]
    return not all(
        isinstance(schema, dict) and ("null" in str(schema.get("type", "null")) or schema.get("nullable") is True)
        for schema in schemas
    )
