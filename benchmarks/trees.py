"""What token trees save: tokens, attended pairs, time and memory of a step; and that loss and gradients are the same.

    python -m benchmarks.trees [--size cpu|gpu] [--rounds N] [--rows N]

Needs torch, transformers and numpy alone. The trajectories are made-up token ids with the statistics of EnvScaler's
rows (two of a task share tools and system prompt); the models have random weights. Sizes: "cpu", a small model and
trajectories a sixteenth as long, and "gpu", models of the shapes of Qwen3-0.6B and Qwen3-4B in bf16 with rows of up
to 32,768 tokens.

A step is forward and backward of the same samples, with gradient checkpointing, as LlamaFactory sets it, and the logits
of supervised tokens alone, in chunks; the optimizer is not in it. The contenders take turns, the median is shown:
  one by one  prefix samples, each alone, causal: what torch's sdpa makes of it (FlashAttention on a GPU)
  packed      prefix samples side by side in rows as long as those of the trees, no sample sees another
  trees       served_tokens/trees/rows.py; packed and trees attend by served_tokens/trees/attention.py
"""

import argparse
import contextlib
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from served_tokens.marks import IGNORE_INDEX
from served_tokens.trees.attention import BLOCK, use_tree_attention
from served_tokens.trees.rows import Row, Sample, padded, rows_of, tree
from served_tokens.trees.self_check import checked

# (turns on average, their deviation, most), tokens of reasoning a turn, part of the turns that a query follows
KINDS = (((22.1, 5, 39), 495, 7.75 / 21.1), ((14.3, 4.5, 29), 591, 0.0))
SYSTEM, ANSWER, OBSERVATION = 4200, 60, 110  # tokens; with 18 turns about 7,257 a trajectory
CHUNK = 1024  # supervised tokens whose logits are there at once
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512}
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048}
QWEN3_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3_06B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_4B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SIZES = {"cpu": (SMALL, torch.float32, 16, 2048), "gpu": (QWEN3_06B, torch.bfloat16, 1, 32768)}
SIZES["4b"] = (QWEN3_4B, *SIZES["gpu"][1:])


# ---------------------------------------------------------------- samples


