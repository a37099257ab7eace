"""Step 1 through the command a user types: what it writes, in which formats, and what it says."""

import datetime
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, assistant, call, fill_hub_cache, golden, read_jsonl, tool, user, write_jsonl
from reading_rows import READ_AS_IT_IS, served_trajectory

from served_tokens.files.read import digest_of
from served_tokens.prompts.chat_template import QWEN3, fingerprint, load_chat_template, read_chat_template
from served_tokens.prompts.turns import apply_chat_template
from step1_apply_tool_template import default_output

STEP1 = "step1_apply_tool_template.py"
RENDER = load_chat_template(read_chat_template(str(QWEN3)))
ROW = {"id": 7, "tools": None, "messages": [user("q"), assistant("a", "r")]}


# ---------------------------------------------------------------- what it refuses


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
    process = run(STEP1, "x.jsonl", "y.jsonl")
    assert [row["id"] for row in read_jsonl(tmp_path / "y.jsonl")] == [7]
    rejects = read_jsonl(tmp_path / "y.jsonl.rejects.jsonl")
    assert [(row["row"], row["reason"].split(" (")[0]) for row in rejects] == [
        (1, "the row is not valid JSON"),
        (2, "message 1: tool call arguments are not valid JSON"),
        (3, "the text holds a lone surrogate, which no tokenizer can read"),
        (4, "the row is not an object but a number"),
    ]
    assert rejects[1]["trajectory"] == bad and rejects[0]["trajectory"].strip() == "{ not json"
    assert "4 rows set aside with reasons: y.jsonl.rejects.jsonl" in process.stderr

    process = run(STEP1, "x.jsonl", "z.jsonl", "--strict", expect=1)
    assert (
        "x.jsonl: row 1 (counted from 0): the row is not valid" in process.stderr and "drop --strict" in process.stderr
    )
    assert not list(tmp_path.glob("*z.jsonl*"))


def test_exit_code_says_when_nothing_is_left_and_an_earlier_output_stays(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"messages": []}])
    (tmp_path / "y.jsonl").write_text("earlier")
    process = run(STEP1, "x.jsonl", "y.jsonl", expect=1)
    assert "no trajectory is left; y.jsonl is not written" in process.stderr
    assert (tmp_path / "y.jsonl").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl", "y.jsonl.rejects.jsonl"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["a.txt"], "a.txt: unknown file type '.txt'"),
        (["empty"], "empty: the folder holds no .json, .jsonl, .jsonl.gz, .parquet file"),
        (["a.json"], "a.json: no array of rows, as [{…}, {…}]; what is no list is .jsonl, a row on each line"),
        (["x.jsonl", "folder.jsonl"], "folder.jsonl: cannot be written"),
        (["x.jsonl", "x.jsonl/y.jsonl"], "x.jsonl/y.jsonl: cannot be written (File exists); name another output"),
        (["--chat-template", "none.jinja"], "cannot read the chat template"),
        (["--chat-template", "me/none"], "no chat template to be had"),
        (["me/none", "y.jsonl"], "me/none: no such file, and not to be had from the Hugging Face Hub"),
        (["x.jsonl", "y.jsonl", "--file", "x"], "x.jsonl: is no Hugging Face data set id; --file chooses among the"),
    ],
)
def test_what_cannot_be_read_or_written_is_a_clear_error(run, tmp_path, arguments, reason):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text('{"a": 1}')
    write_jsonl(tmp_path / "x.jsonl", [ROW])
    for folder in ("empty", "folder.jsonl"):
        (tmp_path / folder).mkdir()
    there = sorted(tmp_path.iterdir())
    assert reason in run(STEP1, *arguments, expect=1).stderr
    assert sorted(tmp_path.iterdir()) == there


# ---------------------------------------------------------------- formats and columns

F = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"x": 1}}}
CALLS = [call("f", {"x": 1}), call("g", {"y": {"z": None}})]
ROWS = [
    {"id": 1, "info": {"b": [1]}, "tools": [F], "messages": [user("q"), assistant("", "r", CALLS), tool("t")]},
    {"id": 2, "info": {"c": None}, "tools": [], "messages": [user("订单"), assistant("b", "s")]},
]
STRINGS = [{**row, **{key: json.dumps(row[key]) for key in ("info", "tools", "messages")}} for row in ROWS]


def parsed(value):
    return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value


