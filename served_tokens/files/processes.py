"""Shards over processes: what a script does with a row, done with all rows of many files.

A shard is the unit of work. The process that converts it writes its rows, those set aside and what else there is,
each to a part of its own; what comes back are counts. So the outputs are the same with any number of processes, and
one of them that is killed leaves an error and not a gap.
"""

import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from served_tokens.files.read import REJECTS, Place, Shard, parse_row, progress, read_shards, rows_of, shown_raw
from served_tokens.files.write import join, row_writer, written
from served_tokens.marks import Counts, TrajectoryError

SHOWN_REASONS, SHOWN_REASON = 5, 1000  # reasons on the screen; characters of a reason that are kept
TOO_DEEP = "the row is nested too deeply"


class Work(NamedTuple):
    """What is done with a shard.

    convert: convert(row, place) -> (counts, [(stream, row), …]); it raises TrajectoryError where the row is to be
        set aside. A stream is what its parts end with: "" is the output, another one goes beside it.
    output: what the streams are of, for messages.
    folder: where the parts are written, as NUMBER + stream + suffix.
    suffix, schema: of the rows of the output, see `row_writer`; a stream that ends with .jsonl is written so.
    strict: stop at the first row that is to be set aside.
    loads: what reads the JSON of a line.
    """

    convert: Callable
    output: Path
    folder: Path
    suffix: str
    schema: object = None
    strict: bool = False
    loads: Callable = json.loads


@dataclass
class Totals:
    """What comes of rows.

    rows_in, set_aside: how many were read, and how many of these are set aside.
    reasons: {kind: [rows, the first one's place, its reason]}.
    unread: {key that nobody reads: rows that are set aside for it}.
    counts: what `convert` counts, None before the first row.
    """

    rows_in: int = 0
    set_aside: int = 0
    reasons: dict = field(default_factory=dict)
    unread: Counter = field(default_factory=Counter)
    counts: Counts | None = None

    def add(self, other: "Totals") -> None:
        self.rows_in += other.rows_in
        self.set_aside += other.set_aside
        for kind, (number, *first) in other.reasons.items():
            self.reasons.setdefault(kind, [0, *first])[0] += number
        self.unread.update(other.unread)
        self.count(other.counts)

    def count(self, counts: Counts | None) -> None:
        """Add what is counted of a row, or of a part of the rows."""
        if self.counts is None:
            self.counts = counts
        elif counts is not None:
            self.counts.add(counts)


def convert_files(sources: list[str], work: Work, num_proc: int, desc: str) -> Totals:
    """Convert the rows of files over processes, with a progress bar; see `Work` for what is written where."""
    totals = Totals()
    results = in_processes(functools.partial(_convert, work), enumerate(read_shards(sources)), num_proc)
    with progress(sources, desc) as bar, contextlib.closing(results):
        for of_shard, size in results:
            totals.add(of_shard)
            bar.update(size)
    return totals


def convert_shard(work: Work, number: int, rows) -> Totals:
    """Convert one shard and write its parts. `rows`: (place, raw), see `rows_of`."""
    totals = Totals()
    with contextlib.ExitStack() as stack:

        @functools.cache
        def writer(stream: str):
            suffix = "" if stream.endswith(".jsonl") else work.suffix
            stack.enter_context(written(Path(f"{work.output}{stream}")))
            return stack.enter_context(row_writer(work.folder / f"{number:06}{stream}{suffix}", work.schema))

        for place, raw in rows:
            totals.rows_in += 1
            try:
                counts, made = work.convert(parse_row(raw, work.loads), place)
            except (TrajectoryError, RecursionError) as error:
                reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
                if work.strict:
                    raise SystemExit(
                        f"{place.source}: row {place.row}: {reason}; fix the row, or drop --strict to set it aside"
                    ) from None
                kind, reason = re.sub(r"\d+", "#", reason), reason[:SHOWN_REASON]
                writer(REJECTS)(rejected(place, reason, raw))
                unread = Counter(getattr(error, "keys", ()))
                totals.add(Totals(set_aside=1, reasons={kind: [1, place, reason]}, unread=unread))
            else:
                totals.count(counts)
                for stream, row in made:
                    writer(stream)(row)
    return totals


def rejected(place: Place, reason: str, raw) -> bytes:
    """The line of a row that is set aside, in ASCII, so that one with a lone surrogate can be written too."""
    line = {**place._asdict(), "reason": reason}
    try:
        return json.dumps({**line, "trajectory": shown_raw(raw)}, default=str).encode()
    except (RecursionError, TypeError, ValueError):
        return json.dumps({**line, "trajectory": None}).encode()


def parts_of(folder: Path, stream: str = "") -> list[Path]:
    """The parts of a stream, in order."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(rf"\d+{re.escape(stream)}(\.\w+)?", path.name))


def save_beside(folder: Path, stream: str, output: Path) -> Path | None:
    """Join the parts of a stream beside the output, under its name and the stream's; None where there are none.

    A file of an earlier run is then gone.
    """
    path = output.with_name(output.name + stream)
    if parts := parts_of(folder, stream):
        join(parts, path)
        return path
    with written(path):
        path.unlink(missing_ok=True)
    return None


def print_reasons(totals: Totals, path: Path | str | None, of_several_files: bool) -> None:
    """Where the rows are that were set aside, and why."""
    if not path:
        return
    print(f"{totals.set_aside} rows set aside with their reasons: {path}", file=sys.stderr)
    for number, place, reason in sorted(totals.reasons.values(), key=lambda kind: -kind[0])[:SHOWN_REASONS]:
        file = f" of {place.source}" * of_several_files
        print(f"  {number} like row {place.row}{file}: {reason}", file=sys.stderr)
    if len(totals.reasons) > SHOWN_REASONS:
        print(f"  and {len(totals.reasons) - SHOWN_REASONS} more kinds of reasons, in the file", file=sys.stderr)


def _convert(work: Work, numbered: tuple[int, Shard]) -> tuple[Totals, int]:
    number, shard = numbered
    return convert_shard(work, number, rows_of(shard)), shard.size


def in_processes(function, items, num_proc: int):
    """map(function, items) over processes, of few items at a time; here where there is but one.

    The processes inherit the function, so it may hold what is large or cannot be sent.
    """
    head = [*itertools.islice(items, 2)]
    items = itertools.chain(head, items)
    if num_proc == 1 or len(head) < 2:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), initializer=_start, initargs=(function,))
    futures = collections.deque()
    try:
        for item in items:
            futures.append(pool.submit(_run, item))
            if len(futures) > num_proc + 1:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool:
        raise SystemExit("a worker process was killed (out of memory?); try a smaller --num-proc") from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function) -> None:
    """In a new process: what to do with items, and to end with the parent."""
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run(item):
    return _function(item)
