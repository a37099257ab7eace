"""Token ids on both sides: which are supervised, and where two samples differ."""

import itertools

from served_tokens.marks import IGNORE_INDEX

TOKENS_DIFFER, MASK_DIFFERS = "the tokens differ", "the loss mask differs"
SHOWN_TOKENS = 12  # on each side of the first difference


def supervised_spans(labels: list[int]) -> list[tuple[int, int]]:
    """The (start, end) of each run of supervised tokens."""
    marked = [IGNORE_INDEX, *labels, IGNORE_INDEX]
    edges = [k for k, (a, b) in enumerate(itertools.pairwise(marked)) if (a == IGNORE_INDEX) != (b == IGNORE_INDEX)]
    return [*zip(edges[::2], edges[1::2])]


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """The first position at which two lists differ, or the length of the shorter one."""
    return next((k for k, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def first_mismatch(expected: dict, trained: dict) -> tuple[str, int]:
    """(what is wrong, from which token on) of two samples, {"input_ids", "labels"}, that differ."""
    if expected["input_ids"] != trained["input_ids"]:
        return TOKENS_DIFFER, first_difference(expected["input_ids"], trained["input_ids"])
    return MASK_DIFFERS, first_difference(expected["labels"], trained["labels"])


def described(expected: dict, trained: dict, kind: str, at: int, decode) -> str:
    """A mismatch as text on both sides."""
    start, end = max(0, at - SHOWN_TOKENS), at + SHOWN_TOKENS
    lines = [f"{kind} from token {at} of {len(expected['input_ids'])}:"]
    for side, sample in (("served ", expected), ("trained", trained)):
        ids, labels = sample["input_ids"], sample["labels"]
        loss = at < len(labels) and labels[at] != IGNORE_INDEX
        said = f" (loss: {loss})" if kind == MASK_DIFFERS else ""
        lines.append(f"  {side}: …{decode(ids[start:at])!r} >>> {decode(ids[at:end])!r}{said}")
    return "\n".join(lines)
