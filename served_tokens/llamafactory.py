"""LlamaFactory's side: its own parser, converter, template and processor make the token ids of each sample.

Its loader makes all samples of a data set at once and keeps them on disk; here each is made when it is asked for, by
the same parts, and a text that samples of a trajectory share is tokenized once. That this makes no difference is seen
in each run: some samples of each data set are made by its loader too (`compare_with_its_loader`).
"""

import bisect
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from served_tokens.files.processes import in_processes
from served_tokens.files.read import progress
from served_tokens.marks import BLOCK_END, Tokens, remembering
from served_tokens.samples.alpaca import COLUMNS, PROVENANCE
from served_tokens.samples.tokens import TRAIN, read_tokens
from served_tokens.training import read_config, refuse_mistakes

COMPARED = 64  # samples of each data set that are made by LlamaFactory's loader too
UNWRITABLE = "; can HF_HOME and HF_DATASETS_CACHE be written?"
NO_TOKENIZER = "{}: no tokenizer to be had; set model_name_or_path to a model's folder, or to a Hub id within reach"
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
    config = read_config(yaml, overrides)
    refuse_mistakes(config)
    from llamafactory.hparams import get_train_args

    with tempfile.TemporaryDirectory() as nowhere, refusals():
        output = config.get("output_dir") or "trainer_output"  # its default
        config = {**config, **ANY_MACHINE, "output_dir": nowhere}
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(config)
    training_args.output_dir = output
    if finetuning_args.stage != "sft":
        sys.exit(f"{yaml}: stage is {finetuning_args.stage}; only sft samples can be checked")
    return model_args, data_args, training_args


@contextlib.contextmanager
def refusals(says: str = "LlamaFactory refuses these settings"):
    """What LlamaFactory and its libraries find wrong with the settings, as one line instead of a traceback."""
    try:
        yield
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error} {error.__cause__ or ''}".split())
        sys.exit(f"{says}: {what}{UNWRITABLE if getattr(error, 'errno', None) else ''}")


def settings_beyond_the_samples(data_args) -> list[str]:
    """What is wrong with settings that act after the samples are built, where comparing samples cannot show it."""
    from llamafactory.data.template import TEMPLATES

    problems, template = [], TEMPLATES.get(data_args.template)
    if template and template.replace_jinja_template:
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
    """The data arguments by which samples are built before packing; max_samples: of each data set, not the YAML's."""
    data_args = copy.copy(data_args)
    data_args.packing = data_args.neat_packing = data_args.streaming = False
    if data_args.tokenized_path is not None and not Path(data_args.tokenized_path).exists():
        data_args.tokenized_path = None  # it is written by the training
    if max_samples is not None or data_args.tokenized_path:  # of which LlamaFactory takes all
        data_args.max_samples = max_samples
    return data_args


@dataclass(frozen=True)
class TrainingSet:
    """A data set of the YAML."""

    name: str
    path: Path  # its file, or folder of files
    provenance: object  # a table of what step 2 says of each sample, less those behind max_samples
    built: object  # the samples as LlamaFactory makes them; of `tokenized_path` those that it loads
    total: int  # how many samples it holds
    trains: bool = True  # else it is for evaluation


