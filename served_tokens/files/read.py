"""Reading: the rows of .jsonl, .jsonl.gz, .json and .parquet files, in chunks that are small whatever the file is."""

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from served_tokens.files.hub import local_copy
from served_tokens.marks import TrajectoryError, kind_of

FORMATS = (".json", ".jsonl", ".jsonl.gz", ".parquet")
REJECTS, LEFT_OUT, PREVIEW = ".rejects.jsonl", ".left_out.jsonl", "_preview.json"  # beside an output: its name and this
CHUNK_BYTES = 1 << 21  # of rows in memory, about
FIRST_CHUNK = 1 << 13  # characters of a JSON array read at first: who wants the first row only need not download more
JSON_CHUNK = 1 << 20  # characters read at a time from there on
PARQUET_ROWS, PARQUET_BUFFER = 32, 1 << 20  # rows and bytes read at a time: a row group may be as long as the file
SECONDS_OF_LOG = 30  # between two lines of progress in a log file
MIXED = {  # columns, and what of them must be no Arrow struct: calls and tools
    **dict.fromkeys(
        ("messages", "conversations", "prompt", "completion"),
        r"\b(arguments|args|input|parameters): struct<|\btools: list<\w+: struct<",
    ),
    **dict.fromkeys(("tools", "functions"), "struct<"),
}

tqdm.monitor_interval = 0  # no thread beside the bar: processes are forked


class Place(NamedTuple):
    """Which row of which file, counted from 0."""

    source: str
    row: int


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file that follow one another.

    rows: (place, raw) of each; raw is the bytes of a line, or a value that is parsed already.
    size: bytes of the file that were read for them.
    """

    rows: list
    size: int


def format_of(name: Path | str) -> str | None:
    """The one of FORMATS that a name says."""
    return next((suffix for suffix in FORMATS if str(name).endswith(suffix)), None)


def find_files(source: str) -> list[str]:
    """The files behind a path: itself, or all in a folder, at any depth, by name; ends where there are none."""
    path, found = local_copy(source) or Path(source), [source]
    if path.is_dir():
        walked = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        found = [str(file) for file in sorted(walked) if is_data(file.relative_to(path))]
    if not found:
        raise SystemExit(f"{source}: the folder holds no {', '.join(FORMATS)} file")
    for file in found:
        local_file(file)
    return found


def is_data(path: Path) -> bool:
    """Whether a file of a folder is read: not what a script writes beside its output, nor what is hidden."""
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return bool(format_of(path)) and not hidden and not path.name.endswith((REJECTS, LEFT_OUT, PREVIEW))


def local_file(source: str) -> Path:
    """The data file at a path, or at an address in a Hugging Face data set (see files/hub.py)."""
    path = local_copy(source) or Path(source)
    if not path.is_file():
        raise SystemExit(f"{source}: no such file; give a {', '.join(FORMATS)} file or a Hugging Face data set id")
    if not format_of(path):
        raise SystemExit(f"{source}: unknown file type {path.suffix!r}; known are {', '.join(FORMATS)}")
    return path


def digest_of(source: str) -> str:
    """8 bytes of the SHA-256 of a data file, as hex, by which one sees that it has changed."""
    try:
        return checksum(local_file(source))[:16]
    except OSError as error:
        raise SystemExit(f"{source}: cannot be read ({error})") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hex; of a folder, that of the lines that sha256sum prints of its files, sorted by name."""
    if path.is_dir():
        lines = "".join(f"{checksum(file)}  {file.name}\n" for file in sorted(path.iterdir()))
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(sources: list[str], desc: str):
    """A bar over the bytes of files. In a log file it is a line now and then."""
    size = sum(local_file(source).stat().st_size for source in sources)
    lines = {"mininterval": SECONDS_OF_LOG, "bar_format": "{desc}: {percentage:.0f} %, {elapsed}\n"}
    return tqdm(total=size, desc=desc, unit="B", unit_scale=True, **({} if sys.stderr.isatty() else lines))


# ---------------------------------------------------------------- rows


