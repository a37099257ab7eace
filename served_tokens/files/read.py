"""Reading: the rows of .jsonl, .jsonl.gz, .json and .parquet files, in shards that a process reads by itself.

A row is an object. A shard is a range of lines, some row groups of a Parquet file, or what was read of a JSON array
or a gzip; which rows it holds depends on the file alone.
"""

import codecs
import gzip
import io
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from served_tokens.files.hub import local_copy
from served_tokens.marks import TrajectoryError

FORMATS = (".json", ".jsonl", ".jsonl.gz", ".parquet")
REJECTS, LEFT_OUT, PREVIEW = ".rejects.jsonl", ".left_out.jsonl", "_preview.json"  # beside an output: its name and this
GZIP = b"\x1f\x8b"
SHARD_BYTES = 1 << 23  # about the size of a shard
FIRST_CHUNK = 1 << 13  # characters of a JSON array read at first: who wants the first row only need not download more
JSON_CHUNK = 1 << 20  # characters read at a time from there on
PARQUET_ROWS, PARQUET_BUFFER = (
    32,
    1 << 20,
)  # rows and bytes read at a time, where a row group may be as long as the file
SECONDS_OF_LOG = 30  # between two lines of progress in a log file

tqdm.monitor_interval = 0  # no thread beside the bar: processes are forked


class Place(NamedTuple):
    """Which row of which file, counted from 0."""

    source: str
    row: int


class Shard(NamedTuple):
    """Some rows of a file: read already, or at a span of it, (start, bytes) of lines or (first, end) of row groups."""

    first: Place
    size: int  # bytes of the file
    path: str
    inode: int
    span: tuple = ()
    rows: tuple = ()


def format_of(name: Path | str) -> str | None:
    """The one of FORMATS that a name says."""
    return next((suffix for suffix in FORMATS if str(name).endswith(suffix)), None)


def find_files(source: str) -> list[str]:
    """The files behind a path: itself, or all in a folder, at any depth, by name; ends where there are none."""
    path = local_copy(source) or Path(source)
    if not path.is_dir():
        local_file(source)
        return [source]
    walked = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    found = sorted(file for file in walked if is_data(file.relative_to(path)))
    if not found:
        raise SystemExit(f"{source}: the folder holds no {', '.join(FORMATS)} file")
    for file in found:
        local_file(str(file))
    return [*map(str, found)]


def is_data(path: Path) -> bool:
    """Whether a file of a folder is read: not what a script writes beside its output, nor what is hidden."""
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return bool(format_of(path)) and not hidden and not path.name.endswith((REJECTS, LEFT_OUT, PREVIEW))


def local_file(source: str) -> Path:
    """The data file at a path, or at an address in a Hugging Face data set (see `hub_data_set`)."""
    path = local_copy(source) or Path(source)
    if path.is_file():
        if not format_of(path):
            raise SystemExit(f"{source}: unknown file type {path.suffix!r}; known are {', '.join(FORMATS)}")
        try:
            with path.open("rb") as file:
                start = file.read(2)
        except OSError as error:
            raise SystemExit(f"{source}: cannot be read ({error})") from None
        packed = start == GZIP
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise SystemExit(f"{source}: is UTF-16; write it as UTF-8")
        if packed != (format_of(path) == ".jsonl.gz"):
            raise SystemExit(f"{source}: is {'' if packed else 'not '}compressed by gzip; only a .jsonl.gz file is")
        return path
    raise SystemExit(f"{source}: no such file; give a {', '.join(FORMATS)} file or a Hugging Face data set id")


# ---------------------------------------------------------------- shards


def read_shards(sources: list[str]):
    """Yield the shards of files, in order."""
    for source in sources:
        path = local_file(source)
        read = {".jsonl": _line_shards, ".parquet": _row_group_shards}.get(format_of(path), _stream_shards)
        try:
            with path.open("rb") as file:
                yield from read(file, source, str(path), os.fstat(file.fileno()).st_ino)
        except OSError as error:
            raise SystemExit(f"{source}: cannot be read ({error})") from None


