"""Train on token trees: the same training as `llamafactory-cli train`, and each token of a trajectory once.

    python train_on_trees.py qwen3_full_sft.yaml [key=value …] [row_tokens=N] [row_samples=N] [row_accumulation=N]

Takes the YAML, the overrides and the environment of `llamafactory-cli train` (FORCE_TORCHRUN=1, NNODES, …). It
tokenizes the samples of step 2 as ever; they become rows, in which what samples share is there once; LlamaFactory
trains on these. Loss, optimizer, checkpoints, logs and resuming are its own, and so are the gradients. Before the
first step attention is compared, on the device, with that on single samples: where it is wrong, nothing is trained.

row_tokens: the longest row (default: cutoff_len; on a CPU, where attention takes row × row, one of each trajectory).
    Where cutoff_len is near the longest sample, a longer row holds a trajectory whole.
row_samples: the most samples of a row (default: no limit).
row_accumulation: gradient_accumulation_steps, in rows. By default it is set so that a step holds as many supervised
    tokens as one of the YAML's.

The one idea: samples of a trajectory begin alike, so they are a tree; a mask shows each token the ones before it in its
own sample, and no others.
"""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from served_tokens import llamafactory
from served_tokens.files.command_line import CommandLine, run
from served_tokens.report.cost import Schedule, training_cost
from served_tokens.trees.files import (
    LONGEST,
    ROW_TOKENS,
    ROWS,
    SAMPLES,
    SUPERVISED,
    TOKENS,
    accumulated_rows,
    own_options,
    write_rows,
)

INSTEAD = "train the samples with llamafactory-cli, written with --merge-turns where that is possible"
# What cannot be, and the way out.
REFUSED = {
    "streaming": "rows are written before they are trained; set streaming=false",
    "tokenized_path": "the rows are kept there; leave it out",
    "train_on_prompt": f"rows supervise what step 2 supervises; {INSTEAD}",
    "val_size": "it holds out samples, and so tears trajectories apart; hold out tasks by step 2 --val-ratio",
    "predict_with_generate": f"a row is no prompt; {INSTEAD}",
    "do_predict": f"a row is no prompt; {INSTEAD}",
    "use_unsloth": f"unsloth has an attention of its own; set use_unsloth=false, or {INSTEAD}",
    "use_kt": f"KTransformers has an attention of its own; {INSTEAD}",
    "shift_attn": f"it shifts the tokens that see each other; set shift_attn=false, or {INSTEAD}",
    "mixture_of_depths": f"it leaves out tokens that others see; {INSTEAD}",
    "moe_aux_loss_coef": f"that loss reads the attention mask of padding; {INSTEAD}",
    "use_asft_loss": f"its reference model is given no positions; {INSTEAD}",
    "neftune_noise_alpha": f"its noise depends on the length of a sample, and a row is longer; {INSTEAD}",
    "use_hyper_parallel": f"it trains by its own code; {INSTEAD}",
    "parallelism_config": f"sequence and context parallelism cut rows that a tree joins; {INSTEAD}",
}
REFUSED_IN_ENVIRONMENT = {
    "USE_RAY": "start it by FORCE_TORCHRUN=1 on each machine",
    "USE_MCA": INSTEAD,
    "USE_KT": INSTEAD,
}
# What is set otherwise, and why.
SET = {
    "flash_attn": ("sdpa", "only a mask of their own shows trees; it is flex_attention on a GPU, sdpa on a CPU"),
    "packing": (False, "a row holds several trajectories already"),
    "neat_packing": (False, "a row holds several trajectories already"),
    "per_device_train_batch_size": (1, "a batch is one row; samples are counted by gradient_accumulation_steps"),
    "per_device_eval_batch_size": (1, "a batch is one row"),
}
DENSE = 5  # bytes for each pair of tokens: the mask, and torch's copy of it in float32; measured, 3 in bf16
MUCH = 4e9  # bytes
WHOLE_LOGITS = ("compute_accuracy", "use_dft_loss", "use_eaft_loss", "label_smoothing_factor")


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        yaml, given, own = parsed_arguments(sys.argv[1:])
        arguments = [yaml, *given, *prepared(yaml, given, own)]
        refuse_spaces(arguments)
        sys.argv = ["llamafactory-cli", *arguments]
        start_torchrun() if starts_torchrun() else train()
    elif any(argument.startswith("tokenized_path=") for argument in sys.argv):
        train()  # in one of the processes that torchrun started
    else:
        sys.exit("train_on_trees.py starts torchrun by itself; run it with python, and FORCE_TORCHRUN=1")


