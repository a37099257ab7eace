"""Which samples are shown: a bounded choice for the page, and those of one turn for the terminal."""

import sys

from served_tokens.proof.findings import Findings, Sample, choice_of_samples


def samples_to_show(found: Findings, provenance, built, limit: int) -> list[tuple[str, Sample]]:
    """(name of the data set, sample) for a bounded choice: each reason to show it in turn, by trajectory and turn."""
    reasons, samples = [], []
    for position, why in choice_of_samples(found, limit).items():
        reasons += [why] * (why not in reasons)
        sample = sample_at(provenance, built, position)
        by_length = {"longest": -found.lengths[position], "shortest": found.lengths[position]}.get(why, 0)
        order = reasons.index(why), by_length, sample.source, sample.trajectory, sample.turns, position
        why += "" if found.exact[position] or why == "mismatch" else ", not exact"
        mismatch = found.mismatches.get(position, (None, ""))
        samples.append((order, sample._replace(why=why, served=found.lengths[position], mismatch=mismatch)))
    return [(found.name, sample) for _, sample in sorted(samples)]


def sample_at(provenance, built, position: int) -> Sample:
    told, trained = provenance[position], built[position]
    return Sample(told["source"] or "", told["trajectory"], told["turns"], trained["input_ids"], trained["labels"])


def samples_of_turn(sets: list, trajectory: int, turn: int) -> list[Sample]:
    """The samples that supervise a turn; ends with what there is instead where there is none."""
    found, others = [], set()
    for its in sets:
        provenance, built = its.provenance, its.built
        for position, its_trajectory in enumerate(provenance["trajectory"][:]):
            if its_trajectory == trajectory:
                sample = sample_at(provenance, built, position)
                others.update(sample.turns)
                found += [sample] if turn in sample.turns else []
    if not found and others:
        which = ", ".join(map(str, sorted(others)))
        sys.exit(
            f"--show {trajectory}:{turn}: no sample supervises message {turn} of trajectory {trajectory}, counted from "
            f"0; those that are supervised: {which}"
        )
    if not found:
        names = ", ".join(its.name for its in sets)
        sys.exit(
            f"--show {trajectory}:{turn}: trajectory {trajectory} has no sample in {names}; rows are counted from 0; "
            "one that cannot be read has none, nor one whose turns are all left out"
        )
    return found
