"""The shipped YAML, and merged samples: the losses and gradients of a tiny random Qwen3."""

import pyarrow.parquet as pq
import pytest
from conftest import REFUND, ROOT, assistant, call, tool, write_jsonl

from served_tokens.llamafactory import parse_arguments
from served_tokens.marks import IGNORE_INDEX

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
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAINS}])
    run("step1_apply_tool_template.py", "rows.jsonl", "plain.jsonl", "--allow-calls-without-tools")
    made = []
    for name, *more in (("prefix",), ("merged", "--merge-turns")):
        options = "--history-thinking", "template", "--dataset-dir", ".", *more
        run("step2_to_alpaca_mask_history.py", "plain.jsonl", f"{name}.parquet", *options)
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


def test_shipped_yaml_is_the_training_that_the_readme_promises(tiny_model):
    model, data, training = parse_arguments(str(ROOT / "qwen3_full_sft.yaml"), [f"dataset_dir={ROOT}"])
    assert (model.model_name_or_path, model.trust_remote_code) == ("Qwen/Qwen3-4B", False)
    assert (data.template, data.mask_history, data.cutoff_len) == ("qwen3", True, 32768)
    assert data.dataset == ["alpaca_mask_history_envscaler_sft_traj_9k"]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 32)
    assert (training.learning_rate, training.num_train_epochs) == (1.0e-6, 3.0)
    assert training.lr_scheduler_type == "cosine" and training.get_warmup_steps(1000) == 100
    text = (ROOT / "qwen3_full_sft.yaml").read_text()
    lines = (
        "dataset_dir: .",
        "deepspeed: deepspeed_zero3.json",
        "bf16: true",
        "plot_loss: true",
        "report_to: none",
        "finetuning_type: full",
    )
    assert all(line in text for line in lines)
