"""What `llamafactory.py` makes of samples, one by one, is what LlamaFactory's own loader makes of all of them."""

import contextlib
import io

import pytest
from conftest import ROOT, golden
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.model import load_tokenizer

from served_tokens import llamafactory

TEMPLATE, MERGED = ("--history-thinking", "template"), ("--history-thinking", "template", "--merge-turns")
SETTINGS = {
    "drop": ((), ()),
    "template": (TEMPLATE, ("template=qwen3_nothink",)),
    "merged": (MERGED, ("template=qwen3_nothink", "mask_history=false")),
    "no thinking": (("--no-thinking",), ("enable_thinking=false",)),
    "wrong template": (TEMPLATE, ()),
    "template of the model": ((), ("template=null",)),
    "samples are cut": ((), ("cutoff_len=400",)),
    "the prompt is trained": (MERGED, ("mask_history=false", "train_on_prompt=true")),
    "the first samples": ((), ("max_samples=20",)),
}


def loaded(arguments, name: str) -> list[dict]:
    """What the loader makes of one data set."""
    model_args, data_args, training_args = arguments
    data_args.dataset, data_args.eval_dataset = [name], None
    parts = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(parts["tokenizer"], data_args)
    with contextlib.redirect_stdout(io.StringIO()):
        made = get_dataset(template, model_args, data_args, training_args, "sft", **parts)
    return made["train_dataset"].select_columns(["input_ids", "labels"]).to_list()


@pytest.fixture
def arguments(tiny_model, tmp_path):
    """arguments("dataset=…", …) -> LlamaFactory's arguments for data sets in tmp_path"""

    def arguments(*overrides: str) -> tuple:
        settings = [f"dataset_dir={tmp_path}", f"model_name_or_path={tiny_model}", "preprocessing_num_workers=null"]
        return llamafactory.parse_arguments(str(ROOT / "qwen3_full_sft.yaml"), [*settings, *overrides])

    return arguments


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_sample_is_what_the_loader_makes_of_it(setting, pipeline, arguments):
    options, overrides = SETTINGS[setting]
    pipeline(golden(), *options, suffix="")
    [its], _ = llamafactory.training_sets(*arguments("dataset=samples", *overrides))
    built = [its.built[position] for position in range(len(its.provenance))]
    assert built == loaded(arguments("dataset=samples", *overrides), "samples")
    of_processes = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in llamafactory.all_built(its)
    ]
    assert of_processes == built


def test_several_data_sets_are_built_each_by_itself_those_for_evaluation_last(pipeline, arguments):
    pipeline(golden(), name="one")
    pipeline(golden(), name="two", suffix=".jsonl")
    pipeline(golden(), *TEMPLATE, name="three", suffix=".json")
    settings = "dataset=two,one", "eval_dataset=three", "val_size=0.0"
    sets, _ = llamafactory.training_sets(*arguments(*settings))
    assert [its.name for its in sets] == ["two", "one", "three"]
    for its in sets:
        built = [its.built[position] for position in range(len(its.provenance))]
        assert built == loaded(arguments(*settings), its.name)


def test_a_loader_that_makes_other_samples_ends_the_run(pipeline, arguments, monkeypatch):
    pipeline(golden())
    monkeypatch.setattr(llamafactory.Built, "__getitem__", lambda built, position: {"input_ids": [1], "labels": [1]})
    with pytest.raises(SystemExit, match="LlamaFactory's loader makes other samples"):
        llamafactory.training_sets(*arguments("dataset=samples"))
