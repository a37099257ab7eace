"""The mask of token trees by blocks, and flex_attention with it as far as a CPU runs it."""

import random

import numpy as np
import pytest
import torch
from test_token_trees import NO, random_samples, seen_by
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from served_tokens.trees import attention
from served_tokens.trees.rows import Row, Sample, padded, rows_of
from served_tokens.trees.self_check import TURNS, made_up

BLOCK = attention.BLOCK


def random_row(draw: random.Random) -> Row:
    """Random samples, each token of which is drawn out to many."""
    length = draw.randint(20, 90)
    samples = [Sample(*(np.repeat(column, length) for column in sample)) for sample in random_samples(draw)]
    samples = [Sample(ids, np.where(np.arange(len(ids)) % length, NO, labels)) for ids, labels in samples]
    made = list(rows_of([*samples, Sample(np.arange(2), np.arange(2))], 10**6))
    return padded(made[0], BLOCK, 0)


def test_each_block_is_listed_as_the_dense_mask_has_it():
    draw, kinds = random.Random(0), torch.zeros(3)
    for _ in range(100):
        row = random_row(draw)
        last, some = torch.tensor(row.last).long(), draw.randrange(len(row.last))
        blocks, dense = attention.block_mask(last), attention.dense_mask(last)[0, 0]
        assert dense[some].nonzero()[:, 0].tolist() == seen_by(row, some).tolist()
        tiles = dense.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)  # (of queries, of keys, …)
        full, seen = tiles.all((-1, -2)), tiles.any(-1).any(-1)
        assert torch.equal(listed(blocks.full_kv_num_blocks, blocks.full_kv_indices), full)
        assert torch.equal(listed(blocks.kv_num_blocks, blocks.kv_indices), seen & ~full)
        token = torch.arange(len(last))
        pair_by_pair = blocks.mask_mod(0, 0, token[:, None], token)
        assert torch.equal(pair_by_pair, dense)  # which is asked for in the blocks that are seen in part
        kinds += torch.tensor([full.sum(), (seen & ~full).sum(), (~seen).tril().sum()])
    assert (kinds > 100).all()  # there are blocks of each kind


def listed(count: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Whether each block of queries visits each block of keys."""
    visited = torch.zeros(order.shape[-2:], dtype=torch.bool)
    for queries, number in enumerate(count[0, 0]):
        visited[queries, order[0, 0, queries, :number].long()] = True
    return visited


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_blocks_is_the_dense_one(monkeypatch):
    """Eagerly, as a CPU never attends in training; the self-check runs the compiled kernel on each device."""
    monkeypatch.setattr(attention, "_compiled", lambda: flex_attention)
    for turns in TURNS:
        last = torch.tensor(made_up(turns)[0])
        query, key, value = (torch.randn(1, len(last), heads, 32).transpose(1, 2) for heads in (4, 2, 2))
        with torch.no_grad():
            ours, _ = attention.tree_attention(None, query, key, value, attention.block_mask(last))
        theirs = scaled_dot_product_attention(query, key, value, attention.dense_mask(last), enable_gqa=True)
        assert torch.allclose(ours, theirs.transpose(1, 2), atol=1e-5)