def rows_of(shard: Shard):
    """Yield (place, raw) for each row of a shard: raw is its line, or a value that is parsed already."""
    source, first = shard.first
    try:
        for index, raw in enumerate(_rows_at(shard) if shard.span else shard.rows, first):
            yield Place(source, index), raw
    except OSError as error:
        raise SystemExit(f"{source}: cannot be read ({error})") from None


def read_rows(source: str, desc: str | None = None):
    """Yield (index, row, None) for each row of a file, or (index, text, error) where a row cannot be read."""
    with progress([source], desc) as bar:
        for shard in read_shards([source]):
            for place, raw in rows_of(shard):
                try:
                    yield place.row, parse_row(raw), None
                except TrajectoryError as error:
                    yield place.row, shown_raw(raw), error
            bar.update(shard.size)


def first_columns(file, name: Path | str) -> list[str]:
    """The columns of the first row of an open file; raises SystemExit or TrajectoryError where it has none."""
    if format_of(name) == ".parquet":
        return open_parquet(file, name).schema_arrow.names
    for raw in _stream(file, name):
        return [*parse_row(raw)]
    raise SystemExit(f"{name}: has no row")


def progress(sources: list[str], desc: str | None):
    """A bar over the bytes of files; none without a name. In a log file it is a line now and then."""
    size = sum(local_file(source).stat().st_size for source in sources) if desc else None
    log = (
        {}
        if sys.stderr.isatty()
        else {"mininterval": SECONDS_OF_LOG, "bar_format": "{desc}: {percentage:.0f} %, {elapsed}\n"}
    )
    return tqdm(total=size, desc=desc, unit="B", unit_scale=True, disable=desc is None, **log)


def _line_shards(file, source: str, path: str, inode: int):
    start, first, whole = 0, 0, os.fstat(file.fileno()).st_size
    while lines := file.readlines(SHARD_BYTES):
        size = sum(map(len, lines))
        yield Shard(Place(source, first), size, path, inode, (start, size))
        start, first = start + size, first + sum(map(_is_row, lines))
    if start < whole:
        raise SystemExit(f"{path}: has been cut while it was read; run this again")


def _row_group_shards(file, source: str, path: str, inode: int):
    metadata, size = open_parquet(file, path).metadata, os.fstat(file.fileno()).st_size
    start = first = rows = size_of_groups = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        size_of_groups += metadata.row_group(group).total_byte_size
        if size_of_groups >= SHARD_BYTES or group == metadata.num_row_groups - 1:
            share = size * (group + 1 - start) // metadata.num_row_groups
            yield Shard(Place(source, first), share, path, inode, (start, group + 1))
            start, first, rows, size_of_groups = group + 1, first + rows, 0, 0


def _stream_shards(file, source: str, path: str, inode: int):
    rows, first, done, held = [], 0, 0, 0
    for row in _stream(file, path):
        rows.append(row)
        held += len(row) if isinstance(row, bytes) else 0
        if max(held, file.tell() - done) >= SHARD_BYTES:
            yield Shard(Place(source, first), file.tell() - done, path, inode, rows=tuple(rows))
            rows, first, done, held = [], first + len(rows), file.tell(), 0
    if rows:
        yield Shard(Place(source, first), file.tell() - done, path, inode, rows=tuple(rows))


def _rows_at(shard: Shard):
    with open(shard.path, "rb") as file:
        if os.fstat(file.fileno()).st_ino != shard.inode:
            raise SystemExit(f"{shard.path}: has been replaced while it was read; run this again")
        if format_of(shard.path) == ".parquet":
            yield from _read_parquet(file, shard.path, range(*shard.span))
        else:
            start, length = shard.span
            file.seek(start)
            if len(lines := file.read(length)) < length:
                raise SystemExit(f"{shard.path}: has been cut while it was read; run this again")
            yield from _read_lines(io.BytesIO(lines), shard.path)


# ---------------------------------------------------------------- formats


