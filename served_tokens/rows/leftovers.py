"""What is left over of a row when it is read: keys that look like what must not be lost set it aside."""

import re

from served_tokens.marks import TrajectoryError, is_number
from served_tokens.rows.message_shapes import ARGUMENTS

# Words of a key that suggest what must not be lost, and where it would be read. Long ones are looked for within words.
SUSPICIOUS = {
    "reasoning": (
        "reason",
        "think",
        "thought",
        "cot",
        "analysis",
        "rationale",
        "scratchpad",
        "monologue",
        "reflection",
    ),
    "tools": ("tool", "function", "api"),
    "a system prompt": ("system",),
    "a loss switch": ("loss", "train", "weight", "mask", "supervis", "label"),
    "arguments": ("arg", "argument", "kwarg", "param", "parameter", "input"),
}
WAY_OUT = {
    ("reasoning", "message"): "reasoning_content",
    ("tools", "message"): "tool_calls",
    ("tools", "row"): "tools",
    ("a system prompt", "row"): "system",
    ("a loss switch", "message"): "weight",
    ("arguments", "tool call"): "arguments",
}


# Of what is read, what is lost where a client spells it otherwise, and no word above tells.
ENDS = ("finish_reason", "stop_reason")
SPELLED = {
    "row": ("enable_thinking", "chat_template_kwargs", *ENDS),
    "message": ("content", "prefix", "partial", *ENDS),
}
# What such words are in, and is nothing of the kind: why a run ended, how much a model was asked to think.
HARMLESS = re.compile("(termination|termination_type|end|exit)_reason|reasoning_effort")
OPPOSITE = re.compile("mask|exclude|ignore|skip|without|no_|not_|un[a-z]")  # of a loss switch: 1 may mean not trained


def refuse_suspicious(unread: list) -> None:
    """Raise TrajectoryError for the first (kind of object, key, value) that looks like what must not be lost."""
    for kind, key, value in unread:
        if (known := re.sub("([a-z])([A-Z])", r"\1_\2", str(key)).lower()) in SPELLED.get(kind, ()) and known != key:
            raise TrajectoryError(
                f"a {kind} has the key {key}, which is not read, as {known} is: rename it, or leave it out by "
                f"--ignore-key {key}"
            )
        if HARMLESS.fullmatch(str(key)) or _asks_to_think(kind, key, value):
            continue
        for what in SUSPICIOUS:
            suggested = _suggests(key, what) or (what == "tools" and kind == "message" and _are_calls(value))
            if (what != "arguments" or kind == "tool call") and suggested and _is_of_kind(value, what):
                is_opposite = what == "a loss switch" and OPPOSITE.match(known)
                field = None if is_opposite else WAY_OUT.get((what, kind))
                read = f"read it by --read-as {key}={field}, or " * (field not in (None, key))
                raise TrajectoryError(
                    f"a {kind} has the key {key}, which looks like {what} and is not read: {read}leave it out by "
                    f"--ignore-key {key}"
                )


def _asks_to_think(kind: str, key: str, value) -> bool:
    """Whether it is what a request has of thinking that is on: Anthropic's `thinking`, `reasoning` of OpenAI."""
    settings = ("type", "budget_tokens", "display") if key == "thinking" else ("effort", "summary", "max_tokens")
    asks = kind == "row" and key in ("thinking", "reasoning") and isinstance(value, dict) and {*value} <= {*settings}
    return asks and value.get("type", "enabled") in ("enabled", "adaptive") and value.get("effort") != "none"


def _suggests(key: str, what: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", str(key))]
    words += re.findall("[a-z]+", str(key).lower())  # CoT
    return any(
        word.startswith(hint) if what != "arguments" and hint != "cot" else word in (hint, hint + "s")
        for hint in SUSPICIOUS[what]
        for word in words
    ) or any(hint in word for hint in SUSPICIOUS[what] if len(hint) > 5 for word in words)


def _are_calls(value) -> bool:
    """Whether objects look like calls, whatever the name they stand under."""
    return isinstance(value, list) and any(
        isinstance(item, dict) and ("function" in item or ("name" in item and any(key in item for key in ARGUMENTS)))
        for item in value
    )


def _is_of_kind(value, what: str) -> bool:
    switches = value if isinstance(value, list) else [value]
    is_switch = bool(switches) and all(map(is_number, switches))
    return is_switch if what == "a loss switch" else isinstance(value, (str, list, dict))