def read_rows(path) -> list[dict]:
    rows = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    return [{key: parsed(value) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("output", ["y.json", "y.jsonl"])
@pytest.mark.parametrize(
    "source, rows",
    [("x.jsonl", ROWS), ("x.json", ROWS), ("x.jsonl", STRINGS), ("x.json", STRINGS), ("x.parquet", STRINGS)],
    ids=[".jsonl", ".json", ".jsonl of strings", ".json of strings", ".parquet"],
)
def test_formats_give_the_same_rows_with_their_columns_and_no_key_reaches_another_object(
    run, tmp_path, source, rows, output
):
    write_jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8")
    if source == "x.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    run(STEP1, source, output)
    for index, (row, out) in enumerate(zip(ROWS, read_rows(tmp_path / output), strict=True)):
        plain, served = apply_chat_template(*served_trajectory(row), RENDER)
        made_of = {"sha256": digest_of(str(tmp_path / source)), "chat_template": fingerprint(RENDER)}
        reading = {"reading": READ_AS_IT_IS["reading"] | made_of}
        served = {"source": source, "trajectory": index, **(READ_AS_IT_IS | reading), **served}
        assert [*out.items()] == [*{**row, "messages": plain, "served": served}.items()]
        if index == 0:
            assert '{"name": "f", "arguments": {"x": 1}}' in plain[2]["content"]
            assert '{"name": "g", "arguments": {"y": {"z": null}}}' in plain[2]["content"]


def test_values_of_parquet_columns_become_json(run, tmp_path):
    columns = {"score": [1.5], "date": [datetime.date(2024, 1, 2)], "task_info": [{"env_id": "e"}], "tags": [["a"]]}
    pq.write_table(pa.table({**columns, "messages": [json.dumps(ROW["messages"])]}), tmp_path / "x.parquet")
    run(STEP1, "x.parquet")
    [row] = read_jsonl(tmp_path / "x_apply_qwen3_template.jsonl")
    values = {"score": 1.5, "date": "2024-01-02", "task_info": {"env_id": "e"}, "tags": ["a"]}
    assert {key: row[key] for key in columns} == values


@pytest.mark.parametrize(
    "row, column",
    [
        ({"messages": [assistant("", "r", CALLS)]}, "messages"),
        ({"messages": "[]", "tools": [{"a": 1}, {"b": 1}]}, "tools"),
    ],
)
def test_parquet_that_mixed_the_keys_of_objects_already_is_refused(run, tmp_path, row, column):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    errors = run(STEP1, "x.parquet", expect=1).stderr
    assert f"column {column} holds objects as Arrow structs" in errors


def test_default_output_stands_beside_the_input_or_is_named_after_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.v2").mkdir()
    for source, stem in (("x.jsonl.gz", "x"), ("d.v2", "d.v2"), (".", f"../{tmp_path.name}")):
        assert default_output(source).resolve() == Path(f"{stem}_apply_qwen3_template.jsonl").resolve()
    assert default_output("x.json") == Path("x_apply_qwen3_template.json")
    for source in ("me/Traj-9K", "me/Traj-9K@v1.0", "me/Traj-9K@refs/pr/1"):
        assert default_output(source).name == "Traj-9K_apply_qwen3_template.jsonl"


def test_output_is_not_taken_for_an_input(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{**ROW, "served": {}}])
    assert "it is one of step 1 already" in run(STEP1, "x.jsonl", "z.jsonl", expect=1).stderr


def test_tools_may_be_missing_null_empty_or_a_string():
    for columns in ({}, *({"tools": tools} for tools in (None, [], "", "[]", "null"))):
        assert served_trajectory({"messages": ROW["messages"], **columns}) == (ROW["messages"], None)


def test_folder_is_read_in_the_order_of_its_names_but_not_what_scripts_leave_beside_outputs(run, tmp_path):
    def row(number: int) -> dict:
        return {"id": number, "messages": ROW["messages"]}

    folder = tmp_path / "data"
    write_jsonl(folder / "b.jsonl", [row(2), {"bad": 1}, row(3)])
    (folder / "a").mkdir()
    (folder / "a" / "x.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(row(at)).encode() for at in (0, 1))))
    (folder / "c.json").write_text(json.dumps([row(4)]))
    for name in ".d.jsonl _e.jsonl b.jsonl.rejects.jsonl b.jsonl.left_out.jsonl README.md".split():
        (folder / name).write_text("not read")
    process = run(STEP1, "data", "y.jsonl")
    rows = read_jsonl(tmp_path / "y.jsonl")
    assert [(row["id"], row["served"]["source"], row["served"]["trajectory"]) for row in rows] == [
        (0, "data/a/x.jsonl.gz", 0),
        (1, "data/a/x.jsonl.gz", 1),
        (2, "data/b.jsonl", 0),
        (3, "data/b.jsonl", 2),
        (4, "data/c.json", 0),
    ]
    assert "6 rows in = 5 rows out + 1 set aside" in process.stdout


def test_progress_in_a_log_file_is_a_count_now_and_then(run, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [ROW] * 4000)
    counts = run(STEP1, "x.jsonl", "y.jsonl").stderr.split("\r")
    assert "step 1: 4000 rows" in counts[-1] and len(counts) < 5


# ---------------------------------------------------------------- the template, the start


def test_chat_template_from_file_model_directory_and_hub_model_agree(run, process, tmp_path, tiny_model):
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    fill_hub_cache(tmp_path / "hub", "model", "me/tiny", files)
    write_jsonl(tmp_path / "x.jsonl", golden())
    run(STEP1, "x.jsonl", "file.jsonl", "--chat-template", QWEN3)
    run(STEP1, "x.jsonl", "folder.jsonl", "--chat-template", tiny_model)
    process(STEP1, "x.jsonl", "hub.jsonl", "--chat-template", "me/tiny", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert len({(tmp_path / f"{name}.jsonl").read_text() for name in ("file", "folder", "hub")}) == 1


@pytest.mark.parametrize("script", [STEP1, "step2_to_alpaca_mask_history.py", "check_training_tokens.py"])
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
