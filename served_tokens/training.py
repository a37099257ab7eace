"""A training by LlamaFactory as a YAML and overrides have it, seen without its import, which takes long."""

import difflib
import itertools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

INFO = "dataset_info.json"
ON_A_CPU = {"deepspeed": "null", "bf16": "false", "fp16": "false", "tf32": "null"}  # what only a GPU can, switched off


def is_enabled(variable: str) -> bool:
    """Whether LlamaFactory takes a variable of the environment for set."""
    return os.getenv(variable, "0").lower() in ("true", "y", "1")


def meant(word: str, known) -> str:
    """What to add to an error about a word that is not known."""
    near = difflib.get_close_matches(word, known, 1)
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
    for key in ("dataset", "eval_dataset"):
        names = config.get(key) or []
        if isinstance(names, (int, float)):  # a name that is a number
            names = config[key] = str(names)
        for name in names.split(",") if isinstance(names, str) else names:
            _find_data_set(name.strip(), str(config.get("dataset_dir", "data")))
    return config


def _find_data_set(name: str, folder: str) -> None:
    """Stop where LlamaFactory would not find a data set, with the folder or the name that may be meant."""
    places = {str(info.parent): info for info in [Path(INFO), *sorted(Path().glob(f"*/{INFO}")), Path(folder, INFO)]}
    known = {}
    for place, info in places.items():
        try:
            known[place] = json.loads(info.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known[place] = {}
    its = known[str(Path(folder))]
    if name not in its and not folder.startswith(("ONLINE", "REMOTE:")):
        others = [f"; set dataset_dir={place}" for place in known if name in known[place]]
        way_out = [*others, meant(name, its) or "; set dataset_dir to the folder of the one that step 2 named"][0]
        sys.exit(f"data set {name}: not in {Path(folder, INFO)}{way_out}")


@dataclass(frozen=True)
class Earlier:
    """What a training finds in its output_dir, and what it would do there, in words.

    is_done: whether it would do nothing, or not start. afresh: the override by which it begins at the start.
    """

    said: str
    is_done: bool
    afresh: str


def earlier_training(training_args, steps_of_epoch: float = math.inf) -> Earlier | None:
    """What LlamaFactory would go on from; None where it begins at the start. steps_of_epoch: the most."""
    args, folder, resume = training_args, Path(training_args.output_dir), training_args.resume_from_checkpoint
    if not args.do_train or resume is False or (resume is None and args.overwrite_output_dir):
        return None
    names = (f"{folder}-{number}" for number in itertools.count(2))
    afresh = next(f"output_dir={name}" for name in names if not Path(name).exists())
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    models = [path for pattern in ("*model.safetensors*", "*model.bin*") for path in folder.glob(pattern)]
    if models and not (numbers or resume):
        said = f"output_dir: {folder} holds a model and no checkpoint, so LlamaFactory does not start"
        return Earlier(said, True, afresh)
    last = Path(resume) if isinstance(resume, str) else folder / f"checkpoint-{max(numbers, default=0)}"
    if not (last / "trainer_state.json").is_file():
        return None
    state, card = json.loads((last / "trainer_state.json").read_text(encoding="utf-8")), folder / "README.md"
    step, epoch = state["global_step"], state["epoch"] or 0
    is_done = epoch >= args.num_train_epochs or step >= args.num_train_epochs * steps_of_epoch
    if args.max_steps > 0:
        is_done = step >= args.max_steps
    of = re.search(r" (on the .+ datasets?)\.$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    of_data = f", {of[1]}" if of else ""
    said = f"output_dir: {last} is step {step} of {state['max_steps']}, epoch {epoch:.2f}{of_data}"
    does = "does nothing more" if is_done else "goes on from there"
    return Earlier(f"{said}: LlamaFactory resumes it, and {does}", is_done, afresh)


def has_gpu() -> bool:
    """Whether LlamaFactory sees a device to train on beside the CPU."""
    from llamafactory.extras.misc import get_device_count

    return get_device_count() > 0


def for_a_cpu(config: dict) -> dict[str, str]:
    """{key: override} of what only a GPU can."""
    return {key: f"{key}={value}" for key, value in ON_A_CPU.items() if config.get(key)}


def lacks_a_gpu(config: dict) -> str:
    """What to say of a training that needs a GPU where there is none, with the way out; "" where it can run."""
    needs = is_enabled("FORCE_TORCHRUN") or (for_a_cpu(config) and not config.get("use_cpu"))
    if not needs or "NPROC_PER_NODE" in os.environ or has_gpu():
        return ""
    off = " ".join(for_a_cpu(config).values()) or "use_cpu=true"
    return f"there is no GPU here: start it without FORCE_TORCHRUN=1, and with {off}"


def training_command(program: list[str], yaml: str, overrides: list[str], config: dict) -> str:
    """The command that trains on this machine, as it can be pasted.

    Args:
        program: the words before the YAML, such as ["llamafactory-cli", "train"].
        config: what the YAML and the overrides come to.
    """
    torchrun, latest = has_gpu() and not config.get("use_cpu"), {its.partition("=")[0]: its for its in overrides}
    latest |= {} if torchrun else for_a_cpu(config)
    return ("FORCE_TORCHRUN=1 " if torchrun else "") + shlex.join([*program, yaml, *latest.values()])
