"""Step 1 through the command a user types, and the rules by which it reads messages."""

import datetime
import gzip
import json
import os
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
from conftest import ROOT, assistant, call, fill_hub_cache, golden, read_jsonl, tool, user, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from reading_rows import READ_AS_IT_IS, served_trajectory

from served_tokens.files import read as reading
from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.turns import apply_chat_template
from step1_apply_tool_template import default_output

RENDER = load_chat_template(read_chat_template(str(QWEN3)))
ROW = {"id": 7, "tools": None, "messages": [user("q"), assistant("a", "r")]}
EMPTY_THINK = "<think>\n\n</think>\n\n"


def plain_texts(*messages, tools=None) -> list[str]:
    plain, _ = apply_chat_template(*served_trajectory({"messages": list(messages), "tools": tools}), RENDER)
    return [message["content"] for message in plain]


# ---------------------------------------------------------------- the messages it writes


@pytest.mark.parametrize(
    "message, target",
    [
        ({"role": "assistant", "content": "a", "reasoning": "r"}, "<think>\nr\n</think>\n\na"),
        (assistant("<think>\nr\n</think>\n\na"), "<think>\nr\n</think>\n\na"),
        (assistant("r\n</think>\n\na"), "<think>\nr\n</think>\n\na"),
        (assistant("<think>\nr\n</think>\n\na", "r"), "<think>\nr\n</think>\n\na"),
        (assistant("a", None), EMPTY_THINK + "a"),
        (assistant("  a \n", " r "), "<think>\n r \n</think>\n\n  a \n"),
        (assistant([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]), EMPTY_THINK + "a\n b"),
        (
            assistant("", "r", [call("f", '{"x":1.50,"y":"\\u00e9"}')]),
            '<think>\nr\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1.5, "y": "é"}}\n</tool_call>',
        ),
    ],
)
def test_target_of_a_turn(message, target):
    assert plain_texts(user("q"), message) == ["q", target]


def test_messages_after_the_last_turn_stay():
    assert plain_texts(user("q"), assistant("a", "r"), user("bye"))[2] == "bye"


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": []}, "no assistant message"),
        ({"messages": None}, "no assistant message"),
        ({"conversations": 1, "id": 2}, "column conversations is not a list but a number"),
        ({"messages": "[{"}, "column messages is not valid JSON"),
        ({"messages": {"role": "user"}}, "column messages is not a list but an object"),
        ({"messages": [user("q")]}, "no assistant message"),
        ({"messages": [user("q"), "hi"]}, "message 1: a message is not an object but a string"),
        ({"messages": [user(3)]}, "message 0: content is not text but a number"),
        ({"messages": [user("q"), assistant("so <think>x</think>a")]}, "message 1: has text before an inline <think>"),
        ({"messages": [user("q"), assistant("a")], "tools": ["f"]}, "a tool is not an object but a string"),
    ],
)
def test_bad_trajectory_is_named_with_message_and_reason(row, reason):
    with pytest.raises(TrajectoryError) as error:
        served_trajectory(row)
    assert reason in str(error.value)


