"""Rows over processes: what a script does with a row, done with all rows of many files.

The parent reads rows and hands them out in chunks; a process converts those of a chunk and writes them as a file, and
the parent joins these in order. So the outputs are the same with any number of processes, and one of them that is
killed leaves an error and not a gap.
"""

import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from served_tokens.files.read import REJECTS, Place, parse_row, progress, read_chunks
from served_tokens.files.write import finish, json_row, packed, shown
from served_tokens.marks import Counts, TrajectoryError, many

SHOWN_REASONS, SHOWN_REASON = 5, 1000  # reasons on the screen; characters of a reason that are kept
TOO_DEEP = "the row is nested too deeply"


@dataclass(frozen=True)
class Work:
    """What is done with rows.

    A stream is of the rows that go into one output: "" of the converted ones, REJECTS of those set aside.
    """

    convert: Callable  # convert(row, place) -> (counts, [(stream, row), …]); TrajectoryError sets the row aside
    counts: type[Counts]
    outputs: dict[str, Path]  # {stream: the file or folder for its rows}
    folder: Path  # a work folder; in it is a folder for each output, with its parts
    schema: object = None  # of outputs that are Parquet
    strict: bool = False  # stop at the first row that is to be set aside

    def finish(self, stream: str) -> Path | None:
        """Give an output its name, and return it. Where it has no rows, the file of an earlier run goes."""
        output = self.outputs[stream]
        if (parts := self.folder / output.name).exists():
            finish(parts, output)
            return output
        output.unlink(missing_ok=True)
        return None


@dataclass
class Totals(Counts):
    """What comes of rows."""

    counts: Counts  # what `convert` counts of them
    rows_in: int = 0
    set_aside: int = 0
    reasons: Counter = field(default_factory=Counter)  # why, with # for each number -> rows set aside
    first: dict = field(default_factory=dict)  # the same -> why and where in its first row
    unread: Counter = field(default_factory=Counter)  # key that nobody reads -> rows set aside for it


def convert_files(sources: list[str], work: Work, num_proc: int, desc: str) -> Totals:
    """Convert the rows of files over processes, with their count on the screen."""
    chunks = ((f"{number:06}", chunk) for number, chunk in enumerate(read_chunks(sources)))
    return collect(in_processes(functools.partial(convert_chunk, work), chunks, num_proc), work, desc)


def collect(results, work: Work, desc: str) -> Totals:
    """What comes of rows, of what comes of each chunk of them."""
    totals = Totals(work.counts())
    with progress(desc) as bar, contextlib.closing(results):
        for of_chunk in results:
            totals.add(of_chunk)
            bar.update(of_chunk.rows_in)
    return totals


def convert_chunk(work: Work, named: tuple[str, list]) -> Totals:
    """Convert rows, and write what they become as parts of the outputs; named: (the name of a part, the rows)."""
    name, chunk = named
    totals, made = Totals(work.counts(), rows_in=len(chunk)), defaultdict(list)
    for place, raw in chunk:
        try:
            counts, rows = work.convert(parse_row(raw), place)
        except (TrajectoryError, RecursionError) as error:
            reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)[:SHOWN_REASON]
            if work.strict:
                way_out = "fix the row, or drop --strict to set it aside"
                raise SystemExit(f"{place} (counted from 0): {reason}; {way_out}") from None
            made[REJECTS].append(_rejected(place, reason, raw))
            totals.set_aside += 1
            kind = re.sub(r"\d+", "#", reason)
            totals.reasons[kind] += 1
            totals.first.setdefault(kind, f"{reason} (first in {place}, counted from 0)")
            totals.unread.update(getattr(error, "keys", ()))
        else:
            totals.counts.add(counts)
            for stream, row in rows:
                made[stream].append(row)
    for stream, rows in made.items():
        output = work.outputs[stream]
        parts = work.folder / output.name
        parts.mkdir(exist_ok=True)
        (parts / f"{name}.parquet").write_bytes(packed(rows, output, work.schema))
    return totals


def _rejected(place: Place, reason: str, raw) -> bytes:
    """The line of a row that is set aside: the row is parsed where it can be, and not there where it is too deep."""
    line = {**place._asdict(), "reason": reason}
    try:
        return json_row({**line, "trajectory": json.loads(raw) if isinstance(raw, bytes) else raw})
    except (ValueError, RecursionError):
        return json_row({**line, "trajectory": raw.decode("utf-8", "replace") if isinstance(raw, bytes) else None})


def finish_rejects(work: Work, totals: Totals) -> None:
    """Give the rows that are set aside their file, and say why so many are."""
    if path := work.finish(REJECTS):
        print(f"{many(totals.set_aside, 'row')} set aside with reasons: {shown(path)}", file=sys.stderr)
    most = totals.reasons.most_common(SHOWN_REASONS)
    for reason, rows in most:
        print(f"  {many(rows, 'row')}: {totals.first[reason]}", file=sys.stderr)
    if more := totals.set_aside - sum(rows for _, rows in most):
        print(f"  {many(more, 'row')} for other reasons, all in that file", file=sys.stderr)


def in_processes(function, items, num_proc: int):
    """map(function, items) over processes, of few items at a time; here where there is but one.

    The processes inherit the function, so it may hold what is large or cannot be sent. Results come back in files: of a
    process that is killed in the middle of a pipe, the parent would wait for ever for the rest.
    """
    head = [*itertools.islice(items, 2)]
    items = itertools.chain(head, items)
    if num_proc == 1 or len(head) < 2:
        yield from map(function, items)
        return
    context, futures = multiprocessing.get_context("fork"), collections.deque()
    with tempfile.TemporaryDirectory() as folder:
        pool = ProcessPoolExecutor(num_proc, context, _start, (function, folder))
        try:
            for item in items:
                futures.append(pool.submit(_run, item))
                if len(futures) > num_proc + 1:
                    yield _taken(futures.popleft().result())
            while futures:
                yield _taken(futures.popleft().result())
        except BrokenProcessPool:
            raise SystemExit("a worker process was killed (out of memory?); try a smaller --num-proc") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(function, folder: str) -> None:
    """In a new process: what to do with items, where to put results, and to end with the parent, as signals are its."""
    global _function, _folder
    _function, _folder = function, folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which a broken pool ends its processes

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run(item) -> str:
    """The file with the result of an item."""
    with tempfile.NamedTemporaryFile(dir=_folder, delete=False) as file:
        pickle.dump(_function(item), file, pickle.HIGHEST_PROTOCOL)
    return file.name


def _taken(path: str):
    """The result in a file, which is removed."""
    with open(path, "rb") as file:
        os.unlink(path)
        return pickle.load(file)
