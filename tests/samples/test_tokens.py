"""Samples of token ids: what is in the folder, what the check finds in it, and who else trains on it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REFUND, ROOT, assistant, read_jsonl, user, write_jsonl
from datasets import Dataset, DatasetDict, load_from_disk

from served_tokens.marks import IGNORE_INDEX

TOOLS = [{"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}]
HISTORY = ["--history-thinking", "template"]
YAML = ROOT / "qwen3_full_sft.yaml"


@pytest.fixture
def ids(run, tmp_path, tiny_model):
    """ids(*options) -> what step 2 says, which makes `ids` of two rows in tmp_path."""

    def ids(*options, expect: int = 0):
        rows = [{"messages": REFUND, "tools": TOOLS}, {"messages": [user("q"), assistant("a", "r")], "tools": None}]
        rows = [{**row, "task_info": {"task_id": str(number)}} for number, row in enumerate(rows)]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl")
        said = run("step2_to_alpaca_mask_history.py", "plain.jsonl", *options, "--tokens", tiny_model, expect=expect)
        return said.stdout + said.stderr

    return ids


@pytest.fixture
def check(run, tiny_model):
    """check(*arguments) -> what the check says of `ids`."""

    def check(*arguments, expect: int = 0) -> str:
        its = (f"model_name_or_path={tiny_model}", "tokenized_path=ids", "template=qwen3_nothink")
        said = run("check_training_tokens.py", YAML, *its, *arguments, expect=expect)
        return said.stdout + said.stderr

    return check


def test_a_merged_sample_supervises_its_turns_and_a_file_says_where_it_comes_from(ids, tmp_path, tokenizer):
    ids("ids", *HISTORY, "--merge-turns")
    first = load_from_disk(str(tmp_path / "ids"))["train"][0]
    supervised = [number for number in first["labels"] if number != IGNORE_INDEX]
    call = '<tool_call>\n{"name": "get", "arguments": {"id": "W12"}}\n</tool_call><|im_end|>\n'
    assert tokenizer.decode(supervised) == (
        f"<think>\nlook it up\n</think>\n\n{call}<think>\ntell them\n</think>\n\nSent.<|im_end|>\n"
    )
    assert [*first] == ["input_ids", "attention_mask", "labels"] and {*first["attention_mask"]} == {1}
    told = pq.read_table(tmp_path / "ids" / "provenance_train.parquet").to_pylist()
    assert [(its["trajectory"], its["turns"], its["served_as"]) for its in told] == [
        (0, [2, 4], "template"),
        (0, [6], "template"),
        (1, [1], "template"),
    ]
    assert {(its["source"], json.loads(its["reading"])["server_style"]) for its in told} == {("rows.jsonl", "vllm")}


def test_tasks_are_held_out_as_a_split_and_long_samples_are_left_out(ids, check, tmp_path):
    said = ids("ids", "--val-ratio", "0.5", "--seed", "5", "--cutoff-len", "279")
    assert "1 of the samples are held out, for validation: its split validation" in said
    splits = load_from_disk(str(tmp_path / "ids"))
    sizes = {split: [len(row["input_ids"]) for row in rows] for split, rows in splits.items()}
    assert sizes == {"train": [225, 243], "validation": [18]}
    reasons = {line["turn"]: line["reason"] for line in read_jsonl(tmp_path / "ids.left_out.jsonl")}
    assert reasons == {6: "their sample does not fit in --cutoff-len", 1: "they are held out, to be evaluated"}
    said = check("--trees", "--report", "page.html")
    assert "PASSED: 3 of 3 samples are exact" in said and "validation: 1 row of token trees" in said
    assert "⟦<think>\nlook it up" in check("--show", "0:2")


@pytest.mark.parametrize(
    "column, at, value, why",
    [
        ("input_ids", 0, 1, "the tokens differ from token 0 of"),
        ("labels", -1, IGNORE_INDEX, "the loss mask differs from token"),
        ("attention_mask", 0, 0, "or hides tokens by its attention_mask; run step 2 again"),
        ("attention_mask", slice(5), [1], "or hides tokens by its attention_mask; run step 2 again"),
    ],
)
def test_token_ids_that_are_not_those_of_step_2_are_caught(ids, check, tmp_path, column, at, value, why):
    ids("ids")
    provenance = tmp_path / "ids" / "provenance_train.parquet"
    rows, kept = load_from_disk(str(tmp_path / "ids"))["train"].to_list(), provenance.read_bytes()
    rows[1][column][at] = value
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(str(tmp_path / "ids"))
    assert "template llama3 ends answers by <|eot_id|>; set template=" in check("template=llama3", expect=1)
    provenance.unlink(missing_ok=True)
    assert "or does not say which turns its samples are of; write it with step 2 --tokens" in check(expect=1)
    provenance.write_bytes(kept)
    assert why in check(expect=1)


@pytest.mark.parametrize(
    "column, value, why",
    [
        ("turns", "2", "holds more or less than input_ids, attention_mask, labels of each sample and where it comes"),
        ("served_as", pa.scalar(None, pa.string()), "sample 0 does not say which turns of which trajectory it is; wr"),
        ("reading", '{"server_style": "x"}', "do not say how step 1 read it, or another version wrote them; run both"),
        ("reading", '{"template_kwargs": 1}', "do not say how step 1 read it, or another version wrote them; run both"),
    ],
)
def test_where_samples_come_from_changed_by_hand_is_an_error_of_one_line(ids, check, tmp_path, column, value, why):
    ids("ids")
    path = tmp_path / "ids" / "provenance_train.parquet"
    told = pq.read_table(path)
    at, values = told.column_names.index(column), pa.repeat(value, len(told))
    pq.write_table(told.set_column(at, column, values), path)
    assert why in check(expect=1)


def test_tokenized_path_that_is_a_list_is_an_error_of_one_line(check):
    assert "tokenized_path=['ids']: is not the name of a folder" in check("tokenized_path=[ids]", expect=1)


@pytest.mark.parametrize(
    "options, why",
    [
        (("ids.parquet",), "ids.parquet: unknown file type '.parquet'; known are none"),
        (("ids", "--tokenizer", "m"), "drop --tokenizer and --dataset-…"),
        (("there",), "there: holds more than Parquet files of these scripts; name another folder"),
        (("pictures",), "pictures: holds folders that are not of these scripts; name another folder"),
    ],
)
def test_what_cannot_be_the_folder_is_a_clear_error_before_the_work(ids, tmp_path, options, why):
    (tmp_path / "there").mkdir()
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    (tmp_path / "there" / "note").touch()
    assert why in ids(*options, expect=1)


def test_trl_trains_on_the_folder_of_the_default_name_as_it_is(ids, tmp_path, tiny_model):
    from trl import SFTConfig, SFTTrainer

    ids(*HISTORY, "--merge-turns")
    rows = load_from_disk(str(tmp_path / "plain_tokens"))["train"]
    settings = {"max_length": None, "max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1}
    config = SFTConfig(str(tmp_path / "saves"), **settings, report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(str(tiny_model), config, train_dataset=rows)
    batches = trainer.get_train_dataloader()
    trained = [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]
    assert sorted(trained) == sorted((row["input_ids"], row["labels"]) for row in rows)
    trainer.train()
    assert [0 < log["loss"] < 20 for log in trainer.state.log_history if "loss" in log] == [True, True]
