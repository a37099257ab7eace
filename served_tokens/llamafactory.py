"""LlamaFactory's side of the check: its own parser, template and data loader build the training set."""

import atexit
import contextlib
import copy
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from served_tokens.samples.alpaca import COLUMNS

PROVENANCE = ("source", "trajectory", "turns", "served_as", "reading")
OUT_OF_REACH = (
    "; is model_name_or_path a local folder or the Hub within reach, and can HF_HOME and HF_DATASETS_CACHE be written?"
)
# What the machine that trains has and the one that checks may lack. No data depends on these.
ANY_MACHINE = {
    **dict.fromkeys(("deepspeed", "fsdp", "tf32")),
    **dict.fromkeys(("bf16", "fp16", "pure_bf16", "fp8", "torch_compile"), False),
    **dict.fromkeys(("enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "dataloader_num_workers"), False),
    "report_to": "none",
    "flash_attn": "auto",
    "use_cpu": True,  # else several GPUs would have to be torchrun's, and one would be taken
}


def parse_arguments(yaml: str, overrides: list[str]):
    """(model, data, training) arguments, as LlamaFactory parses them, less what depends on the machine."""
    from llamafactory.hparams import get_train_args

    with tempfile.TemporaryDirectory() as nowhere, refusals():
        config = {**read_config(yaml, overrides), **ANY_MACHINE, "output_dir": nowhere}
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(config)
    if finetuning_args.stage != "sft":
        sys.exit(f"{yaml}: stage is {finetuning_args.stage}; only sft samples can be checked")
    return model_args, data_args, training_args


def read_config(yaml: str, overrides: list[str]) -> dict:
    """The settings of `llamafactory-cli train`, before LlamaFactory looks at them."""
    from llamafactory.hparams.parser import read_args

    if not Path(yaml).is_file() or Path(yaml).suffix not in (".yaml", ".yml"):
        sys.exit(f"{yaml}: no such .yaml file")
    sys.argv = ["llamafactory-cli", yaml, *overrides]
    with refusals():
        config = dict(read_args())
    for key in ("dataset", "eval_dataset"):  # a name that is a number
        if isinstance(config.get(key), (int, float)):
            config[key] = str(config[key])
    return config


@contextlib.contextmanager
def refusals():
    """What LlamaFactory and its libraries find wrong with the settings, as one line instead of a traceback."""
    try:
        yield
    except Exception as error:
        hint = OUT_OF_REACH if isinstance(error, OSError) else ""
        sys.exit(f"LlamaFactory refuses these settings: {type(error).__name__}: {error}{hint}")


def settings_beyond_the_samples(data_args) -> list[str]:
    """What is wrong with settings that act after the samples are built, where comparing samples cannot show it."""
    from llamafactory.data.template import TEMPLATES

    problems = []
    if data_args.template in TEMPLATES and TEMPLATES[data_args.template].replace_jinja_template:
        problems.append(f"template {data_args.template} puts a chat template of its own into the trained model")
    if len(data_args.dataset or []) > 1 and data_args.mix_strategy != "concat":
        problems.append(f"mix_strategy {data_args.mix_strategy} draws some samples more than once, or not at all")
    if data_args.packing and not data_args.neat_packing:
        problems.append(
            "packing without neat_packing: samples see the tokens of other samples, which no served prompt has"
        )
    if data_args.val_size:
        problems.append(
            "val_size splits the samples of one trajectory between training and evaluation; drop it, and hold tasks "
            "out by step 2 --val-ratio"
        )
    if not data_args.ignore_pad_token_for_loss:
        problems.append("ignore_pad_token_for_loss is false: the padding after each sample has loss too")
    return problems


def use_the_hub_if_it_answers() -> None:
    """Without the Hub, a client tries for minutes; so it is told before it is imported."""
    import httpx

    if "HF_HUB_OFFLINE" not in os.environ:
        try:
            httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
        except httpx.HTTPError:
            os.environ["HF_HUB_OFFLINE"] = "1"


def for_the_check(data_args, max_samples: int | None):
    """The data arguments by which the samples are built one by one, as they are before packing; ends where they cannot.

    Args:
        max_samples: of each data set, in place of the YAML's.
    """
    if data_args.tokenized_path is not None and Path(data_args.tokenized_path).exists():
        sys.exit(
            f"tokenized_path: LlamaFactory trains on what it tokenized into {data_args.tokenized_path} earlier; "
            "remove that folder, then check"
        )
    data_args = copy.copy(data_args)
    if data_args.preprocessing_num_workers:
        data_args.preprocessing_num_workers = min(data_args.preprocessing_num_workers, os.cpu_count())
    data_args.packing = data_args.neat_packing = data_args.streaming = False
    data_args.max_samples = data_args.max_samples if max_samples is None else max_samples
    data_args.tokenized_path = None
    return data_args


@dataclass(frozen=True)
class TrainingSet:
    """A data set of the YAML, as LlamaFactory builds it.

    path: of its file, or folder of files.
    provenance, built: two tables with the same rows: what step 2 says of the samples, and their token ids and labels.
        There are fewer than samples by max_samples, or where only those of one trajectory are asked for.
    total: how many samples it holds.
    """

    name: str
    path: Path
    provenance: object
    built: object
    total: int


def training_sets(model_args, data_args, training_args, trajectory: int | None = None) -> list[TrainingSet]:
    """The data sets of the YAML, first those that are trained, then those for evaluation."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.model import load_tokenizer

    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    arguments = model_args, data_args, training_args
    return [
        _training_set(name, attributes, template, tokenizer_module, arguments, trajectory)
        for name, attributes in zip(names, get_dataset_list(names, data_args.dataset_dir))
    ]


def _training_set(name, attributes, template, tokenizer_module, arguments, trajectory) -> TrainingSet:
    from datasets import load_dataset
    from llamafactory.data import get_dataset
    from llamafactory.extras.constants import FILEEXT2TYPE

    model_args, data_args, training_args = arguments
    data_args = copy.copy(data_args)
    if attributes.num_samples is not None:
        raise ValueError(f"data set {name} has num_samples, which draws samples at random; check it without")
    path = Path(data_args.dataset_dir, attributes.dataset_name)
    if not path.exists():
        raise ValueError(f"data set {name}: no file {path}; write it with step2_to_alpaca_mask_history.py")
    files = [str(path / file) for file in os.listdir(path)] if path.is_dir() else [str(path)]  # LlamaFactory's order
    kind = FILEEXT2TYPE[Path(files[0]).suffix[1:]]
    provenance = load_dataset(kind, data_files=files, split=attributes.split, cache_dir=model_args.cache_dir)
    missing = set(PROVENANCE) - set(provenance.column_names)
    if missing:
        raise ValueError(f"data set {name}: no column {', '.join(sorted(missing))}; write it with step 2")
    total = len(provenance)
    if trajectory is not None:
        provenance = provenance.filter(lambda its: its == trajectory, input_columns="trajectory")
        data_args.dataset_dir = _alone(name, provenance, attributes)
    provenance = provenance.select_columns(PROVENANCE)
    if data_args.max_samples is not None:
        provenance = provenance.select(range(min(data_args.max_samples, len(provenance))))
    data_args.dataset, data_args.eval_dataset, data_args.val_size = [name], None, 0.0
    if not len(provenance):
        return TrainingSet(name, path, provenance, provenance, total)
    built = get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer_module)
    built = built["train_dataset"].select_columns(["input_ids", "labels"])
    if len(provenance) != len(built):
        raise ValueError(f"data set {name}: it drops {len(provenance) - len(built)} samples that it finds invalid")
    return TrainingSet(name, path, provenance, built, total)


def _alone(name: str, samples, attributes) -> str:
    """A dataset_dir, until the process ends, in which a data set holds these samples only."""
    folder = tempfile.mkdtemp(prefix="samples_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    samples.to_parquet(f"{folder}/samples.parquet")
    columns = {column: getattr(attributes, column) for column in COLUMNS}
    entry = {"file_name": "samples.parquet", "formatting": "alpaca", "columns": columns}
    Path(folder, "dataset_info.json").write_text(json.dumps({name: entry}), encoding="utf-8")
    return folder
