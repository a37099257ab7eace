"""What the check learns of a data set: numbers of every sample, texts of a bounded choice of samples.

So neither the page nor the memory grows with the data.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from served_tokens.marks import Counts
from served_tokens.rows.notes import Reasoned

MISMATCHES_KEPT, PLACES_KEPT, LOSSES_KEPT = 50, 20, 3


@dataclass
class Numbers(Counts):
    """What is counted of some rows, and of their samples; tokens are those that LlamaFactory trains on."""

    supervised_turns: int = 0
    held_out: int = 0  # turns of the training set, which are not among those that are left out
    reasoned: Reasoned = field(default_factory=Reasoned)  # turns that are trained to think
    cut: int = 0  # samples over cutoff_len
    tokens: int = 0
    supervised_tokens: int = 0
    recorded_turns: int = 0  # whose token ids a server recorded
    exact_by_record: int = 0
    rows_read_twice: int = 0  # by step 1 and by the check's own rules
    rows_searched: int = 0  # for each of their texts, as these rules do not read them
    read_otherwise: int = 0  # rows
    other_targets: int = 0  # prompts that are trained to another target too
    with_and_without: int = 0  # of these, to the same answer with and without reasoning
    reasoning_lost: int = 0  # of these, where the one without is a past turn


@dataclass
class Findings:
    """What the check learns of one data set."""

    name: str
    trains: bool  # else it is for evaluation
    settings: str  # what its samples are served as and built with
    lengths: array  # tokens of each sample as it is served, by its position in the data set
    exact: bytearray  # 1 for each sample that is exact, by its position
    path: Path | None = None  # its file, or folder of files
    total: int = 0  # samples in it, of which max_samples may take the first only
    counts: Numbers = field(default_factory=Numbers)
    kinds: Counter = field(default_factory=Counter)  # what differs -> samples
    reasons: Counter = field(default_factory=Counter)  # why it is set aside -> rows
    turns: Counter = field(default_factory=Counter)  # turns of a row that is checked -> rows
    targets: Counter = field(default_factory=Counter)  # tokens of a target -> turns
    mismatches: dict = field(default_factory=dict)  # position of a sample -> (first token that differs or None, text)
    left_out: list = field(default_factory=list)  # the first turns without a sample, as text
    why_left_out: Counter = field(default_factory=Counter)  # reason -> turns without a sample
    ways: dict = field(default_factory=dict)  # how it can be trained -> (samples or rows, tokens)
    lost: list = field(default_factory=list)  # the first faults of the reading, as text
    lost_under: Counter = field(default_factory=Counter)  # key or column -> texts that no sample holds that should
    unread: Counter = field(default_factory=Counter)  # "message.usage" and the like, that nobody reads -> rows
    other_targets: str = ""  # where the first prompt stands that is trained to several targets
    reasoning_lost: str = ""  # where the first two of these stand that differ by their reasoning alone

    def add(self, part: "Findings") -> None:
        """What a process has learned of other samples."""
        self.counts.add(part.counts)
        for name in ("kinds", "reasons", "turns", "targets", "why_left_out", "lost_under", "unread"):
            getattr(self, name).update(getattr(part, name))
        for position, length in part.lengths.items():
            self.lengths[position], self.exact[position] = length, part.exact.get(position, 0)
        for position in [*part.mismatches][: MISMATCHES_KEPT - len(self.mismatches)]:
            self.mismatches[position] = part.mismatches[position]
        self.left_out += part.left_out[: PLACES_KEPT - len(self.left_out)]
        self.lost += part.lost[: LOSSES_KEPT - len(self.lost)]

    def mismatch(self, position: int, kind: str, at: int | None, text: str) -> None:
        """A sample that differs; at: the first token that does, or None."""
        self.kinds[kind] += 1
        if len(self.mismatches) < MISMATCHES_KEPT:
            self.mismatches[position] = (at, text)
