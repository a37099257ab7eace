"""What the scripts share: reading trajectories, the server's view of their messages, and writing files whole or not at all.

A trajectory is one row of a `.json` array, a `.jsonl` or a `.parquet` file, or of a Hugging Face data set. Its
`messages` and `tools` are lists, or JSON strings of lists. Rows are counted from 0.
"""

import codecs
import collections
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import string
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import orjson
from tqdm import tqdm

from served_tokens.hub_data_set import local_copy

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "data" / "envscaler_sample.jsonl"
FORMATS = (".json", ".jsonl", ".parquet")
REJECTS, LEFT_OUT_TURNS = ".rejects.jsonl", ".left_out.jsonl"  # what is written beside an output: its name and this
ROLES = ("system", "user", "assistant", "tool")
BLOCK_START, BLOCK_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (  # of Qwen's tokenizers: in a text they are no text but a mark, to the model that is trained and served
    BLOCK_START, BLOCK_END, "<|endoftext|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio", "file")  # content parts
RENDER_SECONDS = 60  # the longest that a chat template may take for one rendering
SHOWN_REASONS, SHOWN_REASON = 5, 1000  # reasons on the screen; characters of a reason that are kept
GZIP = b"\x1f\x8b"
FIRST_CHUNK = 1 << 13  # characters of a JSON array read at first: who wants the first row only need not download more
JSON_CHUNK = 1 << 20  # characters of a JSON array read at a time, or bytes written
BATCH, BATCH_BYTES = 32, 1 << 20  # the most rows, and about the most JSON, that a process works on at a time
PARQUET_BUFFER = 1 << 20  # bytes of a Parquet file read at a time, where a row group may be as long as the file
PARQUET_BATCH = 512  # rows held in memory while a Parquet file is written

tqdm.monitor_interval = 0  # no thread beside the bar: processes are forked


class TrajectoryError(ValueError):
    """What is wrong with one trajectory, and in which message."""


# ---------------------------------------------------------------- the server's view of a trajectory


def served_trajectory(row: dict, control_tokens: tuple = CONTROL_TOKENS) -> tuple[list[dict], list[dict] | None]:
    """The messages and tools of a row as an OpenAI-compatible server hands them to the chat template.

    vLLM and SGLang parse tool-call `arguments` strings into objects and read `content: null` as empty. A list of text
    parts becomes their concatenation; another list or an object that a tool returned, its JSON. Reasoning, whether in
    `reasoning_content`, `reasoning` or inline in `content`, comes out in `reasoning_content`. See README, "What the
    server sees".

    Returns (messages, tools): new dicts, the row is left alone; tools is None where there are none.
    Raises TrajectoryError, also where a text holds one of `control_tokens`.
    """
    messages = decoded_messages(row)
    if not messages:
        raise TrajectoryError("the trajectory has no messages")
    tools = row.get("tools")
    tools = (_served_tools_of_text if isinstance(tools, str) else _served_tools)(tools, control_tokens)
    served = []
    for position, message in enumerate(messages):
        try:
            served.append(_served_message(message))
        except TrajectoryError as error:
            raise TrajectoryError(f"message {position}: {error}") from None
    if control_tokens and _may_hold(served, control_tokens):
        for position, message in enumerate(served):
            _refuse_control_tokens(message, control_tokens, f"message {position}: ")
    if not any(message["role"] == "assistant" for message in served):
        raise TrajectoryError("the trajectory has no assistant message, so there is nothing to train on")
    return served, tools


def decoded_messages(row: dict) -> list:
    """The column `messages` as a list, whether it is one or a JSON string of one; raises TrajectoryError."""
    if "messages" not in row:
        raise TrajectoryError(f"the row has no column messages; it has {', '.join(row) or 'none'}")
    return _decoded(row["messages"], "messages")


