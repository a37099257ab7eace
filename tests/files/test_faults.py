"""Hostile files and faults.

What cannot be read or written is one line of error, and an output is whole or not there.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HANGS, ROOT, assistant, read_jsonl, user, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from served_tokens.files import read as reading
from served_tokens.files.read import parse_row, read_chunks, read_rows

STEP1, STEP2 = "step1_apply_tool_template.py", "step2_to_alpaca_mask_history.py"
ROW = {"messages": [user("q é"), assistant("a", "r")]}
LINE = json.dumps(ROW, ensure_ascii=False).encode()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_in(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- reading


DAMAGED = [
    LINE.replace("é".encode(), b"\xe9"),
    LINE.replace(b"q", b"\x00"),
    b"\x00\x00",
    b"\xff\xfd",
    *(b"3", b"null", b"[]", b'"x"'),
    b'{"messages": ' + b"[" * 100_000,
    LINE[:-9],  # cut in the middle of a row
]


def test_damaged_line_is_set_aside_and_the_rest_goes_on(run, tmp_path):
    lines = b"\xef\xbb\xbf" + LINE + b"\r", b"\r", *DAMAGED, LINE
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert "12 rows in = 2 rows out + 10 set aside" in run(STEP1, "x.jsonl", "y.jsonl").stdout
    assert [row["messages"][0]["content"] for row in read_jsonl(tmp_path / "y.jsonl")] == ["q é", "q é"]
    assert [row["row"] for row in read_jsonl(tmp_path / "y.jsonl.rejects.jsonl")] == [*range(1, 11)]
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[\r\n" + LINE + b",\r\n3,\r\n" + LINE + b"\r\n]\r\n")
    assert "3 rows in = 2 rows out + 1 set aside" in run(STEP1, "x.json", "y.jsonl").stdout


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("x.jsonl", b"", "x.jsonl: no trajectory is left"),
        ("x.parquet", b"", "x.parquet: not a Parquet file"),
        ("x.jsonl.gz", LINE, "x.jsonl.gz: cannot be read"),
        ("x.jsonl.gz", gzip.compress(LINE)[:-9], "x.jsonl.gz: cannot be read"),
        ("x.jsonl.gz", gzip.compress(LINE)[:10] + b"\xff" * 9, "x.jsonl.gz: cannot be read"),
        ("x.json.gz", gzip.compress(LINE), "x.json.gz: unknown file type '.gz'"),
        ("x.json", b'[3, null, [], "x"]', "1 row: the row is not an object but a number"),
    ],
)
def test_file_without_a_row_to_use_is_a_clear_error(run, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert reason in run(STEP1, name, "y.jsonl", expect=1).stderr
    assert "y.jsonl" not in names(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[{}", b"[{},", b'[{"a": 1}, {"a"', b"[{} {}]", b"[{}] x", b"[{}][{}]", b"[,]", b"[{\x00}]"),
        *(gzip.compress(LINE), b"[" * 100_000, b'[{"id": ' + b"9" * 5000 + b"}]", b"[" + DAMAGED[0] + b"]"),
    ],
)
def test_array_that_is_cut_or_broken_is_a_clear_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(SystemExit, match=r"x.json: no array of rows"):
        list(read_rows(str(tmp_path / "x.json")))


@given(
    rows=st.lists(
        st.recursive(
            st.none() | st.text(max_size=3) | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        ),
        max_size=4,
    ),
    indent=st.sampled_from([None, 4]),
    chunk=st.integers(1, 40),
)
def test_array_is_read_as_a_stream_whatever_the_size_of_the_pieces(rows, indent, chunk):
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(reading, FIRST_READ=chunk, JSON_READ=chunk):
        path = Path(folder) / "x.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8", newline="")
        assert [row for chunk in read_chunks([str(path)]) for _, row in chunk] == rows


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet"])
def test_chunks_hold_each_row_of_a_file_once_under_its_number(tmp_path, name):
    rows = [{"id": number} for number in range(100)]
    lines = b"\xef\xbb\xbf" + b"\n \n".join(json.dumps(row).encode() for row in rows)
    (tmp_path / "x.jsonl").write_bytes(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=33)
    chunks = [*read_chunks([str(tmp_path / name)], rows=7)]
    assert {len(chunk) for chunk in chunks[:-1]} == {7}
    assert [(place.row, parse_row(raw)) for chunk in chunks for place, raw in chunk] == [*enumerate(rows)]


def test_folder_with_a_link_to_nothing_is_an_error_and_one_to_a_folder_is_followed(run, tmp_path):
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", [ROW])
    write_jsonl(tmp_path / "data" / "a.jsonl", [ROW])
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    assert "2 rows in = 2 rows out" in run(STEP1, "data", "y.jsonl").stdout
    (tmp_path / "data" / "c.jsonl").symlink_to("none")
    assert "data/c.jsonl: no such file" in run(STEP1, "data", "y.jsonl", expect=1).stderr


# ---------------------------------------------------------------- writing


def test_output_goes_into_a_folder_that_is_made_and_over_an_earlier_file(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    for _ in range(2):
        run(STEP1, "x.jsonl", "new/folder/y.jsonl")
        run(STEP2, "new/folder/y.jsonl", "other/new/out.parquet", "--dataset-dir", ".")
    assert names(tmp_path / "new/folder") == ["y.jsonl"]
    assert names(tmp_path / "other/new") == ["out.parquet"]


def many(rows: int = 400) -> list[dict]:
    return [{"id": number, "messages": [user(os.urandom(400).hex()), assistant("a", "r")]} for number in range(rows)]


@pytest.mark.parametrize(
    "script, output, disk",
    [(STEP1, "y.jsonl", 40_000), (STEP2, "out", 10_000), (STEP2, "out.parquet", 90_000), (STEP2, "out.jsonl", 300_000)],
)
def test_full_disk_is_a_clear_error_and_leaves_the_earlier_output_whole(run, process, tmp_path, script, output, disk):
    write_jsonl(tmp_path / "x.jsonl", [*many(), *({"bad": row} for row in many())])
    if script == STEP2:
        run(STEP1, "x.jsonl", "plain.jsonl")
        (tmp_path / "plain.jsonl").replace(tmp_path / "x.jsonl")
        (tmp_path / "plain.jsonl.rejects.jsonl").unlink()
    if "." in output:
        (tmp_path / output).write_text("earlier")
    before = files_in(tmp_path)
    options = ["--dataset-dir", "."] if script == STEP2 else []
    errors = process(script, "x.jsonl", output, *options, expect=1, disk=disk, PYTHONDONTWRITEBYTECODE="1").stderr
    assert f"{output}: cannot be written" in errors and "Traceback" not in errors
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "script, arguments",
    [
        (STEP1, ["x.jsonl"]),
        (STEP1, ["link.jsonl"]),
        (STEP1, ["z.jsonl"]),  # beside which rejects would be written
        (STEP2, ["link.jsonl"]),
        (STEP2, ["v.jsonl", "--val-ratio", "0.3"]),  # whose validation set it would be
    ],
)
def test_input_is_not_written_over_under_any_name(run, tmp_path, script, arguments):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    for name in ("z.jsonl.rejects.jsonl", "v_val.jsonl"):
        (tmp_path / name).hardlink_to(tmp_path / "x.jsonl")
    assert "is the input too; name another output" in run(script, "x.jsonl", *arguments, expect=1).stderr
    assert read_jsonl(tmp_path / "x.jsonl") == [ROW]


@pytest.mark.parametrize(
    "source, output, reason",
    [
        ("data/y.jsonl", "data", "data: is the input too|data: holds more than"),
        ("data/y.jsonl", ".", ".: cannot be written|.: holds more than|.: is no name"),
        ("data/y.jsonl", "mine", "mine: holds more than Parquet files of these scripts"),
        ("data", "data", "data: is the input too|data: holds more than"),
    ],
)
def test_folder_that_holds_the_input_or_other_files_is_not_replaced(run, tmp_path, source, output, reason):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.parquet").write_bytes(b"x")
    run(STEP1, "x.jsonl", "data/y.jsonl")
    assert re.search(reason, run(STEP2, source, output, expect=1).stderr)
    assert names(tmp_path) == ["data", "mine", "x.jsonl"] and names(tmp_path / "mine") == ["mine.parquet"]


def start(folder, *arguments, script: str = STEP1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # a shell lets what it starts in the background ignore Ctrl-C, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_two_runs_at_once_into_one_output_leave_one_of_them_whole(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": name, **ROW}] * 3000)
    for process in [start(tmp_path, f"{name}.jsonl", "y.jsonl", "--num-proc", "1") for name in "ab"]:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
    rows = read_jsonl(tmp_path / "y.jsonl")
    assert len(rows) == 3000 and len({row["id"] for row in rows}) == 1
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "y.jsonl"]


def stopped(folder, number: int) -> subprocess.Popen:
    """A run of step 1 over an earlier output and its rejects that gets a signal in the middle of writing."""
    row = {"messages": [user("q" * 2000), assistant("a", "r")]}
    write_jsonl(folder / "x.jsonl", [{"bad": 1}] * 40 + [row] * 10_000)  # several chunks
    for name in ("y.jsonl", "y.jsonl.rejects.jsonl"):
        (folder / name).write_text("earlier")
    process = start(folder, "x.jsonl", "y.jsonl", "--num-proc", "2")
    while not list(folder.glob(".y.jsonl.*.parts/y.jsonl/*")):
        assert process.poll() is None
        time.sleep(0.01)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=HANGS)  # ends when each process has closed its end of the pipe
    assert [(folder / name).read_text() for name in ("y.jsonl", "y.jsonl.rejects.jsonl")] == ["earlier"] * 2
    return process


def test_kill_in_mid_write_leaves_the_earlier_output_and_nothing_that_looks_like_data(run, tmp_path):
    assert stopped(tmp_path, signal.SIGKILL).returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name not in ("x.jsonl", "y.jsonl", "y.jsonl.rejects.jsonl")]
    assert left and all(path.name.startswith(".") and path.suffix == ".parts" for path in left)
    run(STEP1, "x.jsonl", "y.jsonl")  # and they are in nobody's way
    assert len(read_jsonl(tmp_path / "y.jsonl")) == 10_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_asks_for_an_end_leaves_nothing_behind(tmp_path, number):
    assert stopped(tmp_path, number).returncode == 128 + number
    assert names(tmp_path) == ["x.jsonl", "y.jsonl", "y.jsonl.rejects.jsonl"]


def test_folder_of_samples_takes_the_place_of_an_earlier_one(run, tmp_path):
    for number in (40, 1):
        write_jsonl(tmp_path / "x.jsonl", [ROW] * number)
        run(STEP1, "x.jsonl", "y.jsonl")
        said = run(STEP2, "y.jsonl", "out", "--dataset-dir", ".").stdout
    assert "out, in place of an earlier one" in said and names(tmp_path / "out") == ["000000.parquet"]


# ---------------------------------------------------------------- processes

LONG = {"messages": [user("q" * 20_000), assistant("a", "r")]}


@pytest.mark.parametrize(
    "script, output", [(STEP1, "y.jsonl"), (STEP1, "y.json"), (STEP2, "y.jsonl"), (STEP2, "y.parquet"), (STEP2, "y")]
)
def test_many_processes_write_what_one_writes(run, process, tmp_path, script, output):
    options = ("--dataset-dir", ".") if script == STEP2 else ()
    write_jsonl(tmp_path / "x.jsonl", [{**LONG, "id": number} for number in range(300)])  # several chunks
    if script == STEP2:
        run(STEP1, "x.jsonl", "plain.jsonl")
        (tmp_path / "plain.jsonl").replace(tmp_path / "x.jsonl")
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"served": 1}\nbad\n')
    run(script, "x.jsonl", f"1/{output}", *options)
    process(script, "x.jsonl", f"3/{output}", *options, "--num-proc", 3)
    written = files_in(tmp_path / "1")
    assert written == files_in(tmp_path / "3")
    rejects = written[f"{output}.rejects.jsonl"].splitlines()
    assert [json.loads(line)["row"] for line in rejects] == [300, 301]
    assert output != "y" or len([name for name in written if name.startswith("y/")]) > 2


def test_killed_worker_ends_the_run_and_leaves_nothing(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [LONG] * 600)  # several chunks
    process = start(tmp_path, "x.jsonl", "y.jsonl", "--num-proc", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        time.sleep(0.01)
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=HANGS)  # ends when each process has closed its end of the pipe
    assert process.returncode == 1 and "a worker process was killed" in errors
    assert names(tmp_path) == ["x.jsonl"]


# ---------------------------------------------------------------- rows set aside


def test_reasons_that_differ_in_numbers_are_counted_together(run, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([LINE, b'{"a": x', b'{"ab": x', b'{"abc": x']))
    assert "3 rows: the row is not valid JSON" in run(STEP1, "x.jsonl", "y.jsonl").stderr


def test_rows_nested_too_deeply_are_set_aside_from_every_format_and_keep_their_reason(process, tmp_path):
    deep = [b"[" * depth + b"]" * depth for depth in (900, 960, 985, 995)]
    rows = [LINE, *(b'{"messages": ' + its + b"}" for its in deep)]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*rows, b'{"a": ' + b"[" * 100_000]))
    (tmp_path / "x.json").write_bytes(b"[" + b",".join(rows[:4]) + b"]")
    pq.write_table(pa.table({"messages": [json.dumps(ROW["messages"]), "[" * 100_000]}), tmp_path / "x.parquet")
    for source, aside in (("x.jsonl", 5), ("x.json", 3), ("x.parquet", 1)):
        said = f"{1 + aside} rows in = 1 row out + {aside} set aside"
        assert said in process(STEP1, source, "y.jsonl").stdout
        rejects = (tmp_path / "y.jsonl.rejects.jsonl").read_text()
        assert [int(row) for row in re.findall(r'"row": (\d+), "reason": "', rejects)] == [*range(1, 1 + aside)]
