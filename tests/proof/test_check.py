"""check_training_tokens.py says 100 % where LlamaFactory trains on the served tokens, and catches what breaks it."""

import functools
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, assistant, golden, user, write_jsonl

EXACT = {  # ending of the samples: step 2's options, LlamaFactory's overrides
    ".parquet": ([], ["template=qwen3"]),
    ".json": ([], ["template=qwen3_nothink"]),
    ".jsonl": (["--history-thinking", "template"], ["template=qwen3_nothink"]),
    "": (["--no-thinking"], ["template=qwen3", "enable_thinking=false"]),
}
MISSING = "samples: 1 turn or row has no sample and no reason; run both steps again"


def mismatched(output: str) -> int:
    return int(output.split(" mismatched")[0].split()[-1]) if " mismatched" in output else 0


@pytest.fixture
def failed(finished_check):
    """failed(data set, *overrides) -> the finished check, which fails."""
    return functools.partial(finished_check, expect=1)


@pytest.fixture
def breaking(pipeline, tmp_path):
    """breaking(change) -> a data set in which change(sample) has altered each sample after step 2."""

    def breaking(change, rows=(), name="broken"):
        path = tmp_path / f"{pipeline(rows or golden(), name=name)}.parquet"
        table = pq.read_table(path)
        samples = table.to_pylist()
        for sample in samples:
            change(sample)
        pq.write_table(pa.Table.from_pylist(samples, schema=table.schema), path)
        return name

    return breaking


@pytest.mark.parametrize("suffix", EXACT)
def test_golden_cases_are_exact_in_every_mode_and_format(pipeline, check, suffix):
    options, overrides = EXACT[suffix]
    output = check(pipeline(golden(), *options, suffix=suffix), *overrides)
    assert "PASSED: 53 of 53 samples are exact" in output and "54 turns in = 53 turns in samples + 1 left out" in output


def test_data_set_in_which_no_sample_has_a_history_loads_through_llamafactory(pipeline, check):
    rows = [{"messages": [user(f"q{number}"), assistant("a", "r")]} for number in range(3)]
    assert "PASSED: 3 of 3 samples are exact" in check(pipeline(rows, suffix=".json"))


# ---------------------------------------------------------------- each is broken, and caught


def test_template_that_is_wrong_for_the_history_is_caught_and_the_right_one_named(pipeline, failed):
    name = pipeline(golden(), "--history-thinking", "template")
    process = failed(name, "template=qwen3")
    assert mismatched(process.stdout) == 14
    assert process.stderr.splitlines()[-1] == (
        f"FAILED: {name}: 39 of 53 samples are exact, so the model would not be trained on what it is served with; set "
        "template=qwen3_nothink"
    )


def test_thinking_mode_that_is_wrong_for_the_targets_is_caught(pipeline, check):
    assert "the loss mask differs" in check(pipeline(golden(), "--no-thinking"), expect=1)


@pytest.mark.parametrize(
    "override",
    "preserve_thinking=true mask_history=false default_system=hi template=default split_special_tokens=true".split(),
)
def test_setting_that_changes_the_tokens_or_the_mask_is_caught(pipeline, check, override):
    assert mismatched(check(pipeline(golden()), override, expect=1)) > 0


def test_cutoff_that_cuts_samples_is_caught(pipeline, check):
    output = check(pipeline(golden()), "cutoff_len=400", expect=1)
    cut = int(output.split(" over cutoff_len")[0].split()[-1])
    assert 0 < cut <= 53 and mismatched(output) == 0


@pytest.mark.parametrize(
    "override, said",
    [
        ("packing=true", "packing without neat_packing"),
        ("ignore_pad_token_for_loss=false", "ignore_pad_token_for_loss is false"),
        ("template=chatml", "template chatml puts a chat template of its own into the trained model"),
    ],
)
def test_setting_that_acts_after_the_samples_are_built_is_caught(pipeline, failed, override, said):
    process = failed(pipeline(golden(), "--history-thinking", "template"), "template=qwen3_nothink", override)
    assert said in process.stderr