def without_reasoning(messages: list[dict]) -> list[dict]:
    """The messages as an agent sends them that does not send reasoning back: the `drop` history."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def with_stand_ins(messages: list[dict], tools: list[dict] | None) -> tuple:
    """The same with plain words in place of the control tokens that ChatML is split at, so that a rendering can be split.

    Returns (messages, tools, reveal): reveal(text) puts the tokens back; it is None where there are none. The words are
    as long as the tokens, occur nowhere else, and cannot overlap one another.
    """
    text = json.dumps([messages, tools], ensure_ascii=False, default=str)
    if BLOCK_START not in text and BLOCK_END not in text:
        return messages, tools, None
    words = {}
    for token, opening in ((BLOCK_START, "Qs"), (BLOCK_END, "Qe")):
        while (word := opening + "".join(random.choices(string.ascii_lowercase, k=len(token) - 2))) in text:
            pass
        words[token] = word

    def hide(text: str) -> str:
        return text.replace(BLOCK_START, words[BLOCK_START]).replace(BLOCK_END, words[BLOCK_END])

    def reveal(text: str) -> str:
        return text.replace(words[BLOCK_START], BLOCK_START).replace(words[BLOCK_END], BLOCK_END)

    return map_texts(messages, hide), map_texts(tools, hide), reveal


def map_texts(value, change):
    """A JSON value with change(text) for each text in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    return value


def _served_tools(tools, control_tokens: tuple) -> list[dict] | None:
    tools = _decoded(tools, "tools") or None
    for position, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise TrajectoryError(f"tool {position} is not an object but {_kind(tool)}")
    _refuse_control_tokens({"tools": tools}, control_tokens)
    return tools


@functools.lru_cache(maxsize=64)  # many trajectories share a tool list
def _served_tools_of_text(tools: str, control_tokens: tuple) -> list[dict] | None:
    return [SharedTool(tool) for tool in _served_tools(tools, control_tokens) or ()] or None


class SharedTool(dict):
    """A tool of many trajectories, with its JSON as `tojson` writes it: most of them are rendered with nothing else."""

    __slots__ = ("_as_json",)

    def __init__(self, tool: dict):
        super().__init__(tool)
        self._as_json = json.dumps(tool, ensure_ascii=False)


def _refuse_control_tokens(message: dict, control_tokens: tuple, where: str = "") -> None:
    values = [value for value in message.values() if value]
    text = "\n".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str) for value in values)
    for token in control_tokens:
        if token in text:
            raise TrajectoryError(
                f"{where}the text holds the control token {token}, which could forge a message; take it out of the row, "
                "or keep it by --allow-control-tokens of step 1"
            )


def _may_hold(messages: list[dict], control_tokens: tuple) -> bool:
    """Whether one of the tokens may be in a text: one search for how they begin, instead of one for each in each message."""
    try:
        text = orjson.dumps(messages, default=str)
    except orjson.JSONEncodeError:  # it knows less than json
        return True
    return any([opening in text for opening in _openings(control_tokens)])


@functools.cache
def _openings(control_tokens: tuple) -> list[bytes]:
    return [*{orjson.dumps(token[:2])[1:-1] for token in control_tokens}]


