"""What the check learns of a data set: numbers of every sample, texts of a bounded choice of samples.

So neither the page nor the memory grows with the data.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MISMATCHES_KEPT, PLACES_KEPT, REASONS_KEPT, LOSSES_KEPT = 50, 20, 20, 3


@dataclass
class Findings:
    """What the check learns of one data set: numbers of all samples, texts of the first few mismatches only.

    counts: "exact", "mismatched", "cut", "trajectories", "turns", "supervised turns", "rows set aside", "lost texts",
        "read otherwise" (rows), "other targets", "reasoning lost" (prompts), "without reasoning" (turns);
        "tokens" and "supervised tokens" as LlamaFactory trains on them.
    """

    name: str
    trains: bool  # else it is for evaluation
    settings: str  # what its samples are served as and built with
    lengths: array  # tokens of each sample as it is served, by its position in the data set
    exact: bytearray  # 1 for each sample that is exact, by its position
    path: Path | None = None  # its file, or folder of files
    total: int = 0  # samples in it, of which max_samples may take the first only
    counts: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)  # what differs -> samples
    reasons: Counter = field(default_factory=Counter)  # why it cannot be read -> trajectories
    turns: Counter = field(default_factory=Counter)  # turns of a trajectory -> trajectories
    targets: Counter = field(default_factory=Counter)  # tokens of a target -> turns
    mismatches: dict = field(default_factory=dict)  # position of a sample -> (first token that differs or None, text)
    left_out: list = field(default_factory=list)  # the first turns without a sample, as text
    why_left_out: Counter = field(default_factory=Counter)  # reason -> turns without a sample
    ways: dict = field(default_factory=dict)  # how it can be trained -> (samples or rows, tokens)
    lost: list = field(default_factory=list)  # the first texts that are in no sample that should hold them, as text
    lost_under: Counter = field(default_factory=Counter)  # key or column -> such texts
    unread: Counter = field(default_factory=Counter)  # "message.usage" and the like, that nobody reads -> rows
    other_targets: str = ""  # where the first prompt stands that is trained to several targets
    reasoning_lost: str = ""  # where the first two of these stand that differ by their reasoning alone

    def of_no_sample(self) -> "Findings":
        """What a process starts with that learns of some of the samples: numbers are by position there too."""
        return Findings(self.name, self.trains, self.settings, {}, {}, self.path)

    def add(self, part: "Findings") -> None:
        """What a process has learned of other samples."""
        for position, length in part.lengths.items():
            self.lengths[position], self.exact[position] = length, part.exact.get(position, 0)
        for name in ("counts", "kinds", "turns", "targets", "why_left_out", "lost_under", "unread"):
            getattr(self, name).update(getattr(part, name))
        for reason, number in part.reasons.items():
            known = reason in self.reasons or len(self.reasons) < REASONS_KEPT
            self.reasons[reason if known else "other reasons"] += number
        for position in [*part.mismatches][: MISMATCHES_KEPT - len(self.mismatches)]:
            self.mismatches[position] = part.mismatches[position]
        self.left_out += part.left_out[: PLACES_KEPT - len(self.left_out)]
        self.lost += part.lost[: LOSSES_KEPT - len(self.lost)]

    def lose(self, what: str, said: str) -> None:
        """Count a fault of the reading, "lost texts" or "read otherwise", and keep the first ones as text."""
        self.counts[what] += 1
        if len(self.lost) < LOSSES_KEPT:
            self.lost.append(said)

    def set_aside(self, reason: str) -> None:
        """A row that is not compared."""
        self.counts["rows set aside"] += 1
        self.reasons[reason] += 1

    def mismatch(self, position: int, kind: str, at: int | None, text: str) -> None:
        """A sample that differs; at: the first token that does, or None."""
        self.counts["mismatched"] += 1
        self.kinds[kind] += 1
        if len(self.mismatches) < MISMATCHES_KEPT:
            self.mismatches[position] = (at, text)
