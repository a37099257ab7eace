"""A training by LlamaFactory as a YAML and overrides have it, mostly seen without its import, which takes long."""

import contextlib
import difflib
import itertools
import json
import math
import os
import re
import shlex
import sys
import typing
from pathlib import Path

INFO = "dataset_info.json"
ON_A_CPU = {"deepspeed": "null", "bf16": "false", "fp16": "false", "tf32": "null"}  # what only a GPU can, switched off
NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}


def is_enabled(variable: str) -> bool:
    """Whether LlamaFactory takes a variable of the environment for set."""
    return os.getenv(variable, "0").lower() in ("true", "y", "1")


def meant(word: str, known) -> str:
    """What to add to an error about a word that is not known."""
    near = difflib.get_close_matches(word, known, 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""


def read_config(yaml: str, overrides: list[str]) -> dict:
    """The settings of `llamafactory-cli train`, as it reads them; ends where they can be seen to be wrong."""
    from omegaconf import OmegaConf

    if is_enabled("USE_V1"):
        sys.exit("FAILED: USE_V1=1: that code of LlamaFactory ignores `history`, so it trains other samples; unset it")
    if not Path(yaml).is_file() or Path(yaml).suffix not in (".yaml", ".yml"):
        sys.exit(f"{yaml}: no such .yaml file")
    try:
        config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(yaml), OmegaConf.from_cli(overrides)))
    except Exception as error:  # of two libraries, of many kinds
        sys.exit(f"{yaml}, or an override, is no YAML of `key: value`: {' '.join(str(error).split())}")
    folder = Path(str(config.get("output_dir") or "."))
    for path in (folder, *folder.parents):
        if path.is_file():
            sys.exit(f"output_dir={folder}: {path} is a file; set output_dir to a folder")
    if not isinstance(tokenized := config.get("tokenized_path") or "", str):
        sys.exit(f"tokenized_path={tokenized}: is not the name of a folder; write one that is a number as ./2024")
    if tokenized and Path(tokenized).exists():
        return config  # LlamaFactory looks for no data set then
    for key in ("dataset", "eval_dataset"):
        if isinstance(config.get(key), (int, float)):  # a name that is a number
            config[key] = str(config[key])
        for name in data_sets_of(config, key):
            _find_data_set(name, str(config.get("dataset_dir", "data")))
    return config


def data_sets_of(config: dict, key: str = "dataset") -> list[str]:
    """The names of the data sets in a setting."""
    names = config.get(key) or []
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def _find_data_set(name: str, folder: str) -> None:
    """Stop where LlamaFactory would not find a data set, with the folder or the name that may be meant."""
    known = {Path(folder): []}
    for info in [Path(folder, INFO), Path(INFO), *sorted(Path().glob(f"*/{INFO}"))]:
        with contextlib.suppress(OSError, ValueError):
            known[info.parent] = [*json.loads(info.read_text(encoding="utf-8"))]
    if name not in known[Path(folder)] and not folder.startswith(("ONLINE", "REMOTE:")):
        others = [f"; set dataset_dir={place}" for place, names in known.items() if name in names]
        near = meant(name, known[Path(folder)]) or "; set dataset_dir to the folder that step 2 named"
        sys.exit(f"data set {name}: not in {Path(folder, INFO)}{[*others, near][0]}")


def refuse_mistakes(config: dict) -> None:
    """Stop at a key or a template that LlamaFactory does not know, and at a text where it takes a number."""
    print("loading LlamaFactory …", file=sys.stderr, flush=True)
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams.parser import _TRAIN_ARGS

    kinds = {key: kind for of in _TRAIN_ARGS for key, kind in typing.get_type_hints(of).items()}
    for key, value in config.items():
        if key not in kinds and not is_enabled("ALLOW_EXTRA_ARGS"):
            sys.exit(f"{key}: LlamaFactory has no such setting{meant(key, kinds)}")
        takes = {kinds.get(key), *typing.get_args(kinds.get(key))}
        if type(value) in {str, float} - takes and (of := takes & NUMBERS.keys()):
            sys.exit(f"{key}={value}: is not {' or '.join(NUMBERS[one] for one in of)}")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if isinstance(value := config.get(key), int) and value < 1:
            sys.exit(f"{key}={value}: must be above 0")
    if (template := config.get("template")) not in {None, *TEMPLATES}:
        sys.exit(f"template={template}: LlamaFactory has no such template{meant(template, TEMPLATES)}")


