"""Train on token trees: the same training as `llamafactory-cli train`, and each token of a trajectory once.

    python train_on_trees.py qwen3_full_sft.yaml [key=value …] [row_tokens=N] [row_samples=N]

Takes the YAML, the overrides and the environment of `llamafactory-cli train` (FORCE_TORCHRUN=1, NNODES, …). It
tokenizes the samples of step 2 as it does; they become rows, in which what samples share is there once; it trains on
these. Loss, optimizer, checkpoints, logs and resuming are its own, and so are the gradients. Before the
first step attention is compared, on the device, with that on single samples: where it is wrong, nothing is trained.

row_tokens: the longest row (default: cutoff_len; on a CPU, where attention takes row × row, 16,384 if that is less).
    Where cutoff_len is near the longest sample, a longer row holds a trajectory whole.
row_samples: the most samples of a row (default: no limit).

gradient_accumulation_steps is set in rows, so that a step holds as many supervised tokens as one of the YAML's.

The one idea: samples of a trajectory begin alike, so they are a tree; a mask shows each token the ones before it in its
own sample, and no others.
"""

import hashlib
import itertools
import logging
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from served_tokens import llamafactory, training
from served_tokens.files.command_line import CommandLine, Took, run
from served_tokens.files.read import checksum
from served_tokens.marks import many
from served_tokens.report.summary import settings_that_fit
from served_tokens.trees.files import Written, own_options, rows_of_step, write_rows
from served_tokens.trees.rows import Sample

