"""Writing: files and folders that appear whole or not at all, in the format that their name says."""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

import orjson

from served_tokens.files.read import format_of

ROW_GROUP = 512  # rows
# Most text of a sample is that of the samples before it too: as a dictionary, a row group holds each text once.
PARQUET = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 25}
TEXTS = ("messages", "served")  # columns of step 1: texts, small integers and null, which orjson writes too, but faster
CHUNKS = r"\d+-of-\d+\.parquet"  # the files of a folder of rows
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


def check_output(output: Path, holds: str = CHUNKS) -> None:
    """Whether something can be written under this name, a file or a folder; before the work.

    holds: what the names of the files match that a folder of these scripts has.
    """
    if output.name == "dataset_info.json":
        raise SystemExit(f"{output}: is LlamaFactory's list of data sets; name another output")
    is_folder = not re.search(r"\.[A-Za-z]+$", output.name)  # .v2 and .1 end the name of a folder too
    if not is_folder and format_of(output) not in FILES:
        raise SystemExit(f"{output}: unknown file type {output.suffix!r}; known are {', '.join(FILES)} and none")
    if output.is_file() if is_folder else output.is_dir():
        raise SystemExit(f"{output}: cannot be written, as there is a {'file' if is_folder else 'folder'} of this name")
    held = output.iterdir() if output.is_dir() else ()
    if not all(re.fullmatch(holds, file.name) for file in held):
        raise SystemExit(f"{output}: holds more than files of these scripts; name another folder")


def refuse_inputs(inputs, *outputs: Path) -> None:
    """Stop where an input would be written over, whatever names lead to it, alone or with the folder that it is in."""
    for output in filter(os.path.exists, outputs):
        for source in map(Path, filter(os.path.exists, inputs)):
            if output.samefile(source) or output.resolve() in source.resolve().parents:
                raise SystemExit(f"{output}: is the input too; name another output")


# ---------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def written(path: Path):
    """A failure to write, as one line."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error})") from None


@contextlib.contextmanager
def work_folder(beside: Path):
    """A hidden folder beside an output, in which it is written; it is removed in the end.

    A process that is killed leaves it, under a name that no other run has and no reader of data takes.
    """
    names = {"prefix": f".{beside.name}.", "suffix": ".parts", "dir": beside.parent}
    with written(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(**names, ignore_cleanup_errors=True) as folder:
            yield Path(folder)


@contextlib.contextmanager
def whole_file(path: Path):
    """A path to write a file to: it takes the name `path` when the block ends, unless the block fails."""
    with work_folder(path) as folder:
        yield folder / "whole"
        os.replace(folder / "whole", path)


def append(part: Path, number: int, rows: bytes) -> None:
    """Write the rows of a chunk behind those of the chunks before it.

    Args:
        part: a path in a work folder; its name is that of the output, and says the format.
        number: of the chunk.
        rows: see `packed`.
    """
    if is_text(part):
        if part.suffix == ".json":
            rows = (b",\n" if part.exists() else b"[\n") + rows[:-1].replace(b"\n", b",\n")
        with part.open("ab") as file:
            file.write(rows)
    else:
        part.mkdir(exist_ok=True)
        (part / f"{number:09}.parquet").write_bytes(rows)


def finish(part: Path, output: Path) -> None:
    """Give what was appended to a part the name of the output, in place of an earlier one."""
    with written(output):
        if output.suffix == ".json":
            with part.open("ab") as file:
                file.write(b"\n]\n")
        elif format_of(output) == ".parquet":
            part = _joined(sorted(part.iterdir()), part / "whole")
        elif not is_text(output):
            files = sorted(part.glob("[0-9]*.parquet"))
            for number, file in enumerate(files):
                file.rename(part / f"{number:05}-of-{len(files):05}.parquet")
        earlier = part.with_name(f"{part.name}.earlier")
        try:
            if output.is_dir():  # which cannot be replaced at once
                os.replace(output, earlier)
            os.replace(part, output)
        except BaseException:
            if earlier.exists() and not output.exists():
                os.replace(earlier, output)
            raise


def _joined(files: list[Path], whole: Path) -> Path:
    """One Parquet file of several. A column that one of them lacks, or has but nulls in, has the type of the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.unify_schemas([pq.read_schema(file) for file in files], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise SystemExit(f"a column holds values of several types ({error}); write .jsonl instead") from None
    with pq.ParquetWriter(whole, schema, **PARQUET) as writer:
        for file in files:
            table = pa.concat_tables([schema.empty_table(), pq.read_table(file)], promote_options="permissive")
            writer.write_table(table, ROW_GROUP)
    return whole


# ---------------------------------------------------------------- rows


def is_text(output: Path) -> bool:
    """Whether an output holds JSON, and not Parquet."""
    return format_of(output) in (".json", ".jsonl")


def packed(rows: list, output: Path, schema=None) -> bytes:
    """The rows of a chunk as `append` takes them, in the format of an output.

    Args:
        rows: dicts, or where the output is JSON also lines of it.
        schema: of a Parquet file. Without one, scalars keep their types, and lists and objects become JSON, so that no
            key of one reaches another.
    """
    if is_text(output):
        return b"".join(row if isinstance(row, bytes) else json_row(row) for row in rows)
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in schema.names if schema else dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        if not schema:
            values = [_json(its, name in TEXTS).decode() if isinstance(its, (dict, list)) else its for its in values]
        try:
            columns[name] = pa.array(values, schema.field(name).type if schema else None)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise SystemExit(f"column {name} does not fit one Parquet type ({error}); write .jsonl instead") from None
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, ROW_GROUP, **PARQUET)
    return file.getvalue()


def json_row(row: dict) -> bytes:
    """A row as a line of JSON: what is no JSON as text, half characters as escapes, all others as they are."""
    columns = (_json(key) + b": " + _json(value, key in TEXTS) for key, value in row.items())
    return b"{" + b", ".join(columns) + b"}\n"


def _json(value, holds_texts: bool = False) -> bytes:
    if holds_texts or isinstance(value, str):
        try:
            return orjson.dumps(value)
        except orjson.JSONEncodeError:
            pass  # half a character, or what is no JSON
    return json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace")