def test_packing_that_keeps_samples_apart_passes(pipeline, check):
    assert "PASSED: " in check(pipeline(golden()), "packing=true", "neat_packing=true")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda table: pa.concat_tables([table, table.slice(0, 2)]), "2 turns are trained more than once"),
        (lambda table: table.slice(1), MISSING),
        (lambda table: table.filter(pc.not_equal(table["trajectory"], 4)), MISSING),
    ],
    ids=["samples twice", "a turn missing", "a trajectory missing"],
)
def test_samples_that_are_there_twice_or_missing_without_a_reason_are_caught(pipeline, failed, tmp_path, change, said):
    path = tmp_path / f"{pipeline(golden())}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    process = failed("samples")
    assert mismatched(process.stdout) == 0 and f"FAILED: {said}" in process.stderr


def test_chat_template_of_another_model_is_caught(pipeline, check, tmp_path):
    template = (ROOT / "chat_templates/qwen3.jinja").read_text(encoding="utf-8").replace("# Tools", "# Functions")
    (tmp_path / "other.jinja").write_text(template, encoding="utf-8")
    pipeline(golden(), name="other", step1=["--chat-template", "other.jinja"])
    assert mismatched(check("other", expect=1)) == 33


# ---------------------------------------------------------------- how it is used


def test_trajectories_that_are_not_there_or_others_are_named(pipeline, failed, tmp_path):
    name = pipeline(golden())
    (tmp_path / "rows.jsonl").unlink()
    assert "rows.jsonl: is not there, and step 1 read it; name it by --trajectories FILE" in failed(name).stderr
    write_jsonl(tmp_path / "few.jsonl", golden()[:3])
    assert "few.jsonl: has no usable row 3" in failed(name, "--trajectories", "few.jsonl").stderr


def test_max_samples_gives_a_quick_look(pipeline, check):
    output = check(pipeline(golden()), "--max-samples", "5")
    assert "PASSED for 5 of 53 samples, which are exact" in output and "left out: max_samples is 5" in output


def test_data_set_that_step_2_did_not_write_is_named(failed, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"instruction": "q", "output": "a", "history": [["a", "b"]]}])
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    entry = {"x": {"file_name": "x.jsonl", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    assert "data set x: no column reading, served_as, source, trajectory, turns" in failed("x").stderr


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["train_on_prompt=true"], "LlamaFactory refuses these settings: ValueError: `mask_history` is"),
        (["template=qwen_3"], "template=qwen_3: LlamaFactory has no such template; did you mean qwen3?"),
        (["cutof_len=4"], "cutof_len: LlamaFactory has no such setting; did you mean cutoff_len?"),
        (["cutoff_len=4k"], "cutoff_len=4k: is not a whole number"),
        ([f"output_dir={__file__}/x"], f"output_dir={__file__}/x: {__file__} is a file; set output_dir to a folder"),
        (["cutoff_len=4.5"], "cutoff_len=4.5: is not a whole number"),
        (["gradient_accumulation_steps=0"], "gradient_accumulation_steps=0: must be above 0"),
        (["bf16=flase"], "bf16=flase: is not true or false"),
        (["model_name_or_path=/none"], "/none: no tokenizer to be had; set model_name_or_path to a model's folder, or"),
    ],
)
def test_setting_that_llamafactory_refuses_is_a_clear_error(pipeline, failed, overrides, reason):
    assert failed(pipeline(golden()[:1]), *overrides).stderr.removeprefix("loading LlamaFactory …\n").startswith(reason)


