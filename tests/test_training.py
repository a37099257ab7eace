"""The shipped YAML."""

from conftest import ROOT

from served_tokens.llamafactory import parse_arguments


def test_shipped_yaml_is_the_training_that_the_readme_promises(tiny_model):
    model, data, training = parse_arguments(str(ROOT / "qwen3_full_sft.yaml"), [f"dataset_dir={ROOT}"])
    assert (model.model_name_or_path, model.trust_remote_code) == ("Qwen/Qwen3-4B", False)
    assert (data.template, data.mask_history, data.cutoff_len) == ("qwen3", True, 32768)
    assert data.dataset == ["alpaca_mask_history_envscaler_sft_traj_9k"]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 32)
    assert (training.learning_rate, training.num_train_epochs) == (1.0e-6, 3.0)
    assert training.lr_scheduler_type == "cosine" and training.get_warmup_steps(1000) == 100
    text = (ROOT / "qwen3_full_sft.yaml").read_text()
    lines = "deepspeed: deepspeed_zero3.json\nbf16: true\nplot_loss: true\nreport_to: none\nfinetuning_type: full"
    assert all(line in text for line in lines.split("\n"))