def read_chunks(sources: list[str]):
    """Yield the rows of files, in order, as chunks."""
    for source in sources:
        try:
            with local_file(source).open("rb") as file:
                yield from chunks_of(file, source)
        except OSError as error:
            raise SystemExit(f"{source}: cannot be read ({error})") from None


def chunks_of(file, source: str):
    """Yield the rows of an open file of any file system as chunks; the source is its name, which says the format."""
    rows, held, done = [], 0, 0
    for number, (raw, size) in enumerate(_rows(file, source)):
        rows.append((Place(source, number), raw))
        held += size
        if held >= CHUNK_BYTES:
            yield Chunk(rows, file.tell() - done)
            rows, held, done = [], 0, file.tell()
    yield Chunk(rows, file.tell() - done)


def read_rows(source: str):
    """Yield (index, row, None) for each row of a file, or (index, None, error) where a row cannot be read."""
    for chunk in read_chunks([source]):
        for place, raw in chunk.rows:
            try:
                yield place.row, parse_row(raw), None
            except TrajectoryError as error:
                yield place.row, None, error


def first_columns(file, name: str) -> list[str]:
    """The columns of the first row of an open file; raises SystemExit or TrajectoryError where it has none."""
    if format_of(name) == ".parquet":
        return open_parquet(file, name).schema_arrow.names
    for raw, _ in _rows(file, name):
        return [*parse_row(raw)]
    raise SystemExit(f"{name}: has no row")


def parse_row(raw, loads=json.loads) -> dict:
    """A row of a reader; raises TrajectoryError."""
    if isinstance(raw, bytes):
        try:
            raw = loads(raw)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"the row is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise TrajectoryError(f"the row is not an object but {kind_of(raw)}")
    return raw


# ---------------------------------------------------------------- formats: each reader yields (raw, bytes in memory)


def _rows(file, name: str):
    return {".parquet": _read_parquet, ".json": _read_json}.get(format_of(name), _read_lines)(file, name)


def _read_lines(file, name: str):
    try:
        for line in gzip.GzipFile(fileobj=file) if format_of(name) == ".jsonl.gz" else file:
            line = line.removeprefix(codecs.BOM_UTF8)
            if line and not line.isspace():
                yield line, len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SystemExit(f"{name}: cannot be unpacked ({error})") from None


def _read_json(file, name: str):
    """The rows of an array, read as a stream: the text in memory grows with the longest row, not with the file."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
    way_out = "a .json file holds one array of rows, a .jsonl file a row per line"
    try:
        file = io.TextIOWrapper(file, encoding="utf-8-sig")
        text, size = file.read(FIRST_CHUNK), FIRST_CHUNK
        at = skip(text).end() + 1
        if text[at - 1 : at] != "[":
            raise SystemExit(f"{name}: not an array; {way_out}")
        while text[(at := skip(text, at).end()) : at + 1] != "]":
            try:
                row, end = decode(text, at)
                end = skip(text, end).end()
            except json.JSONDecodeError:
                end = len(text)
            if text[end : end + 1] in (",", "]"):
                yield row, end - at
                at, size = end + (text[end] == ","), JSON_CHUNK
            elif more := file.read(size):  # the row may go on
                text, at, size = text[at:] + more, 0, 2 * size
            else:
                raise SystemExit(
                    f"{name}: not valid JSON, or not to its end, from {text[at : at + 40]!r} on; {way_out}"
                )
        if (text[at + 1 :] + file.read(JSON_CHUNK)).strip():
            raise SystemExit(f"{name}: has text after the array; {way_out}")
        file.detach()  # else it would be closed with this
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{name}: not valid JSON ({error}); {way_out}") from None


def _read_parquet(file, name: str):
    parquet = open_parquet(file, name)
    for column, struct in MIXED.items():
        index = parquet.schema_arrow.get_field_index(column)
        if index >= 0 and re.search(struct, str(parquet.schema_arrow.field(index).type)):
            raise SystemExit(
                f"{name}: column {column} holds objects as Arrow structs, in which every object has the keys of all "
                "others; store the column as JSON strings"
            )
    try:  # threads would read ahead, without a bound
        for batch in parquet.iter_batches(PARQUET_ROWS, use_threads=False):
            for row in batch.to_pylist():
                yield row, batch.nbytes // batch.num_rows
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
