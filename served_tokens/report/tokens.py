"""Tokens of a sample as text: in the terminal, and as the data of the page's viewer."""

import itertools
import json
import re

from served_tokens.marks import IGNORE_INDEX
from served_tokens.proof.findings import Sample

TOKENS_IN_PAGE = 500_000  # of all its samples together
TOKENS_OF_SAMPLE = 10_000  # more, and a browser is slow to show it
TOKENS_OF_CHARACTER = 8  # the most tokens that are tried together to find whole characters
# What a terminal would obey, a reader would not see or a file cannot hold: control characters, marks that reorder the
# text, lone surrogates.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with what cannot be seen in it written out."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def pieces(ids: list[int], decode):
    """Yield (ids, text) of single tokens; of several together where only they make whole characters."""
    start = 0
    while start < len(ids):
        for end in range(start + 1, min(start + TOKENS_OF_CHARACTER, len(ids)) + 1):
            if "\ufffd" not in (text := decode(ids[start:end])):
                break
        else:  # the text is cut in a character, or really holds this sign
            end, text = start + 1, decode(ids[start : start + 1])
        yield tuple(ids[start:end]), text
        start = end


def shown_ranges(length: int, limit: int, at: int) -> list[tuple[int, int]]:
    """What is shown of a sample of this many tokens: its two ends and what is around `at`, or all of it."""
    if length <= limit:
        return [(0, length)]
    third = limit // 3
    start = min(max(0, at - third // 2), length - third)
    ranges = [(0, third)]
    for first, end in ((start, start + third), (length - third, length)):
        if first <= ranges[-1][1]:
            first = ranges.pop()[0]
        ranges.append((first, end))
    return ranges


def runs(sample: Sample, limit: int):
    """Yield (supervised, first token, ids), or (None, first token, how many) where tokens are not shown."""
    at = sample.mismatch[0]
    if at is None:
        at = next((i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX), 0)
    done = 0
    for start, end in shown_ranges(len(sample.input_ids), limit, at):
        if start > done:
            yield None, done, start - done
        for supervised, group in itertools.groupby(range(start, end), lambda i: sample.labels[i] != IGNORE_INDEX):
            positions = list(group)
            yield supervised, positions[0], sample.input_ids[positions[0] : positions[-1] + 1]
        done = end


def terminal_view(sample: Sample, decode, special: set[int], colour: bool) -> str:
    """The whole sample as text: what is supervised is green and underlined, or in ⟦…⟧ without colour."""
    marked = "green, underlined" if colour else "in ⟦…⟧"
    numbers = f"{len(sample.input_ids):,} tokens, {sample.supervised:,} supervised ({marked})"
    text = []
    for supervised, _, ids in runs(sample, len(sample.input_ids)):
        parts = []
        for is_special, group in itertools.groupby(ids, special.__contains__):
            style = ";".join((["4", "32"] if supervised else []) + (["1", "35"] if is_special else []))
            part = visible(decode(list(group)))
            parts.append(f"\x1b[{style}m{part}\x1b[0m" if colour and style else part)
        text.append("⟦" + "".join(parts) + "⟧" if supervised and not colour else "".join(parts))
    return visible(f"{sample.source}: {sample.place}: {numbers}") + "\n\n" + "".join(text)


def viewer_data(samples: list[tuple[str, Sample]], decode, special: set[int]) -> dict:
    """What the page's script shows of (name of a data set, sample), each piece of text once.

    {"pieces": [[ids, text, special], …], "samples": [{…, "runs": [[supervised, first token, numbers of pieces], …]}]};
    a run of tokens that are not shown is [null, first token, how many].
    """
    limit = min(TOKENS_OF_SAMPLE, TOKENS_IN_PAGE // max(1, len(samples)))
    index = {}

    def numbers(ids: list[int]) -> list[int]:
        found = ((*piece, not special.isdisjoint(piece[0])) for piece in pieces(ids, decode))
        return [index.setdefault(piece, len(index)) for piece in found]

    entries = [
        {
            "name": name,
            "source": sample.source,
            "place": sample.place,
            "trajectory": sample.trajectory,
            "turns": sample.turns,
            "why": sample.why,
            "tokens": len(sample.input_ids),
            "served": sample.served,
            "supervised": sample.supervised,
            "at": sample.mismatch[0],
            "mismatch": visible(sample.mismatch[1]),
            "runs": [(known, at, held if known is None else numbers(held)) for known, at, held in runs(sample, limit)],
        }
        for name, sample in samples
    ]
    return {"pieces": [(ids, visible(text), is_special) for ids, text, is_special in index], "samples": entries}


def script_json(value) -> str:
    """JSON that can stand in a script element: no text in it can end the element, or a line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
