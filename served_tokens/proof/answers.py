"""Prompts that are trained to several targets: what is seen only of all trajectories of a data set together."""

import hashlib
from dataclasses import dataclass

from served_tokens.marks import BLOCK_END
from served_tokens.proof.findings import Findings


@dataclass(frozen=True)
class Answer:
    """What a prompt is trained to: digests of the prompt, of the whole target, and of what follows its reasoning."""

    prompt: bytes
    target: bytes
    answer: bytes
    thinks: bool
    ends_row: bool  # the turn is the last of its row
    place: str  # its trajectory and turn, for people


def answer_of(prompt: str, target: str, ends_row: bool, place: str) -> Answer:
    reasoning, closed, answer = target.partition(BLOCK_END)[0].rpartition("</think>")
    return Answer(
        prompt=_digest(prompt),
        target=_digest(target),
        answer=_digest(answer),
        thinks=bool(closed and reasoning.replace("<think>", "").strip()),
        ends_row=ends_row,
        place=place,
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def note_answer(found: Findings, known: dict[bytes, list[Answer]], answer: Answer) -> None:
    """Note a prompt that is trained to another target too, and whether the two differ by their reasoning alone.

    Where the turn with reasoning ends its row and the one without is a past turn of another, that is the sign of a log
    with a row for each call, in which past turns have lost their reasoning. known: {prompt: what it is trained to}.
    """
    others = known.setdefault(answer.prompt, [])
    if any(other.target == answer.target for other in others):
        return
    for other in others:
        if other.answer == answer.answer and other.thinks != answer.thinks:
            with_it, without = (answer, other) if answer.thinks else (other, answer)
            if with_it.ends_row and not without.ends_row:
                found.reasoning_lost += 1
                found.first_reasoning_lost = found.first_reasoning_lost or f"{with_it.place}, and {without.place}"
    if others:
        found.other_targets += 1
        found.first_other_targets = found.first_other_targets or f"{others[0].place}, and {answer.place}"
    others.append(answer)