def test_bad_rows_are_set_aside_with_their_reason_and_the_rest_goes_on(run, tmp_path):
    bad = {"messages": [user("q"), assistant("", "r", [call("f", "{")])]}
    lines = [
        json.dumps(ROW),
        "{ not json",
        json.dumps(bad),
        json.dumps({**ROW, "messages": [user("\ud800"), assistant("a")]}),
        "3",
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    process = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl")
    assert [row["id"] for row in read_jsonl(tmp_path / "y.jsonl")] == [7]
    rejects = read_jsonl(tmp_path / "y.jsonl.rejects.jsonl")
    assert [(row["row"], row["reason"].split(" (")[0]) for row in rejects] == [
        (1, "the row is not valid JSON"),
        (2, "message 1: tool call arguments are not valid JSON"),
        (3, "the text holds a lone surrogate, which no tokenizer can read"),
        (4, "the row is not an object but a number"),
    ]
    assert rejects[1]["trajectory"] == bad and rejects[0]["trajectory"].strip() == "{ not json"
    assert "4 rows set aside with their reasons: y.jsonl.rejects.jsonl" in process.stderr

    process = run("step1_apply_tool_template.py", "x.jsonl", "z.jsonl", "--strict", expect=1)
    assert "x.jsonl: row 1: the row is not valid JSON" in process.stderr and "drop --strict" in process.stderr
    assert not list(tmp_path.glob("*z.jsonl*"))


def test_exit_code_says_when_nothing_is_left_and_an_earlier_output_stays(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"messages": []}])
    (tmp_path / "y.jsonl").write_text("earlier")
    process = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl", expect=1)
    assert "no trajectory is left; y.jsonl is not written; the one of an earlier run is still there" in process.stderr
    assert (tmp_path / "y.jsonl").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl", "y.jsonl.rejects.jsonl"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["a.txt"], "a.txt: unknown file type '.txt'"),
        (["empty"], "empty: the folder holds no .json, .jsonl, .jsonl.gz, .parquet file"),
        (["a.json"], "a.json: not an array; a .json file holds one array of rows"),
        (["x.jsonl", "folder.jsonl"], "folder.jsonl: cannot be written"),
        (["x.jsonl", "x.jsonl/y.jsonl"], "x.jsonl/y.jsonl: cannot be written"),
        (["--chat-template", "none.jinja"], "cannot read the chat template"),
        (["--chat-template", "me/none"], "no chat template to be had"),
    ],
)
def test_what_cannot_be_read_or_written_is_a_clear_error(run, tmp_path, arguments, reason):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text('{"a": 1}')
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    for folder in ("empty", "folder.jsonl"):
        (tmp_path / folder).mkdir()
    there = sorted(tmp_path.iterdir())
    process = run("step1_apply_tool_template.py", *arguments, expect=1, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert reason in process.stderr and "Traceback" not in process.stderr
    assert sorted(tmp_path.iterdir()) == there


# ---------------------------------------------------------------- formats and columns

ROWS = [
    {
        "id": 1,
        "info": {"b": [1]},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"x": 1}}}],
        "messages": [
            user("q"),
            assistant("", "r", [call("f", {"x": 1}), call("g", {"y": {"z": None}})]),
            tool("t"),
            assistant("a", "s"),
        ],
    },
    {"id": 2, "info": {"c": None}, "tools": [], "messages": [user("订单"), assistant("b", "s")]},
]


def as_json_strings(row: dict) -> dict:
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in row.items()
        if key in ("tools", "messages")
    }
    return {**row, **texts}


def write_rows(path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8")
    else:
        rows = [{**as_json_strings(row), "info": json.dumps(row["info"])} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), path)


def read_rows(path) -> list[dict]:
    rows = [row for _, row, error in reading.read_rows(str(path))]
    return [
        {key: json.loads(value) if isinstance(value, str) and value[0] in "[{" else value for key, value in row.items()}
        for row in rows
    ]


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("suffix_out", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("suffix_in", [".json", ".jsonl", ".parquet"])
def test_formats_give_the_same_rows_and_no_key_reaches_another_object(
    in_process, tmp_path, suffix_in, suffix_out, strings
):
    write_rows(tmp_path / ("x" + suffix_in), [as_json_strings(row) for row in ROWS] if strings else ROWS)
    in_process("step1_apply_tool_template.py", "x" + suffix_in, "y" + suffix_out)
    written = read_rows(tmp_path / ("y" + suffix_out))
    for index, (row, out) in enumerate(zip(ROWS, written, strict=True)):
        assert [out["id"], out["info"], out["tools"]] == [row["id"], row["info"], row["tools"]]
        plain, served = apply_chat_template(*served_trajectory(row), RENDER)
        assert out["messages"] == plain
        assert out["served"] == {"source": "x" + suffix_in, "trajectory": index, **READ_AS_IT_IS, **served}
    assert '{"name": "f", "arguments": {"x": 1}}' in written[0]["messages"][2]["content"]
    assert '{"name": "g", "arguments": {"y": {"z": null}}}' in written[0]["messages"][2]["content"]


def test_other_columns_pass_through_unchanged(run, tmp_path):
    row = {
        "traj_type": "conversation",
        "task_info": {"task": "é", "n": None},
        "user_messages": '["q"]',
        "steps": 2,
        **ROW,
    }
    write_jsonl(tmp_path / "x.jsonl", [row])
    run("step1_apply_tool_template.py", "x.jsonl")
    (out,) = read_jsonl(tmp_path / "x_apply_qwen3_template.jsonl")
    assert {key: out[key] for key in row if key != "messages"} == {key: row[key] for key in row if key != "messages"}
    assert list(out) == [*row, "served"]


def test_values_of_parquet_columns_keep_their_types_and_lists_and_objects_become_json(run, tmp_path):
    columns = {"score": pa.array([1.5]), "date": [datetime.date(2024, 1, 2)], "extra": [b"x"]}
    mixed = {"task_info": pa.array([{"env_id": "e", "n": 1}]), "tags": pa.array([["a"]])}
    pq.write_table(pa.table({**columns, **mixed, "messages": [json.dumps(ROW["messages"])]}), tmp_path / "x.parquet")
    run("step1_apply_tool_template.py", "x.parquet")
    out = pq.read_table(tmp_path / "x_apply_qwen3_template.parquet")
    assert out.select(columns).equals(pa.table(columns))
    assert out.select(mixed).to_pylist() == [{"task_info": '{"env_id": "e", "n": 1}', "tags": '["a"]'}]
    run("step1_apply_tool_template.py", "x.parquet", "y.jsonl")
    assert read_jsonl(tmp_path / "y.jsonl")[0]["date"] == "2024-01-02"


def test_parquet_that_mixed_the_arguments_of_calls_already_is_refused(run, tmp_path):
    messages = [user("q"), assistant("", "r", [call("f", {"x": 1}), call("g", {"y": 1})])]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "x.parquet")
    process = run("step1_apply_tool_template.py", "x.parquet", expect=1)
    assert "column messages holds objects as Arrow structs" in process.stderr
    pq.write_table(pa.Table.from_pylist([{"messages": "[]", "tools": [{"a": 1}, {"b": 1}]}]), tmp_path / "x.parquet")
    process = run("step1_apply_tool_template.py", "x.parquet", expect=1)
    assert "column tools holds objects as Arrow structs" in process.stderr