def training_sets(model_args, data_args, training_args) -> tuple[list[TrainingSet], Tokens]:
    """(the data sets of the YAML, first those that are trained, then those for evaluation; the server's tokenizer)

    Where the two tokenizers are the same, both sides remember their texts together.
    """
    from datasets import disable_progress_bars
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.model import load_tokenizer

    disable_progress_bars()  # of the few samples that its loader makes
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    not_twice = mock.patch("transformers.models.auto.processing_auto.AutoTokenizer")  # and dropped the second time
    with refusals(NO_TOKENIZER.format(model_args.model_name_or_path)), not_twice:
        parts = load_tokenizer(model_args)
    tokenizer = parts["tokenizer"]
    served = copy.deepcopy(tokenizer)  # before the template changes it
    served.split_special_tokens = False  # a server never does
    tokens = Tokens(served)
    parts["template"] = get_template_and_fix_tokenizer(tokenizer, data_args)
    if data_args.tokenized_path:
        if tokenizer.eos_token not in (served.eos_token, BLOCK_END):
            sys.exit(f"template {data_args.template} ends answers by {tokenizer.eos_token}; set template=qwen3_nothink")
        return tokenized_sets(Path(data_args.tokenized_path), data_args.max_samples), tokens
    remembers = copy.copy(tokenizer)
    same = served.added_tokens_decoder == tokenizer.added_tokens_decoder and not tokenizer.split_special_tokens
    encode = tokens if same else remembering(functools.partial(tokenizer.encode, add_special_tokens=False))
    remembers.encode = lambda text, add_special_tokens: encode(text)  # by LlamaFactory it is false
    names, sets = [*(data_args.dataset or []), *(data_args.eval_dataset or [])], []
    for name, attributes in zip(names, get_dataset_list(names, data_args.dataset_dir)):
        trains = len(sets) < len(data_args.dataset or [])
        its = _training_set(name, attributes, {**parts, "tokenizer": remembers}, model_args, data_args, trains)
        if len(its.provenance):
            compare_with_its_loader(its, attributes, parts, model_args, data_args, training_args)
        sets.append(its)
    return sets, tokens


def tokenized_sets(folder: Path, max_samples: int | None) -> list[TrainingSet]:
    """The splits of samples that are token ids, see `save_tokens`."""
    return [
        TrainingSet(split, folder, told.select(range(len(told))[:max_samples]), built, len(told), split == TRAIN)
        for split, (told, built) in read_tokens(folder).items()
    ]


def _training_set(name: str, attributes, parts: dict, model_args, data_args, trains: bool) -> TrainingSet:
    from datasets import load_dataset
    from llamafactory.extras.constants import FILEEXT2TYPE

    if attributes.num_samples is not None:
        sys.exit(f"data set {name} has num_samples, which draws samples at random; check it without")
    path = Path(data_args.dataset_dir, attributes.dataset_name)
    if not path.exists():
        sys.exit(f"data set {name}: no file {path}; write it with step2_to_alpaca_mask_history.py")
    files = [str(path / file) for file in os.listdir(path)] if path.is_dir() else [str(path)]  # LlamaFactory's order
    kind = FILEEXT2TYPE[Path(files[0]).suffix[1:]]
    if kind == "parquet":
        samples = ParquetRows(files)
    else:
        samples = load_dataset(kind, data_files=files, split=attributes.split, cache_dir=model_args.cache_dir)
    if missing := set(PROVENANCE) - set(samples.column_names):
        sys.exit(f"data set {name}: no column {', '.join(sorted(missing))}; write it with step 2")
    provenance = samples.select_columns([*PROVENANCE])
    if data_args.max_samples is not None:
        provenance = provenance.select(range(min(data_args.max_samples, len(samples))))
    return TrainingSet(name, path, provenance, Built(samples, attributes, parts, data_args), len(samples), trains)


class ParquetRows:
    """The rows of Parquet files as a `datasets.Dataset` has them, one row group at a time and without its cache."""

    def __init__(self, files: list[str]):
        import pyarrow.parquet as pq

        self.files, self.column_names = files, pq.read_schema(files[0]).names
        self.groups, self.starts = [], [0]  # (file, number in it) of each row group; its first row, last the end
        for file in files:
            metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group))
                self.starts.append(self.starts[-1] + metadata.row_group(group).num_rows)
        self.table_of = functools.lru_cache(1)(lambda file, group: pq.ParquetFile(file).read_row_group(group))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, position: int) -> dict:
        at = bisect.bisect(self.starts, position) - 1
        return self.table_of(*self.groups[at]).slice(position - self.starts[at], 1).to_pylist()[0]

    def select_columns(self, names: list[str]):
        import pyarrow.parquet as pq
        from datasets import Dataset

        return Dataset(pq.read_table(self.files, columns=names))


