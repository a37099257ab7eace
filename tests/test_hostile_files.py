"""Hostile files and faults.

What cannot be read or written is one line of error, and an output is whole or not there.
"""

import gzip
import json
import os
import resource
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
from conftest import ROOT, assistant, interruptible, read_jsonl, user, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from served_tokens.files import read as reading
from served_tokens.files.read import parse_row, read_chunks, read_rows
from served_tokens.files.write import append, finish, packed
from served_tokens.marks import TrajectoryError

STEP1, STEP2 = "step1_apply_tool_template.py", "step2_to_alpaca_mask_history.py"
ROW = {"messages": [user("q é"), assistant("a", "r")]}
LINE = json.dumps(ROW, ensure_ascii=False).encode()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "content, rows, set_aside",
    [
        (LINE + b"\n" + LINE[:-9], 1, [1]),  # cut in the middle of a row
        (b"\xef\xbb\xbf" + LINE + b"\n" + LINE, 2, []),
        (LINE + b"\r\n\r\n" + LINE + b"\r\n", 2, []),
        (LINE.replace("é".encode(), b"\xe9") + b"\n" + LINE, 1, [0]),
        (LINE.replace(b"q", b"\x00") + b"\n" + LINE + b"\n\x00\x00\n", 1, [0, 2]),
        (b"\xff\xfd\n" + LINE, 1, [0]),
        (b'3\nnull\n[]\n"x"\n' + LINE, 1, [0, 1, 2, 3]),
        (LINE + b"\n" + b'{"messages": ' + b"[" * 100000 + b"\n", 1, [1]),
    ],
)
def test_damaged_line_is_set_aside_and_the_rest_goes_on(run, tmp_path, content, rows, set_aside):
    (tmp_path / "x.jsonl").write_bytes(content)
    process = run(STEP1, "x.jsonl", "y.jsonl")
    total = rows + len(set_aside)
    assert f"{total} rows in = {rows} rows out + {len(set_aside)} set aside" in process.stdout
    assert [row["messages"][0]["content"] for row in read_jsonl(tmp_path / "y.jsonl")] == ["q é"] * rows
    rejects = tmp_path / "y.jsonl.rejects.jsonl"
    assert [row["row"] for row in read_jsonl(rejects)] == set_aside if set_aside else not rejects.exists()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("x.jsonl", b"", "x.jsonl: no trajectory is left"),
        ("x.json", b"", "x.json: not an array"),
        ("x.parquet", b"", "x.parquet: not a Parquet file"),
        ("x.json", gzip.compress(LINE), "x.json: not valid JSON"),
        ("x.jsonl.gz", LINE, "x.jsonl.gz: cannot be unpacked"),
        ("x.jsonl.gz", gzip.compress(LINE)[:-9], "x.jsonl.gz: cannot be unpacked"),
        ("x.jsonl.gz", gzip.compress(LINE)[:10] + b"\xff" * 9, "x.jsonl.gz: cannot be unpacked"),
        ("x.json", b'[{"id": ' + b"9" * 5000 + b"}]", "x.json: not valid JSON"),
        ("x.json.gz", gzip.compress(LINE), "x.json.gz: unknown file type '.gz'"),
        ("x.json", b"[" + LINE + b"," + LINE[:-3], "x.json: not valid JSON"),
        ("x.json", b"[" + LINE.replace("é".encode(), b"\xe9") + b"]", "x.json: not valid JSON"),
        ("x.json", b"[" * 100000, "x.json: not valid JSON"),
        ("x.json", b'[3, null, [], "x"]', "1 like row 0: the row is not an object but a number"),
    ],
)
def test_file_without_a_row_to_use_is_a_clear_error(run, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    process = run(STEP1, name, "y.jsonl", expect=1)
    assert reason in process.stderr and "Traceback" not in process.stderr
    assert "y.jsonl" not in names(tmp_path)


def test_array_with_a_mark_and_carriage_returns_is_read(run, tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[\r\n" + LINE + b",\r\n3,\r\n" + LINE + b"\r\n]\r\n")
    assert "3 rows in = 2 rows out + 1 set aside" in run(STEP1, "x.json", "y.jsonl").stdout


def test_file_without_permission_is_a_clear_error(tmp_path):  # which root does not meet, so it is simulated
    path = write_jsonl(tmp_path / "x.jsonl", [ROW])
    denied = PermissionError(13, "Permission denied")
    with (
        mock.patch.object(Path, "open", side_effect=denied),
        pytest.raises(SystemExit, match=r"x.jsonl: cannot be read"),
    ):
        list(read_rows(str(path)))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@given(data=st.data())
def test_reader_of_mutated_bytes_gives_rows_or_errors_of_one_line(tmp_path_factory, suffix, data):
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f"whole{suffix}"
    if not whole.exists():
        rows = [
            {"id": number, "messages": json.dumps(ROW["messages"]), "é": None if number else 1.5} for number in range(3)
        ]
        append(folder / f"part{suffix}", 0, packed(rows, whole))
        finish(folder / f"part{suffix}", whole)
    content = bytearray(whole.read_bytes())
    place, byte = (
        st.integers(0, len(content)),
        st.sampled_from(b'\x00\xff\xef"\\{}[],:\n\r\t eu09P') | st.integers(0, 255),
    )
    for kind, at, value, length in data.draw(
        st.lists(st.tuples(st.integers(0, 3), place, byte, st.integers(0, 40)), min_size=1, max_size=6)
    ):
        if kind == 0:
            content[at : at + 1] = [value]
        elif kind == 1:
            content[at:at] = [value] * length
        elif kind == 2:
            del content[at : at + length]
        else:
            del content[at:]
    path = folder / f"mutated{suffix}"
    path.write_bytes(content)
    try:
        for _, row, error in read_rows(str(path)):
            assert error or isinstance(row, dict)
    except SystemExit as stop:
        assert str(path) in str(stop)


@given(line=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_line_is_a_row_or_set_aside(line):
    try:
        assert isinstance(parse_row(line), dict)
    except TrajectoryError as error:
        assert "\n" not in str(error)


@given(
    lines=st.lists(
        st.sampled_from([LINE, b"", b" ", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + LINE, b"bad", LINE * 3]), max_size=12
    ),
    end=st.sampled_from([b"", b"\n"]),
    size=st.integers(1, 300),
)
def test_chunks_hold_each_row_of_a_file_once_under_its_number(lines, end, size):
    kept = [line.removeprefix(b"\xef\xbb\xbf") for line in lines if line.strip() not in (b"", b"\xef\xbb\xbf")]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(reading, "CHUNK_BYTES", size):
        path = Path(folder) / "x.jsonl"
        path.write_bytes(b"\n".join(lines) + end)
        chunks = [*read_chunks([str(path)])]
        rows = [(place.row, raw) for chunk in chunks for place, raw in chunk.rows]
        assert sum(chunk.size for chunk in chunks) == path.stat().st_size
        path.write_bytes(gzip.compress(path.read_bytes()))
        packed = path.rename(f"{path}.gz")
        unpacked = [(place.row, raw) for chunk in read_chunks([str(packed)]) for place, raw in chunk.rows]
    assert [(row, raw.strip(b"\n")) for row, raw in rows] == [*enumerate(kept)]
    assert unpacked == rows


@pytest.mark.parametrize("groups", [1, 3, 50])
def test_chunks_hold_each_row_of_a_parquet_file_once_under_its_number(tmp_path, groups):
    table = pa.table({"id": range(50), "messages": ["[]"] * 50})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=50 // groups + 1)
    with mock.patch.object(reading, "CHUNK_BYTES", 100):
        chunks = [*read_chunks([str(tmp_path / "x.parquet")])]
    rows = [(place.row, row["id"]) for chunk in chunks for place, row in chunk.rows]
    assert rows == [(at, at) for at in range(50)] and len(chunks) > 5


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
    assert names(tmp_path / "other/new") == ["out.parquet", "out_preview.json"]


def limited(script: str, *arguments, folder, size: int):
    """The script where no file may grow beyond `size` bytes, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def many(rows: int = 400) -> list[dict]:
    return [{"id": number, "messages": [user(os.urandom(400).hex()), assistant("a", "r")]} for number in range(rows)]


def assert_cannot_be_written(process: subprocess.CompletedProcess, name: str) -> None:
    assert process.returncode == 1 and f"{name}: cannot be written" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("output", ["y.jsonl", "y.json", "y.parquet"])
def test_full_disk_is_a_clear_error_and_leaves_the_earlier_output_whole(tmp_path, output):
    write_jsonl(tmp_path / "x.jsonl", many())
    (tmp_path / output).write_text("earlier")
    assert_cannot_be_written(limited(STEP1, "x.jsonl", output, folder=tmp_path, size=40_000), output)
    assert (tmp_path / output).read_text() == "earlier" and names(tmp_path) == sorted(["x.jsonl", output])


def test_full_disk_while_rejects_are_written_names_their_file(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [ROW, *({"bad": row} for row in many())])
    assert_cannot_be_written(
        limited(STEP1, "x.jsonl", "y.jsonl", folder=tmp_path, size=40_000), "y.jsonl.rejects.jsonl"
    )
    assert names(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize("output, size", [("out", 90_000), ("out.parquet", 90_000), ("out.jsonl", 300_000)])
def test_full_disk_in_step_2_is_a_clear_error_and_leaves_nothing(run, tmp_path, output, size):
    write_jsonl(tmp_path / "x.jsonl", many())
    run(STEP1, "x.jsonl", "y.jsonl")
    process = limited(STEP2, "y.jsonl", output, "--dataset-dir", ".", folder=tmp_path, size=size)
    assert_cannot_be_written(process, output)
    assert names(tmp_path) == ["x.jsonl", "y.jsonl"]


@pytest.mark.parametrize(
    "script, arguments",
    [
        (STEP1, ["x.jsonl"]),
        (STEP1, ["link.jsonl"]),
        (STEP1, ["z.jsonl"]),  # beside which rejects would be written
        (STEP2, ["link.jsonl"]),
        (STEP2, ["out.parquet"]),  # of which it would be the preview
        (STEP2, ["v.jsonl", "--val-ratio", "0.3"]),  # of which it would be that of the validation set
    ],
)
def test_input_is_not_written_over_under_any_name(run, tmp_path, script, arguments):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    for name in ("z.jsonl.rejects.jsonl", "out_preview.json", "v_val_preview.json"):
        (tmp_path / name).hardlink_to(tmp_path / "x.jsonl")
    assert "is the input too; name another output" in run(script, "x.jsonl", *arguments, expect=1).stderr
    assert read_jsonl(tmp_path / "x.jsonl") == [ROW]


@pytest.mark.parametrize("output", ["data", "."])
def test_folder_that_holds_the_input_is_not_replaced(run, tmp_path, output):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    run(STEP1, "x.jsonl", "data/y")
    (tmp_path / "x.jsonl").unlink()
    for script, source in ((STEP2, "data/y"), (STEP2, "data"), (STEP1, "data/y/00000-of-00001.parquet")):
        errors = run(script, source, output, expect=1).stderr
        reasons = (
            "is the input too; name another output",
            "holds more than Parquet files",
            ".: is no name of an output",
        )
        assert any(reason in errors for reason in reasons)
    assert "data/y: is the input too" in run(STEP2, "data/y", "data/y", expect=1).stderr
    assert names(tmp_path / "data/y") == ["00000-of-00001.parquet"]


def start(folder, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / STEP1), *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )


def test_two_runs_at_once_into_one_output_leave_one_of_them_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "a", **ROW}] * 3000)
    write_jsonl(tmp_path / "b.jsonl", [{"id": "b", **ROW}] * 3000)
    processes = [start(tmp_path, f"{name}.jsonl", "y.jsonl", "--num-proc", "1") for name in "ab"]
    for process in processes:
        _, errors = process.communicate(timeout=60)
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
    while not list(folder.glob(".y.jsonl.*.parts/y.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    process.communicate(timeout=60)
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


def test_kill_of_step_2_leaves_no_folder_that_looks_like_samples(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [ROW] * 30000)
    run(STEP1, "x.jsonl", "y.jsonl")
    command = [sys.executable, str(ROOT / STEP2), "y.jsonl", "out", "--dataset-dir", "."]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob(".out.*.parts/out/*.parquet")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["x.jsonl", "y.jsonl"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SystemExit(130)])
def test_folder_that_cannot_take_its_name_gives_the_earlier_one_back(tmp_path, fault):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier.parquet").write_bytes(b"x")
    (tmp_path / "parts").mkdir()
    replace, targets = os.replace, []

    def fails_at_the_second(source, target):
        targets.append(target)
        if len(targets) == 2:
            raise fault
        replace(source, target)

    append(tmp_path / "parts" / "out", 0, packed([ROW], Path("out")))
    with mock.patch("os.replace", fails_at_the_second), pytest.raises(SystemExit):
        finish(tmp_path / "parts" / "out", tmp_path / "out")
    assert names(tmp_path / "out") == ["earlier.parquet"]


def test_folder_of_parquet_files_that_no_script_wrote_is_not_replaced(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.parquet").write_bytes(b"x")
    assert "out: holds more than Parquet files" in run(STEP1, "x.jsonl", "out", expect=1).stderr
    assert names(tmp_path / "out") == ["mine.parquet"]
    run(STEP1, "x.jsonl", "new")
    assert "new, in place of an earlier one" in run(STEP1, "x.jsonl", "new").stdout


# ---------------------------------------------------------------- rows set aside


def test_reasons_that_differ_in_numbers_are_counted_together(run, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([LINE, b'{"a": x', b'{"ab": x', b'{"abc": x']))
    assert "3 like row 1: the row is not valid JSON" in run(STEP1, "x.jsonl", "y.jsonl").stderr


def test_reject_nested_too_deeply_to_be_written_keeps_its_reason(run, tmp_path):
    for depth in (900, 990, 995, 100_000):
        (tmp_path / "x.jsonl").write_bytes(LINE + b'\n{"a": ' + b"[" * depth + b"]" * depth + b"}\n")
        run(STEP1, "x.jsonl", "y.jsonl")
        assert [row["row"] for row in read_jsonl(tmp_path / "y.jsonl.rejects.jsonl")] == [1]


def test_rows_nested_deeply_in_an_array_or_parquet_are_set_aside(run, tmp_path):
    deep = "[" * 100_000
    pq.write_table(pa.table({"messages": [json.dumps(ROW["messages"]), deep]}), tmp_path / "x.parquet")
    assert "2 rows in = 1 rows out + 1 set aside" in run(STEP1, "x.parquet", "y.jsonl").stdout
    for depth in (900, 960, 985):
        (tmp_path / "x.json").write_bytes(b"[" + LINE + b', {"messages": ' + b"[" * depth + b"]" * depth + b"}]")
        process = run(STEP1, "x.json", "y.jsonl")
        assert "2 rows in = 1 rows out + 1 set aside" in process.stdout
