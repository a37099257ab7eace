"""The self-check of attention on trees: what is right passes, and no planted fault does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from served_tokens.trees import attention, rows, self_check
from served_tokens.trees.self_check import SelfCheck, allowed, attention_error

BLOCK = attention.BLOCK
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODELS = [(4, 2, 8), (14, 2, 64), (6, 6, 32)]  # heads, key/value heads, width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_attention_that_is_right_is_far_within_what_is_allowed(model, dtype):
    assert attention_error(*model, "cpu", dtype) < allowed(dtype) / 4


def test_autocast_computes_the_same():
    assert attention_error(4, 2, 32, "cpu", torch.bfloat16, autocast=True) < allowed(torch.bfloat16) / 4


# ---------------------------------------------------------------- planted faults

FIRST, SECOND = slice(300, 345), slice(345, 415)  # the targets of the first two turns: neither sees the other


def mask_that(change):
    """Plants a mask in which `change` has altered what tokens see."""

    def plant(monkeypatch):
        dense = attention.dense_mask

        def wrong(last):
            mask = dense(last).clone()
            change(mask[0, 0])
            return mask

        monkeypatch.setattr(attention, "dense_mask", wrong)

    return plant


def shows_a_sibling(mask):
    mask[SECOND, FIRST] = True


def shows_one_token_of_a_sibling(mask):
    mask[SECOND, FIRST.start] = True


def hides_a_block_of_ancestors(mask):
    mask[SECOND, :BLOCK] = False


def hides_one_ancestor(mask):
    mask[SECOND, 200] = False


def hides_the_other_block_of_a_trajectory(mask):
    mask[-BLOCK:, -2 * BLOCK : -BLOCK] = False


def positions_that_go_on(monkeypatch):
    padded = rows.padded

    def wrong(row, *arguments):
        row = padded(row, *arguments)
        return row._replace(position_ids=np.arange(len(row.last), dtype=np.int32))

    monkeypatch.setattr(rows, "padded", wrong)


def positions_one_too_far_behind_a_branch(monkeypatch):
    tree = rows.tree

    def wrong(*arguments):
        row = tree(*arguments)
        row.position_ids[SECOND] += 1
        return row

    monkeypatch.setattr(rows, "tree", wrong)


def no_padding(monkeypatch):
    """Padding sees what is before it, as under a causal mask."""
    padded = rows.padded

    def wrong(row, *arguments):
        whole = padded(row, *arguments)
        end = np.where(row.last == len(row.last) - 1, len(whole.last) - 1, row.last)
        return whole._replace(last=np.concatenate([end, np.full(len(whole.last) - len(end), len(whole.last) - 1)]))

    monkeypatch.setattr(rows, "padded", wrong)


def a_causal_kernel(monkeypatch):
    monkeypatch.setattr(
        attention, "dense_mask", lambda last: torch.ones(len(last), len(last)).bool().tril()[None, None]
    )


def zeros_without_gradients(monkeypatch):
    """The forward of gradient checkpointing is a kernel of its own."""
    tree_attention = attention.tree_attention

    def wrong(*arguments, **keywords):
        output, weights = tree_attention(*arguments, **keywords)
        return (output if torch.is_grad_enabled() else output * 0), weights

    monkeypatch.setattr(attention, "tree_attention", wrong)


MASKS = [
    shows_a_sibling,
    shows_one_token_of_a_sibling,
    hides_a_block_of_ancestors,
    hides_one_ancestor,
    hides_the_other_block_of_a_trajectory,
]
OTHERS = [
    positions_that_go_on,
    positions_one_too_far_behind_a_branch,
    no_padding,
    a_causal_kernel,
    zeros_without_gradients,
]
FAULTS = {fault.__name__: mask_that(fault) for fault in MASKS} | {fault.__name__: fault for fault in OTHERS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_far_over_what_is_allowed(fault, dtype, monkeypatch):
    FAULTS[fault](monkeypatch)
    assert attention_error(4, 2, 32, "cpu", dtype) > 2 * allowed(dtype)


# ---------------------------------------------------------------- rows of blocks that are masked wholly


def blockwise(safe: bool):
    """Attention as a kernel does it: over the blocks that the mask lists, with a running maximum and sum.

    safe: whether a token that has seen nothing yet, whose maximum is -inf, is kept from -inf - -inf.
    """

    def tree_attention(module, query, key, value, mask: BlockMask, scaling):
        key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
        tokens, blocks = torch.arange(BLOCK), []
        for number in range(query.shape[2] // BLOCK):
            of_block = query[:, :, number * BLOCK : (number + 1) * BLOCK]
            most = torch.full((*of_block.shape[:3], 1), -torch.inf)
            total, summed = torch.zeros_like(most), torch.zeros_like(of_block)
            for other, whole in visited(mask, number):
                here = slice(other * BLOCK, (other + 1) * BLOCK)
                scores = of_block @ key[:, :, here].mT * scaling
                if not whole:
                    shown = mask.mask_mod(0, 0, (number * BLOCK + tokens)[:, None], other * BLOCK + tokens)
                    scores = scores.masked_fill(~shown, -torch.inf)
                now = torch.maximum(most, scores.amax(-1, keepdim=True)).detach()
                finite = now.masked_fill(now == -torch.inf, 0) if safe else now
                weights, kept = (scores - finite).exp(), (most - finite).exp()
                total, summed = (
                    total * kept + weights.sum(-1, keepdim=True),
                    summed * kept + weights @ value[:, :, here],
                )
                most = now
            blocks.append(summed / total)
        return torch.cat(blocks, dim=2).transpose(1, 2), None

    return tree_attention


def visited(mask: BlockMask, number: int) -> list[tuple[int, bool]]:
    """(a block of keys, whether all of it is seen), in the order of torch's kernel: those seen in part first."""
    parts = mask.kv_indices[0, 0, number, : mask.kv_num_blocks[0, 0, number]]
    wholes = mask.full_kv_indices[0, 0, number, : mask.full_kv_num_blocks[0, 0, number]]
    return [(int(one), False) for one in parts] + [(int(one), True) for one in wholes]


@pytest.mark.parametrize("safe", [True, False])
def test_rows_of_blocks_that_are_masked_wholly_are_in_the_made_up_rows(safe, monkeypatch):
    monkeypatch.setattr(attention, "dense_mask", attention.block_mask)
    monkeypatch.setattr(attention, "tree_attention", blockwise(safe))
    error = attention_error(4, 2, 32, "cpu", torch.float32)
    assert error < 1e-4 if safe else np.isnan(error)


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
