"""How many training tokens --merge-turns saves, by the number of turns per user query.

    python benchmarks/merge_turns.py

Makes trajectories of 16 turns (the tools and system prompt of the embedded sample, 60 tokens of reasoning and a tool
output of 200 per turn), splits them both ways, and prints tokens per trajectory and their ratio.
"""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_qwen3  # noqa: E402
from step1_apply_tool_template import QWEN3, apply_chat_template, load_chat_template  # noqa: E402
from step2_to_alpaca_mask_history import to_samples  # noqa: E402
from trajectories import SAMPLE, served_trajectory  # noqa: E402

TURNS = 16
PER_QUERY = (1, 4, 16)


def trajectory(turns_per_query: int, row: dict, words: random.Random) -> dict:
    """One made-up trajectory of TURNS turns with the tools and system prompt of `row`."""

    def text(length: int) -> str:
        return " ".join(words.choice("order item stock ship date late refund check first then note ask".split()) for _ in range(length))

    messages = json.loads(row["messages"])[:1]
    for turn in range(TURNS):
        if turn % turns_per_query == 0:
            messages.append({"role": "user", "content": text(30)})
        reply = {"role": "assistant", "content": "", "reasoning_content": text(60)}
        if turn % turns_per_query == turns_per_query - 1:
            messages.append({**reply, "content": text(40)})
        else:
            call = {"function": {"name": "get_order", "arguments": {"order_id": turn}}}
            messages += [{**reply, "tool_calls": [call]}, {"role": "tool", "content": text(200)}]
    return {"messages": messages, "tools": row["tools"]}


def main() -> None:
    render, tokenizer = load_chat_template(str(QWEN3)), tiny_qwen3.build_tokenizer()
    row = json.loads(SAMPLE.read_text(encoding="utf-8").splitlines()[0])

    def tokens(samples: list[dict]) -> int:
        text = "".join(
            f"<|im_start|>system\n{sample['system']}<|im_end|>\n"
            + "".join(
                f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"
                for user, assistant in [*sample["history"], [sample["instruction"], sample["output"]]]
            )
            for sample in samples
        )
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    print(f"{TURNS} turns; turns per query  samples      tokens  merged samples  merged tokens  times fewer tokens")
    for turns_per_query in PER_QUERY:
        messages, tools = served_trajectory(trajectory(turns_per_query, row, random.Random(0)))
        plain, served = apply_chat_template(messages, tools, render)
        served |= {"source": "", "trajectory": 0}
        prefix, merged = (to_samples(plain, served, "template", merge)[0] for merge in (False, True))
        counts = tokens(prefix), tokens(merged)
        print(f"{turns_per_query:>24}  {len(prefix):>7}  {counts[0]:>10}  {len(merged):>14}  {counts[1]:>13}  {counts[0] / counts[1]:>18.1f}")


if __name__ == "__main__":
    main()
