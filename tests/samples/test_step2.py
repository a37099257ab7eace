"""Step 2 through the command a user types: options, formats, what is left out and what is said."""

import json
import re

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, assistant, call, read_jsonl, tool, user, write_jsonl
from reading_rows import READ_AS_IT_IS, served_trajectory

from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.turns import apply_chat_template
from served_tokens.samples.alpaca import step1_columns, to_samples, training_settings
from step2_to_alpaca_mask_history import default_output

STEP2 = "step2_to_alpaca_mask_history.py"
RENDER = load_chat_template(read_chat_template(str(QWEN3)))
CONVERSATION = [
    {"role": "system", "content": "P"},
    user("q1"),
    assistant("", "r1", [call("f", {})]),
    tool("t1"),
    assistant("a1", "r2"),
    user("q2"),
    assistant("", "r3", [call("f", {})]),
    tool("t2"),
    assistant("a2", "r4"),
    user("bye"),
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
RESPONSE = "<tool_response>\n%s\n</tool_response>"


def row_of(messages, **more) -> dict:
    return {"messages": messages, "tools": TOOLS, **more}


def step1_row(messages, tools=None) -> dict:
    plain, served = apply_chat_template(*served_trajectory({"messages": messages, "tools": tools}), RENDER)
    return {"messages": plain, "served": {"source": "x.jsonl", "trajectory": 0, **READ_AS_IT_IS, **served}}


def read_samples(path) -> list[dict]:
    if path.is_dir():
        return [sample for shard in sorted(path.iterdir()) for sample in read_samples(shard)]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def step2(run, tmp_path):
    """step2(rows, *options) -> the samples that the command writes for these trajectories; step2.said: what it says."""

    def step2(rows: list, *options, output: str = "out.parquet", expect: int = 0):
        rows = [row if isinstance(row, dict) else row_of(row) for row in rows]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl")
        process = run(STEP2, "plain.jsonl", output, "--dataset-dir", ".", *options, expect=expect)
        step2.said = process.stderr if expect else process.stdout
        return None if expect else read_samples(tmp_path / output)

    return step2


# ---------------------------------------------------------------- what a sample is


def test_each_turn_becomes_one_prefix_sample_without_the_reasoning_of_the_history():
    samples, left_out = to_samples(*step1_columns(step1_row(CONVERSATION)), "drop")
    assert left_out == {}
    assert samples[3] == {
        "instruction": RESPONSE % "t2",
        "input": "",
        "output": "<think>\nr4\n</think>\n\na2",
        "system": "P",
        "history": [["q1", CALL], [RESPONSE % "t1", "a1"], ["q2", CALL]],
        "source": "x.jsonl",
        "trajectory": 0,
        "turns": [8],
        "served_as": "drop",
        "reading": '{"server_style": "vllm", "echo": "none"}',
    }
    assert [sample["turns"][-1] for sample in samples] == [2, 4, 6, 8]
    assert [len(sample["history"]) for sample in samples] == [0, 1, 2, 3]


# ---------------------------------------------------------------- the command


def test_formats_hold_the_same_samples_in_the_same_order_and_a_folder_of_step_1_is_read(step2, run, tmp_path):
    rows = [CONVERSATION, CONVERSATION[:5]]
    parquet, *others = (step2(rows, output="out" + suffix) for suffix in (".parquet", ".jsonl", ".json", ""))
    assert len(parquet) == 6 and others == [parquet] * 3
    run("step1_apply_tool_template.py", "rows.jsonl", "plain/x.jsonl")
    run(STEP2, "plain", "again", "--dataset-dir", ".")
    assert read_samples(tmp_path / "again") == parquet


def test_default_output_has_the_name_of_its_input_and_the_shipped_files_name_that_of_the_readme(run, tmp_path):
    for name in ("mine_plain", "mine_apply_qwen3_template", "mine"):
        write_jsonl(tmp_path / f"{name}.jsonl", [step1_row(CONVERSATION)])
        said = run(STEP2, f"{name}.jsonl").stdout
        assert said.endswith("qwen3_full_sft.yaml dataset=mine_samples\n")
        assert len(read_samples(tmp_path / "mine_samples")) == 4
    assert [*json.loads((tmp_path / "dataset_info.json").read_text())] == ["mine_samples"]
    output = default_output("data/envscaler_plain.jsonl", "_samples")
    assert f"\ndataset: {output.name}\n" in (ROOT / "qwen3_full_sft.yaml").read_text(encoding="utf-8")
    entries = json.loads((ROOT / "dataset_info.json").read_text(encoding="utf-8"))
    assert {name: entry["file_name"] for name, entry in entries.items()} == {
        "envscaler_samples": str(output),
        "envscaler_samples_val": f"{output}_val",
    }


def test_output_is_registered_beside_other_entries(step2, tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "x.json"}}')
    step2([CONVERSATION] * 2, output="sub/out.parquet")
    step2([CONVERSATION], "--dataset-name", "named", output="out.jsonl")
    entries = json.loads((tmp_path / "dataset_info.json").read_text())
    names = "prompt=instruction query=input response=output system=system history=history"
    columns = dict(pair.split("=") for pair in names.split())
    assert entries == {
        "mine": {"file_name": "x.json"},
        "out": {"file_name": "sub/out.parquet", "formatting": "alpaca", "columns": columns},
        "named": {"file_name": "out.jsonl", "formatting": "alpaca", "columns": columns},
    }


