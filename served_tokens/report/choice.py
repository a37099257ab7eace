"""Which samples are shown: a bounded choice for the page, and those of one turn for the terminal."""

import sys

from served_tokens.llamafactory import TrainingSet
from served_tokens.proof.findings import Findings
from served_tokens.report.tokens import ShownSample, visible

SAMPLES_IN_PAGE = 200  # about
EXTREMES = 20  # samples that are in the page for being the longest, and as many for being the shortest


def samples_to_show(found: list[Findings], sets: list[TrainingSet]) -> list[ShownSample]:
    """A bounded choice of samples of each data set, with the reason to show each."""
    shown = []
    for findings, its in zip(found, sets):
        for position, why in choice_of_samples(findings, SAMPLES_IN_PAGE // len(sets)).items():
            if not findings.exact[position] and why != "mismatch":
                why += ", not exact"
            at, mismatch = findings.mismatches.get(position, (None, ""))
            served = findings.lengths[position]
            shown.append(sample_at(its, position, why=why, served=served, at=at, mismatch=visible(mismatch)))
    return shown


def choice_of_samples(found: Findings, number: int) -> dict[int, str]:
    """{position: why it is shown}: mismatches, the longest, the shortest, and of the rest what makes the number."""
    every, chosen = range(len(found.lengths)), {}
    by_length = sorted(every, key=found.lengths.__getitem__, reverse=True)
    reasons = {"mismatch": found.mismatches, "longest": by_length[:EXTREMES], "shortest": by_length[-EXTREMES:]}
    for why, positions in reasons.items():
        chosen |= {position: why for position in positions if position not in chosen}
    rest = [position for position in every if position not in chosen]
    wanted = max(0, min(number - len(chosen), len(rest)))
    return chosen | {rest[index * len(rest) // wanted]: "even choice" for index in range(wanted)}


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
    samples = [sample_at(its, position) for its in sets for position in range(len(its.provenance))]
    of_turn = [sample for sample in samples if turn in sample.turns]
    if not of_turn:
        supervised = sorted({turn for sample in samples for turn in sample.turns})
        sys.exit(
            f"--show {trajectory}:{turn}: no sample supervises message {turn} of trajectory {trajectory}, both counted "
            f"from 0; those that are supervised: {', '.join(map(str, supervised)) or 'none'}"
        )
    return of_turn
