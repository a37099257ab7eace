"""A training by LlamaFactory, as a YAML and overrides have it: its settings, where it would begin, and its command.

Nothing here waits for the import of LlamaFactory, which takes long, so that mistakes are told at once.
"""

import difflib
import itertools
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ON_A_CPU = {"deepspeed": "null", "bf16": "false", "fp16": "false", "tf32": "null"}  # what only a GPU can, switched off
INFO = "dataset_info.json"


def is_enabled(variable: str) -> bool:
    """Whether LlamaFactory takes a variable of the environment for set."""
    return os.getenv(variable, "0").lower() in ("true", "y", "1")


def meant(word: str, known) -> str:
    """What to add to an error about a word that is not known."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def read_config(yaml: str, overrides: list[str]) -> dict:
    """The settings of `llamafactory-cli train`, as it reads them; ends where one can see that it would not train."""
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
    known = _names_in(Path(folder, INFO))
    if name in known or folder.startswith(("ONLINE", "REMOTE:")):
        return
    others = [info.parent for info in [Path(INFO), *sorted(Path().glob(f"*/{INFO}"))] if name in _names_in(info)]
    way_out = meant(name, known) or "; set dataset_dir to the folder that step 2 named"
    if others:
        way_out = f"; set dataset_dir={others[0]}"
    sys.exit(f"data set {name}: not in {Path(folder, INFO)}{way_out}")


def _names_in(dataset_info: Path) -> list[str]:
    """The data sets that are registered there."""
    try:
        return [*json.loads(dataset_info.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


@dataclass(frozen=True)
class Earlier:
    """What an earlier training left in output_dir.

    said: that, in words. step: of the checkpoint from which a training goes on.
    is_done: whether it would do nothing from there. afresh: the setting by which one begins at the start.
    """

    said: str
    step: int
    is_done: bool
    afresh: str

    @property
    def would_do_nothing(self) -> str:
        return f"{self.said}: a training resumes there, and does nothing; set {self.afresh}"

    @property
    def goes_on(self) -> str:
        return f"{self.said}: the training goes on from there; {self.afresh} begins at the start"


def earlier_training(training_args) -> Earlier | None:
    """What a training finds in its output_dir, where LlamaFactory looks; None where it begins at the start."""
    folder, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if not training_args.do_train or resume is False or (resume is None and training_args.overwrite_output_dir):
        return None
    names = (f"{folder}-{number}" for number in itertools.count(2))
    afresh = next(f"output_dir={name}" for name in names if not Path(name).exists())
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    last = Path(resume) if isinstance(resume, str) else folder / f"checkpoint-{max(numbers, default=0)}"
    try:
        state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        models = sorted([*folder.glob("*model.safetensors*"), *folder.glob("*model.bin*")])
        if not models or numbers or resume:
            return None
        return Earlier(f"output_dir: {folder} holds {models[0].name} and no checkpoint", 0, True, afresh)
    step, steps, epoch = state["global_step"], training_args.max_steps, state["epoch"] or 0
    card = folder / "README.md"
    of = re.search(r" on (the .+ datasets?)\.$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    said = f"output_dir: {last} is step {step} of {state['max_steps']}, epoch {epoch:.2f}"
    return Earlier(
        said=said + (f", on {of[1]}" if of else ""),
        step=step,
        is_done=step >= steps if steps > 0 else epoch >= training_args.num_train_epochs,
        afresh=afresh,
    )


def has_gpu() -> bool:
    """Whether LlamaFactory sees a device to train on beside the CPU."""
    from llamafactory.extras.misc import get_device_count

    return get_device_count() > 0


def no_gpu_for_torchrun(config: dict) -> str:
    """What to say of FORCE_TORCHRUN=1 where it would start no process; "" where it is not set, or would."""
    if not is_enabled("FORCE_TORCHRUN") or "NPROC_PER_NODE" in os.environ or has_gpu():
        return ""
    return f"FORCE_TORCHRUN=1: there is no GPU here to start a process for; leave it out, and set {without_gpu(config)}"


def without_gpu(config: dict) -> str:
    """The overrides by which a CPU can train, as they are typed."""
    return " ".join(for_a_cpu(config).values()) or "use_cpu=true"


def for_a_cpu(config: dict) -> dict[str, str]:
    """{key: override} of what only a GPU can."""
    return {key: f"{key}={value}" for key, value in ON_A_CPU.items() if config.get(key)}


def training_command(program: list[str], yaml: str, overrides: list[str], config: dict) -> str:
    """The command that trains on this machine, as it can be pasted.

    Args:
        program: the words before the YAML, such as ["llamafactory-cli", "train"].
        config: what the YAML and the overrides come to.
    """
    latest = {one.partition("=")[0]: one for one in overrides}
    if has_gpu() and not config.get("use_cpu"):
        return "FORCE_TORCHRUN=1 " + shlex.join([*program, yaml, *latest.values()])
    return shlex.join([*program, yaml, *(latest | for_a_cpu(config)).values()])