@pytest.mark.parametrize("broken", ["{", "[]", "null"])
def test_broken_dataset_info_is_named_and_left_alone(step2, tmp_path, broken):
    (tmp_path / "dataset_info.json").write_text(broken)
    step2([CONVERSATION], expect=1)
    assert "dataset_info.json: not a dataset_info.json" in step2.said
    assert (tmp_path / "dataset_info.json").read_text() == broken and not (tmp_path / "out.parquet").exists()


def test_rows_that_are_not_of_step_1_are_set_aside(run, tmp_path):
    damaged = step1_row(CONVERSATION)
    damaged["served"]["turns"][0]["message"] = 99
    write_jsonl(tmp_path / "x.jsonl", [{"messages": CONVERSATION}, step1_row(CONVERSATION), {"served": 3}, damaged])
    run(STEP2, "x.jsonl", "out.parquet", "--dataset-dir", ".")
    assert [row["row"] for row in read_jsonl(tmp_path / "out.parquet.rejects.jsonl")] == [0, 2, 3]
    errors = run(STEP2, "x.jsonl", "o.parquet", "--strict", expect=1).stderr
    assert (
        "x.jsonl: row 0 (counted from 0): the row is not one of step 1; run step1_apply_tool_template.py first"
        in errors
    )


# ---------------------------------------------------------------- the traps of the JSON formats


EACH, MERGED = [[2], [4], [6], [8]], [[2, 4], [6, 8]]


