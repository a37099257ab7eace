import json
import math
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import HANGS, ROOT, assistant, golden, user, write_jsonl

from served_tokens.llamafactory import parse_arguments
from served_tokens.rows.notes import NO_REASONING
from served_tokens.training import earlier_training, training_command

ROWS = [{"messages": [user("où?"), assistant("là", "pensée")]}]


def test_output_that_the_terminal_cannot_show_is_escaped(process, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{**ROWS[0], "clé": "é"}])
    said = process("step1_apply_tool_template.py", "x.jsonl", "y.jsonl", expect=1, PYTHONIOENCODING="ascii").stderr
    assert "row.cl\\xe9 (1)" in said


@pytest.mark.parametrize("full", [True, False])
def test_full_disk_or_a_pipe_that_is_closed_ends_a_script_without_a_trace(tmp_path, full):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, ROOT / "step1_apply_tool_template.py", "x.jsonl", "y.jsonl"]
    with open("/dev/full" if full else writes, "w") as stdout:
        process = subprocess.run(command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in process.stderr and ("No space left on device" in process.stderr) == full
    assert process.returncode and (tmp_path / "y.jsonl").exists()


def test_name_of_a_data_set_that_is_a_number_and_a_yaml_behind_overrides_are_taken(run, pipeline, tiny_model):
    pipeline(golden()[:3], name="7")
    overrides = "dataset_dir=.", "dataset=7", f"model_name_or_path={tiny_model}", "preprocessing_num_workers=8"
    process = run(
        "check_training_tokens.py", *overrides, ROOT / "qwen3_full_sft.yaml", "tf32=true", "enable_liger_kernel=true"
    )
    assert "PASSED: " in process.stdout
    assert "llamafactory-cli train " in process.stdout.splitlines()[-1]


def test_mistake_in_a_command_is_one_line(process):
    errors = process("step1_apply_tool_template.py", "x", "--num-proc", "none", expect=2).stderr
    assert errors == (
        "step1_apply_tool_template.py: argument --num-proc: 'none' is no whole number above 0 (--help tells the "
        "options)\n"
    )


STEP2 = f"next: python {ROOT}/step2_to_alpaca_mask_history.py 'my rows_apply_qwen3_template.jsonl'"


@pytest.mark.parametrize(
    "reasoning, options, line",
    [("r", [], STEP2), (None, [], f"{STEP2} --no-thinking"), (None, ["--echo", "vllm"], STEP2)],
)
def test_next_lines_lead_to_samples_that_pass_and_without_any_reasoning_to_a_model_that_does_not_think(
    run, tmp_path, tiny_model, reasoning, options, line
):
    write_jsonl(tmp_path / "my rows.jsonl", [{"messages": [user("q"), assistant("a", reasoning)]}])
    said = run("step1_apply_tool_template.py", "my rows.jsonl", *options).stdout
    assert said.splitlines()[-1] == line and (NO_REASONING in said) == (reasoning is None)
    said = run("step2_to_alpaca_mask_history.py", *shlex.split(line)[3:]).stdout
    assert "reasoning" not in said
    check = "check_training_tokens.py", *shlex.split(said.splitlines()[-1])[3:]
    said = run(*check, f"model_name_or_path={tiny_model}", "preprocessing_num_workers=1").stdout
    assert "PASSED: 1 of 1 samples are exact" in said and (NO_REASONING in said) == (options != [])


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_has_a_line_for_each_argument_and_no_option_outside_of_a_group(process, script):
    said = process(script, "--help").stdout
    groups = re.split(r"\n\n(what is read|how the past looks|limits|what else is checked|what is written):\n", said)
    [(_, options)] = re.findall(r"\n(options):\n(.*)", groups[0], re.DOTALL)
    assert options.split() == "-h, --help show this help message and exit".split()
    arguments = re.findall(r"^  (\S.*?)(?:  +(\S.*)|\n {10,}(\S.*))?$", "\n".join(groups[2::2]), re.MULTILINE)
    assert len(arguments) > 1 and all(beside or below for _, beside, below in arguments)


@pytest.mark.parametrize("script", ["check_training_tokens.py", "train_on_trees.py"])
@pytest.mark.parametrize(
    "arguments, environment, says",
    [
        (["none.yaml"], {}, "none.yaml: no such .yaml file"),
        (["bad.yaml"], {}, "bad.yaml, or an override, is no YAML of `key: value`: mapping values are not allowed"),
        (["x.yaml", "dataset=mine"], {}, "data set mine: not in dataset_info.json; set dataset_dir=data"),
        (
            ["x.yaml", "dataset_dir=data", "dataset=nine"],
            {},
            "data set nine: not in data/dataset_info.json; did you mean",
        ),
        (["x.yaml"], {"USE_V1": "1"}, "FAILED: USE_V1=1: that code of LlamaFactory ignores `history`"),
    ],
)
def test_plain_mistakes_are_told_in_one_line_without_the_imports_that_take_long(
    process, tmp_path, script, arguments, environment, says
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {}}')
    (tmp_path / "x.yaml").write_text("dataset_dir: .")
    (tmp_path / "bad.yaml").write_text("a: b\n c: d")
    for name in ("llamafactory", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    errors = process(script, *arguments, expect=1, PYTHONPATH=str(tmp_path), **environment).stderr
    assert errors.startswith(says) and errors.count("\n") == 1


@pytest.mark.parametrize("script", ["step1_apply_tool_template.py", "check_training_tokens.py"])
def test_a_python_without_the_packages_says_what_to_activate(script):
    process = subprocess.run([sys.executable, "-S", ROOT / script], capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("No module named ") and ". .venv/bin/activate" in process.stderr


def test_a_gpu_decides_the_form_of_the_training_command(monkeypatch):
    settings = ["a=b", "bf16=true", "a=c"], {"deepspeed": "x.json", "bf16": True}
    devices = "llamafactory.extras.misc.get_device_count"
    monkeypatch.setattr(devices, lambda: 1)
    assert training_command(["python", "t.py"], "x.yaml", *settings) == (
        "FORCE_TORCHRUN=1 python t.py x.yaml a=c bf16=true"
    )
    monkeypatch.setattr(devices, lambda: 0)
    assert training_command(["lf", "train"], "x.yaml", *settings) == "lf train x.yaml a=c bf16=false deepspeed=null"


def test_what_is_named_next_runs_as_it_is_pasted_to_a_trained_model_and_so_does_the_way_out(run, tmp_path, tiny_model):
    def paste(command: str, expect: int = 0) -> str:
        """Run a command in a shell; returns what it says."""
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        options = {"shell": True, "cwd": tmp_path, "env": {**os.environ, "PATH": path}, "timeout": HANGS}
        process = subprocess.run(command, **options, capture_output=True, text=True)
        assert process.returncode == expect, command + process.stdout + process.stderr
        return process.stdout + process.stderr

    def next_of(said: str) -> str:
        return next(line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: "))

    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    steps = next_of(paste(f"python {ROOT / 'step1_apply_tool_template.py'} rows.jsonl"))
    check = next_of(paste(f"{steps} --cutoff-len 2000 --tokenizer {tiny_model}"))
    train = next_of(paste(f"{check} num_train_epochs=1 preprocessing_num_workers=1 dataloader_num_workers=0 --trees"))
    assert "train_on_trees.py" in train and "attention on token trees is right here" in paste(train)
    done = (
        "FAILED: output_dir: saves/qwen3-4b-full-sft/checkpoint-1 is step 1 of 1, epoch 1.00, on the "
        "rows_samples dataset: LlamaFactory would do nothing; set "
        "output_dir=saves/qwen3-4b-full-sft-2"
    )
    assert done in paste(train, expect=1)
    overrides = shlex.split(train)[3:]
    said = run("check_training_tokens.py", ROOT / "qwen3_full_sft.yaml", *overrides, expect=1).stderr
    assert done in said and next_of(said).startswith("llamafactory-cli train ")
    paste(next_of(said))
    assert (tmp_path / "saves/qwen3-4b-full-sft-2/model.safetensors").is_file()


@pytest.mark.parametrize(
    "state, settings, says",
    [
        ((4, 2.0), {}, "is step 4 of 6, epoch 2.00, on the a and the b datasets: LlamaFactory goes on from there"),
        ((6, 3.0), {}, "would do nothing"),
        ((4, 2.0), {"max_steps": 4}, "would do nothing"),
        ((6, 3.0), {"max_steps": 9}, "goes on"),
        ((6, 3.0), {"overwrite_output_dir": True}, ""),
        ((6, 3.0), {"resume_from_checkpoint": False}, ""),
        ((6, 3.0), {"do_train": False}, ""),
        (None, {}, "holds a model and no checkpoint, so LlamaFactory stops"),
    ],
)
def test_what_a_training_finds_in_its_output_dir_is_told(tmp_path, tiny_model, state, settings, says):
    (tmp_path / "model.safetensors").touch()
    if state:
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-10").mkdir()
        told = {"global_step": state[0], "epoch": state[1], "max_steps": 6}
        (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(told))
    default = {"do_train": True, "max_steps": -1, "num_train_epochs": 3.0, "output_dir": tmp_path}
    default |= {"resume_from_checkpoint": None, "overwrite_output_dir": False}
    arguments = SimpleNamespace(**{**default, **settings})
    (tmp_path / "README.md").write_text("This model is trained on the a and the b datasets.\n")
    said, afresh = earlier_training(arguments, {"dataset": "b, a"})
    assert says in said and bool(said) == bool(says) and ("anew" in said or not said) == (not afresh)
    assert settings or earlier_training(arguments, {}, steps_of_epoch=1)[1].endswith("-2")  # of a smaller data set
    if "goes on" in said:
        of_others = {"dataset": "c"}, {"model_name_or_path": tiny_model}
        assert "goes on" in earlier_training(arguments, {"model_name_or_path": tiny_model})[0]  # a LoRA has no config
        (tmp_path / "checkpoint-10" / "config.json").write_text('{"hidden_size": 1}')
        data, model = (earlier_training(arguments, config, written=math.inf)[0] for config in of_others)
        assert "would go on from there on other data; set output_dir=" in data
        assert "would go on with the weights of another model; set output_dir=" in model
        said = earlier_training(arguments, {"model_name_or_path": "none/such"}, written=math.inf)[0]
        assert "goes on from there, with samples written since then; output_dir=" in said


def test_shipped_yaml_is_the_training_that_the_readme_promises(tiny_model):
    model, data, training = parse_arguments(str(ROOT / "qwen3_full_sft.yaml"), [f"dataset_dir={ROOT}"])
    assert (model.model_name_or_path, model.trust_remote_code) == ("Qwen/Qwen3-4B", False)
    assert (data.template, data.mask_history, data.cutoff_len) == ("qwen3", True, 32768)
    assert data.dataset == ["envscaler_samples"]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 32)
    assert (training.learning_rate, training.num_train_epochs) == (1.0e-6, 3.0)
    assert training.lr_scheduler_type == "cosine" and training.get_warmup_steps(1000) == 100
    text = (ROOT / "qwen3_full_sft.yaml").read_text()
    lines = "deepspeed: deepspeed_zero3.json\nbf16: true\nplot_loss: true\nreport_to: none\nfinetuning_type: full"
    assert all(line in text for line in lines.split("\n"))