class Built:
    """The samples of a data set as LlamaFactory makes them, each when it is asked for: {"input_ids", "labels"}.

    samples: as step 2 wrote them, a sequence of dicts. attributes: what LlamaFactory reads of the data set in
    dataset_info.json. parts: its tokenizer, processor of other media, and template.
    """

    def __init__(self, samples, attributes, parts: dict, data_args):
        from llamafactory.data.converter import get_dataset_converter
        from llamafactory.data.processor import SupervisedDatasetProcessor

        self.samples = samples
        self.convert = get_dataset_converter(attributes.formatting, attributes, data_args)
        self.processor = SupervisedDatasetProcessor(**parts, data_args=data_args)

    def __getitem__(self, position: int) -> dict[str, list[int]]:
        aligned = self.convert(self.samples[position])
        made = self.processor.preprocess_dataset({key: [value] for key, value in aligned.items()})
        if not made:
            raise ValueError(f"sample {position} is dropped by LlamaFactory, which finds it invalid")
        return {column: made[column][0] for column in ("input_ids", "labels")}


def all_built(its: TrainingSet):
    """Yield (token ids, labels) of each sample, int32 arrays, made over processes, a trajectory at a time."""
    of_trajectory = [*zip(its.provenance["source"][:], its.provenance["trajectory"][:])]
    groups = (group for _, group in itertools.groupby(range(len(of_trajectory)), key=of_trajectory.__getitem__))
    with progress(f"tokenize {its.name}", " samples", len(its.provenance)) as bar:
        for made in in_processes(functools.partial(_arrays, its.built), map(list, groups), os.cpu_count()):
            yield from made
            bar.update(len(made))


def _arrays(built: Built, positions: list[int]) -> list[tuple]:
    made = map(built.__getitem__, positions)
    return [tuple(np.array(one[column], np.int32) for column in ("input_ids", "labels")) for one in made]


def compare_with_its_loader(its: TrainingSet, attributes, parts: dict, model_args, data_args, training_args) -> None:
    """Make some samples by LlamaFactory's own loader too; ends with a line where they are others than ours.

    These are the first of each history, merged and not.
    """
    from datasets import Dataset
    from llamafactory.data import get_dataset

    kinds = [(as_, len(turns) > 1) for as_, turns in zip(its.provenance["served_as"][:], its.provenance["turns"][:])]
    each = COMPARED // len(set(kinds))
    chosen = [at for kind in sorted(set(kinds)) for at in [at for at, its in enumerate(kinds) if its == kind][:each]]
    model_args, data_args = copy.copy(model_args), copy.copy(data_args)
    data_args.dataset, data_args.eval_dataset, data_args.val_size, data_args.max_samples = [its.name], None, 0.0, None
    data_args.preprocessing_num_workers = None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints a sample
        model_args.cache_dir = data_args.dataset_dir = folder
        Dataset.from_list([its.built.samples[at] for at in chosen]).to_parquet(f"{folder}/samples.parquet")
        columns = {column: getattr(attributes, column) for column in COLUMNS}
        entry = {"file_name": "samples.parquet", "formatting": attributes.formatting, "columns": columns}
        Path(folder, "dataset_info.json").write_text(json.dumps({its.name: entry}), encoding="utf-8")
        made = get_dataset(parts["template"], model_args, data_args, training_args, "sft", parts["tokenizer"])
        theirs = made["train_dataset"].select_columns(["input_ids", "labels"]).to_list()
    if theirs != [its.built[at] for at in chosen]:
        sys.exit(
            f"data set {its.name}: with these settings LlamaFactory's loader makes other samples of it than its "
            "converter, template and processor do, so this check does not know what is trained"
        )
