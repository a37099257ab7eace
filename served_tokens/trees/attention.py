"""The attention of token trees in transformers: token q sees token k where k <= q <= last[k].

A batch is one row, and `last` travels as its attention mask, of shape (1, 1, tokens): three dimensions, because
LlamaFactory and transformers leave alone what is neither a padding mask (2) nor a finished one (4).
"""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa"  # the name in the model's config, which so stays as it is
BLOCK = 128  # tokens; rows are padded to a multiple of it
# IS_DIVISIBLE: what the kernel cannot know where it is compiled for any length, that rows are whole blocks.
# ROWS_GUARANTEED_SAFE must stay out. It promises that each token sees something in each block that its block visits;
# in trees some see nothing there (of another trajectory, of a sibling), and with the promise an H200 made NaN of them.
KERNEL = {"IS_DIVISIBLE": True}


def use_tree_attention() -> None:
    """From now on, in this process, models with the attention "sdpa" understand token trees."""
    AttentionMaskInterface.register(ATTENTION, tree_mask)
    AttentionInterface.register(ATTENTION, tree_attention)


def tree_mask(*args, attention_mask: torch.Tensor | None = None, **kwargs):
    """The mask of a row, for `tree_attention`; called by transformers once a forward pass.

    attention_mask: `last` of the row, integers of shape (1, 1, tokens); others are left to transformers.
    """
    if attention_mask is None or attention_mask.dim() != 3:
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    if attention_mask.shape[:2] != (1, 1):
        raise ValueError("a batch of token trees holds one row; set the batch sizes to 1")
    return (block_mask if attention_mask.is_cuda else dense_mask)(attention_mask[0, 0])


def dense_mask(last: torch.Tensor) -> torch.Tensor:
    """What each token sees, True or False, of shape (1, 1, tokens, tokens)."""
    token = torch.arange(len(last), device=last.device)
    return ((token <= token[:, None]) & (token[:, None] <= last))[None, None]


def block_mask(last: torch.Tensor) -> BlockMask:
    """The same for flex_attention; `last` has a multiple of BLOCK tokens.

    Which blocks are seen in part or in full follows from the least and the greatest `last` of a block, so nothing of
    the size tokens × tokens is made.
    """
    last = last.int()
    of_block = last.view(-1, BLOCK)
    number = torch.arange(len(of_block), device=last.device)
    first = number[:, None] * BLOCK  # token of each block that sees
    before = number < number[:, None]
    full = before & (of_block.amin(1) >= first + BLOCK - 1)
    part = (before & (of_block.amax(1) >= first) & ~full) | (number == number[:, None])

    def sees(batch, head, q, k):
        return (k <= q) & (q <= last[k])

    return BlockMask.from_kv_blocks(*_ordered(part), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=sees)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many blocks each block sees, which: those first), int32, as BlockMask wants them."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention by the mask of `tree_mask`, as transformers calls it; returns ((1, tokens, heads, width), None)."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast, which does that for others, does not know it
    options = {"block_mask": attention_mask, "enable_gqa": True, "scale": scaling, "kernel_options": KERNEL}
    out = _compiled()(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled():
    return torch.compile(flex_attention)
