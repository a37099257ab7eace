"""Writing: files and folders that appear whole or not at all, in the format that their name says."""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

from served_tokens.marks import many

ROW_GROUP = 512  # rows
# Most text of a sample is that of the samples before it too: as a dictionary, a row group holds each text once.
PARQUET = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 25}
TEXT = (".json", ".jsonl")
FILES = (*TEXT, ".parquet", "")  # the last: a folder of Parquet files, whose name has no extension
PARTS = r"\d[\d-]*(of-\d+)?\.parquet"  # the names in such a folder


def shown(path: Path | str) -> str:
    """A path as a person would type it from here."""
    with contextlib.suppress(ValueError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)


def accounted(unit: str, total: int, kept: int, how: str, others: dict[str, int]) -> str:
    """Where all rows, or all turns, went; others: {where else: how many}, the last of which is said even if it is 0."""
    rest = "".join(f" + {others[where]} {where}" for where in others if others[where] or where == [*others][-1])
    return f"{many(total, unit)} in = {many(kept, unit)} {how}{rest}"


def ending_of(output: Path) -> str:
    """Its extension, or "" of a folder; .v2 and .1 end the name of a folder too."""
    return output.suffix if re.search(r"\.[A-Za-z]+$", output.name) else ""


def check_output(output: Path, formats: tuple[str, ...] = FILES, holds: str = PARTS) -> None:
    """Whether something can be written under this name, in one of the formats; before the work.

    holds: what all names in a folder of these scripts match.
    """
    if output.name == "dataset_info.json":
        raise SystemExit(f"{output}: is LlamaFactory's list of data sets; name another output")
    ending = ending_of(output)
    if ending not in formats:
        known = ", ".join(its or "none" for its in formats)
        raise SystemExit(f"{output}: unknown file type {ending!r}; known are {known}")
    if output.is_dir() if ending else output.is_file():
        raise SystemExit(f"{output}: cannot be written, as there is a {'folder' if ending else 'file'} of this name")
    if output.is_dir() and not all(re.fullmatch(holds, its.name) for its in output.iterdir()):
        raise SystemExit(f"{output}: holds more than Parquet files of these scripts; name another folder")


def refuse_inputs(inputs, *outputs: Path) -> None:
    """Stop where an input would be written over, whatever names lead to it, alone or with the folder that it is in."""
    for output in filter(os.path.exists, outputs):
        for source in map(Path, filter(os.path.exists, inputs)):
            if output.samefile(source) or output.resolve() in source.resolve().parents:
                raise SystemExit(f"{output}: is the input too; name another output")


# ---------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def work_folder(beside: Path):
    """A hidden folder beside an output, in which it is written; it is removed in the end.

    A process that is killed leaves it, under a name that no other run has and no reader of data takes. What cannot be
    written meanwhile ends the run with one line.
    """
    names = {"prefix": f".{beside.name}.", "suffix": ".parts", "dir": beside.parent}
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(**names, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        why = error.strerror or error  # less the name of a file that nobody asked for
        raise SystemExit(f"{beside}: cannot be written ({why}); name another output") from None


@contextlib.contextmanager
def whole_file(path: Path):
    """A path to write a file to: it takes the name `path` when the block ends, unless the block fails."""
    with work_folder(path) as folder:
        yield folder / "whole"
        os.replace(folder / "whole", path)


def finish(parts: Path, output: Path) -> None:
    """Make an output of its parts, in place of an earlier one; parts: a folder of files of `packed` rows, by name."""
    files, ending, whole = sorted(parts.iterdir()), ending_of(output), parts / "whole"
    if ending == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetWriter(whole, pq.read_schema(files[0]), **PARQUET) as writer:
            for file in files:
                writer.write_table(pq.read_table(file), ROW_GROUP)
    elif ending:
        with whole.open("wb") as joined:
            for file in files:
                rows = file.read_bytes()
                if ending == ".json":
                    rows = (b",\n" if joined.tell() else b"[\n") + rows[:-1].replace(b"\n", b",\n")
                joined.write(rows)
                file.unlink()
            joined.write(b"\n]\n" if ending == ".json" else b"")
    else:
        whole = parts
    if output.is_dir():  # which cannot be replaced at once
        os.replace(output, parts.with_name(f"{parts.name}.earlier"))
    os.replace(whole, output)


# ---------------------------------------------------------------- rows


def packed(rows: list, output: Path, schema) -> bytes:
    """Rows as a part of an output: dicts, of the schema where it is Parquet, or also lines where it is JSON."""
    if ending_of(output) in TEXT:
        return b"".join(row if isinstance(row, bytes) else json_row(row) for row in rows)
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, ROW_GROUP, **PARQUET)
    return file.getvalue()


def json_row(row: dict) -> bytes:
    """A row as a line of JSON: what is no JSON as text, half characters as escapes, all others as they are."""
    return json.dumps(row, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n"
