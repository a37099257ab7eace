"""What of a trajectory is served as it is and may still be a mistake in the data: counted, and named by step 1."""

import hashlib
import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

from served_tokens.marks import Counts
from served_tokens.rows.trajectory import Trajectory

UNKNOWN_TOOL = "tool calls name a tool that their trajectory does not offer"
CALL_AS_TEXT = "turns write a call as text, <tool_call>… or the like, and not in tool_calls; it is trained as that text"
NO_CALL = "tool outputs follow no tool call; where the call is a text in the turn before, it is trained as that text"
TOOLS_TWICE = "trajectories offer tools both in the system text and beside it, so their prompts hold them twice"
TWO_ANSWERS = "turns follow right on another turn; where both are parts of one answer, join them"
SAYS_NONE = 'turns say "None" or the like as their text or reasoning, which is trained as that text; write null'
WRAPPED = "tool outputs are wrapped in <tool_response> already, so their prompts hold it twice"
NULL_ARGUMENTS = (
    "tool calls have null arguments that the schema of their tool does not allow, as Arrow fills in where objects of "
    "several shapes share a column; write arguments as JSON strings"
)
NULL_SCHEMAS = (
    "trajectories have tools with null among their parameters' properties, as Arrow fills in where objects of several "
    "shapes share a column; write tools as JSON strings"
)
NO_REASONING = (
    "no turn has reasoning: a thinking model would be trained not to think; step 2 makes samples for one that does not "
    "by --no-thinking, and leaves turns without reasoning out by --require-reasoning"
)
SOME_REASONING = (
    "{} of {} turns have no reasoning, {} of them in trajectories whose other turns have some: trained, they teach the "
    "model not to think; step 2 --require-reasoning leaves them out, and --turns last trains the last turn of each row "
    "only, for logs with a row for each call"
)
CALL_LIKE = re.compile(
    r"<tool_?call|<function_?call|<function=|<invoke|\[TOOL_?CALLS?\]|<\|(?:tool_call|python_tag)|<｜tool|^Action:",
    re.IGNORECASE | re.MULTILINE,
)
SAYS_NOTHING = frozenset(("none", "null", "nan", "(no content)"))


@dataclass
class Noted(Counts):
    """What step 1 counts of trajectories.

    beside_reasoning: turns without reasoning of trajectories whose other turns have some.
    not_rendered: turns whose reasoning the chat template does not render.
    left_out: {why: turns}; shapes: {name: how often}; known: {"message.usage": trajectories}, which nobody reads;
    notes: {what may be a mistake: how often}; printed: {how a server prints tools otherwise: trajectories}.
    digests: 8 bytes of each trajectory's plain messages, so that equal ones are found.
    """

    trajectories: int = 0
    turns: int = 0
    with_reasoning: int = 0
    beside_reasoning: int = 0
    not_rendered: int = 0
    left_out: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)
    known: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    printed: Counter = field(default_factory=Counter)
    digests: array = field(default_factory=lambda: array("Q"))

    def lines(self) -> list[str]:
        """What a person should know of the data, a line each."""
        lines = [f"read as: {_listed(self.shapes)}"]
        lines += [f"{number} turns left out: {why}" for why, number in self.left_out.items()]
        if self.known:
            lines.append(f"keys that nobody reads, and in how many rows: {_listed(self.known)}")
        if self.turns and not self.with_reasoning:
            lines.append(NO_REASONING)
        elif (without := self.turns - self.with_reasoning) > 0:
            lines.append(SOME_REASONING.format(without, self.turns, self.beside_reasoning))
        lines += [f"{number} {note}" for note, number in (+self.notes).items()]
        if self.printed:
            ways = _listed(self.printed)
            lines.append(f"tools that the server prints otherwise than they are given (--server-style): {ways}")
        if equal := len(self.digests) - len(set(self.digests)):
            lines.append(f"{equal} rows have the same messages and tools as another row")
        return lines


def _listed(counted: Counter) -> str:
    return ", ".join(f"{name} ({number})" for name, number in counted.most_common())


def noted(trajectory: Trajectory) -> Noted:
    """What is to be known of a trajectory before it is rendered."""
    messages, tools, given = trajectory.messages, trajectory.tools or [], trajectory.given
    turns = [messages[turn] for turn in trajectory.turns]
    thinking = sum(bool(turn.get("reasoning_content", "").strip()) for turn in turns)
    return Noted(
        trajectories=1,
        turns=len(turns),
        with_reasoning=thinking,
        beside_reasoning=len(turns) - thinking if thinking else 0,
        shapes=Counter(given.shapes),
        known=Counter(given.known.keys()),
        notes=_mistakes(messages, [tool["function"] for tool in tools]),
        printed=Counter(printed_otherwise(given.tools or [], tools)),
    )


def digest(plain: list[dict]) -> int:
    """8 bytes that rows with the same plain messages share, and no others."""
    text = "\0".join(message["content"] for message in plain)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def printed_otherwise(given: list[dict], served: list[dict]) -> set[str]:
    """The ways in which a server prints tools otherwise than they are given."""
    ways = set()
    for tool, shown in zip(given, served):
        for old, new in ((tool, shown), (tool["function"], shown["function"])):
            ways |= {f"without {key}" for key in old if key not in new}
            ways |= {f"with {key}: {json.dumps(new[key])}" for key in new if key not in old}
            if "parameters" in old and old["parameters"] != new.get("parameters"):
                ways.add("with other parameters")
            if [key for key in old if key in new] != [key for key in new if key in old]:
                ways.add("in another order")
    return ways


def _mistakes(messages: list[dict], functions: list[dict]) -> Counter:
    """{what may be a mistake in messages, and in the functions of tools: how often}"""
    notes, waiting, role_before = Counter(), 0, None  # waiting: calls whose output is still to come
    schemas = {str(function.get("name")): _properties(function) for function in functions}
    notes[NULL_SCHEMAS] += any(None in properties.values() for properties in schemas.values())
    for message in messages:
        role, content, calls = message["role"], message["content"], message.get("tool_calls", [])
        if role == "assistant":
            texts = (content, message.get("reasoning_content", ""))
            notes[SAYS_NONE] += any(text[:20].strip().lower() in SAYS_NOTHING for text in texts)
            notes[CALL_AS_TEXT] += CALL_LIKE.search(content) is not None
            notes[TWO_ANSWERS] += role_before == "assistant"
            waiting += len(calls)
        elif role == "tool":
            notes[NO_CALL] += not waiting
            notes[WRAPPED] += content.lstrip().startswith("<tool_response>")
            waiting = max(0, waiting - 1)
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
