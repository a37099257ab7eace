"""What the check learns of a data set: numbers of every sample, texts of a bounded choice of samples.

So neither the page nor the memory grows with the data.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from served_tokens.marks import Counts
from served_tokens.rows.notes import Reasoned

KEPT = {"mismatches": 50, "left_out": 20, "lost": 3}  # the first of each


@dataclass
class Learnt(Counts):
    """What is learnt of some rows, and of their samples; tokens are those that LlamaFactory trains on."""

    supervised: list = field(default_factory=list)  # (source, trajectory, turn) of each turn of a sample, also twice
    tasks: list = field(default_factory=list)  # of each trajectory that samples are of, see `task_of`
    held_out: int = 0  # turns of the training set, which are not among those that are left out
    reasoned: Reasoned = field(default_factory=Reasoned)  # turns that are trained to think
    cut: int = 0  # samples over cutoff_len
    tokens: int = 0
    supervised_tokens: int = 0
    recorded_turns: int = 0  # whose token ids a server recorded
    exact_by_record: int = 0
    rows_read_twice: int = 0  # by step 1 and by the check's own rules
    read_otherwise: int = 0  # rows
    kinds: Counter = field(default_factory=Counter)  # what differs -> samples
    reasons: Counter = field(default_factory=Counter)  # why it is set aside -> rows
    turns: Counter = field(default_factory=Counter)  # turns of a row that is checked -> rows
    targets: Counter = field(default_factory=Counter)  # tokens of a target -> turns
    mismatches: list = field(default_factory=list)  # (position of a sample, Mismatch)
    left_out: list = field(default_factory=list)  # turns without a sample, as text
    why_left_out: Counter = field(default_factory=Counter)  # reason -> turns without a sample
    lost: list = field(default_factory=list)  # faults of the reading, as text
    lost_under: Counter = field(default_factory=Counter)  # key or column -> texts that no sample holds that should
    unread: Counter = field(default_factory=Counter)  # "message.usage" and the like, that nobody reads -> rows

    def add(self, other: "Learnt") -> None:
        super().add(other)
        for name, most in KEPT.items():
            del getattr(self, name)[most:]


@dataclass(kw_only=True)
class Findings(Learnt):
    """What the check learns of one data set."""

    name: str
    trains: bool = True  # else it is for evaluation
    settings: str  # what its samples are served as and built with
    lengths: array  # tokens of each sample as it is served, by its position in the data set
    exact: bytearray  # 1 for each sample that is exact, by its position
    path: Path | None = None  # its file, or folder of files
    total: int = 0  # samples in it, of which max_samples may take the first only
    ways: dict = field(default_factory=dict)  # how it can be trained -> (samples or rows, tokens)
    supervised_turns: int = 0
    other_targets: int = 0  # prompts that are trained to another target too
    first_other_targets: str = ""  # where the first of them stands
    reasoning_lost: int = 0  # of these, to the same answer without reasoning in a past turn
    first_reasoning_lost: str = ""  # where the first two of them stand
