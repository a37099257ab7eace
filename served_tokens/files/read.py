"""Reading: the rows of .jsonl, .jsonl.gz, .json and .parquet files, a few at a time whatever the size of the file."""

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from served_tokens.marks import TrajectoryError, kind_of

FORMATS = (".json", ".jsonl", ".jsonl.gz", ".parquet")
REJECTS, LEFT_OUT = ".rejects.jsonl", ".left_out.jsonl"  # beside an output: its name and this
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@([^/]+)/(.+)")  # of a file, as huggingface_hub writes it
CHUNK_ROWS = 32
FIRST_READ, JSON_READ = 1 << 13, 1 << 20  # characters of a JSON array read at first, for its first row alone, and then
PARQUET_BUFFER = 1 << 20  # bytes read at a time: a row group may be as long as the file
SECONDS_OF_LOG = 30  # between two counts in a log file
MIXED = re.compile(  # columns with calls or tools in Arrow structs
    r"(messages|conversations|prompt|completion): .*(\b(arguments|args|input|parameters)|\btools: list<\w+): struct<"
    r"|(tools|functions): .*struct<"
)

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # a download by Xet that breaks off begins anew
tqdm.monitor_interval = 0  # no thread beside the bar: processes are forked


class Place(NamedTuple):
    """Which row of which file, counted from 0."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}: row {self.row}"


def format_of(name: Path | str) -> str | None:
    """The one of FORMATS that a name says."""
    return next((suffix for suffix in FORMATS if str(name).endswith(suffix)), None)


def find_files(source: str) -> list[str]:
    """The files behind a path: itself, or all in a folder, at any depth, by name; ends where there are none."""
    path = Path(source)
    if not path.is_dir():
        return [source]
    walked = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    found = [str(file) for file in sorted(walked) if is_data(file.relative_to(path))]
    return found or sys.exit(f"{source}: the folder holds no {', '.join(FORMATS)} file")


def is_data(path: Path) -> bool:
    """Whether a file of a folder is read: not what a script writes beside its output, nor what is hidden."""
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return bool(format_of(path)) and not hidden and not path.name.endswith((REJECTS, LEFT_OUT, "dataset_info.json"))


def open_data(source: str):
    """The open data file at a path, or at an address in a Hugging Face data set."""
    address = ADDRESS.fullmatch(source)
    path = download(address[1], address[3], address[2]) if address else Path(source)
    if not path.is_file():
        raise SystemExit(f"{source}: no such file; give a {', '.join(FORMATS)} file or a Hugging Face data set id")
    if not format_of(path):
        raise SystemExit(f"{source}: unknown file type {path.suffix!r}; known are {', '.join(FORMATS)}")
    return path.open("rb")


def digest_of(source: str) -> str:
    """8 bytes of the SHA-256 of a data file, as hex, by which one sees that it has changed."""
    try:
        with open_data(source) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise SystemExit(f"{source}: cannot be read ({error})") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hex; of a folder, that of the lines that sha256sum prints of its files, sorted by name."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = "".join(f"{checksum(file)}  {file.relative_to(path)}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(data_set: str, name: str, revision: str) -> Path:
    """Where a file of a Hugging Face data set is in the Hub's cache, downloaded unless it is there.

    A revision that is no commit is looked up on the Hub; the cache then knows which commit it is.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(data_set, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the Hub client raises many kinds; each means that the file is not whole
        again = "run this again, and it goes on from where it ended"
        raise SystemExit(f"{data_set}: {name}: the download failed ({one_line(error)}); {again}") from None


def one_line(error: Exception) -> str:
    """What an error says."""
    return " ".join(str(error).split()) or type(error).__name__


def progress(desc: str, unit: str = " rows", total: int | None = None):
    """A count on the screen; with the total, how much of it is done and the time that is left."""
    return tqdm(desc=desc, unit=unit, total=total, mininterval=0.1 if sys.stderr.isatty() else SECONDS_OF_LOG)


# ---------------------------------------------------------------- rows


def read_chunks(sources: list[str], rows: int = CHUNK_ROWS, opened=open_data):
    """Yield the rows of files, in order, as lists of (place, raw); raw is the bytes of a line, or a parsed value.

    rows: the most of a list; opened: opened(source) -> the file that is open for reading.
    """
    for source in sources:
        try:
            with opened(source) as file:
                placed = ((Place(source, number), raw) for number, raw in enumerate(_rows(file, source)))
                while chunk := [*itertools.islice(placed, rows)]:
                    yield chunk
        except (OSError, EOFError, zlib.error) as error:  # the last two: it ends too early, or is not packed so
            raise SystemExit(f"{source}: cannot be read ({error})") from None


def read_rows(source: str):
    """Yield (index, row) for each row of a file that can be read."""
    for chunk in read_chunks([source]):
        for place, raw in chunk:
            with contextlib.suppress(TrajectoryError):
                yield place.row, parse_row(raw)


def first_columns(file, name: str) -> list[str]:
    """The columns of the first row of an open file; raises SystemExit or TrajectoryError where it has none."""
    for raw in _rows(file, name):
        return [*parse_row(raw)]
    raise SystemExit(f"{name}: has no row")


def parse_row(raw) -> dict:
    """A row of a reader; raises TrajectoryError."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            way_out = "a line of .jsonl is one row, a list is .json"
            raise TrajectoryError(f"the row is not valid JSON ({error}); {way_out}") from None
    if not isinstance(raw, dict):
        raise TrajectoryError(f"the row is not an object but {kind_of(raw)}")
    return raw


# ---------------------------------------------------------------- formats


def _rows(file, name: str):
    return {".parquet": _read_parquet, ".json": _read_json}.get(format_of(name), _read_lines)(file, name)


def _read_lines(file, name: str):
    for line in gzip.GzipFile(fileobj=file) if format_of(name) == ".jsonl.gz" else file:
        line = line.removeprefix(codecs.BOM_UTF8)
        if line and not line.isspace():
            yield line


def _read_json(file, name: str):
    """The rows of an array, read as a stream: the text in memory grows with the longest row, not with the file."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
    invalid = "no array of rows, as [{…}, {…}]; what is no list is .jsonl, a row on each line"
    try:
        file = io.TextIOWrapper(file, encoding="utf-8-sig")
        text, size = file.read(FIRST_READ).lstrip(), FIRST_READ
        if not text.startswith("["):
            raise ValueError("it begins with no [")
        at = 1
        while text[(at := skip(text, at).end()) : at + 1] != "]":
            try:
                row, end = decode(text, at)
                end = skip(text, end).end()
            except json.JSONDecodeError:
                end = len(text)
            if text[end : end + 1] in (",", "]"):
                yield row
                at, size = end + (text[end] == ","), JSON_READ
            elif more := file.read(size):  # the row may go on
                text, at, size = text[at:] + more, 0, 2 * size
            else:
                raise ValueError(f"from {text[at : at + 40]!r} on, or it ends too early")
        if (text[at + 1 :] + file.read(JSON_READ)).strip():
            raise ValueError("there is text after the array")
        file.detach()  # else it would be closed with this
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{name}: {invalid} ({error})") from None


def _read_parquet(file, name: str):
    import pyarrow.parquet as pq

    try:  # threads and a buffer before the reading would read ahead, without a bound
        parquet = pq.ParquetFile(file, buffer_size=PARQUET_BUFFER, pre_buffer=False)
        for column in parquet.schema_arrow:
            if MIXED.match(f"{column.name}: {column.type}"):
                raise SystemExit(
                    f"{name}: column {column.name} holds objects as Arrow structs, in which every object has the keys "
                    "of all others; store the column as JSON strings"
                )
        for batch in parquet.iter_batches(CHUNK_ROWS, use_threads=False):
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises many kinds; each means that the file is damaged
        raise SystemExit(f"{name}: not a Parquet file that can be read ({type(error).__name__}: {error})") from None
