"""Writing: files that appear whole or not at all, in the format that their name says, alone or joined of parts."""

import contextlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

import orjson

from served_tokens.files.read import format_of

ROW_GROUP, ROW_GROUP_CHARACTERS = 512, 1 << 24  # the most rows, and about the most text, in memory for a Parquet file
# Most text of a sample is that of the samples before it too: as a dictionary, a row group holds each text once.
PARQUET = {"compression": "zstd", "dictionary_pagesize_limit": 2 * ROW_GROUP_CHARACTERS}
BUFFER = 1 << 20  # bytes
FILES = (".json", ".jsonl", ".parquet")  # that are written; a name without an extension is a folder


def shown(path: Path | str) -> str:
    """A path as a person would type it from here."""
    with contextlib.suppress(ValueError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)


def accounted(unit: str, total: int, kept: int, how: str, others: int, why: str) -> str:
    """The line that says where all rows, or all turns, went."""
    return f"{total} {unit} in = {kept} {unit} {how} + {others} {why}"


def still_there(path: Path) -> str:
    """What to add where a file is not written."""
    return "; the one of an earlier run is still there" if path.exists() else ""


def check_output(output: Path) -> None:
    """Whether something can be written under this name, a file or a folder of Parquet files; before the work."""
    if not output.name.strip("."):
        raise SystemExit(f"{output}: is no name of an output")
    is_folder = not re.search(r"\.[A-Za-z]+$", output.name)  # .v2 and .1 end the name of a folder too
    if not is_folder and format_of(output) not in FILES:
        raise SystemExit(f"{output}: unknown file type {output.suffix!r}; known are {', '.join(FILES)} and none")
    with written(output):
        if output.is_file() if is_folder else output.is_dir():
            raise FileExistsError(f"there is a {'file' if is_folder else 'folder'} of this name")
    if is_folder and output.is_dir() and not all(map(_is_shard, output.iterdir())):
        raise SystemExit(f"{output}: holds more than Parquet files of these scripts; name another folder")


def _is_shard(path: Path) -> bool:
    return path.is_file() and re.fullmatch(r"\d+-of-\d+\.parquet", path.name) is not None


def refuse_inputs(inputs, *outputs: Path) -> None:
    """Stop where an input would be written over, whatever names lead to it, alone or with the folder that it is in."""
    for output in filter(os.path.exists, outputs):
        for source in map(Path, filter(os.path.exists, inputs)):
            if output.samefile(source) or output.resolve() in source.resolve().parents:
                raise SystemExit(f"{output}: is the input too; name another output")


