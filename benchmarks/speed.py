"""How fast and in how much memory step 1 and step 2 run, beside the naive definition and the floor.

    python benchmarks/speed.py [--turns 108000]

Makes its own input: 9,000 trajectories of 12 turns, as many as EnvScaler has, and 2,700 of 40, no two alike; 50 at a time
share an environment, which is tools and a system prompt. A user query comes every fourth turn. Prints for both
  naive   transformers renders the served prompt and the target of every turn; json.dump with indent 4; one process
  ours    step 1 and step 2, as commands, to one Parquet file, and to as many as there are cores
  floor   parse the input once, render each trajectory once, encode and write the output once; all of it over all cores
and the peak memory of the largest process for 1, 4 and 16 times the input, format by format. Imports of naive and floor
are not counted, those of ours are. Ours and the floor run in turn, three times; the medians are shown. The samples of all
are compared.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step1_apply_tool_template import QWEN3, prepared_template, read_chat_template, split_blocks  # noqa: E402
from step2_to_alpaca_mask_history import ROW_GROUP, write_parquet  # noqa: E402
from trajectories import SAMPLE, served_trajectory, without_reasoning  # noqa: E402

QUERY_EVERY = 4
OF_ENVIRONMENT = 50  # trajectories that share the tools and the system prompt of an environment
COLUMNS = ("instruction", "input", "output", "system", "history")
ROUNDS = 3
LEAST = 500  # trajectories, of which peak memory is measured for 1, 4 and 16 times as many


def make_input(path: Path, trajectories: int, turns: int, copies: int = 1) -> None:
    """A .jsonl file of made-up trajectories with the tools of the embedded sample."""
    source = random.Random(turns)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(5000)]
    tools = [json.loads(line)["tools"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]

    def text(length: int) -> str:
        return " ".join(source.choices(words, k=length))

    environments = [(text(300), source.choice(tools)) for _ in range(1 + trajectories * copies // OF_ENVIRONMENT)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(trajectories * copies):
            policy, tools = source.choice(environments)
            messages = [{"role": "system", "content": policy}]
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
            file.write(json.dumps({"tools": tools, "messages": json.dumps(messages)}) + "\n")


# ---------------------------------------------------------------- what is measured, each in a process of its own


def naive(source: str, target: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat_template, samples = QWEN3.read_text(encoding="utf-8"), []

    def render(messages: list, tools, **options) -> str:
        [rendered], _ = render_jinja_template([messages], tools=tools, chat_template=chat_template, **options)
        return rendered

    start = time.perf_counter()
    with open(source, encoding="utf-8") as file:
        for line in file:
            messages, tools = served_trajectory(json.loads(line))
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    prompt = render(without_reasoning(messages[:turn]), tools, add_generation_prompt=True)
                    whole = render(messages[: turn + 1], tools)
                    (_, system), *blocks = split_blocks(prompt)
                    texts = [text for _, text in blocks]
                    output = whole.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
                    samples.append({"instruction": texts[-1], "input": "", "output": output, "system": system,
                                    "history": [texts[at : at + 2] for at in range(0, len(texts) - 1, 2)]})  # fmt: skip
    with open(target, "w", encoding="utf-8") as file:
        json.dump(samples, file, ensure_ascii=False, indent=4)
    print(time.perf_counter() - start)
    Path(f"{target}.digests").write_text("\n".join(digests(samples)), encoding="ascii")


def digests(samples) -> list[str]:
    return sorted(hashlib.sha256(json.dumps([sample[column] for column in COLUMNS]).encode()).hexdigest() for sample in samples)


def render_once(line: bytes) -> int:
    render, *_ = prepared_template(read_chat_template(str(QWEN3)))
    return len(render(*served_trajectory(json.loads(line))))


def floor(source: str, samples: str) -> None:
    """`samples` is the Parquet file that step 2 wrote: what is read from it is not a part of the floor, writing it is."""
    import pyarrow.parquet as pq

    table, cores = pq.read_table(samples), os.cpu_count()
    bounds = [len(table) * core // cores for core in range(cores + 1)]
    prepared_template(read_chat_template(str(QWEN3)))
    fork = multiprocessing.get_context("fork")
    start = time.perf_counter()
    with open(source, "rb") as file, fork.Pool() as pool:
        for _ in pool.imap(render_once, file, chunksize=16):
            pass
    writers = [
        fork.Process(target=write_parquet, args=(f"{samples}.floor{at}", (table.slice(row, min(ROW_GROUP, to - row)) for row in range(at, to, ROW_GROUP))))
        for at, to in itertools.pairwise(bounds)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    print(time.perf_counter() - start)


def compare(samples: str, shards: str, naive_samples: str) -> None:
    """Whether all three hold the same samples."""
    import pyarrow.parquet as pq

    def read(*paths):
        return (row for path in paths for batch in pq.ParquetFile(path).iter_batches(512, columns=[*COLUMNS]) for row in batch.to_pylist())

    if not digests(read(samples)) == digests(read(*Path(shards).iterdir())) == Path(f"{naive_samples}.digests").read_text().split():
        sys.exit("the samples differ")


def run(*command) -> tuple[float, float, str]:
    """(seconds, MB of the largest process, output) of a command."""
    os.sync()  # none has to wait for what an earlier one wrote
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output


def both_steps(source: Path, target: Path, *options) -> tuple[float, float]:
    plain = target.with_name(f"{target.stem}_plain{source.suffix}")
    one = run(ROOT / "step1_apply_tool_template.py", source, plain)
    two = run(ROOT / "step2_to_alpaca_mask_history.py", plain, target, "--dataset-dir", target.parent, *options)
    return one[0] + two[0], max(one[1], two[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=108_000, help="in all (default: 108000)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # a process of the benchmark's own
    args = parser.parse_args()
    if args.part:
        {"naive": naive, "floor": floor, "compare": compare}[args.part[0]](*args.part[1:])
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cores = os.cpu_count()
        print(f"{args.turns} turns, {cores} cores; seconds, and MB of the largest process")
        print(f"turns of a trajectory  naive  one file  {cores} files  floor  naive / one file  naive / {cores} files"
              f"  one file / floor  {cores} files / floor  naive MB  ours MB")  # fmt: skip
        for turns in (12, 40):
            source, target, shards = folder / f"{turns}.jsonl", folder / f"{turns}.parquet", folder / f"{turns}"
            make_input(source, args.turns // turns, turns)
            rounds = []
            for _ in range(ROUNDS):
                ours = both_steps(source, target), both_steps(source, shards, "--num-shards", cores)
                seconds, peaks = zip(*ours)
                rounds.append((*seconds, float(run(__file__, "--part", "floor", source, target)[2]), max(peaks)))
            one, many, least, peak = map(statistics.median, zip(*rounds))
            _, slow_memory, slow = run(__file__, "--part", "naive", source, folder / "naive.json")
            slow = float(slow)
            run(__file__, "--part", "compare", target, shards, folder / "naive.json")
            print(f"{turns:>21}  {slow:>5.1f}  {one:>8.1f}  {many:>7.1f}  {least:>5.1f}  {slow / one:>16.1f}  {slow / many:>15.1f}"
                  f"  {one / least:>16.1f}  {many / least:>15.1f}  {slow_memory:>8.0f}  {peak:>7.0f}",
                  flush=True)  # fmt: skip
        print("\npeak MB of the largest process, 12 turns     1x     4x    16x")
        for suffix_in, suffix_out in ((".jsonl", ".parquet"), (".jsonl", ""), (".jsonl", ".jsonl"), (".json", ".json"), (".parquet", ".parquet")):
            peaks = []
            for copies in (1, 4, 16):
                source = folder / f"{copies}x.jsonl"
                make_input(source, LEAST, 12, copies)
                if suffix_in != ".jsonl":
                    convert(source, source := source.with_suffix(suffix_in))
                options = () if suffix_out else ("--num-shards", cores)
                peaks.append(both_steps(source, folder / f"out{suffix_out}", *options)[1])
            print(f"{suffix_in[1:]:>8} to {suffix_out[1:] or 'shards':<8}                      " + "".join(f"{peak:>7.0f}" for peak in peaks), flush=True)


def convert(source: Path, target: Path) -> None:
    from trajectories import read_rows, row_writer

    with row_writer(target) as write:
        for _, row, _ in read_rows(str(source)):
            write(row)


if __name__ == "__main__":
    main()