def trajectories(number: int, shorter: int = 1, vocabulary: int = 512):
    """Yield the turns of each trajectory: (observation, answer, reasoning, whether a query opens it), token ids."""
    for task in range((number + 1) // 2):
        draw = np.random.default_rng(task)

        def tokens(mean, draw=draw):
            return draw.integers(0, vocabulary, max(2, round(mean / shorter)), dtype=np.int32)

        system = tokens(SYSTEM)
        for (mean, deviation, most), reasoning, queries in KINDS[: number - 2 * task]:
            count, lengthy = int(np.clip(round(draw.normal(mean, deviation)), 3, most)), draw.lognormal(-0.08, 0.4)
            turns = []
            for turn in range(count):
                observation = tokens(OBSERVATION) if turn else np.concatenate([system, tokens(OBSERVATION)])
                thought = tokens(min(7490, reasoning * lengthy * draw.lognormal(-0.18, 0.6)))
                turns.append((observation, tokens(ANSWER), thought, turn == 0 or draw.random() < queries))
            yield turns


def prefix_samples(turns: list, keeps_reasoning: bool) -> list[Sample]:
    """A sample for each turn; where reasoning is kept, it is that since the last query."""
    samples, query = [], 0
    for number, (_, answer, reasoning, is_query) in enumerate(turns):
        query = number if is_query else query
        context = []
        for past, (observation, its_answer, its_reasoning, _) in enumerate(turns[: number + 1]):
            context.append(observation)
            if past < number:
                context += [its_reasoning, its_answer] if keeps_reasoning and past >= query else [its_answer]
        samples.append(_sample(np.concatenate(context), np.concatenate([reasoning, answer])))
    return samples


def merged_chains(turns: list) -> list[Sample]:
    """The samples with reasoning kept, of which one supervises all turns from a query to the next."""
    samples = prefix_samples(turns, True)
    ends = [number for number in range(len(turns)) if number + 1 == len(turns) or turns[number + 1][3]]
    return [samples[number] for number in ends]


def _sample(prompt: np.ndarray, target: np.ndarray) -> Sample:
    return Sample(np.concatenate([prompt, target]), np.concatenate([np.full_like(prompt, IGNORE_INDEX), target]))


def packed_rows(samples: list[Sample], row_tokens: int):
    """Rows in which nothing is shared: first fit, in order."""
    held = []
    for sample in samples:
        if held and sum(len(one.ids) for one in held) + len(sample.ids) > row_tokens:
            yield tree(held, [0] * len(held))
            held = []
        held.append(sample)
    yield tree(held, [0] * len(held))


# ---------------------------------------------------------------- counting


def count(number: int, row_tokens: int) -> None:
    print(f"\n{number} trajectories like EnvScaler's: an epoch, and what attends to what")
    print(f"{'':<34} rows or samples  million tokens  times fewer  billion pairs  times fewer")
    for mode, keeps in (("default history", False), ("reasoning of the chain kept", True)):
        ways = counted(number, keeps, row_tokens)
        (_, tokens, pairs), *_ = ways.values()
        print(mode)
        for name, (rows, its_tokens, its_pairs) in ways.items():
            print(
                f"  {name:<32} {rows:>15}  {its_tokens / 1e6:>14.2f}  {tokens / its_tokens:>11.1f}  "
                f"{its_pairs / 1e9:>13.2f}  {pairs / its_pairs:>11.1f}",
                flush=True,
            )


def counted(number: int, keeps: bool, row_tokens: int) -> dict:
    """{how it is trained: [rows or samples, tokens, pairs of tokens of which one attends to the other]}"""
    ways = {}

    def add(way: str, size: int, pairs: int) -> None:
        ways[way] = [old + new for old, new in zip(ways.get(way, (0, 0, 0)), (1, size, pairs))]

    def samples():
        for turns in trajectories(number):
            prefix = prefix_samples(turns, keeps)
            for way, those in (("prefix samples", prefix), ("merged chains", merged_chains(turns) if keeps else [])):
                for sample in those:
                    add(way, len(sample.ids), len(sample.ids) * (len(sample.ids) + 1) // 2)
            for row in rows_of(prefix, row_tokens):
                add("trees, one a row", len(row.last), int(row.position_ids.sum()) + len(row.last))
            yield from prefix

    for row in rows_of(samples(), row_tokens):
        add(f"trees, rows of {row_tokens}", len(row.last), int(row.position_ids.sum()) + len(row.last))
    return ways


# ---------------------------------------------------------------- steps


def check(shape: dict, dtype: torch.dtype, device: str) -> None:
    """Print that attention is right for models of this shape, or end: no figure means a thing where it is wrong."""
    torch._dynamo.reset()
    heads = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    print(checked(*heads, device, dtype), flush=True)


def model_of(shape: dict, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **shape, max_position_embeddings=131072, tie_word_embeddings=True, attn_implementation="sdpa"
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model.train()


def batch_of(row, device: str) -> dict:
    """A Row, or a Sample as it is trained today, as the model takes it."""
    columns = {"input_ids": row[0], "labels": row[1]}
    if not isinstance(row, Sample):
        row = padded(row, BLOCK, 0)
        columns = {"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}
        columns["attention_mask"] = row.last[None]
    return {name: torch.as_tensor(column, dtype=torch.int64, device=device)[None] for name, column in columns.items()}


def summed_loss(model, input_ids, labels, **others) -> torch.Tensor:
    """The loss of the supervised tokens, summed, in float32 or better."""
    hidden = model.model(input_ids=input_ids, use_cache=False, **others).last_hidden_state[0, :-1]
    supervised = labels[0, 1:] != IGNORE_INDEX
    hidden, labels = hidden[supervised], labels[0, 1:][supervised]

    def of_chunk(hidden, labels):
        logits = model.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK))
    return sum(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks)


def step(model, rows: list, device: str) -> float:
    """Forward and backward of all rows, into the gradients; returns the loss, summed over tokens."""
    model.zero_grad()
    total = 0.0
    for row in rows:
        loss = summed_loss(model, **batch_of(row, device))
        loss.backward()
        total += loss.detach().double()
    return float(total)


def exactness(device: str, dtype: torch.dtype) -> None:
    print(f"\nexactness, tiny model, {dtype}, {device}: differences from prefix samples, one by one", flush=True)
    for mode, keeps in (("default history", False), ("reasoning of the chain kept", True)):
        samples = [sample for turns in trajectories(4, 16) for sample in prefix_samples(turns, keeps)]
        rows = list(rows_of(samples, 2048))
        model = model_of(TINY, dtype, device)
        expected, gradients = step(model, samples, device), _gradients(model)
        for name, these in (("trees", rows), ("control: trees, causal mask", list(map(_as_causal, rows)))):
            loss = step(model, these, device)
            off = [(a - b).norm() / b.norm() for a, b in zip(_gradients(model), gradients)]
            print(
                f"  {mode}, {name}: {len(samples)} samples in {len(rows)} rows; loss {abs(loss / expected - 1):.1e}, "
                f"gradients {max(off):.1e} (the worst parameter)",
                flush=True,
            )


def _gradients(model) -> list:
    return [parameter.grad.double().clone() for parameter in model.parameters()]


def _as_causal(row):
    return row._replace(last=np.full_like(row.last, len(row.last) - 1))


def speed(size: str, rounds: int) -> None:
    shape, dtype, shorter, row_tokens = SIZES[size]
    device = "cpu" if size == "cpu" else "cuda"
    samples, rows = [], []
    for turns in trajectories(12, shorter, shape["vocab_size"]):  # as many whole trajectories as one row holds
        more = samples + prefix_samples(turns, False)
        if len(made := list(rows_of(more, row_tokens))) == 1:
            samples, rows = more, made
    contenders = {"trees": rows, "packed": list(packed_rows(samples, row_tokens)), "one by one": samples}
    model = model_of(shape, dtype, device)
    print(f"\na step over {len(samples)} samples, {_described(model)}, {dtype}, {device}", flush=True)
    seconds, memory, losses = {name: [] for name in contenders}, dict.fromkeys(contenders, 0.0), {}
    for turn in range(rounds + 1):
        for name, of_contender in list(contenders.items()):
            try:
                taken, peak, losses[name] = measured(lambda of=of_contender: step(model, of, device), device)
            except Exception:
                print(f"  {name}: failed\n{traceback.format_exc()}", flush=True)
                del contenders[name]
                continue
            if turn:
                seconds[name].append(taken)
                memory[name] = max(memory[name], peak)
            else:
                print(f"  {name}: {taken:.1f} s the first time, compilation included", flush=True)
    print("  {:<12} {:>8} {:>10} {:>10} {:>13} {:>9} {:>13}".format(*COLUMNS))
    for name, of_contender in contenders.items():
        tokens, median = sum(len(row[0]) for row in of_contender), statistics.median(seconds[name])
        faster = statistics.median(seconds["trees"]) if seconds["trees"] else float("nan")
        print(
            f"  {name:<12} {len(of_contender):>8} {tokens:>10} {median:>10.3f} {median / faster:>13.2f} "
            f"{memory[name]:>9.1f} {losses[name] / sum(supervised_tokens(row) for row in of_contender):>13.6f}",
            flush=True,
        )


COLUMNS = ("", "rows", "tokens", "seconds", "times trees", "peak GB", "mean loss")


def supervised_tokens(row) -> int:
    return int((row.labels[1:] != IGNORE_INDEX).sum())


def _described(model) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"


def measured(work, device: str) -> tuple[float, float, float]:
    """(seconds, peak memory in GB, what work returns)"""
    reset_peak(device)
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak_memory(device) / 1e9, result


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes since `reset_peak`: allocated ones on a GPU, those of the process on a CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return 0


def many_lengths(row_tokens: int) -> None:
    """Rows of other lengths: how often flex_attention is compiled anew, and whether it is slower then."""
    shape, dtype, *_ = SIZES["gpu"]
    model = model_of(shape, dtype, "cuda")
    samples = [sample for turns in trajectories(12, 1, shape["vocab_size"]) for sample in prefix_samples(turns, False)]
    whole = max(rows_of(samples, row_tokens), key=lambda row: len(row.input_ids))
    lengths = [len(whole.input_ids) * eighths // 8 for eighths in (8, 6, 4, 5, 7)]
    print("\nrows of different lengths, one after the other: seconds of the first and second step", flush=True)
    for length in lengths:
        row = Row(*(column[:length] for column in whole))
        row = row._replace(last=np.minimum(row.last, length - 1))
        first, second = (measured(lambda of=row: step(model, [of], "cuda"), "cuda") for _ in range(2))
        print(
            f"  {len(row.input_ids):>6} tokens: {first[0]:>7.2f} {second[0]:>7.3f} s, peak {second[1]:.1f} GB, "
            f"{second[0] / len(row.input_ids) * 1e6:.1f} microseconds a token",
            flush=True,
        )


def section(work, *arguments) -> None:
    """One section fails alone."""
    torch._dynamo.reset()  # else what it saw of other models makes it compile for any size
    try:
        work(*arguments)
    except Exception:
        print(f"{work.__name__} failed\n{traceback.format_exc()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200, help="trajectories that are counted; 0: none")
    args = parser.parse_args()
    start = time.perf_counter()
    on = torch.cuda.get_device_name() if args.size == "gpu" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{on}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    transformers.logging.set_verbosity_error()
    use_tree_attention()
    if args.size == "gpu":
        for shape, dtype in ((TINY, torch.float32), (QWEN3_06B, torch.bfloat16), (QWEN3_4B, torch.bfloat16)):
            check(shape, dtype, "cuda")
        section(exactness, "cuda", torch.float32)
        section(speed, "gpu", args.rounds)
        section(many_lengths, SIZES["gpu"][3])
        section(speed, "4b", 2)
    else:
        check(SMALL, torch.float32, "cpu")
        section(exactness, "cpu", torch.float64)
        section(exactness, "cpu", torch.float32)
        section(speed, "cpu", args.rounds)
    if args.rows:
        section(count, args.rows, 32768)
    print(f"\n{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