@contextlib.contextmanager
def written(path: Path):
    """A failure to write, as one line."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error})") from None


@contextlib.contextmanager
def work_folder(beside: Path):
    """A hidden folder beside an output, for its parts; it is removed in the end.

    A process that is killed leaves it, under a name that no other run has and no reader of data takes.
    """
    own = f"{os.getpid()}-{secrets.token_hex(4)}"  # machines that share a folder may share process numbers
    folder = beside.with_name(f".{beside.name}.{own}.parts")
    with written(beside):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path):
    """A path to write a file or a folder to: it takes the name `path` when the block ends, unless the block fails."""
    with work_folder(path) as folder:
        whole, earlier = folder / "whole", folder / "earlier"
        yield whole
        try:
            if whole.is_dir() and path.is_dir():  # which cannot be replaced at once
                os.replace(path, earlier)
            os.replace(whole, path)
        except BaseException:
            if earlier.exists() and not path.exists():
                os.replace(earlier, path)
            raise


# ---------------------------------------------------------------- rows


@contextlib.contextmanager
def row_writer(path: Path, schema=None):
    """Yield write(row) for a .jsonl or, by `schema`, a .parquet file. A row is a dict, or for .jsonl its JSON."""
    if path.suffix == ".parquet":
        with _parquet_writer(path, schema) as write:
            yield write
    else:
        with path.open("wb", BUFFER) as file:
            yield lambda row: file.write((row if isinstance(row, bytes) else json_row(row)) + b"\n")


def json_row(row: dict, texts=()) -> bytes:
    """A row as JSON. The columns `texts` hold but texts, small integers and null, which orjson writes faster."""
    columns = (
        orjson.dumps(key)
        + b": "
        + (orjson.dumps(value) if key in texts or type(value) is str else json_text(value).encode())
        for key, value in row.items()
    )
    return b"{" + b", ".join(columns) + b"}"


def json_text(value) -> str:
    """JSON with non-ASCII kept, and dates as ISO text."""

    def default(value) -> str:
        if hasattr(value, "isoformat"):
            return value.isoformat()
        raise SystemExit(f"a column holds {type(value).__name__}, for which JSON has no type; write .parquet instead")

    return json.dumps(value, ensure_ascii=False, default=default)


@contextlib.contextmanager
def _parquet_writer(path: Path, schema):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, characters = [], 0

    def flush() -> None:
        nonlocal characters
        writer.write_table(pa.table({field.name: _array(rows, field) for field in schema}, schema=schema))
        rows.clear()
        characters = 0

    def write(row: dict) -> None:
        nonlocal characters
        if not row.keys() <= set(schema.names):
            raise SystemExit(f"column {min(row.keys() - set(schema.names))} is in no earlier row; write .jsonl instead")
        rows.append(row)
        characters += sum(map(_characters, row.values()))
        if len(rows) == ROW_GROUP or characters > ROW_GROUP_CHARACTERS:
            flush()

    with pq.ParquetWriter(path, schema, **PARQUET) as writer:
        yield write
        if rows:
            flush()


def _array(rows: list[dict], field):
    import pyarrow as pa

    values = [row.get(field.name) for row in rows]
    if pa.types.is_string(field.type):
        values = [json_text(value) if isinstance(value, (dict, list)) else value for value in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise SystemExit(f"column {field.name} does not fit {field.type} ({error}); write .jsonl instead") from None


def _characters(value) -> int:
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0


def inferred_schema(rows: list[dict]):
    """Scalars keep their type; lists and objects become JSON strings, so that no key of one row reaches another."""
    import pyarrow as pa

    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    fields = []
    for column in dict.fromkeys(key for row in rows for key in row):
        kinds = {type(row[column]) for row in rows if row.get(column) is not None}
        scalars = [types[kind] for kind in kinds if kind in types]
        if scalars and len(kinds) > 1:
            raise SystemExit(
                f"column {column} holds values of several types, which Parquet cannot; write .jsonl instead"
            )
        fields.append((column, scalars[0] if scalars else pa.string()))
    return pa.schema(fields)


# ---------------------------------------------------------------- parts


def part_suffix(output: Path) -> str:
    """The format of the parts of an output."""
    return ".jsonl" if format_of(output) in (".json", ".jsonl") else ".parquet"


def join(parts: list[Path], output: Path) -> None:
    """One output of parts: they are moved into a folder, or written one after the other. The parts may be gone then."""
    with whole_file(output) as whole:
        if format_of(output) == ".parquet":
            _join_parquet(parts, whole)
        elif format_of(output):
            _join_lines(
                parts, whole, *((b"[\n", b",\n", b"\n]\n") if output.suffix == ".json" else (b"", b"\n", b"\n"))
            )
        else:
            whole.mkdir()
            for number, part in enumerate(parts):
                part.rename(whole / f"{number:05}-of-{len(parts):05}.parquet")


def _join_lines(parts: list[Path], whole: Path, opening: bytes, between: bytes, closing: bytes) -> None:
    with whole.open("wb", BUFFER) as file:
        file.write(opening)
        started = False
        for part in parts:
            with part.open("rb") as lines:
                if between == b"\n":
                    shutil.copyfileobj(lines, file, BUFFER)
                    continue
                for line in lines:
                    file.write(between * started + line.rstrip(b"\n"))
                    started = True
        file.write(closing if between != b"\n" else b"")


def _join_parquet(parts: list[Path], whole: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(whole, pq.read_schema(parts[0]), **PARQUET) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))
