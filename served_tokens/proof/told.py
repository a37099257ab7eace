"""What step 2 says of its samples: which turns they are of, how rows were read, and why other turns have none."""

import contextlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from served_tokens.files.read import ADDRESS, LEFT_OUT, Place, format_of, read_rows
from served_tokens.proof.turn import SERVED_AS
from served_tokens.rows.servers import STYLES
from served_tokens.rows.trajectory import Reading

MADE_OF = ("sha256", "chat_template")  # what rows are made of, which step 1 tells with its reading
VALIDATION = "_val"  # what step 2 adds to the name of a validation set


@dataclass(frozen=True)
class Claim:
    """What a sample says of itself: its position in the data set, the turns that it trains, and how they are served."""

    position: int
    turns: list[int]
    served_as: str


def claims_of(provenance, trajectories: str | None) -> tuple[dict[Place, list[Claim]], dict[str, Reading]]:
    """({trajectory: what its samples claim}, {file: how step 1 read it}); trajectories: the file read in its place."""
    claims, told = defaultdict(list), {}
    for position, sample in enumerate(provenance.to_list()):
        source = trajectories or sample["source"]
        if not (source and sample["turns"] and sample["trajectory"] is not None and sample["served_as"] in SERVED_AS):
            raise SystemExit(
                f"sample {position} does not say which turns of which trajectory it is; write it with step 2"
            )
        if not (source in told or format_of(source) is None or ADDRESS.match(source) or Path(source).exists()):
            raise SystemExit(f"{source}: is not there, and step 1 read it; name it by --trajectories FILE")
        told[source] = sample["reading"]
        claim = Claim(position=position, turns=sample["turns"], served_as=sample["served_as"])
        claims[Place(source, sample["trajectory"])].append(claim)
    return dict(claims), {source: _reading_of(text, source) for source, text in told.items()}


def _reading_of(told: str, source: str) -> Reading:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        reading = Reading(**{key: value for key, value in json.loads(told).items() if key not in MADE_OF})
        kinds, known = ([*map(type, vars(its).values())] for its in (reading, Reading()))
        if kinds == known and reading.server_style in STYLES:
            return reading
    raise SystemExit(
        f"{source}: its samples do not say how step 1 read it, or another version wrote them; run both steps again"
    )


def reasons_of(path: Path, trajectories: str | None) -> dict[tuple[str, int, int], str]:
    """Why step 2 left turns out, as it says beside its samples: {(source, trajectory, turn): reason}.

    Beside those for validation it says nothing of its own. trajectories: the file that is read in place of the source.
    """
    suffix = format_of(path) or ""
    name = path.name.removesuffix(suffix)
    beside, of_both = (path.with_name(of + suffix + LEFT_OUT) for of in (name, name.removesuffix(VALIDATION)))
    path = beside if beside.is_file() else of_both
    rows = [row for _, row in read_rows(str(path))] if path.is_file() else []
    return {(trajectories or row["source"], row["trajectory"], row["turn"]): row["reason"] for row in rows}
