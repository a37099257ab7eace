"""Training for real, by the shipped YAML, on a tiny random Qwen3 on the CPU: LlamaFactory's own, and on token trees."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HANGS, ROOT, assistant, call, run_here, tool, user, write_jsonl
from datasets import load_from_disk
from llamafactory.hparams import ModelArguments
from transformers import BloomConfig, Qwen3Config, RwkvConfig

import train_on_trees
from served_tokens.marks import IGNORE_INDEX
from served_tokens.trees.files import Written, own_options, rows_of_step, write_rows
from served_tokens.trees.rows import Sample

STEPS, TURNS = 4, 3
ATTEMPTS = 3
# A worker's native threads at exit, after all is saved: seldom.
EXIT_RACE = "terminate called without an active exception"
SETTINGS = [
    *("bf16=false", "learning_rate=1.0e-3", "preprocessing_num_workers=1", "dataloader_num_workers=0"),
    *("save_strategy=steps", "save_steps=2", "eval_dataset=held", "eval_strategy=steps", "eval_steps=2"),
    "disable_shuffling=true",  # so that each step has the samples of two trajectories, in order
    *(f"max_steps={STEPS}", f"row_samples={TURNS}"),
]
ONE, TWO = ("deepspeed=null", f"gradient_accumulation_steps={2 * TURNS}"), (f"gradient_accumulation_steps={TURNS}",)
TREES = [sys.executable, str(ROOT / "train_on_trees.py")]
SAMPLES = [str(Path(sys.executable).with_name("llamafactory-cli")), "train"]


def trajectory(name: str) -> dict:
    """Of TURNS turns."""
    messages = [
        {"role": "system", "content": "Serve."},
        user(f"where is {name}?"),
        assistant("", f"look {name} up", [call("get", {"id": name})]),
        tool(f"{name} was sent"),
        assistant("Sent.", "tell them"),
        user("thanks"),
        assistant(f"Ask me about {name} again."),
    ]
    tools = [{"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}]
    return {"messages": messages, "tools": tools}


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model) -> Path:
    """The shipped YAML, four trajectories to train on and one to evaluate."""
    folder = tmp_path_factory.mktemp("trees")
    for name in ("qwen3_full_sft.yaml", "deepspeed_zero3.json"):
        shutil.copy(ROOT / name, folder)
    for name, those in (("samples", ["W1", "order 22", "the parcel", "x"]), ("held", ["my refund"])):
        write_jsonl(folder / "rows.jsonl", [trajectory(one) for one in those])
        run_here(folder, "step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl")
        run_here(folder, "step2_to_alpaca_mask_history.py", "plain.jsonl", f"{name}.parquet", "--dataset-dir", ".")
    return folder


@pytest.fixture(scope="module")
def train(project, tiny_model):
    """train(command, output, *overrides) -> (the losses that are logged, those of the held set, what is printed)

    fails=True: where it is to fail -> the finished process. resume: a checkpoint to go on from.
    """

    def train(command: list, output: str, *overrides, fails=False, resume=None, **environment):
        own = [one for one in SETTINGS if command is TREES or not one.startswith("row_")]
        names = f"model_name_or_path={tiny_model}", "dataset=samples", f"output_dir={output}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        options = {"capture_output": True, "text": True, "timeout": HANGS}
        options["env"] = {**os.environ, "PATH": path, "LLAMAFACTORY_VERBOSITY": "ERROR", **environment}
        for _ in range(ATTEMPTS):
            shutil.rmtree(project / output, ignore_errors=True)
            if resume:
                shutil.copytree(resume, project / output / resume.name)
            process = subprocess.run(
                [*command, "qwen3_full_sft.yaml", *names, *own, *overrides], cwd=project, **options
            )
            if EXIT_RACE not in process.stderr:
                break
        if fails:
            return process
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-5000:]
        log = json.loads((project / output / "trainer_state.json").read_text())["log_history"]
        losses, of_held = ([entry[key] for entry in log if key in entry] for key in ("loss", "eval_loss"))
        return losses, of_held, process.stdout

    return train


def weights_of(folder: Path) -> dict:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def prefix(train, project):
    """Losses of the samples, as LlamaFactory's own command trains them."""
    losses, of_held, _ = train(SAMPLES, "prefix", *ONE)
    assert len(losses) == STEPS and len(of_held) == 2 and losses[-1] < losses[0] - 0.05
    assert (project / "prefix" / "training_loss.png").is_file()
    return losses


