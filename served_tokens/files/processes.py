"""Rows over processes: what a script does with a row, done with all rows of many files.

The parent reads rows and hands them out in chunks; a process converts those of a chunk and hands back bytes, which the
parent writes in order. So the outputs are the same with any number of processes, and one of them that is
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
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from served_tokens.files.read import REJECTS, Chunk, Place, parse_row, progress, read_chunks, read_rows
from served_tokens.files.write import append, finish, json_row, packed, shown, written
from served_tokens.marks import Counts, TrajectoryError, many

SHOWN_REASONS, SHOWN_REASON = 5, 1000  # reasons on the screen; characters of a reason that are kept
TOO_DEEP = "the row is nested too deeply"


@dataclass(frozen=True)
class Work:
    """What is done with rows.

    convert: convert(row, place) -> (counts, [(stream, row), …]); it raises TrajectoryError where the row is to be set
        aside. A stream is of the rows that go into one output: "" of the converted ones, REJECTS of those set aside.
    counts: the class of the counts.
    outputs: {stream: the file or folder for its rows}
    folder: a work folder, in which outputs are written until they are whole.
    schema: of outputs that are Parquet, see `packed`.
    strict: stop at the first row that is to be set aside.
    loads: what reads the JSON of a line.
    """

    convert: Callable
    counts: type[Counts]
    outputs: dict[str, Path]
    folder: Path
    schema: object = None
    strict: bool = False
    loads: Callable = json.loads

    def part(self, stream: str) -> Path:
        """Where an output is written until it is whole."""
        return self.folder / self.outputs[stream].name

    def finish(self, stream: str) -> Path | None:
        """Give an output its name, and return it. Where it has no rows, the file of an earlier run goes."""
        output = self.outputs[stream]
        if self.part(stream).exists():
            finish(self.part(stream), output)
            return output
        output.unlink(missing_ok=True)
        return None


@dataclass
class Totals(Counts):
    """What comes of rows.

    counts: what `convert` counts of them. rows_in: how many were read, and size: in how many bytes of their files;
    set_aside: how many of these are set aside. unread: {key that nobody reads: rows that are set aside for it}.
    """

    counts: Counts
    rows_in: int = 0
    size: int = 0
    set_aside: int = 0
    unread: Counter = field(default_factory=Counter)


def convert_files(sources: list[str], work: Work, num_proc: int, desc: str) -> Totals:
    """Convert the rows of files over processes, with a progress bar; see `Work` for what is written where."""
    results = in_processes(functools.partial(convert_chunk, work), read_chunks(sources), num_proc)
    with progress(sources, desc) as bar, contextlib.closing(results):
        return collect(results, work, bar)


def collect(results, work: Work, bar) -> Totals:
    """Write what comes of chunks, see `convert_chunk`, in their order."""
    totals = Totals(work.counts())
    for number, (of_chunk, made) in enumerate(results):
        totals.add(of_chunk)
        for stream, rows in made.items():
            with written(work.outputs[stream]):
                append(work.part(stream), number, rows)
        bar.update(of_chunk.size)
    return totals


def convert_chunk(work: Work, chunk: Chunk) -> tuple[Totals, dict[str, bytes]]:
    """(what comes of the rows of a chunk, {stream: its rows, see `packed`})"""
    totals, made = Totals(work.counts(), rows_in=len(chunk.rows), size=chunk.size), defaultdict(list)
    for place, raw in chunk.rows:
        try:
            counts, rows = work.convert(parse_row(raw, work.loads), place)
        except (TrajectoryError, RecursionError) as error:
            reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
            if work.strict:
                way_out = "fix the row, or drop --strict to set it aside"
                raise SystemExit(f"{place} (counted from 0): {reason}; {way_out}") from None
            made[REJECTS].append(_rejected(place, reason[:SHOWN_REASON], raw))
            totals.set_aside += 1
            totals.unread.update(getattr(error, "keys", ()))
        else:
            totals.counts.add(counts)
            for stream, row in rows:
                made[stream].append(row)
    return totals, {its: packed(rows, work.outputs[its], work.schema) for its, rows in made.items()}


def _rejected(place: Place, reason: str, raw) -> bytes:
    """The line of a row that is set aside: the row is parsed where it can be, and not there where it is too deep."""
    line = {**place._asdict(), "reason": reason}
    try:
        return json_row({**line, "trajectory": json.loads(raw) if isinstance(raw, bytes) else raw})
    except (ValueError, RecursionError):
        return json_row({**line, "trajectory": raw.decode("utf-8", "replace") if isinstance(raw, bytes) else None})


def print_reasons(path: Path | None, number: int, of_several_files: bool) -> None:
    """Why so many rows are set aside, of the file with them."""
    if path is None:
        return
    kinds, firsts = Counter(), {}
    for _, line, error in read_rows(str(path)):
        if not error:  # a row that is nested too deeply to be read
            kind, of = re.sub(r"\d+", "#", line["reason"]), f" of {line['source']}" if of_several_files else ""
            kinds[kind] += 1
            firsts.setdefault(kind, f"row {line['row']} (counted from 0){of}: {line['reason']}")
    print(f"{many(number, 'row')} set aside with reasons: {shown(path)}", file=sys.stderr)
    for kind, rows in kinds.most_common(SHOWN_REASONS):
        print(f"  {rows} like {firsts[kind]}", file=sys.stderr)


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
        pool = ProcessPoolExecutor(num_proc, context, initializer=_start, initargs=(function, folder))
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


def _run(item) -> Path:
    """The file with the result of an item."""
    result, path = _function(item), Path(_folder, uuid.uuid4().hex)
    with written(path), path.open("wb") as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    return path


def _taken(path: Path):
    """The result in a file, which is removed."""
    with path.open("rb") as file:
        path.unlink()
        return pickle.load(file)