def _served_message(message: dict) -> dict:
    if not isinstance(message, dict):
        raise TrajectoryError(f"is not an object but {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise TrajectoryError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    served = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content", "tool_calls")}
    served["content"] = _text(message.get("content"), role)
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(reasoning, str):
            raise TrajectoryError(f"reasoning is not a string but {_kind(reasoning)}")
        # Beside reasoning in its own field, which templates read first, a think tag further on is text of the answer.
        reads_inline = not reasoning or served["content"].lstrip().startswith("<think>")
        inline, answer = _inline_reasoning(served["content"]) if reads_inline else (None, "")
        if reasoning and inline:
            if inline.strip() != reasoning.strip():
                raise TrajectoryError("has reasoning both in its own field and inline in content, and they differ")
            served["content"] = answer
        elif not reasoning and inline is not None:
            reasoning, served["content"] = inline, answer
        if reasoning:
            served["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if not isinstance(calls, (list, type(None))):
            raise TrajectoryError(f"tool_calls is not a list but {_kind(calls)}")
        if calls:
            served["tool_calls"] = [_served_call(call) for call in calls]
    return served


def _inline_reasoning(content: str) -> tuple[str | None, str]:
    """Split `<think>…</think>answer` into (reasoning, answer); (None, content) without one.

    The edges are cut as in Qwen3's template. That would lose what stands before the first `<think>` or between two
    `</think>`: the first is an error here, the second stays in the answer.
    """
    before, close, answer = content.partition("</think>")
    if not close:
        return None, content
    lead, opened, reasoning = before.partition("<think>")
    if opened and lead.strip():
        raise TrajectoryError("has text before an inline <think> block, which the chat template would lose")
    return (reasoning if opened else before).strip("\n"), answer.lstrip("\n")


def _served_call(call: dict) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TrajectoryError("a tool call has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"tool call arguments are not valid JSON ({error})") from None
    if not arguments and not isinstance(arguments, (bool, int, float)):  # missing, null, "" and [] are no arguments
        arguments = {}
    if not isinstance(arguments, dict):
        raise TrajectoryError(f"tool call arguments are not a JSON object but {_kind(arguments)}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _text(content, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") in MEDIA:
            raise TrajectoryError(f"content is not text but a list with a part of type {part['type']}; leave it out of the row")
    if is_text_parts(content):
        return "".join(part["text"] for part in content)
    if role == "tool" and isinstance(content, (dict, list)):  # what a client sends; a template would render nothing
        return json.dumps(content, ensure_ascii=False, default=str)
    raise TrajectoryError(f"content is not text but {_kind(content)}")


def is_text_parts(content) -> bool:
    """Whether the content of a message is a list of text parts."""
    return isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)


def _decoded(value, column: str) -> list:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"column {column} is not valid JSON ({error})") from None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise TrajectoryError(f"column {column} is not a list but {_kind(value)}")
    return value


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


# ---------------------------------------------------------------- reading


class Place(NamedTuple):
    """Which row of which file, counted from 0."""

    source: str
    row: int


def local_file(source: str) -> Path:
    """The data file at a path, or at an address in a Hugging Face data set (see `hub_data_set`)."""
    path = local_copy(source) or Path(source)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise SystemExit(f"{source}: unknown file type {path.suffix!r}; known are {', '.join(FORMATS)}")
        try:
            with path.open("rb") as file:
                packed = file.read(2) == GZIP
        except OSError as error:
            raise SystemExit(f"{source}: cannot be read ({error})") from None
        if packed:
            raise SystemExit(f"{source}: is compressed by gzip; unpack it first")
        return path
    if path.is_dir():
        raise SystemExit(f"{source}: is a folder; give one of its {', '.join(FORMATS)} files")
    raise SystemExit(f"{source}: no such file; give a {', '.join(FORMATS)} file or a Hugging Face data set id")


def read_rows(source: str, desc: str | None = None):
    """Yield (index, row, None) for each row of a file, or (index, text, error) where a row cannot be read."""
    for place, raw in read_raw([source], desc):
        raw = raw.read() if isinstance(raw, Line) else raw
        try:
            yield place.row, parse_row(raw), None
        except TrajectoryError as error:
            yield place.row, shown_raw(raw), error


def read_raw(sources: list[str], desc: str | None = None):
    """Yield (place, raw) for each row of the files: where its line is, or a row that is parsed already."""
    files = {source: local_file(source) for source in sources}
    try:
        size = sum(path.stat().st_size for path in files.values())
        with tqdm(total=size, desc=desc, unit="B", unit_scale=True, disable=desc is None) as bar:
            for source, path in files.items():
                for index, raw in enumerate(_read_file(path, bar)):
                    yield Place(source, index), raw
    except OSError as error:
        raise SystemExit(f"{source}: cannot be read ({error})") from None


def load_text(raw: bytes):
    """json.loads, several times faster, where only texts and small integers are wanted: others orjson may read differently."""
    try:
        return orjson.loads(raw)
    except ValueError:
        return json.loads(raw)