def train() -> None:
    """LlamaFactory trains by the arguments of this process."""
    from llamafactory.train.tuner import run_exp

    from served_tokens.trees.attention import use_tree_attention
    from served_tokens.trees.self_check import SelfCheck

    use_tree_attention()
    run_exp(callbacks=[SelfCheck()])


def start_torchrun() -> None:
    """LlamaFactory's launcher starts this file in each process, and ends this one."""
    from llamafactory import launcher

    launcher.__file__ = os.path.relpath(__file__)
    sys.argv.insert(1, "train")
    try:
        launcher.launch()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the processes have said what is wrong


def parsed_arguments(arguments: list[str]) -> tuple[str, list[str], dict[str, int]]:
    """(the YAML, the overrides for LlamaFactory, ours)"""
    parser = CommandLine(__doc__)
    parser.add_argument("yaml", metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for llamafactory-cli train, and ours")
    args = parser.parse_args(arguments)
    return args.yaml, *own_options(args.overrides)


def prepared(yaml: str, given: list[str], own: dict[str, int]) -> list[str]:
    """Write the rows; returns the overrides by which LlamaFactory trains on them."""
    config = llamafactory.read_config(yaml, given)
    devices = check_settings(config)
    overrides = [f"{key}={str(value).lower()}" for key, (value, _) in SET.items()]
    model_args, data_args, training_args = llamafactory.parse_arguments(yaml, [*given, *overrides])
    with llamafactory.refusals():
        check_model(model_args)
    limits = {"row_tokens": own.get("row_tokens", data_args.cutoff_len), "row_samples": own.get("row_samples")}
    limits["apart"] = "row_tokens" not in own and not on_gpu(config)
    place, counts = rows_in_folder(config, model_args, data_args, training_args, limits)
    if not on_gpu(config):
        warn_of_dense_attention(max((count[LONGEST] for count in counts.values()), default=0))
    batch = config.get("per_device_train_batch_size") or 8  # LlamaFactory's own default
    samples = int(batch) * training_args.gradient_accumulation_steps * devices
    accumulation = say_what_is_trained(counts, training_args, samples, devices, own.get("row_accumulation"))
    return [*overrides, f"tokenized_path={place}", f"gradient_accumulation_steps={accumulation}"]


def check_settings(config: dict) -> int:
    """Stop at settings that trees cannot have, say which are set otherwise; returns the number of devices."""
    from llamafactory.extras.misc import get_device_count, is_env_enabled

    for key, way_out in REFUSED.items():
        if config.get(key):
            sys.exit(f"{key}: not on token trees: {way_out}")
    for key, way_out in REFUSED_IN_ENVIRONMENT.items():
        if is_env_enabled(key):
            sys.exit(f"{key}: not on token trees: {way_out}")
    if config.get("mix_strategy", "concat") != "concat":
        sys.exit("mix_strategy: not on token trees: it draws samples of other trajectories between; set it to concat")
    for key, (value, why) in SET.items():
        if config.get(key, value) != value:
            print(f"{key}: {value} instead of {config[key]}: {why}")
    if starts_torchrun():
        devices = int(os.getenv("NNODES", "1")) * int(os.getenv("NPROC_PER_NODE", str(get_device_count())))
        return devices or sys.exit("FORCE_TORCHRUN: there is no GPU to start a process for; set NPROC_PER_NODE too")
    if config.get("deepspeed"):
        sys.exit("deepspeed: needs FORCE_TORCHRUN=1 before the command, or deepspeed=null")
    return 1


def starts_torchrun() -> bool:
    """Whether LlamaFactory's launcher does."""
    from llamafactory.extras.misc import get_device_count, is_env_enabled

    return is_env_enabled("FORCE_TORCHRUN") or get_device_count() > 1


def refuse_spaces(arguments: list[str]) -> None:
    """Stop at arguments that LlamaFactory's launcher would tear into several for torchrun."""
    torn = [argument for argument in arguments if len(argument.split()) != 1]
    if torn and starts_torchrun():
        sys.exit(f"{torn[0]}: torchrun takes no space; name it without (the folder of rows: by HF_DATASETS_CACHE)")


def check_model(model_args) -> None:
    """Stop at models in which a token sees less than all tokens before it, or another way than by attention."""
    from llamafactory.model import load_config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(model_args)
    name, text = model_args.model_name_or_path, config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if text is not config:
        sys.exit(f"{name}: not on token trees: a model of more than text; {INSTEAD}")
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        which = ", ".join(sorted(kinds - {"full_attention"})) or "sliding windows"
        sys.exit(f"{name}: not on token trees: its layers have {which}, which no mask makes a tree; {INSTEAD}")
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(model, "_is_stateful", False) or not getattr(model, "_supports_attention_backend", False):
        sys.exit(f"{name}: not on token trees: its code does not attend by transformers' AttentionInterface; {INSTEAD}")
    rope = model_args.rope_scaling or (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        sys.exit(f"{name}: not on token trees: {rope} positions depend on the longest sample of a row; {INSTEAD}")
    if getattr(text, "attention_dropout", 0):
        sys.exit(f"{name}: not on token trees: flex_attention has no dropout; set attention_dropout to 0 in its config")


def on_gpu(config: dict) -> bool:
    import torch

    return torch.cuda.is_available() and not config.get("use_cpu")


def rows_in_folder(config: dict, model_args, data_args, training_args, limits: dict) -> tuple[Path, dict]:
    """LlamaFactory tokenizes the samples, and they are written as rows; see `write_rows`."""
    import datasets
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    with contextlib.redirect_stdout(io.StringIO()), llamafactory.refusals():  # LlamaFactory prints whole samples
        tokenizer_module = load_tokenizer(model_args)
        tokenizer = tokenizer_module["tokenizer"]
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
        made = get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer_module)
    evaluated = made.get("eval_dataset")
    by_name = evaluated if isinstance(evaluated, dict) else {"": evaluated} if evaluated is not None else {}
    built = {"train": made["train_dataset"]} if "train_dataset" in made else {}
    built |= {f"validation_{name}".removesuffix("_"): dataset for name, dataset in by_name.items()}
    folder = Path(model_args.cache_dir or datasets.config.HF_DATASETS_CACHE, "token_trees").absolute()
    whole_logits = any(config.get(key) for key in WHOLE_LOGITS)
    return write_rows(built, folder, limits, tokenizer.pad_token_id, whole_logits)


def warn_of_dense_attention(longest: int) -> None:
    """Say what attention takes of memory on a CPU, where that is much. `longest`: tokens of a row."""
    if (size := DENSE * longest**2) > MUCH:
        print(
            f"warning: without a GPU attention takes row × row: about {size / 1e9:.0f} GB for the longest row "
            f"({longest:,} tokens), besides the model; row_samples= and row_tokens= make rows shorter"
        )


def say_what_is_trained(counts: dict, training_args, samples: int, devices: int, accumulation: int | None) -> int:
    """Print what the rows save and what a step holds; returns how many rows of a device a step has.

    Args:
        samples: of a step by the YAML.
        accumulation: what the user wants.
    """
    for split, count in counts.items():
        fewer = count[TOKENS] / max(1, count[ROW_TOKENS])
        print(
            f"{split}: {count[SAMPLES]:,} samples of {count[TOKENS]:,} tokens in {count[ROWS]:,} rows of "
            f"{count[ROW_TOKENS]:,}: {fewer:.1f} times fewer tokens"
        )
    if not (count := counts.get("train")):
        return 1
    a_row = count[SAMPLES] / max(1, count[ROWS])
    set_to = accumulation or accumulated_rows(samples, a_row, devices)
    part = set_to * devices * a_row / samples
    schedule = Schedule(training_args.num_train_epochs, training_args.max_steps, 1, set_to, devices)
    cost = training_cost(count[ROWS], count[ROW_TOKENS], count[SUPERVISED], schedule)
    print(
        f"gradient_accumulation_steps: {set_to} rows: a step holds {part:.2f} times the supervised tokens that "
        f"{samples} samples hold on average; {cost['steps']} steps"
    )
    if not accumulation and part > 1.5:
        print(
            f"  rows are too long for steps of {samples} samples: row_samples={max(1, samples // devices)} limits them"
        )
    return set_to


if __name__ == "__main__":
    run(main)
