"""Token ids on both sides: of the texts that are served, and where two samples differ."""

import functools
import itertools
import re

from served_tokens.marks import BLOCK_END, BLOCK_START, IGNORE_INDEX, remembering

MARKS = re.compile(f"({re.escape(BLOCK_START)}|{re.escape(BLOCK_END)})")
TOKENS_DIFFER, MASK_DIFFERS = "the tokens differ", "the loss mask differs"
SHOWN_TOKENS = 12  # on each side of the first difference


class Tokens:
    """The token ids of texts, as the tokenizer makes them of a whole text.

    A tokenizer splits a text at its special tokens first, and tokenizes what is between them by itself. So a stretch
    that several prompts share is tokenized once; of the longest text it is seen that this is so.
    """

    def __init__(self, tokenizer):
        self.of_whole = functools.partial(tokenizer.encode, add_special_tokens=False)
        self.of_stretch = remembering(self.of_whole)
        self.proven = 0  # characters of the longest text of which it was seen

    def __call__(self, text: str) -> list[int]:
        ids = [number for stretch in MARKS.split(text) for number in self.of_stretch(stretch)]
        if len(text) > 2 * self.proven:
            self.proven = len(text)
            if ids != self.of_whole(text):
                raise SystemExit(
                    f"the tokenizer makes other tokens of a text than of its parts between {BLOCK_START} and "
                    f"{BLOCK_END}; check with a model of which these are special tokens"
                )
        return ids


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