ROOT = Path(__file__).resolve().parent
INSTEAD = "train the samples with llamafactory-cli, written with --merge-turns where that is possible"
# Settings, of the YAML or the environment, that trees cannot have, and the way out.
REFUSED = {
    "streaming": "rows are written before they are trained; set streaming=false",
    "val_size": "it holds out samples, and so tears trajectories apart; hold out tasks by step 2 --val-ratio",
    "predict_with_generate": f"a row is no prompt; {INSTEAD}",
    "use_unsloth": f"unsloth has an attention of its own; set use_unsloth=false, or {INSTEAD}",
    "use_kt": f"KTransformers has an attention of its own; {INSTEAD}",
    "mixture_of_depths": f"it leaves out tokens that others see; {INSTEAD}",
    "moe_aux_loss_coef": f"that loss reads the attention mask of padding; {INSTEAD}",
    "use_asft_loss": f"its reference model is given no positions; {INSTEAD}",
    "neftune_noise_alpha": f"its noise depends on the length of a sample, and a row is longer; {INSTEAD}",
    "use_hyper_parallel": f"it trains by its own code; {INSTEAD}",
    "parallelism_config": f"sequence and context parallelism cut rows that a tree joins; {INSTEAD}",
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
ROW_ON_CPU = 16384  # tokens: 1.3 GB of attention
WHOLE_LOGITS = ("compute_accuracy", "use_dft_loss", "use_eaft_loss", "label_smoothing_factor")


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        sys.argv = ["llamafactory-cli", *prepared(sys.argv[1:])]
        start_torchrun() if devices_of_torchrun() else train()
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


def prepared(arguments: list[str]) -> list[str]:
    """Write the rows; takes the arguments of this command, returns those by which LlamaFactory trains on the rows."""
    took, parser = Took(), CommandLine(__doc__)
    logging.disable(logging.WARNING)  # what LlamaFactory says of the settings, it says again when it trains
    add = parser.group("what is read")
    add("yaml", metavar="YAML", help="of the training")
    add("overrides", nargs="*", default=[], metavar="key=value", help="as for llamafactory-cli train, and ours")
    args = parser.parse_args(arguments)
    given, own = own_options(args.overrides)
    config = training.read_config(args.yaml, given)  # before the imports, so that a mistake costs nothing
    import torch

    check_settings(config)
    devices = max(1, devices_of_torchrun())
    overrides = [f"{key}={str(value).lower()}" for key, (value, _) in SET.items()]
    model_args, data_args, training_args = llamafactory.parse_arguments(args.yaml, [*given, *overrides])
    stop_where_nothing_is_done(training_args, math.inf, args, config)
    with llamafactory.refusals():
        check_model(model_args)
    on_gpu = torch.cuda.is_available() and not config.get("use_cpu")
    longest = data_args.cutoff_len if on_gpu else min(data_args.cutoff_len, ROW_ON_CPU)
    limits = {"row_tokens": own.get("row_tokens", longest), "row_samples": own.get("row_samples")}
    took.done("loading")
    place, counts = rows_in_folder(config, model_args, data_args, training_args, limits)
    took.done("rows")
    for split, count in counts.items():
        rows = f"{many(count.rows, 'row')} of at most {limits['row_tokens']:,} (or of one sample)"
        fewer = f"{count.row_tokens:,} in {rows}: {count.tokens / max(1, count.row_tokens):.1f} times fewer"
        print(f"{split}: {count.tokens:,} tokens of {many(count.samples, 'sample')} are {fewer}")
    if not data_args.tokenized_path and max(count.longest for count in counts.values()) >= data_args.cutoff_len:
        sys.exit(f"FAILED: samples may be cut at cutoff_len={data_args.cutoff_len}; raise it, or step 2 --cutoff-len")
    batch = int(config.get("per_device_train_batch_size") or 8)  # LlamaFactory's own default
    samples = batch * training_args.gradient_accumulation_steps * devices
    count = counts.get("train", Written())
    samples_of_row = max(1, count.samples / max(1, count.rows))
    accumulation = rows_of_step(samples, samples_of_row, devices)
    times = f"{accumulation * devices * samples_of_row / samples:.2f} times the supervised tokens of {samples} samples"
    print(f"gradient_accumulation_steps: {many(accumulation, 'row')}: a step holds {times}, on average")
    print(took)
    logging.disable(logging.NOTSET)
    steps_of_epoch = math.ceil(count.rows / devices / accumulation)
    stop_where_nothing_is_done(training_args, steps_of_epoch, args, config, place.stat().st_mtime)
    return [args.yaml, *given, *overrides, f"tokenized_path={place}", f"gradient_accumulation_steps={accumulation}"]


def stop_where_nothing_is_done(training_args, steps_of_epoch: float, args, config: dict, written: float = 0) -> None:
    """Stop where all steps of the training are done in its output_dir; say where it goes on, once that is known."""
    said, afresh = training.earlier_training(training_args, config, steps_of_epoch, written)
    if afresh:
        command = training.training_command(["python", sys.argv[0]], args.yaml, [*args.overrides, afresh], config)
        sys.exit(f"FAILED: {said}\nnext: {command}")
    if said and steps_of_epoch < math.inf:
        print(said)


def check_settings(config: dict) -> None:
    """Stop at settings that trees cannot have; say which are set otherwise."""
    for key, way_out in REFUSED.items():
        if config.get(key) or training.is_enabled(key):
            sys.exit(f"{key}: not on token trees: {way_out}")
    if config.get("mix_strategy", "concat") != "concat":
        sys.exit("mix_strategy: not on token trees: it draws samples of other trajectories between; set it to concat")
    if lacks := training.lacks_a_gpu(config):
        sys.exit(lacks)
    if config.get("deepspeed") and not devices_of_torchrun():
        sys.exit("deepspeed: needs FORCE_TORCHRUN=1 before the command, or deepspeed=null")
    for key, (value, why) in SET.items():
        if config.get(key, value) != value:
            print(f"{key}: {value} instead of {config[key]}: {why}")


def devices_of_torchrun() -> int:
    """On how many devices, of all machines, torchrun trains; 0 where LlamaFactory trains without it."""
    from llamafactory.extras.misc import get_device_count

    if not training.is_enabled("FORCE_TORCHRUN") and get_device_count() <= 1:
        return 0
    return int(os.getenv("NNODES", "1")) * int(os.getenv("NPROC_PER_NODE", str(get_device_count())))


def check_model(model_args) -> None:
    """Stop at models in which a token sees less than all tokens before it, or another way than by attention."""
    from llamafactory.model import load_config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(model_args)
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if not kinds and getattr(text, "sliding_window", None):
        kinds = {"sliding windows"}
    others = ", ".join(sorted(kinds - {"full_attention"}))
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    attends = getattr(model, "_supports_attention_backend", False) and not getattr(model, "_is_stateful", False)
    dropout = getattr(text, "attention_dropout", 0)
    rope = model_args.rope_scaling or (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    problems = {
        "a model of more than text": text is not config,
        f"its layers have {others}, which no mask makes a tree": others,
        "its code does not attend by transformers' AttentionInterface": not attends,
        f"{rope} positions depend on the longest sample of a row": rope in ("dynamic", "longrope"),
        "flex_attention has no dropout; set attention_dropout to 0 in its config, or else": dropout,
    }
    for problem, it_has in problems.items():
        if it_has:
            sys.exit(f"{model_args.model_name_or_path}: not on token trees: {problem}; {INSTEAD}")


def rows_in_folder(config: dict, model_args, data_args, training_args, limits: dict) -> tuple[Path, dict[str, Written]]:
    """Make the samples, and write them as rows; returns where these are, and what is there. See `write_rows`."""
    import datasets

    with llamafactory.refusals():
        sets, tokens = llamafactory.training_sets(model_args, data_args, training_args)
    tokenizer, splits = tokens.tokenizer, {}
    for its in sets:
        if (fit := settings_that_fit(its.provenance, data_args)) and not data_args.tokenized_path:
            tells = "check_training_tokens.py tells whether its samples are exact as it is"
            print(f"{its.name}: {'; '.join(fit)}; {tells}")
        split = "train" if its.trains else "validation"
        if data_args.eval_on_each_dataset and not its.trains:
            split = f"validation_{its.name}"
        splits[split] = itertools.chain(splits.get(split, ()), itertools.starmap(Sample, llamafactory.all_built(its)))
    whole_logits = any(config.get(key) for key in WHOLE_LOGITS)
    made_of = [
        *(checksum(its.path) for its in sets),
        *(checksum(module) for module in sorted(ROOT.glob("served_tokens/**/*.py"))),
        *(version(package) for package in ("llamafactory", "transformers", "tokenizers")),
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer),
        repr((data_args, limits, whole_logits)),
    ]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    place = Path(model_args.cache_dir or datasets.config.HF_DATASETS_CACHE, "token_trees", name).absolute()
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with llamafactory.refusals():
        return place, write_rows(splits, place, limits, padding, whole_logits)


if __name__ == "__main__":
    run(main)
