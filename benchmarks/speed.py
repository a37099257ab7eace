"""How fast and in how much memory step 1 and step 2 run, beside the ways that others go.

    python -m benchmarks.speed [--rows 9000]

Makes its own input (benchmarks/made_up.py), a JSON array as EnvScaler's: rows of 12 turns, then three tenths as many of
40. Prints
  ours       step 1 and step 2, as commands with their start-up, to the default folder of Parquet files
  reference  as published scripts do it: the array loaded whole, each trajectory rendered once by transformers, a JSON
             array between the steps and one of samples at the end, indented; one process. Its samples are not exact.
  naive      the definition: transformers renders the served prompt and the target of every turn; one process
each alone and, at 12 turns, with LlamaFactory's loading of what comes out, which is what stands between the data and
the tokenizer. Imports of reference and naive are not counted. Then the peak memory of the largest process of ours for
1, 4 and 16 times 250 rows with EnvScaler's statistics, format by format. Ours is run three times, in turn with nothing;
the median is shown.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import loading, made_up
from served_tokens.files.read import find_files, read_rows
from served_tokens.prompts.chat_template import QWEN3, split_blocks
from served_tokens.rows.trajectory import read_trajectory

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("instruction", "input", "output", "system", "history")
ROUNDS, LEAST = 3, 250
FORMATS = ((".jsonl", ""), (".jsonl", ".parquet"), (".jsonl", ".jsonl"), (".json", ".json"), (".parquet", ".parquet"))


def render(messages: list, tools, **options) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat_template = QWEN3.read_text(encoding="utf-8")
    [rendered], _ = render_jinja_template([messages], tools=tools, chat_template=chat_template, **options)
    return rendered


def reference(source: str, target: str) -> None:
    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    for row in rows:
        given = read_trajectory(row)
        rendered = render(given.messages, given.tools)
        row["messages"] = [{"role": role, "content": text} for role, text in split_blocks(rendered)]
    between = Path(f"{target}.between")
    with between.open("w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=4)
    samples = []
    for row in json.loads(between.read_text(encoding="utf-8")):
        system, *texts = [message["content"] for message in row["messages"]]
        for turn in range(1, len(texts), 2):
            history = [texts[at : at + 2] for at in range(0, turn - 1, 2)]
            samples.append(sample(texts[turn - 1], texts[turn], system, history))
    dump(samples, target)


def naive(source: str, target: str) -> None:
    samples = []
    for row in json.loads(Path(source).read_text(encoding="utf-8")):
        given = read_trajectory(row)
        for turn in given.turns:
            past = [
                {key: value for key, value in message.items() if key != "reasoning_content"}
                for message in given.messages[:turn]
            ]
            prompt = render(past, given.tools, add_generation_prompt=True)
            whole = render(given.messages[: turn + 1], given.tools)
            (_, system), *blocks = split_blocks(prompt)
            texts = [text for _, text in blocks]
            history = [texts[at : at + 2] for at in range(0, len(texts) - 1, 2)]
            output = whole.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
            samples.append(sample(texts[-1], output, system, history))
    dump(samples, target)


def sample(instruction: str, output: str, system: str, history: list) -> dict:
    return {"instruction": instruction, "input": "", "output": output, "system": system, "history": history}


def dump(samples: list[dict], target: str) -> None:
    with open(target, "w", encoding="utf-8") as file:
        json.dump(samples, file, ensure_ascii=False, indent=4)


def timed(part: str, *arguments: str) -> None:
    """What a process of this benchmark's own does; the last line that it prints are the seconds."""
    render([{"role": "user", "content": "q"}], None)  # the imports
    start = time.perf_counter()
    {"reference": reference, "naive": naive}[part](*arguments)
    print(time.perf_counter() - start)


def digests(path: Path) -> list[str]:
    rows = (row for file in find_files(str(path)) for _, row in read_rows(file))
    return sorted(hashlib.sha256(json.dumps([row[name] for name in COLUMNS]).encode()).hexdigest() for row in rows)


def run(*command) -> tuple[float, float, str]:
    """(seconds, MB of the largest process, output) of a command."""
    os.sync()  # none has to wait for what an earlier one wrote
    start = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output


def both_steps(source: Path, target: Path) -> tuple[float, float, float]:
    """(seconds of step 1, of step 2, MB of the largest process)"""
    plain = target.with_name(f"{target.stem}_plain.jsonl")
    one = run("step1_apply_tool_template.py", source, plain)
    two = run("step2_to_alpaca_mask_history.py", plain, target, "--dataset-dir", target.parent)
    return one[0], two[0], max(one[1], two[1])


def measure_speed(folder: Path, rows: int, turns: int, others: tuple) -> None:
    source, target = made_up.write(folder / "rows.json", rows, turns), folder / "samples"
    step1, step2, peak = map(statistics.median, zip(*(both_steps(source, target) for _ in range(ROUNDS))))
    ours, loads = step1 + step2, loading.measure(target) if "reference" in others else None
    print(f"{rows} rows of {turns} turns, {source.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
    print(f"  ours       {ours:>6.1f} s (step 1 {step1:.1f}, step 2 {step2:.1f}), {peak:.0f} MB" + loaded(ours, loads))
    for name in others:
        output = folder / f"{name}.json"
        _, memory, printed = run("-m", "benchmarks.speed", "--part", name, source, output)
        seconds = float(printed.split()[-1])
        exact = "" if name == "reference" else f"; the same samples: {digests(target) == digests(output)}"
        line = f"  {name:<10} {seconds:>6.1f} s, {memory:.0f} MB: ours is {seconds / ours:.1f} times faster{exact}"
        if name == "reference":
            theirs = loading.measure(output)
            ratio = (seconds + theirs[0]) / (ours + loads[0])
            line += f"{loaded(seconds, theirs)}: ours is {ratio:.1f} times faster"
        print(line, flush=True)


def loaded(seconds: float, loads: tuple | None) -> str:
    return f"; with LlamaFactory's loading {seconds + loads[0]:.1f} s, {loads[1]:.0f} MB" if loads else ""


def measure_memory(folder: Path) -> None:
    print(f"peak MB of the largest process, {LEAST} rows     1x     4x    16x")
    for suffix_in, suffix_out in FORMATS:
        peaks = []
        for times in (1, 4, 16):
            source = made_up.write(folder / f"{times}x{suffix_in}", LEAST * times)
            peaks.append(both_steps(source, folder / f"out{suffix_out}")[2])
        what = f"{suffix_in[1:]:>8} to {suffix_out[1:] or 'a folder':<8}"
        print(f"{what}                      " + "".join(f"{peak:>7.0f}" for peak in peaks), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=9000)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # a process of the benchmark's own
    args = parser.parse_args()
    if args.part:
        timed(*args.part)
        return
    for rows, turns, others in ((args.rows, 12, ("reference", "naive")), (args.rows * 3 // 10, 40, ("naive",))):
        with tempfile.TemporaryDirectory() as folder:
            measure_speed(Path(folder), rows, turns, others)
    with tempfile.TemporaryDirectory() as folder:
        measure_memory(Path(folder))


if __name__ == "__main__":
    main()
