"""What step 2 says of its samples: which turns they are of, how rows were read, and why other turns have none."""

import json
from collections import defaultdict
from pathlib import Path

from served_tokens.files.read import LEFT_OUT, format_of, read_rows
from served_tokens.proof.turn import SERVED_AS
from served_tokens.rows.trajectory import Reading

VALIDATION = "_val"  # what step 2 adds to the name of a validation set


def samples_by_trajectory(provenance, trajectories: str | None) -> dict:
    """{source: (how step 1 read it, {trajectory: [(position, turns, served_as)]})}"""
    wanted, readings = defaultdict(lambda: defaultdict(list)), {}
    for position, sample in enumerate(provenance):
        source = trajectories or sample["source"]
        if not (source and sample["turns"] and sample["trajectory"] is not None and sample["served_as"] in SERVED_AS):
            raise SystemExit(
                f"sample {position} does not say which turns of which trajectory it is; write it with step 2"
            )
        wanted[source][sample["trajectory"]].append((position, sample["turns"], sample["served_as"]))
        if readings.setdefault(source, sample["reading"]) != sample["reading"]:
            raise SystemExit(
                f"sample {position}: {source} was read by other options of step 1 than for those before it"
            )
    return {source: (_reading_of(readings[source], source), samples) for source, samples in wanted.items()}


def _reading_of(told: str, source: str) -> Reading:
    """How step 1 read the rows of samples."""
    try:
        return Reading.of(json.loads(told))
    except (ValueError, TypeError, AttributeError):
        raise SystemExit(
            f"{source}: its samples do not say how step 1 read it, or another version wrote them; run both steps again"
        ) from None


def reasons_of(path: Path, trajectories: str | None = None) -> dict:
    """Why step 2 left turns out, as it says beside its samples: {(source, trajectory, turn): reason}.

    Beside those for validation it says nothing of its own. trajectories: the file that is read in place of the source.
    """
    suffix = format_of(path) or ""
    name = path.name.removesuffix(suffix)
    beside, of_both = (path.with_name(of + suffix + LEFT_OUT) for of in (name, name.removesuffix(VALIDATION)))
    path = beside if beside.is_file() else of_both
    rows = read_rows(str(path)) if path.is_file() else ()
    rows = (row for _, row, error in rows if not error)
    return {(trajectories or row["source"], row["trajectory"], row["turn"]): row["reason"] for row in rows}
