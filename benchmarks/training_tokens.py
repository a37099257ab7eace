"""What a data set like EnvScaler costs to train: tokens of prefix samples and of merged chains, and hours.

    python -m benchmarks.training_tokens MODEL [--rows 400]

Takes made-up rows with EnvScaler's statistics (benchmarks/made_up.py), splits them each way and counts tokens as
LlamaFactory makes them, with the tokenizer of MODEL (a folder or a Hub id; Qwen/Qwen3-4B is meant). The counts are
scaled to EnvScaler's 9,022 rows. Hours are by arithmetic, nothing is trained: Qwen3-4B on 8 H100 (989 TFLOPS in bf16)
of which 40 % are used; 6 operations for each parameter and token, and the attention of each token to those before it.
"""

import argparse
from collections import Counter

from tqdm import tqdm

from benchmarks import made_up
from served_tokens.prompts.chat_template import QWEN3, load_chat_template, read_chat_template
from served_tokens.prompts.turns import apply_chat_template
from served_tokens.rows.trajectory import read_trajectory
from served_tokens.samples.tokens import load_encoder, to_token_samples

WAYS = (
    ("prefix samples, drop", "drop", False),
    ("prefix samples, template", "template", False),
    ("merged chains, template", "template", True),
)
PARAMETERS, ATTENTION_WIDTH = 4.0e9, 36 * 32 * 128  # Qwen3-4B: layers, heads, width of a head
OPERATIONS_A_SECOND = 8 * 989e12 * 0.4


def hours(lengths: Counter) -> float:
    """Forward and backward of samples of so many tokens: {length: how many}."""
    operations = sum(
        number * (6 * PARAMETERS * length + 6 * ATTENTION_WIDTH * length**2) for length, number in lengths.items()
    )
    return operations / OPERATIONS_A_SECOND / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    render, encode = load_chat_template(read_chat_template(str(QWEN3))), load_encoder(args.model)
    lengths, once, turns = {name: Counter() for name, *_ in WAYS}, 0, 0
    for row in tqdm(made_up.rows(args.rows), total=args.rows, unit=" rows"):
        trajectory = read_trajectory(row)
        plain, served = apply_chat_template(trajectory.messages, trajectory.tools, render)
        served |= {"source": "", "trajectory": 0, "reading": {}}
        for name, served_as, merge in WAYS:
            samples, _ = to_token_samples(plain, served, served_as, merge, encode)
            lengths[name].update(len(sample["input_ids"]) for sample in samples)
        turns += len(served["turns"])
        once += len(encode("".join(message["content"] for message in plain)))
    scale = made_up.ROWS / args.rows
    print(
        f"{args.rows} rows, {turns} turns; for {made_up.ROWS} rows, an epoch (hours: Qwen3-4B on 8 H100, by arithmetic)"
    )
    print(f"{'':<26}  million tokens  longest  hours")
    print(f"{'each token once':<26}  {once * scale / 1e6:>14.0f}")
    for name, of_way in lengths.items():
        total = sum(length * number for length, number in of_way.items())
        print(f"{name:<26}  {total * scale / 1e6:>14.0f}  {max(of_way):>7}  {hours(of_way) * scale:>5.1f}")


if __name__ == "__main__":
    main()
