"""The self-check of attention on trees: what is right passes, and no planted fault does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from served_tokens.trees import attention, rows, self_check
from served_tokens.trees.self_check import TURNS, SelfCheck, allowed, attention_error, made_up

BLOCK = attention.BLOCK
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread():
    """Rows are short: more threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "heads, kv_heads, width, dtype, autocast",
    [
        (4, 2, 8, FLOAT, False),
        (4, 2, 8, HALF, False),
        (4, 2, 8, BRAIN, False),
        (4, 2, 32, BRAIN, True),
        (14, 2, 64, BRAIN, False),
        (6, 6, 32, BRAIN, False),
    ],
)
def test_attention_that_is_right_is_far_within_what_is_allowed(heads, kv_heads, width, dtype, autocast):
    assert attention_error(heads, kv_heads, width, "cpu", dtype, autocast) < allowed(dtype) / 4


# ---------------------------------------------------------------- planted faults

FIRST, SECOND = slice(300, 345), slice(345, 415)  # the targets of the first two turns: neither sees the other


def mask(sees: bool, queries, keys):
    """Plants a mask in which some tokens see, or do not see, some others."""

    def plant(monkeypatch):
        dense = attention.dense_mask

        def wrong(last):
            mask = dense(last).clone()
            mask[0, 0, queries, keys] = sees
            return mask

        monkeypatch.setattr(attention, "dense_mask", wrong)

    return plant


def no_padding(monkeypatch):
    """Padding sees what is before it, as under a causal mask."""
    padded = rows.padded

    def wrong(row, *arguments):
        whole = padded(row, *arguments)
        end = np.where(row.last == len(row.last) - 1, len(whole.last) - 1, row.last)
        return whole._replace(last=np.concatenate([end, np.full(len(whole.last) - len(end), len(whole.last) - 1)]))

    monkeypatch.setattr(rows, "padded", wrong)


def causal(monkeypatch):
    monkeypatch.setattr(attention, "dense_mask", lambda last: torch.ones(1, 1, len(last), len(last)).bool().tril())


def zeros_without_gradients(monkeypatch):
    """The forward of gradient checkpointing is a kernel of its own."""
    tree_attention = attention.tree_attention

    def wrong(*arguments, **keywords):
        output, weights = tree_attention(*arguments, **keywords)
        return (output if torch.is_grad_enabled() else output * 0), weights

    monkeypatch.setattr(attention, "tree_attention", wrong)


FAULTS = {
    "shows a sibling": mask(True, SECOND, FIRST),
    "shows one token of a sibling": mask(True, SECOND, FIRST.start),
    "hides a block of ancestors": mask(False, SECOND, slice(BLOCK)),
    "hides one ancestor": mask(False, SECOND, 200),
    "hides the other block of a trajectory": mask(False, slice(-BLOCK, None), slice(-2 * BLOCK, -BLOCK)),
    "causal": causal,
    "no padding": no_padding,
    "zeros without gradients": zeros_without_gradients,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_far_over_what_is_allowed(fault, monkeypatch):
    """In the dtype that allows the most."""
    FAULTS[fault](monkeypatch)
    assert attention_error(4, 2, 32, "cpu", BRAIN) > 2 * allowed(BRAIN)


def test_rows_of_blocks_that_are_masked_wholly_are_in_the_made_up_rows():
    """A kernel that is promised that there are none makes NaN of them."""
    for turns in TURNS:
        last = torch.tensor(made_up(turns)[0])
        tiles = attention.dense_mask(last)[0, 0].unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
        visited, empty = tiles.any(-1).any(-1), ~tiles.any(-1).all(-1)  # a block; one of its rows sees nothing in it
        assert (visited & empty).any()


# ---------------------------------------------------------------- what the training makes of it


def begin(bf16=False, fp16=False, dtype=torch.float32, process=0) -> None:
    text = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=None, hidden_size=128)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), dtype=dtype)
    device = torch.device("cpu")
    args = SimpleNamespace(bf16=bf16, fp16=fp16, deepspeed=None, device=device, local_process_index=process)
    SelfCheck().on_train_begin(args, None, None, model=model)


@pytest.mark.parametrize(
    "settings, dtype",
    [
        ({}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
    ],
)
def test_the_check_is_in_the_dtype_of_the_training_and_prints_one_line(settings, dtype, capsys):
    begin(**settings)
    begin(**settings, process=1)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("attention on token trees is right here: torch 2.") and f"cpu, torch.{dtype}: off by" in line


def test_the_line_of_a_failure_says_where_how_far_and_the_way_out(monkeypatch):
    monkeypatch.setattr(self_check, "attention_error", lambda *_: float("nan"))
    with pytest.raises(SystemExit) as end:
        begin(bf16=True)
    assert end.value.code == (
        f"attention on token trees is wrong here: torch {torch.__version__}, cpu, torch.bfloat16: off by nan, allowed "
        "6.2e-02; train the samples with llamafactory-cli train, or try another torch"
    )