def test_cause_of_samples_that_differ_is_named(pipeline, failed, tmp_path):
    template = (ROOT / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    (tmp_path / "other.jinja").write_text(template.replace("# Tools", "# The tools"), encoding="utf-8")
    name, step1 = pipeline(golden()), ["--chat-template", "other.jinja"]
    assert "template llama3 writes no <|im_start|>; set template=qwen3" in failed(name, "template=llama3").stderr
    said = failed(pipeline(golden(), name="others", step1=step1)).stderr
    assert "step 1 took another --chat-template than " in said and "tiny_qwen3" in said
    others = [{**case, "messages": [*case["messages"][:-1], assistant("else")]} for case in golden()]
    write_jsonl(tmp_path / "rows.jsonl", others)
    said = failed(name).stderr
    assert "rows.jsonl has changed since step 1 read it; run both steps again" in said
    assert "PASSED" in failed(pipeline(others), expect=0).stdout


def test_several_data_sets_and_an_evaluation_set_are_checked_each(pipeline, check, failed):
    others = [{**case, "messages": [*case["messages"], user("bye")]} for case in golden()]
    for name, rows in (("one", golden()), ("two", golden()), ("three", others)):
        pipeline(rows, name=name, source=f"{name}.rows.jsonl")
    assert "PASSED: 159 of 159 samples are exact" in check("one,two", "eval_dataset=three", "eval_strategy=epoch")
    process = failed("one,two", "mix_strategy=interleave_over", "interleave_probs=0.5,0.5")
    assert "FAILED: mix_strategy interleave_over draws some samples more than once" in process.stderr


def test_one_sample_of_two_data_sets_is_shown(pipeline, check):
    rows = golden("one_turn_no_tools")
    pipeline(rows, name="one"), pipeline(rows, name="two")
    output = check("one,two", "--show", "0:2")
    assert output.count("rows.jsonl: row 0, turn 2: ") == 2 and "PASSED" not in output


def test_prompt_with_several_targets_is_counted_and_fails_where_a_past_turn_has_lost_its_reasoning(checked):
    def asked(*turns) -> list[dict]:
        return [{"messages": [user("q"), turn]} for turn in turns]

    one, other = assistant("a", "so it is"), assistant("b", "so it is")
    output = checked(asked(one, other, one, assistant("a", "or so"))).stdout
    first = "row 0, turn 1, and row 1, turn 1"
    assert f" 2 of the prompts are answered in two ways by the rows: {first}" in output
    both = asked(one, assistant("a"))
    assert "PASSED" in checked(both).stdout
    log = [both[0], {"messages": [*both[1]["messages"], user("and?"), assistant("c", "r")]}]
    for rows, places in ((log, (0, 1)), (log[::-1], (1, 0))):
        assert (
            "FAILED: samples: 1 prompt is trained both with and without reasoning to the same answer "
            f"(row {places[0]}, turn 1, and row {places[1]}, turn 1)"
        ) in checked(rows, expect=1).stderr
    assert "PASSED" in checked(asked(one, assistant("a")), ["--no-thinking"], ["enable_thinking=false"]).stdout


def test_merged_sample_that_lacks_a_turn_it_names_is_caught(breaking, check):
    def claim(sample):
        sample["turns"] = {2: [2, 4, 6]}.get(sample["turns"][0], sample["turns"])

    rows = golden("two_queries_tool_chains")
    assert mismatched(check(breaking(claim, rows), expect=1)) == 1


NOT_TOLD = "its samples do not say how step 1 read it, or another version wrote them"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"turns": []}, "sample 0 does not say which turns of which trajectory it is"),
        ({"reading": "{"}, NOT_TOLD),
        ({"reading": '{"xq7": 1}'}, NOT_TOLD),
    ],
)
def test_sample_that_does_not_say_what_it_is_of_is_named(breaking, failed, change, said):
    assert said in failed(breaking(lambda sample: sample.update(change), golden()[:1])).stderr


def test_turns_left_out_keep_their_reason_for_validation_and_for_a_file_named_by_trajectories(
    pipeline, check, tmp_path, tiny_model
):
    rows = [
        {"messages": [user(f"q{number}"), assistant("a", "r"), user("q " * 300), assistant("b", "s")]}
        for number in range(12)
    ]
    rows.append({"messages": [user("q"), {**assistant("a"), "weight": 0}]})
    name = pipeline(rows, "--val-ratio", "0.4", "--cutoff-len", "300", "--tokenizer", tiny_model)
    assert "step 2 does not say why" not in check(name, f"eval_dataset={name}_val", "cutoff_len=300")
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    output = check(name, "cutoff_len=300", "--trajectories", "moved.jsonl")
    assert "13 rows in = 13 rows checked for samples + 0 set aside" in output
    assert "1 left out: their weight, loss or train" in output and "does not say why" not in output


def test_turn_that_the_chat_template_of_the_model_refuses_is_a_mismatch(pipeline, check, tmp_path):
    import tiny_qwen3
    from transformers import Qwen3Config

    template = (ROOT / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    refuse = (
        "{%- for message in messages[1:] if message.role == 'system' -%}{{- raise_exception('no') -}}{%- endfor -%}"
    )
    tiny_qwen3.build_tokenizer(template + refuse).save_pretrained(tmp_path / "model")
    Qwen3Config().save_pretrained(tmp_path / "model")
    output = check(pipeline(golden()), f"model_name_or_path={tmp_path / 'model'}", expect=1)
    assert mismatched(output) == 1 and "the model's chat template refuses it: no" in output
