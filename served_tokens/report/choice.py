"""Which samples are shown: a bounded choice for the page, and those of one turn for the terminal."""

import heapq
import random
import sys

from served_tokens.llamafactory import TrainingSet
from served_tokens.proof.findings import Findings
from served_tokens.report.tokens import ShownSample, visible

SAMPLES_IN_PAGE = 200
EXTREMES = 20  # samples that are in the page for being the longest, and as many for being the shortest


def samples_to_show(found: list[Findings], sets: list[TrainingSet]) -> list[ShownSample]:
    """A bounded choice of samples of each data set, with the reason to show each."""
    shown, limit = [], max(1, SAMPLES_IN_PAGE // len(sets))
    for findings, its in zip(found, sets):
        for position, why in choice_of_samples(findings, limit).items():
            if not findings.exact[position] and why != "mismatch":
                why += ", not exact"
            at, mismatch = findings.mismatches.get(position, (None, ""))
            served = findings.lengths[position]
            shown.append(sample_at(its, position, why=why, served=served, at=at, mismatch=visible(mismatch)))
    return shown


def choice_of_samples(found: Findings, limit: int) -> dict[int, str]:
    """{position: why it is shown}: those with a mismatch, the longest, the shortest, and an even choice of the rest."""
    length, every, chosen = found.lengths.__getitem__, range(len(found.lengths)), {}
    for why, positions in (
        ("mismatch", sorted(found.mismatches)),
        ("longest", heapq.nlargest(EXTREMES, every, key=length)),
        ("shortest", heapq.nsmallest(EXTREMES, every, key=length)),
    ):
        for position in positions[: limit - len(chosen)]:
            chosen.setdefault(position, why)
    rest = [position for position in every if position not in chosen]
    even = random.Random(0).sample(rest, min(limit - len(chosen), len(rest)))
    return chosen | dict.fromkeys(sorted(even), "even choice")


def sample_at(its: TrainingSet, position: int, **why) -> ShownSample:
    """The sample at a position of a data set; why: the fields of a ShownSample that say why it is shown."""
    told, trained = its.provenance[position], its.built[position]
    return ShownSample(
        name=its.name,
        source=told["source"] or "",
        trajectory=told["trajectory"],
        turns=told["turns"],
        input_ids=trained["input_ids"],
        labels=trained["labels"],
        **why,
    )


def samples_of_turn(sets: list[TrainingSet], trajectory: int, turn: int) -> list[ShownSample]:
    """The samples that supervise a turn, of data sets of this trajectory; ends with what there is where none does."""
    of_turn, others = [], set()
    for its in sets:
        for position, (its_trajectory, turns) in enumerate(zip(its.provenance["trajectory"], its.provenance["turns"])):
            if its_trajectory == trajectory:
                others.update(turns)
                of_turn += [sample_at(its, position)] if turn in turns else []
    if not of_turn:
        others = ", ".join(map(str, sorted(others)))
        none = "none, as where its row cannot be read or all its turns are left out"
        sys.exit(
            f"--show {trajectory}:{turn}: no sample supervises message {turn} of trajectory {trajectory}, both counted "
            f"from 0, in {', '.join(its.name for its in sets)}; those that are supervised: {others or none}"
        )
    return of_turn