@pytest.fixture(scope="module")
def trees(train):
    return train(TREES, "trees", *ONE)


def test_losses_are_those_of_the_same_samples_one_by_one(trees, prefix):
    losses, of_held, printed = trees
    assert losses == pytest.approx(prefix, rel=1e-5)
    assert len(of_held) == 2 and of_held[1] < of_held[0]
    assert "tokens of 12 samples are" in printed and "in 4 rows of" in printed and "tokens of 3 samples are" in printed
    assert "gradient_accumulation_steps: 2 rows: a step holds 1.00 times" in printed
    assert printed.count("attention on token trees is right here: ") == 1


def test_checkpoint_is_a_model_like_any_other(trees, prefix, project):
    ours, theirs = project / "trees", project / "prefix"
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    weights, expected = weights_of(ours), weights_of(theirs)
    assert all((weights[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def test_training_resumes_from_a_checkpoint(trees, train, project):
    losses, _, _ = train(TREES, "resumed", *ONE, resume=project / "trees" / "checkpoint-2")
    assert losses == pytest.approx(trees[0], rel=1e-5)


def test_two_processes_under_zero3(train, prefix, project, tiny_model):
    losses, _, printed = train(TREES, "zero3", *TWO, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert losses == pytest.approx(prefix, rel=1e-4)
    assert printed.count("attention on token trees is right here: ") == 1  # of the first process
    assert "gradient_accumulation_steps: 1 row: a step holds 1.00 times" in printed
    before = weights_of(tiny_model)
    for checkpoint in (project / "zero3" / "checkpoint-2", project / "zero3"):
        after = weights_of(checkpoint)
        assert {name: its.shape for name, its in after.items()} == {name: its.shape for name, its in before.items()}
        assert any((after[name] != before[name]).any() for name in before)


FAULT = """
import sys
if sys.argv[0].endswith("train_on_trees.py"):
    from served_tokens.trees import attention
    dense_mask = attention.dense_mask
    attention.dense_mask = lambda last: dense_mask(last + 1)
"""


def test_no_step_is_trained_where_attention_is_wrong(train, project):
    """The fault is planted by a module that Python imports at its start."""
    (project / "planted").mkdir()
    (project / "planted" / "sitecustomize.py").write_text(FAULT, encoding="utf-8")
    planted = {"PYTHONPATH": f"{project / 'planted'}{os.pathsep}{ROOT}", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    process = train(TREES, "wrong", *TWO, "deepspeed=null", fails=True, **planted)
    lines = [line for line in process.stderr.splitlines() if "attention on token trees is wrong here: torch " in line]
    assert process.returncode == 1 and lines and all("llamafactory-cli train" in line for line in lines)
    assert "Traceback" not in process.stderr.split(lines[0])[0]
    assert "{'loss'" not in process.stdout and not list((project / "wrong").glob("checkpoint-*"))


def test_lora(train):
    lora = (*ONE, "finetuning_type=lora", "lora_target=all", "learning_rate=1.0e-2", "max_steps=2")
    losses, _, _ = train(TREES, "lora", *lora)
    assert losses == pytest.approx(train(SAMPLES, "lora_prefix", *lora)[0], rel=1e-5)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "setting, environment, says",
    [
        ({"streaming": True}, {}, "streaming: not on token trees"),
        ({"val_size": 0.1}, {}, "--val-ratio"),
        ({"use_unsloth": True}, {}, "set use_unsloth=false"),
        ({"neftune_noise_alpha": 5}, {}, "neftune_noise_alpha: not on token trees: .*--merge-turns"),
        ({"parallelism_config": {"cp_size": 2}}, {}, "sequence and context parallelism"),
        ({"mix_strategy": "interleave_under"}, {}, "set it to concat"),
        ({"deepspeed": "x.json"}, {}, "deepspeed=null"),
        ({}, {"USE_RAY": "1"}, "USE_RAY: not on token trees: start it by FORCE_TORCHRUN=1 on each machine"),
    ],
)
def test_settings_that_trees_cannot_have_are_refused_with_the_way_out(setting, environment, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=says):
        train_on_trees.check_settings(setting)


def test_without_a_gpu_the_way_to_train_on_a_cpu_is_told(monkeypatch):
    monkeypatch.setattr("llamafactory.extras.misc.get_device_count", lambda: 0)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    says = "there is no GPU to train on: start it without FORCE_TORCHRUN=1, and with deepspeed=null bf16=false"
    with pytest.raises(SystemExit, match=says):
        train_on_trees.check_settings({"deepspeed": "x.json", "bf16": True})


def test_settings_that_are_set_otherwise_are_told(capsys):
    train_on_trees.check_settings({"flash_attn": "fa2", "neat_packing": True, "per_device_train_batch_size": 4})
    told = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["flash_attn", "neat_packing", "per_device_train_batch_size"]


def test_a_step_has_at_least_one_row_on_each_device():
    assert [rows_of_step(64, samples_of_row, 2) for samples_of_row in (1, 16, 1000)] == [32, 2, 1]


@pytest.mark.parametrize(
    "config, says",
    [
        (Qwen3Config(use_sliding_window=True, sliding_window=64, max_window_layers=1), "sliding_attention"),
        (Qwen3Config(attention_dropout=0.1), "attention_dropout"),
        (Qwen3Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (RwkvConfig(), "AttentionInterface"),
        (BloomConfig(), "AttentionInterface"),
    ],
)
def test_models_that_trees_cannot_train_are_refused(config, says, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=says):
        train_on_trees.check_model(ModelArguments(model_name_or_path=str(tmp_path)))


# ---------------------------------------------------------------- where rows are kept


def test_rows_are_found_again_by_the_same_command_and_made_anew_for_other_settings(monkeypatch, project, tiny_model):
    def place(*overrides: str) -> str:
        """The tokenized_path by which LlamaFactory trains on the rows."""
        names = f"model_name_or_path={tiny_model}", "dataset=samples"
        arguments = train_on_trees.prepared(["qwen3_full_sft.yaml", *names, *SETTINGS, *ONE, *overrides])
        return next(argument for argument in arguments if argument.startswith("tokenized_path="))

    monkeypatch.chdir(project)
    one = place()
    assert len({one, place("row_tokens=128"), place("label_smoothing_factor=0.1")}) == 3
    monkeypatch.setattr(train_on_trees.llamafactory, "all_built", lambda its: map(pytest.fail, ["made again"]))
    assert place() == one


def test_another_run_may_write_the_same_rows_meanwhile(tmp_path, monkeypatch):
    def write_one_row() -> dict:
        samples = [Sample(np.array([1, 2, 3]), np.array([IGNORE_INDEX, 2, 3]))]
        return write_rows({"train": samples}, tmp_path / "rows", {"row_tokens": 128, "row_samples": 1}, 0, False)

    replace = os.replace

    def late(source, target):
        shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert write_one_row() == write_one_row() == {"train": Written(1, 3, 1, 3, 3)}
    assert len(load_from_disk(str(tmp_path / "rows"))["train"]) == 1


def test_an_option_that_is_no_number_is_refused():
    assert own_options(["a=b", "row_tokens=7"]) == (["a=b"], {"row_tokens": 7})
    with pytest.raises(SystemExit, match="row_samples=0"):
        own_options(["row_samples=0"])
