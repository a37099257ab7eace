"""Whether attention on token trees is right on this device, before a step is trained on it.

A kernel may be wrong on one card, with one driver or torch alone, where no test of ours has run. So made-up rows go the
way of the rows that are trained, and beside that through attention that is written out, by what their samples are.
"""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import torch
from transformers import TrainerCallback

from served_tokens.marks import IGNORE_INDEX
from served_tokens.trees import attention, rows

TURNS = (2, 3, 4)  # of the trajectories of each row: a kernel is compiled for the first row, and anew for any length
PROMPTS = (300, 170)  # tokens; the second trajectory begins within a block, so there rows of blocks are masked wholly
TF32 = 2.0**-10  # the eps of the format in which a GPU may be told to multiply float32


class SelfCheck(TrainerCallback):
    """Ends the training before its first step where attention on trees is wrong; in each process, on its device."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        # as the Trainer calls the model: kernels are compiled for it
        autocast = mixed is not None and not args.deepspeed
        line = checked(heads, kv_heads, width, args.device, mixed or model.dtype, autocast)
        if args.local_process_index == 0:
            print(line, flush=True)


def checked(heads: int, kv_heads: int, width: int, device, dtype: torch.dtype, autocast: bool = False) -> str:
    """A line that says that attention on trees is right; where it is wrong, the process ends with one that says so."""
    device = torch.device(device)
    error = attention_error(heads, kv_heads, width, device, dtype, autocast)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    figures = f"torch {torch.__version__}, {where}, {dtype}: off by {error:.1e}, allowed {allowed(dtype):.1e}"
    if error <= allowed(dtype):  # which NaN is not
        return f"attention on token trees is right here: {figures}"
    way_out = "train the samples with llamafactory-cli train, or try another torch"
    sys.exit(f"attention on token trees is wrong here: {figures}; {way_out}")


def allowed(dtype: torch.dtype) -> float:
    """The largest `attention_error` that rounding explains: 16 units in the last place, of half an eps each.

    Chosen by what was measured on a CPU, with 4 to 32 heads of 8 to 128: right attention is off by 2 or 3 units (5e-3
    to 1e-2 in bf16), a mask that is wrong in a few places, positions or padding by 2e-1 and more.
    """
    return 8 * max(torch.finfo(dtype).eps, TF32)


def attention_error(heads: int, kv_heads: int, width: int, device, dtype: torch.dtype, autocast: bool = False) -> float:
    """How far attention on made-up rows is from attention that is written out, as a fraction; NaN where one is.

    Compared are, token by token, the output, with and without gradients, and the gradients of queries, keys and values,
    which are random.
    """
    source, errors = torch.Generator().manual_seed(0), []
    counts = (heads, kv_heads, kv_heads, heads)  # of queries, keys, values and the gradient of the output
    for turns in TURNS:
        last, sees = (torch.as_tensor(each).to(device) for each in made_up(turns))
        random = (torch.randn(len(last), count, width, generator=source) for count in counts)
        *inputs, upstream = (each.to(device).requires_grad_() for each in random)
        with torch.no_grad():  # as gradient checkpointing calls it first
            without_gradients = _of_row(last, inputs, dtype, autocast)
        ours, expected = _of_row(last, inputs, dtype, autocast), _written_out(sees, inputs, dtype)
        gradients = (torch.autograd.grad(output, inputs, upstream) for output in (ours, expected))
        pairs = [(without_gradients, expected), (ours, expected), *zip(*gradients)]
        errors += [_error(*pair) for pair in pairs]
    return float(torch.stack(errors).max())


def made_up(turns: int) -> tuple[np.ndarray, np.ndarray]:
    """(`last` of a row of two trajectories, whether each token of it sees each other: those before it in its sample).

    A turn's target is not shown to the next turn, as in the drop history. Padding sees itself.
    """
    samples, fresh = [], itertools.count()

    def tokens(number: int) -> np.ndarray:
        return np.fromiter(itertools.islice(fresh, number), np.int64)

    for prompt in map(tokens, PROMPTS):
        for turn in range(turns):
            target = tokens(45 + 25 * turn)
            labels = np.concatenate([np.full_like(prompt, IGNORE_INDEX), target])
            samples.append(rows.Sample(np.concatenate([prompt, target]), labels))
            prompt = np.concatenate([prompt, tokens(turn % 2 * 60)])  # none: the next branch opens supervised
    shared = [0, *(rows.shared_tokens(*pair) for pair in itertools.pairwise(samples))]
    last = rows.padded(rows.tree(samples, shared), attention.BLOCK, 0).last.astype(np.int64)
    sees, path, end = np.eye(len(last), dtype=bool), np.arange(0), 0  # path: where in the row a sample's tokens are
    for sample, kept in zip(samples, shared):
        start, end = end, end + len(sample.ids) - kept
        path = np.concatenate([path[:kept], np.arange(start, end)])
        sees[path[:, None], path] = np.tri(len(path), dtype=bool)
    return last, sees


def _of_row(last: torch.Tensor, inputs: list, dtype: torch.dtype, autocast: bool) -> torch.Tensor:
    """The output of each token of a row, float32, (tokens, heads, width), by the functions that transformers calls."""
    _, heads, width = inputs[0].shape
    module = SimpleNamespace(num_key_value_groups=heads // inputs[1].shape[1], is_causal=True, training=True)
    with torch.autocast(last.device.type, dtype, enabled=autocast):
        mask = attention.tree_mask(attention_mask=last[None, None])
        laid_out = (each.to(dtype)[None].transpose(1, 2) for each in inputs)  # as models do
        return attention.tree_attention(module, *laid_out, mask, scaling=width**-0.5)[0][0].float()


def _written_out(sees: torch.Tensor, inputs: list, dtype: torch.dtype) -> torch.Tensor:
    """The same in float32, from the inputs as dtype has them."""
    query, key, value = (each.to(dtype).float().transpose(0, 1) for each in inputs)
    key, value = (each.repeat_interleave(len(query) // len(each), dim=0) for each in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def _error(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference of a token's vectors, over their own length, or the root mean square of all if longer."""
    off, lengths = (vectors.detach().flatten(1).norm(dim=1) for vectors in (ours - expected, expected))
    return (off / lengths.clamp(min=lengths.square().mean().sqrt())).max()
