"""The check FAILS where step 1 loses a text of a row, and says what is neither trained nor shown."""

import copy
import sys

import pytest
from conftest import ROOT, assistant, read_jsonl, write_jsonl
from test_check import arguments
from test_row_texts import CASES, LOSSES, ROW, changed

import step1_apply_tool_template
import step2_to_alpaca_mask_history
from served_tokens.proof import compare as comparison
from served_tokens.proof import findings
from served_tokens.proof import lost as lost_texts
from served_tokens.rows.trajectory import Reading, read_trajectory

SAMPLE = read_jsonl(ROOT / "data" / "envscaler_sample.jsonl")
WAYS = {  # step 2's options, LlamaFactory's overrides
    "drop": ([], []),
    "template": (["--history-thinking", "template"], ["template=qwen3_nothink"]),
    "merged": (["--history-thinking", "template", "--merge-turns"], ["template=qwen3_nothink", "mask_history=false"]),
    "no-thinking": (["--no-thinking"], ["enable_thinking=false"]),
}


@pytest.fixture
def checked(run_check, tmp_path, tiny_model, monkeypatch):
    """checked(rows, way="drop", expect=0) -> what the check of these rows says; all runs in this process."""

    def run(script, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments), "--num-proc", "1"])
        script.main()

    def checked(rows: list[dict], way: str = "drop", expect: int = 0):
        options, overrides = WAYS[way]
        monkeypatch.chdir(tmp_path)
        write_jsonl(tmp_path / "rows.jsonl", rows)
        run(step1_apply_tool_template, "rows.jsonl", "plain.jsonl")
        run(step2_to_alpaca_mask_history, "plain.jsonl", "samples.parquet", "--dataset-dir", ".", *options)
        settings = *arguments(tmp_path, "samples", tiny_model), "preprocessing_num_workers=1", "cutoff_len=100000"
        return run_check(*settings, *overrides, expect=expect)

    return checked


def number_of(what: str, output: str) -> int:
    return int(output.split(f" {what}")[0].split()[-1]) if f" {what}" in output else 0


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_of_the_embedded_sample(checked, way):
    output = checked(SAMPLE[:4], way).stdout
    assert "PASSED: " in output and " lost, texts" not in output
    assert "not trained and not shown: columns steps (4), task_info (4), traj_type (4), user_messages (4)" in output
    assert ("texts not trained: reasoning, by --no-thinking" in output) == (way == "no-thinking")


@pytest.fixture
def read_by(monkeypatch):
    """read_by(broken): step 1 and the check read rows by broken(row) -> row, and all losses are kept."""

    def use(broken) -> None:
        def read(row: dict, *_):
            return read_trajectory(broken(row), Reading(allow_calls_without_tools=True))

        for module in (step1_apply_tool_template, comparison):
            monkeypatch.setattr(module, "read_trajectory", read)
        for module in (lost_texts, findings):
            monkeypatch.setattr(module, "LOSSES_KEPT", 100)

    return use


def only_known(row: dict) -> dict:
    """What was read of a row when step 1 knew one shape alone."""
    known = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
    messages = [{key: value for key, value in message.items() if key in known} for message in row["messages"]]
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
        message["tool_calls"] = [
            {"function": {"arguments": {}, **{k: v for k, v in call_of(call).items() if k in ("name", "arguments")}}}
            for call in message.get("tool_calls") or []
        ]
    return {"messages": messages, "tools": row.get("tools")}


def call_of(call: dict) -> dict:
    return call.get("function", call)


def test_rows_that_were_silently_trained_without_their_texts_fail(checked, read_by):
    read_by(only_known)
    process = checked(read_jsonl(CASES / "00-all-silent-together.jsonl"), expect=1)
    assert " mismatched" not in process.stdout
    texts = number_of("lost, texts", process.stdout)
    assert " of them under tools" in process.stdout and "2 of them under thinking" in process.stdout
    assert f"FAILED: samples: {texts} texts of the trajectories are in no sample that should hold" in process.stderr
    assert [f"rows.jsonl: trajectory {number}: message" in process.stdout for number in range(11)] == (
        [False] + [True] * 10  # the first has no text and no call left, so it is no sample
    )


@pytest.mark.parametrize("way", WAYS)
def test_reading_that_is_broken_on_purpose_fails_key_by_key(checked, read_by, way):
    """Step 1 and the check read the rows alike, so all samples are exact; the rows as they were given tell."""

    def broken(row: dict) -> dict:
        row = copy.deepcopy(row)
        change, _ = LOSSES.get(row.pop("what"), (lambda row: None, ""))
        change(row)
        return row

    read_by(broken)
    process = checked([{**ROW, "what": what} for what in ["right", *LOSSES]], way, expect=1)
    assert " mismatched" not in process.stdout and "in no sample that should hold" in process.stderr
    assert "trajectory 0:" not in process.stdout
    for number, (what, (_, said)) in enumerate(LOSSES.items(), 1):
        lines = [line for line in process.stdout.splitlines() if f"rows.jsonl: trajectory {number}: " in line]
        assert any(said in line for line in lines), what


def test_message_that_is_read_as_no_turn_fails(checked, read_by):
    def broken(row: dict) -> dict:
        messages = [message | {"role": "user"} if k == 2 else message for k, message in enumerate(row["messages"])]
        messages[2].pop("tool_calls"), messages[2].pop("reasoning_content")
        return {**row, "messages": messages}

    read_by(broken)
    output = checked([ROW], expect=1).stdout
    assert "rows.jsonl: trajectory 0: has 3 turns by the roles of its messages, but 2 are read" in output


def test_what_is_lost_is_in_the_report(checked, run_check, tmp_path, tiny_model):
    row = changed(lambda row: row["messages"][2].update(inner_voice="Not <b>this</b>", cost=3))
    checked([{**row, "steps": 4}], expect=1)
    run_check(*arguments(tmp_path, "samples", tiny_model), "--report", "report.html", expect=1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 texts of the trajectories are in no sample" in page and "inner_voice: &#39;Not &lt;b&gt;this" in page
    assert "columns steps (1); message keys cost (1)" in page


def test_texts_of_turns_that_are_left_out_are_counted(checked):
    greeted = [assistant("Hello, how can I help?"), *ROW["messages"][1:]]
    output = checked([{**ROW, "messages": greeted}]).stdout
    assert " lost, texts" not in output and " 1 texts not trained: in turns without a sample" in output
