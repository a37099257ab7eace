"""Tokens of a sample as text: in the terminal, and as the data of the page's viewer."""

import functools
import itertools
import re
from dataclasses import dataclass

from served_tokens.marks import IGNORE_INDEX

TOKENS_IN_PAGE = 1_500_000  # of all its samples together
TOKENS_OF_SAMPLE = (100_000, 50_000, 20_000, 10_000, 5_000, 2_000)  # at most: the first with which they are no more
TOKENS_OF_CHARACTER = 8  # the most tokens that are tried together to find whole characters
# What a terminal would obey, a reader would not see or a file cannot hold: control characters, marks that reorder the
# text, lone surrogates.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class ShownSample:
    """A sample that is shown."""

    name: str  # of its data set
    told: dict  # what step 2 says of it
    trained: dict  # its input_ids and labels as LlamaFactory made them
    why: str = ""  # it is shown
    served: int = 0  # its tokens before any are cut
    at: int | None = None  # the first token that differs from what is served
    mismatch: str = ""  # how it differs

    @property
    def place(self) -> str:
        turns = self.told["turns"]
        return f"row {self.told['trajectory']}, turn{'s' if len(turns) > 1 else ''} {', '.join(map(str, turns))}"

    @property
    def tokens(self) -> int:
        return len(self.trained["input_ids"])

    @property
    def supervised(self) -> int:
        return self.tokens - self.trained["labels"].count(IGNORE_INDEX)


def visible(text: str) -> str:
    """The text with what cannot be seen in it written out."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def pieces(ids: list[int], decode):
    """Yield (ids, text) of single tokens; of several together where only they make whole characters."""
    held = ()
    for number in ids:
        held = (*held, number)
        text = decode(held)
        if "\ufffd" not in text or len(held) == TOKENS_OF_CHARACTER:
            yield held, text
            held = ()
    if held:  # the text is cut in a character, or really holds this sign
        yield held, decode(held)


def runs(sample: ShownSample, limit: int):
    """Yield (whether they are supervised, first position, ids) of neighbouring tokens that all are, or all are not.

    Of a sample with more than `limit` tokens only so many are shown: those around the first token that differs, or is
    supervised.
    """
    supervised = [label != IGNORE_INDEX for label in sample.trained["labels"]]
    middle = [*supervised, True].index(True) if sample.at is None else sample.at
    start = max(0, min(middle - limit // 2, len(supervised) - limit))
    for is_supervised, group in itertools.groupby(supervised[start : start + limit]):
        end = start + len(list(group))
        yield is_supervised, start, sample.trained["input_ids"][start:end]
        start = end


def terminal_view(sample: ShownSample, decode) -> str:
    """The whole sample as text: what is supervised is in ⟦…⟧."""
    numbers = f"{sample.tokens:,} tokens, {sample.supervised:,} supervised (⟦…⟧)"
    text = f"{sample.told['source']}: {sample.place}: {numbers}\n\n"
    for is_supervised, _, ids in runs(sample, sample.tokens):
        text += f"⟦{decode(ids)}⟧" if is_supervised else decode(ids)
    return visible(text)


def viewer_data(samples: list[ShownSample], decode, special: set[int]) -> dict:
    """What the page's script shows of samples, each piece of text once.

    {"pieces": [[ids, text, special], …], "samples": [{…, "runs": [[supervised, first token, numbers of pieces], …]}]}
    """
    fits = (most for most in TOKENS_OF_SAMPLE if sum(min(its.tokens, most) for its in samples) <= TOKENS_IN_PAGE)
    limit, index, entries = next(fits, TOKENS_OF_SAMPLE[-1]), {}, []
    decode_once = functools.cache(lambda ids: decode([*ids]))  # few tokens make most of a text
    names = ("name", "place", "why", "served", "tokens", "supervised", "at", "mismatch")
    for sample in samples:
        shown = [
            (is_supervised, start, [index.setdefault(piece, len(index)) for piece in pieces(ids, decode_once)])
            for is_supervised, start, ids in runs(sample, limit)
        ]
        told = {name: sample.told[name] for name in ("source", "trajectory", "turns")}
        entries.append(told | {name: getattr(sample, name) for name in names} | {"runs": shown})
    return {"pieces": [(ids, visible(text), not special.isdisjoint(ids)) for ids, text in index], "samples": entries}
