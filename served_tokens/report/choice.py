"""Which samples are shown: a bounded choice for the page, and those of one turn for the terminal."""

import sys

from served_tokens.llamafactory import TrainingSet
from served_tokens.proof.findings import Findings
from served_tokens.proof.tokens import Mismatch
from served_tokens.report.tokens import ShownSample, visible

SAMPLES_IN_PAGE = 200  # about
EXTREMES = 20  # samples that are in the page for being the longest, and as many for being the shortest
EXACT = Mismatch("", None, "")


def samples_to_show(found: list[Findings], sets: list[TrainingSet]) -> list[ShownSample]:
    """A bounded choice of samples of each data set, with the reason to show each."""
    shown = []
    for findings, its in zip(found, sets):
        mismatches = dict(findings.mismatches)
        for position, why in choice_of_samples(findings, SAMPLES_IN_PAGE // len(sets)).items():
            mismatch = mismatches.get(position, EXACT)
            sample = ShownSample(
                name=its.name,
                told=its.provenance[position],
                trained=its.built[position],
                why=why if findings.exact[position] or why == "mismatch" else f"{why}, not exact",
                served=findings.lengths[position],
                at=mismatch.at,
                mismatch=visible(mismatch.text),
            )
            shown.append(sample)
    return shown


def choice_of_samples(found: Findings, number: int) -> dict[int, str]:
    """{position: why it is shown}: mismatches, the longest, the shortest, and of the rest what makes the number."""
    every, chosen = range(len(found.lengths)), {}
    by_length = sorted(every, key=found.lengths.__getitem__, reverse=True)
    reasons = {"mismatch": dict(found.mismatches), "longest": by_length[:EXTREMES], "shortest": by_length[-EXTREMES:]}
    for why, positions in reasons.items():
        chosen |= {position: why for position in positions if position not in chosen}
    rest = [position for position in every if position not in chosen]
    wanted = max(0, min(number - len(chosen), len(rest)))
    return chosen | {rest[index * len(rest) // wanted]: "even choice" for index in range(wanted)}


def samples_of_turn(sets: list[TrainingSet], trajectory: int, turn: int) -> list[ShownSample]:
    """The samples that supervise a turn, of data sets of this trajectory; ends with what there is where none does."""
    of_turn, supervised = [], set()
    for its in sets:
        for position, (of, turns) in enumerate(zip(its.provenance["trajectory"][:], its.provenance["turns"][:])):
            supervised.update(turns if of == trajectory else ())
            if of == trajectory and turn in turns:
                of_turn.append(ShownSample(its.name, its.provenance[position], its.built[position]))
    if not of_turn:
        those = ", ".join(map(str, sorted(supervised))) or "none; is the row set aside, or are its turns left out?"
        sys.exit(
            f"--show {trajectory}:{turn}: no sample supervises message {turn} of row {trajectory}, both counted "
            f"from 0; those that are supervised: {those}"
        )
    return of_turn
