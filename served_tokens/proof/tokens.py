"""Token ids on both sides: which are supervised, and where two samples differ."""

import itertools
from dataclasses import dataclass

from served_tokens.marks import IGNORE_INDEX

TOKENS_DIFFER, MASK_DIFFERS = "the tokens differ", "the loss mask differs"
SHOWN_TOKENS = 12  # on each side of the first difference


@dataclass(frozen=True)
class Mismatch:
    """How a sample differs: in what, from which token on (None where it is no token), and as text."""

    kind: str
    at: int | None
    text: str


def supervised_spans(labels: list[int]) -> list[tuple[int, int]]:
    """The (start, end) of each run of supervised tokens."""
    marked = [IGNORE_INDEX, *labels, IGNORE_INDEX]
    edges = [k for k, (a, b) in enumerate(itertools.pairwise(marked)) if (a == IGNORE_INDEX) != (b == IGNORE_INDEX)]
    return [*zip(edges[::2], edges[1::2])]


def mismatch_of(served: dict, trained: dict, decode) -> Mismatch:
    """Where two samples, {"input_ids", "labels"}, that differ begin to, with the text there on both sides."""
    differs = served["input_ids"] != trained["input_ids"]
    kind, column = (TOKENS_DIFFER, "input_ids") if differs else (MASK_DIFFERS, "labels")
    pairs = enumerate(itertools.zip_longest(served[column], trained[column]))
    at = next(position for position, (ours, theirs) in pairs if ours != theirs)
    start, end = max(0, at - SHOWN_TOKENS), at + SHOWN_TOKENS
    lines = [f"{kind} from token {at} of {len(served['input_ids'])}:"]
    for side, sample in (("served ", served), ("trained", trained)):
        ids, labels = sample["input_ids"], sample["labels"]
        loss = at < len(labels) and labels[at] != IGNORE_INDEX
        said = "" if differs else f" (loss: {loss})"
        lines.append(f"  {side}: …{decode(ids[start:at])!r} >>> {decode(ids[at:end])!r}{said}")
    return Mismatch(kind, at, "\n".join(lines))