class Line(NamedTuple):
    """Where a line of a file is. Whoever needs it reads it, so that it need not be sent to another process."""

    path: str
    inode: int
    start: int
    length: int

    def read(self) -> bytes:
        try:
            return read_at(_opened(self.path, self.inode), self.length, self.start)
        except OSError as error:
            raise SystemExit(f"{self.path}: cannot be read ({error})") from None


@functools.cache
def _opened(path: str, inode: int) -> int:
    file = os.open(path, os.O_RDONLY)
    if os.fstat(file).st_ino != inode:
        raise SystemExit(f"{path}: has been replaced while it was read; run this again")
    return file


def read_at(file: int, length: int, at: int) -> bytes:
    """Bytes of a file, of a descriptor that processes share; fewer at its end."""
    parts = []
    while length and (part := os.pread(file, length, at)):  # it reads 2 GB at a time, at most
        parts.append(part)
        length, at = length - len(part), at + len(part)
    return b"".join(parts)


def write_at(file: int, values, at: int) -> None:
    """Write bytes, or an array, to a file, of a descriptor that processes share."""
    left = memoryview(values).cast("B")
    while left:
        written = os.pwrite(file, left, at)
        left, at = left[written:], at + written


def _read_file(path: Path, bar):
    done = 0
    with path.open("rb") as file:
        inode = os.fstat(file.fileno()).st_ino
        for row in READERS[path.suffix](file, path):
            at = max(done, file.tell())  # Parquet is read in leaps
            bar.update(at - done)
            done = at
            yield Line(str(path), inode, at - len(row), len(row)) if isinstance(row, bytes) else row
    bar.update(path.stat().st_size - done)


def parse_row(raw, loads=json.loads) -> dict:
    """A row of a reader; raises TrajectoryError."""
    if isinstance(raw, bytes):
        try:
            raw = loads(raw)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"the row is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise TrajectoryError(f"the row is not an object but {_kind(raw)}")
    return raw


def shown_raw(raw):
    """A row of a reader as a file of rejects keeps it: parsed where it can be, else its text."""
    try:
        return json.loads(raw) if isinstance(raw, bytes) else raw
    except (ValueError, RecursionError):
        return raw.decode("utf-8", "replace")


def _read_jsonl(file, path: Path | str):
    for number, line in enumerate(file):
        line = line if number else line.removeprefix(codecs.BOM_UTF8)
        if len(line) < 100 and line.strip() == b"[":
            raise SystemExit(f"{path}: holds a JSON array over several lines; name it .json")
        if not line.isspace():
            yield line


def _read_json(file, path: Path | str):
    """The rows of an array, read as a stream: the text in memory grows with the longest row, not with the file."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"\s*").match

    def broken(what: str) -> SystemExit:
        return SystemExit(f"{path}: {what}; a .json file holds one array of rows, a .jsonl file a row per line")

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
    except (UnicodeDecodeError, RecursionError) as error:
        raise broken(f"not valid JSON ({error})") from None


def _read_parquet(file, path: Path | str):
    with open_parquet(file, path) as file:
        for column, struct in (("messages", r"\barguments: struct<"), ("tools", "struct<")):
            index = file.schema_arrow.get_field_index(column)
            if index >= 0 and re.search(struct, str(file.schema_arrow.field(index).type)):
                raise SystemExit(
                    f"{path}: column {column} holds objects as Arrow structs, in which every object has the keys of all "
                    "others; store the column as JSON strings"
                )
        batches = file.iter_batches(batch_size=BATCH, use_threads=False)  # threads would read ahead, without a bound
        while rows := _parquet_rows(path, batches):
            yield from rows


def _parquet_rows(path: Path | str, batches) -> list[dict]:
    """The rows of the next batch that has some; none at the end."""
    try:
        for batch in batches:
            if rows := batch.to_pylist():
                return rows
        return []
    except Exception as error:  # pyarrow raises many kinds; each means that the file is damaged
        raise SystemExit(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def open_parquet(file, path: Path | str):
    """The pyarrow.parquet.ParquetFile in a file or at a path; errors name the path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, buffer_size=PARQUET_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SystemExit(f"{path}: not a Parquet file that can be read ({error})") from None


