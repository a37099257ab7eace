"""How fast and in how much memory step 1 and step 2 run, beside the naive definition and the floor.

    python benchmarks/speed.py [--rows 9022] [--turns N]

Makes its own input, as large as EnvScaler and with its statistics (benchmarks/made_up.py), or with N turns in each row. Prints
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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import made_up  # noqa: E402
from step1_apply_tool_template import QWEN3, prepared_template, read_chat_template, split_blocks  # noqa: E402
from step2_to_alpaca_mask_history import ROW_GROUP, write_parquet  # noqa: E402
from trajectories import read_rows, served_trajectory, without_reasoning  # noqa: E402

COLUMNS = ("instruction", "input", "output", "system", "history")
ROUNDS = 3
LEAST = 250  # rows, of which peak memory is measured for 1, 4 and 16 times as many


# ---------------------------------------------------------------- what is measured, each in a process of its own


def naive(source: str, target: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat_template, samples = QWEN3.read_text(encoding="utf-8"), []

    def render(messages: list, tools, **options) -> str:
        [rendered], _ = render_jinja_template([messages], tools=tools, chat_template=chat_template, **options)
        return rendered

    start = time.perf_counter()
    with open(source, encoding="utf-8") as file:
        rows = json.load(file)
    for row in rows:
        messages, tools = served_trajectory(row)
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


def render_once(row: dict) -> int:
    render, *_ = prepared_template(read_chat_template(str(QWEN3)))
    return len(render(*served_trajectory(row)))


def floor(source: str, samples: str) -> None:
    """`samples` is the Parquet file that step 2 wrote: what is read from it is not a part of the floor, writing it is."""
    import pyarrow.parquet as pq

    table, cores = pq.read_table(samples), os.cpu_count()
    bounds = [len(table) * core // cores for core in range(cores + 1)]
    prepared_template(read_chat_template(str(QWEN3)))
    fork = multiprocessing.get_context("fork")
    start = time.perf_counter()
    with fork.Pool() as pool:
        for _ in pool.imap(render_once, (row for _, row, _ in read_rows(source)), chunksize=16):
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


def both_steps(source: Path, target: Path, *options) -> tuple[float, float, float]:
    """(seconds of step 1, of step 2, MB of the largest process)"""
    plain = target.with_name(f"{target.stem}_plain{'.jsonl' if source.suffix == '.json' else source.suffix}")
    one = run(ROOT / "step1_apply_tool_template.py", source, plain)
    two = run(ROOT / "step2_to_alpaca_mask_history.py", plain, target, "--dataset-dir", target.parent, *options)
    return one[0], two[0], max(one[1], two[1])


def size(path: Path) -> str:
    return f"{sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])) / 1e6:.0f} MB"


def measure_speed(folder: Path, rows: int, turns: int | None) -> None:
    cores, source, target, shards = os.cpu_count(), folder / "rows.json", folder / "samples.parquet", folder / "shards"
    made_up.write(source, rows, turns)
    rounds = []
    for _ in range(ROUNDS):
        one, many = both_steps(source, target), both_steps(source, shards, "--num-shards", cores)
        rounds.append((*one, *many, float(run(__file__, "--part", "floor", source, target)[2])))
    step1, step2, peak, _, step2_many, peak_many, least = map(statistics.median, zip(*rounds))
    slow = float(run(__file__, "--part", "naive", source, folder / "naive.json")[2])
    run(__file__, "--part", "compare", target, shards, folder / "naive.json")
    print(f"{rows} rows, {size(source)}, {cores} cores: seconds, MB of the largest process, size of the samples")
    print(f"naive         {slow:>6.1f}  {size(folder / 'naive.json')}\nfloor         {least:>6.1f}")
    for name, two, memory, path in (("one file", step2, peak, target), (f"{cores} files", step2_many, peak_many, shards)):
        print(f"{name:<12}  {step1 + two:>6.1f}  (step 1 {step1:.1f}, step 2 {two:.1f}); {memory:.0f} MB; {size(path)}; "
              f"{slow / (step1 + two):.1f} times faster than naive, {(step1 + two) / least:.1f} times the floor", flush=True)  # fmt: skip


def measure_memory(folder: Path, turns: int | None) -> None:
    print(f"peak MB of the largest process, {LEAST} rows     1x     4x    16x")
    for suffix_in, suffix_out in ((".jsonl", ".parquet"), (".jsonl", ""), (".jsonl", ".jsonl"), (".json", ".json"), (".parquet", ".parquet")):
        peaks, options = [], () if suffix_out else ("--num-shards", os.cpu_count())
        for times in (1, 4, 16):
            source = made_up.write(folder / f"{times}x{suffix_in}", LEAST * times, turns)
            peaks.append(both_steps(source, folder / f"out{suffix_out}", *options)[2])
        print(f"{suffix_in[1:]:>8} to {suffix_out[1:] or 'shards':<8}                      " + "".join(f"{peak:>7.0f}" for peak in peaks), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=made_up.ROWS)
    parser.add_argument("--turns", type=int, metavar="N", help="in each row (default: as in EnvScaler)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # a process of the benchmark's own
    args = parser.parse_args()
    if args.part:
        {"naive": naive, "floor": floor, "compare": compare}[args.part[0]](*args.part[1:])
        return
    for measure, options in ((measure_speed, (args.rows, args.turns)), (measure_memory, (args.turns,))):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), *options)


if __name__ == "__main__":
    main()