def parse_row(raw, loads=json.loads) -> dict:
    """A row of a reader; raises TrajectoryError."""
    if isinstance(raw, bytes):
        try:
            raw = loads(raw)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"the row is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
        raise TrajectoryError(f"the row is not an object but {kinds.get(type(raw), 'a number')}")
    return raw


def shown_raw(raw):
    """A row of a reader as a file of rejects keeps it: parsed where it can be, else its text."""
    try:
        return json.loads(raw) if isinstance(raw, bytes) else raw
    except (ValueError, RecursionError):
        return raw.decode("utf-8", "replace")


def stream_rows(file, name: str):
    """Yield the rows of an open file, whatever file system it is of: raw, as `rows_of` does."""
    return _read_parquet(file, name) if format_of(name) == ".parquet" else _stream(file, name)


def _stream(file, name: Path | str):
    if format_of(name) == ".json":
        return _read_json(file, name)
    return _read_lines(_unpacked(file, name) if format_of(name) == ".jsonl.gz" else file, name)


def _unpacked(file, name: Path | str):
    try:
        yield from gzip.GzipFile(fileobj=file)
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{name}: cannot be unpacked ({error})") from None


def _read_lines(lines, name: Path | str):
    for line in filter(_is_row, lines):
        line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) < 100 and line.strip() == b"[":
            raise SystemExit(f"{name}: holds a JSON array over several lines; name it .json")
        yield line


def _is_row(line: bytes) -> bool:
    return not line.isspace() and line.strip() != codecs.BOM_UTF8


def _read_json(file, name: Path | str):
    """The rows of an array, read as a stream: the text in memory grows with the longest row, not with the file."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"\s*").match

    def broken(what: str) -> SystemExit:
        return SystemExit(f"{name}: {what}; a .json file holds one array of rows, a .jsonl file a row per line")

    try:
        file = io.TextIOWrapper(file, encoding="utf-8-sig")
        text, size, problem = file.read(FIRST_CHUNK), FIRST_CHUNK, "ends in the middle of the array"
        at = skip(text).end() + 1
        if text[at - 1 : at] != "[":
            raise broken("not an array")
        while text[(at := skip(text, at).end()) : at + 1] != "]":
            try:
                row, end = decode(text, at)
                end = skip(text, end).end()
            except json.JSONDecodeError as error:
                row, end, problem = None, len(text), f"not valid JSON ({error})"
            if text[end : end + 1] in (",", "]"):
                yield row
                at, size, problem = end + (text[end] == ","), JSON_CHUNK, "ends in the middle of the array"
            elif more := file.read(size):  # the row may go on
                text, at, size = text[at:] + more, 0, 2 * size
            else:
                raise broken(problem)
        if (text[at + 1 :] + file.read(JSON_CHUNK)).strip():
            raise broken("has text after the array")
        file.detach()  # else it would be closed with this
    except (ValueError, RecursionError) as error:
        raise broken(f"not valid JSON ({error})") from None


MIXED = {  # columns, and what of them must be no Arrow struct: calls and tools
    **dict.fromkeys(
        ("messages", "conversations", "prompt", "completion"),
        r"\b(arguments|args|input|parameters): struct<|\btools: list<\w+: struct<",
    ),
    **dict.fromkeys(("tools", "functions"), "struct<"),
}


def _read_parquet(file, name: Path | str, row_groups=None):
    parquet = open_parquet(file, name)
    for column, struct in MIXED.items():
        index = parquet.schema_arrow.get_field_index(column)
        if index >= 0 and re.search(struct, str(parquet.schema_arrow.field(index).type)):
            raise SystemExit(
                f"{name}: column {column} holds objects as Arrow structs, in which every object has the keys of all "
                "others; store the column as JSON strings"
            )
    try:  # threads would read ahead, without a bound
        for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=row_groups, use_threads=False):
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises many kinds; each means that the file is damaged
        raise SystemExit(f"{name}: cannot be read ({type(error).__name__}: {error})") from None


def open_parquet(file, name: Path | str):
    """The pyarrow.parquet.ParquetFile in a file or at a path; errors name the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, buffer_size=PARQUET_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SystemExit(f"{name}: not a Parquet file that can be read ({error})") from None