def first_columns(file, path: Path | str) -> list[str]:
    """The columns of the first row of a file that is open; raises SystemExit or TrajectoryError where it has none."""
    if Path(path).suffix == ".parquet":
        with open_parquet(file, path) as file:
            return file.schema_arrow.names
    for raw in READERS[Path(path).suffix](file, path):
        return [*parse_row(raw)]
    raise SystemExit(f"{path}: has no row")


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def written(path: Path):
    """A failure to write, as one line."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error})") from None


@contextlib.contextmanager
def whole_file(path: Path):
    """A path to write a file or a folder to: it takes the name `path` when the block ends, and is removed if the block fails.

    A process that is killed leaves it, under a hidden name that no other run has and no reader of data takes.
    """
    own = f"{os.getpid()}-{secrets.token_hex(4)}"  # machines that share a folder may share process numbers
    part, earlier = (path.with_name(f".{path.name}.{own}.{what}") for what in ("part", "earlier"))
    try:
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            if part.is_dir() and path.is_dir():  # which cannot be replaced at once
                os.replace(path, earlier)
            try:
                os.replace(part, path)
            except OSError:
                if earlier.exists():
                    os.replace(earlier, path)
                raise
    finally:
        for left in (part, earlier):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def working_file(path: Path):
    """A file without a name in the folder of path, for what is too much for memory; it ends with the process."""
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            yield file


@contextlib.contextmanager
def row_writer(path: Path, schema=None):
    """Yield write(row) for a `.json`, `.jsonl` or `.parquet` file that appears whole, or not at all.

    A row is a dict; for the JSON formats it may be its JSON.

    `schema` (pyarrow) types a Parquet file. Without it the first rows do, by a rule that cannot mix the keys of nested
    objects: see `_inferred_schema`.
    """
    with whole_file(path) as part:
        if path.suffix == ".parquet":
            with _parquet_writer(part, schema) as write:
                yield write
            return
        opening, between, closing = (b"[\n", b",\n", b"\n]\n") if path.suffix == ".json" else (b"", b"\n", b"\n")
        with part.open("wb", JSON_CHUNK) as file:
            separator = opening

            def write(row) -> None:
                nonlocal separator
                file.write(separator)
                file.write(row if isinstance(row, bytes) else json_row(row))
                separator = between

            yield write
            file.write(closing if separator == between else opening + closing.strip(b"\n"))


def json_row(row: dict, texts=()) -> bytes:
    """A row as JSON. The columns `texts` hold nothing but texts, small integers and null, which orjson writes faster."""
    columns = (
        orjson.dumps(key) + b": " + (orjson.dumps(value) if key in texts or type(value) is str else json_text(value).encode())
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
def _parquet_writer(part: Path, schema):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, columns, writer = [], {}, None

    def flush() -> None:
        nonlocal schema, writer
        schema = schema or _inferred_schema(rows)
        writer = writer or pq.ParquetWriter(part, schema, compression="zstd")
        for field in schema:
            values = [_stored(row.get(field.name), field.type) for row in rows]
            try:
                columns[field.name] = pa.array(values, field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise SystemExit(f"column {field.name} does not fit {field.type} ({error}); write .jsonl instead") from None
        writer.write_table(pa.table(columns, schema=schema))
        rows.clear()

    def write(row: dict) -> None:
        if schema and not row.keys() <= set(schema.names):
            raise SystemExit(f"column {min(row.keys() - set(schema.names))} is in no earlier row; write .jsonl instead")
        rows.append(row)
        if len(rows) == PARQUET_BATCH:
            flush()

    try:
        yield write
        if rows or writer is None:
            flush()
    finally:
        if writer:
            writer.close()


def _inferred_schema(rows: list[dict]):
    """Scalars keep their type; lists and objects become JSON strings, so that no key of one row reaches another."""
    import pyarrow as pa

    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    fields = []
    for column in dict.fromkeys(key for row in rows for key in row):
        kinds = {type(row[column]) for row in rows if row.get(column) is not None}
        scalars = [types[kind] for kind in kinds if kind in types]
        if scalars and len(kinds) > 1:
            raise SystemExit(f"column {column} holds values of several types, which Parquet cannot; write .jsonl instead")
        fields.append((column, scalars[0] if scalars else pa.string()))
    return pa.schema(fields)


def _stored(value, kind):
    import pyarrow as pa

    return json_text(value) if pa.types.is_string(kind) and isinstance(value, (dict, list)) else value


# ---------------------------------------------------------------- around the pure functions


@contextlib.contextmanager
def time_limit():
    """Raise TrajectoryError where the block takes longer than RENDER_SECONDS; only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handle_alarms()
    signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@functools.cache  # once in a process: to set a handler takes longer than to set an alarm
