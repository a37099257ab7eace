"""How fast and in how much memory step 1 and step 2 run, beside the naive definition and the floor.

    python benchmarks/speed.py [--trajectories 300]

Makes its own input: trajectories of 12 and of 40 turns, a user query every fourth turn, each with reasoning, tools and
system prompt of its own. Prints for both
  naive   render every prefix with the chat template, json.dump with indent 4
  ours    step 1 and step 2, as commands, to Parquet
  floor   parse the input once, render each trajectory once, over all cores; encode and write the output once
and the peak memory of the largest process for 1, 4 and 16 times the input, format by format.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step1_apply_tool_template import QWEN3, load_chat_template  # noqa: E402
from trajectories import SAMPLE, served_trajectory, without_reasoning  # noqa: E402

QUERY_EVERY = 4


def make_input(path: Path, trajectories: int, turns: int, copies: int = 1) -> None:
    """A .jsonl file of made-up trajectories with the tools of the embedded sample, no two alike."""
    source = random.Random(turns)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(5000)]
    tools = [json.loads(line)["tools"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]

    def text(length: int) -> str:
        return " ".join(source.choices(words, k=length))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(trajectories * copies):
            messages = [{"role": "system", "content": text(300)}]
            for turn in range(turns):
                if turn % QUERY_EVERY == 0:
                    messages.append({"role": "user", "content": text(30)})
                message = {"role": "assistant", "content": "", "reasoning_content": text(80)}
                if turn % QUERY_EVERY == QUERY_EVERY - 1:
                    messages.append({**message, "content": text(60)})
                else:
                    arguments = json.dumps({"id": text(1), "note": text(10), "count": turn})
                    messages.append({**message, "tool_calls": [{"function": {"name": "get", "arguments": arguments}}]})
                    messages.append({"role": "tool", "content": text(120)})
            file.write(json.dumps({"tools": source.choice(tools), "messages": json.dumps(messages)}) + "\n")


# ---------------------------------------------------------------- what is measured, each in a process of its own


def naive(source: str, target: str) -> None:
    render, samples = load_chat_template(str(QWEN3)), []
    with open(source, encoding="utf-8") as file:
        for line in file:
            messages, tools = served_trajectory(json.loads(line))
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    prompt = render(without_reasoning(messages[:turn]), tools, add_generation_prompt=True)
                    whole = render(messages[: turn + 1], tools)
                    samples.append({"prompt": prompt, "output": whole.rpartition("<|im_start|>assistant\n")[2]})
    with open(target, "w", encoding="utf-8") as file:
        json.dump(samples, file, ensure_ascii=False, indent=4)


def render_once(line: str) -> int:
    render_once.render = getattr(render_once, "render", None) or load_chat_template(str(QWEN3))
    return len(render_once.render(*served_trajectory(json.loads(line))))


def floor(source: str, samples: str) -> None:
    """`samples` is the Parquet file that step 2 wrote: what is read from it is not a part of the floor, writing it is."""
    import pyarrow.parquet as pq

    table = pq.read_table(samples)
    start = time.perf_counter()
    with open(source, encoding="utf-8") as file, multiprocessing.Pool() as pool:
        for _ in pool.imap(render_once, file, chunksize=16):
            pass
    pq.write_table(table, samples + ".floor", compression="zstd", row_group_size=512)
    print(time.perf_counter() - start)


def run(*command) -> tuple[float, float, str]:
    """(seconds, MB of the largest process, output) of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output


def both_steps(source: Path, target: Path) -> tuple[float, float]:
    plain = target.with_name(f"{target.stem}_plain{source.suffix}")
    one = run(ROOT / "step1_apply_tool_template.py", source, plain)
    two = run(ROOT / "step2_to_alpaca_mask_history.py", plain, target, "--dataset-dir", target.parent)
    return one[0] + two[0], max(one[1], two[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=300)
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # a process of the benchmark's own
    args = parser.parse_args()
    if args.part:
        {"naive": naive, "floor": floor}[args.part[0]](*args.part[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"{args.trajectories} trajectories, {os.cpu_count()} cores")
        print("turns   naive s    ours s   floor s   naive / ours   ours / floor   naive MB   ours MB")
        for turns in (12, 40):
            source, target = folder / f"{turns}.jsonl", folder / f"{turns}.parquet"
            make_input(source, args.trajectories, turns)
            ours, ours_memory = both_steps(source, target)
            slow, slow_memory, _ = run(__file__, "--part", "naive", source, folder / "naive.json")
            least = float(run(__file__, "--part", "floor", source, target)[2])
            print(f"{turns:>5}  {slow:>8.1f}  {ours:>8.1f}  {least:>8.1f}  {slow / ours:>13.1f}  {ours / least:>13.1f}"
                  f"  {slow_memory:>9.0f}  {ours_memory:>8.0f}", flush=True)  # fmt: skip
        print("\npeak MB of the largest process, 12 turns     1x     4x    16x")
        for suffix_in, suffix_out in ((".jsonl", ".parquet"), (".jsonl", ".jsonl"), (".json", ".json"), (".parquet", ".parquet")):
            peaks = []
            for copies in (1, 4, 16):
                source = folder / f"{copies}x.jsonl"
                make_input(source, args.trajectories, 12, copies)
                if suffix_in != ".jsonl":
                    convert(source, source := source.with_suffix(suffix_in))
                peaks.append(both_steps(source, folder / f"out{suffix_out}")[1])
            print(f"{suffix_in[1:]:>8} to {suffix_out[1:]:<8}                      " + "".join(f"{peak:>7.0f}" for peak in peaks), flush=True)


def convert(source: Path, target: Path) -> None:
    from trajectories import read_rows, row_writer

    with row_writer(target) as write:
        for _, row, _ in read_rows(str(source)):
            write(row)


if __name__ == "__main__":
    main()
