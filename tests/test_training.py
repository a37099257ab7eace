"""Training for real: the shipped YAML, through llamafactory-cli, on a tiny random Qwen3 on the CPU."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import REFUND, ROOT, assistant, call, tool, write_jsonl

from served_tokens.llamafactory import parse_arguments
from served_tokens.marks import IGNORE_INDEX

STEPS = 3
ATTEMPTS = 3
EXIT_RACE = (
    "terminate called without an active exception"  # a worker's native threads at exit, after all is saved: seldom
)
OVERRIDES = [
    "bf16=false",
    "gradient_accumulation_steps=1",
    f"max_steps={STEPS}",
    "preprocessing_num_workers=1",
    "dataloader_num_workers=0",
    "save_strategy=steps",
    "save_steps=2",
    "learning_rate=1.0e-3",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model) -> Path:
    """The shipped YAML and its parts, and the samples of two trajectories of the embedded sample."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("qwen3_full_sft.yaml", "deepspeed_zero3.json", "dataset_info.json"):
        shutil.copy(ROOT / name, folder)
    rows = (ROOT / "data" / "envscaler_sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text(rows[3] + rows[7], encoding="utf-8")  # short ones
    output = json.loads((ROOT / "dataset_info.json").read_text())["alpaca_mask_history_envscaler_sft_traj_9k"][
        "file_name"
    ]
    for script, *arguments in (
        ("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl"),
        ("step2_to_alpaca_mask_history.py", "plain.jsonl", output, "--dataset-dir", "."),
        ("check_training_tokens.py", "qwen3_full_sft.yaml", f"model_name_or_path={tiny_model}"),
    ):
        subprocess.run([sys.executable, ROOT / script, *arguments], cwd=folder, check=True)
    return folder


def train(folder: Path, model: Path, output: str, *overrides, **environment) -> list[float]:
    """Train, and return the losses that LlamaFactory logs."""
    cli = Path(sys.executable).with_name("llamafactory-cli")
    command = [
        cli,
        "train",
        "qwen3_full_sft.yaml",
        f"model_name_or_path={model}",
        f"output_dir={output}",
        *OVERRIDES,
        *overrides,
    ]
    environment = {**os.environ, "PATH": f"{cli.parent}{os.pathsep}{os.environ['PATH']}", **environment}
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder / output, ignore_errors=True)  # LlamaFactory would resume it
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, env=environment)
        if EXIT_RACE not in process.stderr:
            break
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-5000:]
    log = [json.loads(line) for line in (folder / output / "trainer_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


def assert_trained(folder: Path, losses: list[float], model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(losses) == STEPS and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert (folder / "training_loss.png").is_file()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for checkpoint in (folder / "checkpoint-2", folder):
        after = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        assert after.keys() == before.keys() and all(after[name].shape == before[name].shape for name in before)
        assert any(not torch.equal(after[name].float(), before[name].float()) for name in before)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(model))


def test_plain_training_on_one_process(project, tiny_model):
    losses = train(project, tiny_model, "plain", "deepspeed=null")
    assert_trained(project / "plain", losses, tiny_model)


def test_deepspeed_zero3_with_two_processes(project, tiny_model):
    losses = train(project, tiny_model, "zero3", FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert_trained(project / "zero3", losses, tiny_model)


CHAINS = [
    *REFUND,
    assistant("Wait.", "now refund", [call("refund", {"id": "W12"}), call("get", {"id": "W12"})]),
    tool("ok"),
    tool("refunded"),
    assistant("Refunded.", "all done"),
]


@pytest.fixture
def prefix_and_merged(run, tmp_path):
    """The samples of CHAINS, one per turn and one per chain, in the order of the turns."""
    shutil.copy(ROOT / "qwen3_full_sft.yaml", tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAINS}])
    run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", "--allow-calls-without-tools")
    made = []
    for name, *options in (("prefix",), ("merged", "--merge-turns")):
        run(
            "step2_to_alpaca_mask_history.py",
            "plain.jsonl",
            f"{name}.parquet",
            "--history-thinking",
            "template",
            "--dataset-dir",
            ".",
            *options,
        )
        made.append(pq.read_table(tmp_path / f"{name}.parquet").to_pylist())
    return made


def test_losses_and_gradients_of_merged_samples_are_those_of_the_prefix_samples(prefix_and_merged, tiny_model):
    import torch
    from test_exactness import llamafactory
    from transformers import AutoModelForCausalLM

    def turn_losses(samples, mask_history):
        """The loss of each turn, summed over its tokens; the gradient of their sum."""
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
        losses = []
        for sample in samples:
            ids, labels = map(torch.tensor, llamafactory("qwen3_nothink", True, mask_history)(sample))
            logits = model(ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
            loss.sum().backward()
            starts = (labels[1:] != IGNORE_INDEX) & (labels[:-1] == IGNORE_INDEX)
            span = starts.cumsum(0)[labels[1:] != IGNORE_INDEX]
            losses += [loss[labels[1:] != IGNORE_INDEX][span == turn].sum().item() for turn in range(1, span.max() + 1)]
        return losses, {name: parameter.grad for name, parameter in model.named_parameters()}

    prefix, merged = prefix_and_merged
    assert [sample["turns"] for sample in merged] == [[2, 4], [6, 8, 11]] and len(prefix) == 5
    prefix_losses, prefix_gradients = turn_losses(prefix, mask_history=True)
    merged_losses, merged_gradients = turn_losses(merged, mask_history=False)
    assert len(prefix_losses) == 5 and merged_losses == pytest.approx(prefix_losses, rel=1e-9)
    for name, gradient in prefix_gradients.items():
        difference = (gradient - merged_gradients[name]).norm() / gradient.norm()
        assert difference < 1e-6, name  # Qwen3's norms compute in single precision


def test_one_step_of_real_training_is_the_same_on_merged_samples(prefix_and_merged, tmp_path, tiny_model):
    logs = []
    for name, samples, mask_history in zip(("prefix", "merged"), prefix_and_merged, ("true", "false")):
        train(
            tmp_path,
            tiny_model,
            name,
            f"dataset={name}",
            "template=qwen3_nothink",
            f"mask_history={mask_history}",
            f"per_device_train_batch_size={len(samples)}",
            "deepspeed=null",
            "max_steps=1",
            "save_steps=1",
        )
        logs.append(json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_shipped_yaml_is_the_training_that_the_readme_promises(tiny_model):
    argv = sys.argv
    try:
        model, data, training = parse_arguments(str(ROOT / "qwen3_full_sft.yaml"), [])
    finally:
        sys.argv = argv
    assert (model.model_name_or_path, model.trust_remote_code) == ("Qwen/Qwen3-4B", False)
    assert (data.template, data.mask_history, data.cutoff_len, data.dataset_dir) == ("qwen3", True, 32768, ".")
    assert data.dataset == ["alpaca_mask_history_envscaler_sft_traj_9k"]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 32)
    assert (training.learning_rate, training.num_train_epochs) == (1.0e-6, 3.0)
    assert training.lr_scheduler_type == "cosine" and training.get_warmup_steps(1000) == 100
    text = (ROOT / "qwen3_full_sft.yaml").read_text()
    for line in (
        "deepspeed: deepspeed_zero3.json",
        "bf16: true",
        "plot_loss: true",
        "report_to: none",
        "finetuning_type: full",
    ):
        assert line in text