@pytest.mark.parametrize(
    "options, turns, settings",
    [
        ([], EACH, ""),
        (["--history-thinking", "template"], EACH, " template=qwen3_nothink"),
        (["--history-thinking", "template", "--merge-turns"], MERGED, " template=qwen3_nothink mask_history=false"),
        (["--no-thinking"], EACH, " enable_thinking=false"),
    ],
)
def test_step_2_says_how_many_samples_it_made_and_ends_with_the_command_that_checks_them(
    step2, options, turns, settings
):
    samples = step2([CONVERSATION], *options, output="my samples.parquet")
    assert [sample["turns"] for sample in samples] == turns
    assert f"1 trajectory, 4 turns: {len(turns)} samples" in step2.said
    command = f"next: python {ROOT}/check_training_tokens.py {ROOT}/qwen3_full_sft.yaml 'dataset=my samples'"
    assert step2.said.splitlines()[-1] == command + settings


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["none.jsonl"], "none.jsonl: no such file; run step1_apply_tool_template.py first"),
        (["x.jsonl", "out.txt"], "out.txt: unknown file type '.txt'"),
        (["x.jsonl", "sub/dataset_info.json"], "is LlamaFactory's list of data sets; name another output"),
        (["x.jsonl", "a,b.parquet"], "LlamaFactory separates data sets by commas"),
        (["x.jsonl", "--cutoff-len", "10"], "--cutoff-len and --tokenizer go together"),
        (["x.jsonl", "--cutoff-len", "9", "--tokenizer", "no/such"], "no/such: no tokenizer to be had from this model"),
        (["x.jsonl", "--val-ratio", "1"], "--val-ratio 1.0: is no number from 0 up to, but not, 1"),
        (["x.jsonl", "--val-ratio", "0.999"], "no sample is left to train on; x_samples is not written"),
        (["x.jsonl", "--val-ratio", "0.001"], "no sample is held out; raise --val-ratio, or take another --seed"),
        (["x.jsonl", "--no-thinking", "--history-thinking", "template"], "drop one of the two"),
        (["x.jsonl", "--merge-turns"], "--merge-turns needs --history-thinking template: where the history drops"),
    ],
)
def test_what_cannot_be_followed_is_a_clear_error_and_nothing_is_written(run, tmp_path, arguments, reason):
    write_jsonl(tmp_path / "x.jsonl", [step1_row(CONVERSATION)])
    assert reason in run(STEP2, *arguments, "--dataset-dir", ".", expect=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_settings_follow_from_the_targets_whatever_sample_comes_first():
    assert training_settings("drop", "", True, False) == []
    assert training_settings("drop", "", False, False) == ["template=qwen3_nothink"]
    assert training_settings("no-thinking", "<think>\n", True, False) == ["enable_thinking=false"]
    assert training_settings("no-thinking", "", False, False) == ["template=qwen3_nothink"]
    assert training_settings("template", "<think>\n", True, True) == ["template=null", "mask_history=false"]


# ---------------------------------------------------------------- what is left out on purpose, and what is held out


def turns_of(samples: list[dict]) -> list[tuple]:
    return sorted((sample["trajectory"], turn) for sample in samples for turn in sample["turns"])


NOTHINK = ["template=qwen3_nothink"]


@pytest.mark.parametrize(
    "options, overrides",
    [
        ([], []),
        (["--no-thinking"], ["enable_thinking=false"]),
        (["--history-thinking", "template"], NOTHINK),
        (["--history-thinking", "template", "--merge-turns"], [*NOTHINK, "mask_history=false"]),
    ],
)
def test_samples_that_llamafactory_would_cut_are_left_out_and_listed(
    step2, check, tmp_path, tiny_model, options, overrides
):
    step2([CONVERSATION] * 2, *options)
    [longest] = re.findall(r"the longest sample has (\d+) tokens", check("out", *overrides))
    fitting = step2([CONVERSATION] * 2, *options, "--cutoff-len", longest, "--tokenizer", tiny_model)
    assert turns_of(fitting) == [(trajectory, turn) for trajectory in (0, 1) for turn in (2, 4, 6)]
    listed = read_jsonl(tmp_path / "out.parquet.left_out.jsonl")
    assert [(row["trajectory"], row["turn"]) for row in listed] == [(0, 8), (1, 8)]
    assert listed[0]["reason"] == "their sample does not fit in --cutoff-len"
    assert "PASSED: " in check("out", *overrides, f"cutoff_len={longest}")
    everything = step2([CONVERSATION] * 2, *options, "--cutoff-len", int(longest) + 1, "--tokenizer", tiny_model)
    assert len(turns_of(everything)) == 8 and not (tmp_path / "out.parquet.left_out.jsonl").exists()


SILENT = [user("q"), assistant("a"), user("q2"), assistant("b", "r")]


def test_turns_without_reasoning_are_left_out_where_that_is_asked_for(step2):
    rows = [CONVERSATION, SILENT[:2], SILENT]  # of 4, 1 and 2 turns
    assert turns_of(step2(rows, "--require-reasoning")) == [(0, 2), (0, 4), (0, 6), (0, 8), (2, 3)]
    for line in (
        "3 rows in = 2 rows out as samples + 1 of which all turns are left out + 0 set aside",
        "7 turns in = 5 turns in samples + 2 left out",
        "2 turns left out: they have no reasoning",
    ):
        assert line in step2.said.splitlines()


def test_only_the_last_turn_of_each_row_is_trained_where_that_is_asked_for(step2, tmp_path):
    assert turns_of(step2([CONVERSATION, CONVERSATION[:3], SILENT], "--turns", "last")) == [(0, 8), (1, 2), (2, 3)]
    assert "4 turns left out: they are not the last turn of their row (--turns last)" in step2.said
    assert [row["turn"] for row in read_jsonl(tmp_path / "out.parquet.left_out.jsonl")] == [2, 4, 6, 1]


def numbered(number: int, messages: list = CONVERSATION) -> list:
    return [*messages[:1], user(f"q{number}"), *messages[2:]]


def tasks(*numbers: int) -> list[dict]:
    """Two rows for each task, which differ."""
    return [
        row_of(numbered(copy, CONVERSATION[:5]), task_info={"task_id": f"t{number}"})
        for copy in (0, 1)
        for number in numbers
    ]


@pytest.fixture
def split(step2, tmp_path):
    """split(rows, *options) -> (training, held out): the samples of both sides."""

    def split(rows: list[dict], *options, output: str = "out.parquet") -> tuple[list, list]:
        training = step2(rows, *options, output=output)
        split.said = step2.said
        return training, read_samples(tmp_path / output.replace("out", "out_val"))

    return split


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl", "out"])
def test_validation_set_holds_whole_tasks(split, tmp_path, output):
    training, held_out = split(tasks(*range(20)), "--val-ratio", "0.25", output=output)
    apart = {sample["trajectory"] % 20 for sample in training}, {sample["trajectory"] % 20 for sample in held_out}
    assert not apart[0] & apart[1] and apart[0] | apart[1] == set(range(20)) and 2 <= len(apart[1]) <= 8
    assert turns_of([*training, *held_out]) == [(trajectory, turn) for trajectory in range(40) for turn in (2, 4)]
    entries = json.loads((tmp_path / "dataset_info.json").read_text())
    assert entries["out_val"] == {**entries["out"], "file_name": output.replace("out", "out_val")}
    name = output.replace("out", "out_val")
    said = f"{len(held_out)} of the samples are held out, for validation: {name}, registered as out_val in"
    assert said in split.said


def test_added_rows_move_no_old_ones_to_the_other_side(split):
    def held_out(*numbers: int, seed: int = 1) -> set[int]:
        _, samples = split(tasks(*numbers), "--val-ratio", "0.4", "--seed", seed)
        return {numbers[sample["trajectory"] % len(numbers)] for sample in samples}

    few, many = held_out(*range(10)), held_out(*range(30), 9, 3)
    assert few == {number for number in many if number < 10} and held_out(*range(10), seed=2) != few


def test_rows_of_the_same_content_that_name_no_task_fall_on_one_side(split):
    rows = [row_of(numbered(number % 10)) for number in range(20)]
    rows += [row_of(numbered(number), task_info=json.dumps({"task_id": 7})) for number in range(20, 24)]
    rows += [row_of(numbered(30), task_info=info) for info in (None, "no JSON", {"task_id": None}, 3)]
    training, held_out = split(rows, "--val-ratio", "0.4", "--seed", "1")
    groups = [*range(10), *range(10), *[20] * 4, *[30] * 4]
    apart = [{groups[sample["trajectory"]] for sample in samples} for samples in (training, held_out)]
    assert not apart[0] & apart[1] and apart[0] | apart[1] == set(groups) and 20 in apart[1]


def test_validation_set_passes_the_check_as_eval_dataset(split, check):
    training, held_out = split(tasks(*range(10)), "--val-ratio", "0.4")
    output = check("out", "eval_dataset=out_val")
    assert (
        f"PASSED: {len(training) + len(held_out)} of {len(training) + len(held_out)} samples are exact" in output
        and "out_val: served as drop" in output
    )
    assert f"40 turns in = {len(training)} turns in samples + {len(held_out)} held out + 0 left out\n" in output


@pytest.mark.parametrize(
    "trained, evaluated",
    [
        (row_of(numbered(1), task_info='{"task_id": "t1"}'), row_of(numbered(2), task_info={"task_id": "t1"})),
        (row_of(numbered(1)), {"messages": json.dumps(numbered(1)), "tools": json.dumps(TOOLS)}),
        (
            {"messages": [user("q"), assistant("a", "r")]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r</think>a"}]},
        ),
    ],
)
def test_task_that_is_trained_on_and_evaluated_is_caught(pipeline, finished_check, trained, evaluated):
    for name, row in (("one", trained), ("two", evaluated)):
        pipeline([row], name=name, source=f"{name}.jsonl")
    process = finished_check("one", "eval_dataset=two", expect=1)
    assert " mismatched" not in process.stdout
    assert "FAILED: 1 task is both trained on and evaluated; hold them out by step 2 --val-ratio" in process.stderr


def test_folders_with_dots_have_names_of_their_own(step2, tmp_path):
    for output in ("data.v1", "data.v2"):
        step2([numbered(number) for number in range(10)], "--val-ratio", "0.4", output=output)
    names = "data.v1", "data.v1_val", "data.v2", "data.v2_val"
    entries = json.loads((tmp_path / "dataset_info.json").read_text())
    assert {name: entries[name]["file_name"] for name in entries} == {name: name for name in names}