def earlier_training(args, config: dict, steps_of_epoch: float = math.inf, written: float = 0) -> tuple[str, str]:
    """(what LlamaFactory would go on from, in its output_dir; the override to begin anew, where it must be set)

    It must where LlamaFactory would do nothing, or go on from a training of another model or on other data sets. Both
    are "" where there is nothing, or no look at it. steps_of_epoch: at the most; written: when the samples were.
    """
    folder = Path(args.output_dir)
    if not args.do_train or args.resume_from_checkpoint is not None or args.overwrite_output_dir:
        return "", ""
    names = (f"{folder}-{number}" for number in itertools.count(2))
    afresh = next(f"output_dir={name}" for name in names if not Path(name).exists())
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    models = [path for pattern in ("*model.safetensors*", "*model.bin*") for path in folder.glob(pattern)]
    if models and not numbers:
        return f"output_dir: {folder} holds a model and no checkpoint, so LlamaFactory stops; set {afresh}", afresh
    last = folder / f"checkpoint-{max(numbers, default=0)}"
    if not (last / "trainer_state.json").is_file():
        return "", ""
    state, card = json.loads((last / "trainer_state.json").read_text(encoding="utf-8")), folder / "README.md"
    step, epoch = state["global_step"], state["epoch"] or 0
    of = re.search(r" (on the .+ datasets?)\.$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    of_data = f", {of[1]}" if of else ""
    said = f"output_dir: {last} is step {step} of {state['max_steps']}, epoch {epoch:.2f}{of_data}: LlamaFactory"
    is_done = epoch >= args.num_train_epochs or step >= args.num_train_epochs * steps_of_epoch
    if step >= args.max_steps if args.max_steps > 0 else is_done:
        return f"{said} would do nothing; set {afresh}", afresh
    if of and any(name not in of[1] for name in data_sets_of(config)):
        return f"{said} would go on from there on other data; set {afresh}", afresh
    if _is_of_another_model(last, config):
        return f"{said} would go on with the weights of another model; set {afresh}", afresh
    since = ", with samples written since then" if written > (last / "trainer_state.json").stat().st_mtime else ""
    return f"{said} goes on from there{since}; {afresh} begins anew", ""


def _is_of_another_model(checkpoint: Path, config: dict) -> bool:
    """Whether the weights of a checkpoint have other sizes than those of the model; a LoRA's say nothing of that."""
    from transformers import PretrainedConfig

    sizes = ("model_type", "hidden_size", "num_hidden_layers")
    with contextlib.suppress(OSError, KeyError):  # of a model out of reach, or of none
        folders = str(checkpoint), config["model_name_or_path"]
        its, models = (PretrainedConfig.get_config_dict(folder)[0] for folder in folders)
        return bool(its) and any(its.get(size) != models.get(size) for size in sizes)
    return False


def without_a_gpu(config: dict) -> dict[str, str] | None:
    """{key: override} of what only a GPU can; None where there is one to train on."""
    from llamafactory.extras.misc import get_device_count

    if get_device_count() > 0 and not config.get("use_cpu"):
        return None
    return {key: f"{key}={value}" for key, value in ON_A_CPU.items() if config.get(key)}


def lacks_a_gpu(config: dict) -> str:
    """What to say of a training that needs a GPU where there is none, with the way out; "" where it can run."""
    off = without_a_gpu(config)
    if off is None or "NPROC_PER_NODE" in os.environ or not (off or is_enabled("FORCE_TORCHRUN")):
        return ""
    ways = ["without FORCE_TORCHRUN=1"] if is_enabled("FORCE_TORCHRUN") else []
    ways += [f"with {' '.join(off.values())}"] if off else []
    return f"there is no GPU to train on: start it {', and '.join(ways)}"


def training_command(program: list[str], yaml: str, overrides: list[str], config: dict) -> str:
    """The command that trains on this machine, as it can be pasted.

    program: the words before the YAML. config: what the YAML and the overrides come to.
    """
    off, latest = without_a_gpu(config), {one.partition("=")[0]: one for one in overrides}
    torchrun = "FORCE_TORCHRUN=1 " if off is None else ""
    return torchrun + shlex.join([*program, yaml, *(latest | (off or {})).values()])