@pytest.mark.parametrize("values", [[1, "a"], [2**70]])
def test_column_that_no_parquet_type_fits_is_a_clear_error(run, tmp_path, values):
    write_jsonl(tmp_path / "x.jsonl", [{**ROW, "score": value} for value in values])
    process = run("step1_apply_tool_template.py", "x.jsonl", "y.parquet", expect=1)
    assert "column score does not fit one Parquet type (" in process.stderr and "write .jsonl instead" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_columns_that_some_files_lack_or_have_but_nulls_in_are_joined_in_one_parquet_file(run, tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", [])
    write_jsonl(tmp_path / "data" / "b.jsonl", [{"id": "x", "why": "bad"}, {**ROW, "id": None}])
    write_jsonl(tmp_path / "data" / "c.jsonl", [{**ROW, "id": 2, "steps": 1.5}])
    assert "3 rows in = 2 rows out + 1 set aside" in run("step1_apply_tool_template.py", "data", "y.parquet").stdout
    rows = pq.read_table(tmp_path / "y.parquet", columns=["id", "tools", "steps"]).to_pylist()
    assert rows == [{"id": None, "tools": None, "steps": None}, {"id": 2, "tools": None, "steps": 1.5}]
    write_jsonl(tmp_path / "data" / "d.jsonl", [{**ROW, "id": "x"}])
    assert (
        "a column holds values of several types ("
        in run("step1_apply_tool_template.py", "data", "y.parquet", expect=1).stderr
    )


@pytest.mark.parametrize(
    "source, output", [("x.jsonl.gz", "x_S.jsonl"), ("x.json", "x_S.json"), ("d.v2", "d.v2_S.jsonl")]
)
def test_default_output_stands_beside_the_input(tmp_path, monkeypatch, source, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.v2").mkdir()
    assert default_output(source) == Path(output.replace("_S", "_apply_qwen3_template"))
    assert default_output(".") == tmp_path.with_name(tmp_path.name + "_apply_qwen3_template.jsonl")


def test_output_is_not_taken_for_an_input(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl")
    process = run("step1_apply_tool_template.py", "y.jsonl", "z.jsonl", expect=1)
    assert "it is one of step 1 already" in process.stderr


def test_tools_may_be_missing_null_empty_or_a_string(run, tmp_path):
    rows = [
        {"messages": ROW["messages"]},
        *({"messages": ROW["messages"], "tools": tools} for tools in (None, [], "", "[]", "null")),
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl")
    assert [len(row["messages"]) for row in read_jsonl(tmp_path / "y.jsonl")] == [2] * 6


def test_folder_is_read_in_the_order_of_its_names_but_not_what_scripts_leave_beside_outputs(run, tmp_path):
    def row(number: int) -> dict:
        return {"id": number, "messages": ROW["messages"]}

    folder = tmp_path / "data"
    write_jsonl(folder / "b.jsonl", [row(2), {"bad": 1}, row(3)])
    (folder / "a").mkdir()
    (folder / "a" / "x.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(row(at)).encode() for at in (0, 1))))
    (folder / "c.json").write_text(json.dumps([row(4)]))
    for name in (
        ".d.jsonl",
        "_e.jsonl",
        "b.jsonl.rejects.jsonl",
        "b.jsonl.left_out.jsonl",
        "b_preview.json",
        "README.md",
    ):
        (folder / name).write_text("not read")
    process = run("step1_apply_tool_template.py", "data", "y.jsonl")
    rows = read_jsonl(tmp_path / "y.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert [(row["served"]["source"], row["served"]["trajectory"]) for row in rows] == [
        ("data/a/x.jsonl.gz", 0),
        ("data/a/x.jsonl.gz", 1),
        ("data/b.jsonl", 0),
        ("data/b.jsonl", 2),
        ("data/c.json", 0),
    ]
    assert "6 rows in = 5 rows out + 1 set aside" in process.stdout


def test_output_without_an_extension_is_a_folder_of_parquet_files(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    run("step1_apply_tool_template.py", "x.jsonl", "y")
    run("step1_apply_tool_template.py", "x.jsonl", "y.parquet")
    assert [path.name for path in (tmp_path / "y").iterdir()] == ["00000-of-00001.parquet"]
    assert pq.read_table(tmp_path / "y").equals(pq.read_table(tmp_path / "y.parquet"))


def test_progress_in_a_log_file_is_short_lines(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", MANY * 20)
    lines = run("step1_apply_tool_template.py", "x.jsonl", "y.jsonl").stderr.replace("\r", "").splitlines()
    assert "step 1: 100 %" in lines[-1] + lines[-2] and len(lines) < 10 and max(map(len, lines)) < 40


# ---------------------------------------------------------------- many rows

MANY = [{"id": number, "messages": [user(f"q{number}"), assistant("a" * number, "r")]} for number in range(200)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_many_processes_write_what_one_writes(run, tmp_path, suffix):
    write_jsonl(tmp_path / "x.jsonl", [*MANY, {"messages": []}, "bad", *MANY])
    for num_proc in (1, 3):
        run("step1_apply_tool_template.py", "x.jsonl", f"{num_proc}{suffix}", "--num-proc", num_proc)
    assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"3{suffix}").read_bytes()
    rejects = [(tmp_path / f"{num_proc}{suffix}.rejects.jsonl").read_bytes() for num_proc in (1, 3)]
    assert rejects[0] == rejects[1] and [json.loads(line)["row"] for line in rejects[0].splitlines()] == [200, 201]


@pytest.mark.parametrize("killed", ["a worker", "the parent"])
def test_killed_process_ends_the_others_and_leaves_nothing_that_looks_like_data(tmp_path, killed):
    write_jsonl(tmp_path / "x.jsonl", MANY * 300)  # several chunks
    command = [sys.executable, str(ROOT / "step1_apply_tool_template.py"), "x.jsonl", "y.jsonl", "--num-proc", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        time.sleep(0.01)
    os.kill(int(workers[0]) if killed == "a worker" else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # ends when each process has closed its end of the pipe
    until = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_alive, workers)) and not (tmp_path / "y.jsonl").exists()
    if killed == "a worker":
        assert process.returncode == 1 and "a worker process was killed" in errors
        assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(reading, FIRST_CHUNK=chunk, JSON_CHUNK=chunk):
        path = Path(folder) / "x.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8", newline="")
        assert [row for chunk in reading.read_chunks([str(path)]) for _, row in chunk.rows] == rows


def test_array_that_is_cut_or_broken_is_a_clear_error(tmp_path):
    for text in ("[{}", "[{},", '[{"a": 1}, {"a"', "[{} {}]", "[{}] x", "[{}][{}]", "[,]", "", "[{\x00}]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(SystemExit, match=r"x.json: .*a .json file holds one array of rows"):
            list(reading.read_rows(str(tmp_path / "x.json")))


# ---------------------------------------------------------------- the template, the start


def test_chat_template_from_file_model_directory_and_hub_model_agree(run, tmp_path, tiny_model):
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    fill_hub_cache(tmp_path / "hub", "model", "me/tiny", files)
    write_jsonl(tmp_path / "x.jsonl", golden())
    for name, template in (("a", QWEN3), ("b", tiny_model), ("c", "me/tiny")):
        run(
            "step1_apply_tool_template.py",
            "x.jsonl",
            f"{name}.jsonl",
            "--chat-template",
            template,
            HF_HUB_CACHE=str(tmp_path / "hub"),
        )
    assert (
        (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text() == (tmp_path / "c.jsonl").read_text()
    )


@pytest.mark.parametrize(
    "script", ["step1_apply_tool_template.py", "step2_to_alpaca_mask_history.py", "check_training_tokens.py"]
)
def test_help_imports_neither_transformers_nor_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'llamafactory'} & set(sys.modules)))\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
