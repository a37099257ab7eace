"""Token ids on both sides: of the texts that are served, and where two samples differ."""

import functools
import itertools
import re

from served_tokens.marks import BLOCK_END, BLOCK_START, IGNORE_INDEX

SHOWN_TOKENS = 12  # on each side of the first difference


class Tokens:
    """The token ids of the texts of a trajectory, as the tokenizer makes them of a whole text.

    A tokenizer splits a text at its special tokens first, and tokenizes what is between them by itself. So a stretch
    that several prompts share is tokenized once; of the longest text it is seen that this is so.
    """

    def __init__(self, tokenizer):
        self.of_whole = functools.partial(tokenizer.encode, add_special_tokens=False)
        marks = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if _splits(token)}
        self.known = {mark: [marks[mark]] for mark in (BLOCK_START, BLOCK_END) if mark in marks}
        self.split = (
            re.compile(f"({'|'.join(map(re.escape, self.known))})").split if self.known else lambda text: [text]
        )
        self.proven = 0  # characters of the longest text of which it was seen

    def __call__(self, text: str) -> list[int]:
        ids = []
        for stretch in filter(None, self.split(text)):
            if stretch not in self.known:
                self.known[stretch] = self.of_whole(stretch)
            ids += self.known[stretch]
        if len(text) > 2 * self.proven:
            self.proven = len(text)
            if ids != self.of_whole(text):
                raise SystemExit("the tokenizer makes other tokens of a text than of its parts between special tokens")
        return ids


def _splits(token) -> bool:
    """Whether a text is split at this added token, whatever is beside it."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def supervised_spans(labels: list[int]) -> list[tuple[int, int]]:
    """The (start, end) of each run of supervised tokens."""
    marked = [IGNORE_INDEX, *labels, IGNORE_INDEX]
    edges = [k for k, (a, b) in enumerate(itertools.pairwise(marked)) if (a == IGNORE_INDEX) != (b == IGNORE_INDEX)]
    return [*zip(edges[::2], edges[1::2])]


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first position at which two lists differ; None where they are equal."""
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def first_mismatch(expected: dict, trained: dict) -> tuple[str, str, int]:
    """(column, what is wrong, position) of the first difference of two samples that differ."""
    for column, what in (("input_ids", "the tokens differ"), ("labels", "the loss mask differs")):
        position = first_difference(expected[column], trained[column])
        if position is not None:
            return column, what, position


def describe_mismatch(expected: dict, trained: dict, decode) -> str:
    """The first difference of two samples ({"input_ids", "labels"}), as text on both sides."""
    column, what, position = first_mismatch(expected, trained)
    start, end = max(0, position - SHOWN_TOKENS), position + SHOWN_TOKENS
    lines = [f"{what} from token {position} of {len(expected['input_ids'])}:"]
    for side, sample in (("served ", expected), ("trained", trained)):
        ids, labels = sample["input_ids"], sample["labels"]
        loss = position < len(labels) and labels[position] != IGNORE_INDEX
        said = f" (loss: {loss})" if column == "labels" else ""
        lines.append(f"  {side}: …{decode(ids[start:position])!r} >>> {decode(ids[position:end])!r}{said}")
    return "\n".join(lines)