def _handle_alarms() -> None:
    def stop(number, frame):
        raise TrajectoryError(f"it takes longer than {RENDER_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)


def _batches(items):
    """Lists of (place, raw): of BATCH rows, fewer where they are long."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += item[1].length if isinstance(item[1], Line) else 1  # how long a parsed row is, is not known
        if len(batch) == BATCH or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def convert_batch(function, loads, batch: list) -> list[tuple]:
    """[(place, function(row, place), None)], or (place, row, reason) where it finds an error."""
    results = []
    for place, raw in batch:
        raw = raw.read() if isinstance(raw, Line) else raw
        try:
            results.append((place, function(parse_row(raw, loads), place), None))
        except TrajectoryError as error:
            results.append((place, shown_raw(raw), str(error)))
        except RecursionError:
            text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else None
            results.append((place, text, "the row is nested too deeply"))
    return results


def _convert_batch_into(function, loads, batch_and_file: tuple) -> int:
    """`convert_batch`, with its results pickled into a file; their length."""
    batch, file = batch_and_file
    results = convert_batch(function, loads, batch)
    try:
        pickled = pickle.dumps(results, pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        pickled = pickle.dumps([*map(_picklable, results)], pickle.HIGHEST_PROTOCOL)
    write_at(file, pickled, 0)
    return len(pickled)


def _picklable(result: tuple) -> tuple:
    try:
        pickle.dumps([[result]], pickle.HIGHEST_PROTOCOL)
        return result
    except RecursionError:
        place, _, reason = result
        return place, None, reason or "the row is nested too deeply"


def in_order(function, items, num_proc: int, here: int = 1):
    """map(function, items) over processes, with no more items under way than keep them busy, which is `under_way(num_proc)`.

    The first one is done `here`: a small input needs no processes, and they inherit what the function has loaded. Results
    must be small: a process that is killed while it sends one that the pipe cannot hold would leave its reader waiting.
    """
    yield from map(function, itertools.islice(items, here if num_proc > 1 else None))
    first = next(items, None)
    if first is None:
        return
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), initializer=_live_as_the_parent_wants)
    try:
        futures = collections.deque()
        with _signals_held():  # this forks, and an interrupt would leave half of the processes, or be lost
            futures.append(pool.submit(function, first))
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) == under_way(num_proc):
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool:
        raise SystemExit("a worker process was killed (out of memory?); try a smaller --num-proc") from None
    finally:
        with _signals_held():  # a second interrupt would leave the pool half shut
            pool.shutdown(cancel_futures=True)


def under_way(num_proc: int) -> int:
    return 2 * num_proc + 1


@contextlib.contextmanager
def _signals_held():
    """Python raises an interrupt where it is; a mask would not do, as any thread of a library may receive the signal."""
    held = []
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def _live_as_the_parent_wants() -> None:
    """Leave signals to it, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_the_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


class Rejects:
    """Rows set aside: counted, and written with their reason to `<output>.rejects.jsonl` (none, no file).

    A context: where it fails before `save`, the file of an earlier run stays. `rows_in` and `set_aside` are counts of rows.
    """

    def __init__(self, sources: list[str], output: Path, strict: bool):
        self.output, self.path = output, output.with_name(output.name + REJECTS)
        for source in sources:
            refuse_input(source, output, self.path)
        self.sources, self.strict, self.rows_in, self.set_aside = sources, strict, 0, 0
        self.reasons, self.file, self.stack = {}, None, contextlib.ExitStack()  # reasons: [rows, the first, its reason] by kind

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def convert(self, function, desc: str, num_proc: int, loads=json.loads):
        """Yield function(row, place) for each row of the files, in order; a row in which it finds an error is set aside.

        The function and its results are pickled; the results come in files, of which each batch under way has its own.
        """
        files = [self.stack.enter_context(working_file(self.output)).fileno() for _ in range(under_way(num_proc))]
        rows = read_raw(self.sources, desc)
        batches = zip(_batches(rows), itertools.cycle(files))
        lengths = in_order(functools.partial(_convert_batch_into, function, loads), batches, num_proc)
        for stopped in (rows, lengths):  # the processes and the progress bar end before an error is shown
            self.stack.callback(stopped.close)
        for length, file in zip(lengths, itertools.cycle(files)):
            for place, result, reason in pickle.loads(read_at(file, length, 0)):
                self.rows_in += 1
                if reason is None:
                    yield result
                elif self.strict:
                    raise SystemExit(f"{place.source}: row {place.row}: {reason}; fix the row, or drop --strict to set it aside")
                else:
                    self._set_aside(place, reason, result)

    def _set_aside(self, place: Place, reason: str, trajectory) -> None:
        reason = reason[:SHOWN_REASON]
        row = {**place._asdict(), "reason": reason}
        try:  # ASCII, so that rows with lone surrogates can be written too
            line = json.dumps({**row, "trajectory": trajectory}, default=str)
        except (RecursionError, TypeError, ValueError):
            line = json.dumps({**row, "trajectory": None})
        with written(self.path):
            if self.file is None:
                part = self.stack.enter_context(whole_file(self.path))
                self.file = self.stack.enter_context(part.open("w", encoding="ascii"))
            self.file.write(line + "\n")
        self.set_aside += 1
        self.reasons.setdefault(re.sub(r"\d+", "#", reason), [0, place, reason])[0] += 1

    def save(self) -> None:
        """Give the file its name; say where it is and what the reasons are."""
        if self.file is None:
            with written(self.path):
                self.path.unlink(missing_ok=True)  # that of an earlier run
            return
        self.stack.close()
        print(f"{self.set_aside} rows set aside with their reasons: {self.path}", file=sys.stderr)
        for number, place, reason in sorted(self.reasons.values(), key=lambda kind: -kind[0])[:SHOWN_REASONS]:
            file = f" of {place.source}" * (len(self.sources) > 1)
            print(f"  {number} like row {place.row}{file}: {reason}", file=sys.stderr)


def refuse_input(source: str, *outputs: Path) -> None:
    """Stop where the input would be written over, whatever names lead to it."""
    for output in outputs:
        if output.exists() and Path(source).exists() and output.samefile(source):
            raise SystemExit(f"{output}: is the input too; name another output")


def exit_on_sigterm() -> None:
    """End by SIGTERM as by Ctrl-C: what is half written is removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def shown(path: Path | str) -> str:
    """A path as a person would type it from here."""
    with contextlib.suppress(ValueError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)


def still_there(path: Path) -> str:
    """What to add where a file is not written."""
    return "; the one of an earlier run is still there" if path.exists() else ""


def check_output(output: Path, folder: bool = False) -> None:
    """Whether something can be written under this name, as a file or as a folder of Parquet files; before the work."""
    if folder and output.suffix in FORMATS:
        raise SystemExit(f"{output}: names a file; --num-shards writes a folder")
    if folder and output.is_dir() and any(path.suffix != ".parquet" for path in output.iterdir()):
        raise SystemExit(f"{output}: holds more than Parquet files; name another folder")
    if not folder and output.suffix not in FORMATS:
        raise SystemExit(f"{output}: unknown file type {output.suffix!r}; known are {', '.join(FORMATS)}")


def positive_count(text: str) -> int:
    """A number above zero, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)
