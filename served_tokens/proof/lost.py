"""Looking for the texts of a row in the samples that should hold them.

Nothing that is shown is called lost. What is looked for has places of its own in the rendering, side by side, so a text
must be there as often as it is in the row; and the messages keep their order.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from served_tokens.proof.findings import LOSSES_KEPT, Findings
from served_tokens.proof.row_texts import KNOWN, RowTexts, Text, Unit, json_in, row_texts

SHOWN = 60
WAY_OUT = "bring the row into a shape of docs/rows.md, or leave it out"
NO_SAMPLE, NO_PROMPT = "in turns without a sample", "in other messages that no sample shows"
NO_THINKING = "reasoning, by --no-thinking"
NOT_RENDERED = "reasoning, which the model's chat template does not render"


def forms(text: str) -> list[str]:
    """How a text may be shown: as it is, and as JSON within one or two levels of strings."""
    shown = [text]
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        if once not in shown:
            shown += [once, json.dumps(once, ensure_ascii=ascii_only)[1:-1]]
    return shown


def _wholes(text: Text) -> list[str]:
    """How a text may be shown as a whole: JSON also printed anew."""
    value = json_in(text.text)
    anew = [] if value is None else forms(json.dumps(value, ensure_ascii=False))
    return list(dict.fromkeys([*forms(text.text), *anew, *[text.also] * bool(text.also)]))


def missing_from(texts: list[Text], shown: str, needed: Callable) -> list[Text]:
    """The texts that are in `shown` less often than needed(text) says."""

    def is_there(text: Text) -> bool:
        if sum(map(shown.count, _wholes(text))) >= needed(text):
            return True
        return bool(text.parts) and all(map(is_there, text.parts))

    return [text for text in texts if not is_there(text)]


def times_in(units: list[Unit], kinds: tuple = ("text", "reasoning", "call")) -> Callable:
    """needed(text): how often a text must be shown at least where all texts of these units are.

    As often as they hold it, also within one another: a call has its name in it beside the reasoning that speaks of
    it. But what a message holds under two keys (`reasoning` and `reasoning_content`) may be shown once.
    """
    groups = []
    for unit in units:
        keyed = {kind: {} for kind in kinds}
        for text in unit.texts:
            for leaf in _leaves(text):
                if leaf.kind in kinds:
                    keyed[leaf.kind].setdefault(text.keys[:1], []).append(leaf.text)
        wholes = Counter((text.text, text.keys[:1]) for text in unit.texts if text.parts)
        joined = [["\0".join(texts) for texts in by_key.values()] for by_key in keyed.values() if by_key]
        groups.append((wholes, joined))

    def needed(text: Text) -> int:
        if text.parts:
            times = (max((n for (it, _), n in wholes.items() if it == text.text), default=0) for wholes, _ in groups)
        else:
            times = (max(joined.count(text.text) for joined in by_key) for _, group in groups for by_key in group)
        return max(1, sum(times))

    return needed


def _leaves(text: Text):
    for part in text.parts:
        yield from _leaves(part)
    if not text.parts:
        yield text


def located(unit: Unit, shown: str, start: int) -> tuple[int, list[Text]]:
    """(where the texts of a unit end at the earliest, those that are not there) from `start` on."""
    ends, end, missing = {}, start, []

    def end_of(text: Text) -> int:
        place, best = (text.keys[:1], text.text), -1
        since = ends.get(place, start)
        for form in _wholes(text):
            position = shown.find(form, since, len(shown) if best < 0 else best)
            best = best if position < 0 else position + len(form)
        if best >= 0:
            ends[place] = best
            return best
        of_parts = [end_of(part) for part in text.parts]
        return max(of_parts) if of_parts and min(of_parts) >= 0 else -1

    for text in unit.texts:
        found = end_of(text)
        end = max(end, found)
        missing += [text] * (found < 0)
    return end, missing


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


@dataclass
class Chain:
    """Units that each prompt shows in this order, looked for in one prompt after the other.

    The earliest places in order are the right ones to take: where the units are there in order at all, each ends there
    no later than it really does, so the next is not missed. They stay the same as far as a prompt begins as the one
    before it did, so of the prompts of a trajectory only what is new in each is searched. A text that is not found in
    order is counted in the whole prompt instead.
    """

    units: list[Unit]
    shown: str = ""
    ends: list = field(default_factory=list)  # of the first units in `shown`
    astray: list = field(default_factory=list)  # (unit, text) that is not there in order
    lost: set = field(default_factory=set)  # of these, those that were missing

    def missing(self, shown: str, count: int) -> list[tuple[str, Text]]:
        """(place, text) of those of the first `count` units that this prompt lacks, where no prompt before did."""
        kept = min(bisect_right(self.ends, common_length(self.shown, shown)), count)
        self.shown, self.ends = shown, self.ends[:kept]
        self.astray = [(number, text) for number, text in self.astray if number < kept]
        for number in range(kept, count):
            end, missing = located(self.units[number], shown, self.ends[-1] if self.ends else 0)
            self.ends.append(end)
            self.astray += [(number, text) for text in missing]
        suspects = [suspect for suspect in self.astray if suspect not in self.lost]
        needed = times_in(self.units[:count]) if suspects else None
        gone = [suspect for suspect in suspects if missing_from([suspect[1]], shown, needed)]
        self.lost.update(gone)
        return [(self.units[number].place, text) for number, text in gone]


def missing_in_target(unit: Unit, target: str, unshown: str = "") -> tuple[list[Text], list[Text]]:
    """(texts of a turn that its target lacks, those that are instead in `unshown`: reasoning that is left out)"""
    thought, closed, _ = target.rpartition("</think>")
    sides = (True, thought if closed else target, ("reasoning",)), (False, target, ("text", "reasoning", "call"))
    missing, elsewhere = [], []
    for thoughts, shown, kinds in sides:
        texts = [text for text in unit.texts if (text.kind == "reasoning") == thoughts]
        lost = missing_from(texts, f"{shown}\0{unshown}", times_in([unit], kinds))
        missing += lost
        elsewhere += [text for text in missing_from(texts, shown, lambda _: 1) if text not in lost] if unshown else []
    return missing, elsewhere


# ---------------------------------------------------------------- what the check learns


def looking_for(found: Findings, row: dict, messages: list[dict], place: str, ignored: frozenset) -> Callable:
    """Note what of a row is read nowhere; returns look(turns, served_as, rendered), which notes what a sample lacks.

    Args:
        messages: of the row as they are read.
        place: of the row, for people.
        ignored: columns and keys that the user chose not to read.
        turns, served_as: of a sample; rendered: [(served prompt, target)] of its turns, none where there is none.
    """
    try:
        texts = row_texts(row, ignored)
    except RecursionError:
        _note(found, "nesting", f"{place}: is nested too deep to look for its texts; leave it out")
        return lambda *_: None
    found.unread.update(texts.unread)
    positions = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if len(positions) != len(texts.turns):
        by_role = f"{len(texts.turns)} turns by the roles of its messages"
        _note(found, "roles", f"{place}: has {by_role}, but {len(positions)} are read; {WAY_OUT}")
        return lambda *_: None
    found.not_trained[NO_SAMPLE] += _texts_in(texts.turns)
    found.not_trained[NO_PROMPT] += _texts_in(texts.others)
    numbers = {position: number for number, position in enumerate(positions)}
    chains, looked = [Chain(texts.others), *map(Chain, texts.shown_first)], set()

    def look(turns: list[int], served_as: str, rendered: list[tuple[str, str]]) -> None:
        for turn, (prompt, target) in zip(turns, rendered):
            number = numbers[turn]
            if number not in looked:
                _note_extras(found, texts.extras if not looked else [], prompt)
                found.not_trained[NO_PROMPT] -= _texts_in(texts.others[_most(texts, looked) : texts.before[number]])
                looked.add(number)
                _look_in_target(found, place, texts.turns[number], target, (messages[turn], served_as))
            for chain in chains:
                _look_in_prompt(found, place, chain, prompt, (turn, chain is chains[0] and texts.before[number]))

    return look


def _texts_in(units: list[Unit]) -> int:
    return sum(len(unit.texts) for unit in units)


def _most(texts: RowTexts, looked: set) -> int:
    """How many of the other messages are in prompts of these turns."""
    return max((texts.before[number] for number in looked), default=0)


def _note_extras(found: Findings, extras: list[Text], prompt: str) -> None:
    lost = missing_from(extras, prompt, lambda _: 1)
    found.unread.update(("tool keys", key) for key in sorted({text.keys[0] for text in lost}))


def _look_in_target(found: Findings, place: str, unit: Unit, target: str, turn: tuple[dict, str]) -> None:
    message, served_as = turn
    left_out = served_as == "no-thinking" or "</think>" not in target
    unshown = message.get("reasoning_content", "") if left_out else ""
    missing, elsewhere = missing_in_target(unit, target, unshown)
    found.not_trained[NO_SAMPLE] -= len(unit.texts)
    found.not_trained[NO_THINKING if served_as == "no-thinking" else NOT_RENDERED] += len(elsewhere)
    for text in missing:
        key, way_out = text.keys[0], WAY_OUT
        if key not in KNOWN:
            ignored = f"leave other keys out by --ignore-key {key}"
            way_out = f"read reasoning by step 1 --read-as {key}=reasoning_content; {ignored}"
        _note(found, key, f"{place}: {unit.place}: {_said(text)} is not in the target of its turn; {way_out}")


def _look_in_prompt(found: Findings, place: str, chain: Chain, prompt: str, turn: tuple[int, int | bool]) -> None:
    """turn: (its message, how many of the messages before it are no turns; False where this is not of messages)"""
    turn, before = turn
    of_messages = before is not False
    for where, text in chain.missing(prompt, before if of_messages else len(chain.units)):
        key = text.keys[0] if of_messages else where.partition(": tool ")[0].split()[-1]
        way_out = f"leave it out by step 1 --ignore-key {key}" if of_messages and key not in KNOWN else WAY_OUT
        said = f"{_said(text)} is not in the served prompt of turn {turn}; {way_out}"
        _note(found, key, f"{place}: {where}: {said}")


def _said(text: Text) -> str:
    return f"{'.'.join(text.keys)}: {text.text[:SHOWN] + '…' * (len(text.text) > SHOWN)!r}"


def _note(found: Findings, key: str, said: str) -> None:
    found.counts["lost texts"] += 1
    found.lost_under[key] += 1
    if len(found.lost) < LOSSES_KEPT:
        found.lost.append(said)


def unread_lines(found: Findings) -> list[str]:
    """What is neither trained nor shown, for people."""
    kinds = {}
    for (kind, name), number in sorted(found.unread.items()):
        kinds.setdefault(kind, []).append(f"{name} ({number:,})")
    return [f"{kind} {', '.join(names)}" for kind, names in kinds.items()]
