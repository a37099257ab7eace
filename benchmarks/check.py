"""How long the check and the start of training on token trees take, beside LlamaFactory's own loading of the samples.

    python -m benchmarks.check MODEL [--rows 200] [--turns 12] [--growth]

Takes made-up rows (benchmarks/made_up.py; 12 turns each, as many as airline trajectories of tau-bench have; with
--turns 0 as many as EnvScaler's) and the tokenizer of MODEL, a local folder. Each contender is a process of its own
that starts with an empty cache:
  loading  LlamaFactory's get_dataset, as `llamafactory-cli train` calls it, with as many workers as there are cores
  check    check_training_tokens.py
  trees    train_on_trees.py up to where LlamaFactory starts to train: the rows are written
Prints seconds with imports, what is written on disk, and the most memory of a process and of all at a time. --growth
runs the check on 1, 4 and 16 times a sixteenth of the rows instead.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks import made_up

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import sys
from served_tokens import llamafactory
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.model import load_tokenizer
model_args, data_args, training_args = llamafactory.parse_arguments(sys.argv[1], sys.argv[2:])
parts = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(parts["tokenizer"], data_args)
get_dataset(template, model_args, data_args, training_args, "sft", **parts)
"""
TREES = "import sys, train_on_trees; train_on_trees.prepared(sys.argv[1:])"


def measure(command: list, folder: Path) -> dict[str, float]:
    """{"s": seconds, "GB on disk": …, "MB of a process": …, "MB of all": …} of a command with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment["LLAMAFACTORY_VERBOSITY"] = "ERROR"
        start, largest, together = time.perf_counter(), 0, 0
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = []
        reader = threading.Thread(target=lambda: output.extend(process.stdout))
        reader.start()
        while process.poll() is None:
            sizes = [0]
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    sizes.append(each.memory_full_info().pss)
                except psutil.Error:
                    continue
            largest, together = max(largest, *sizes), max(together, sum(sizes))
            time.sleep(0.5)
        seconds = time.perf_counter() - start
        reader.join()
        if process.returncode:
            sys.exit(b"".join(output[-20:]).decode())
        disk = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    print(
        "".join(f"    {line.decode()}" for line in output if line.startswith((b"took", b"PASSED", b"train:"))), end=""
    )
    return {"s": seconds, "GB on disk": disk / 1e9, "MB of a process": largest / 1e6, "MB of all": together / 1e6}


def samples(folder: Path, rows: int, turns: int) -> None:
    """Write made-up rows as the data set `samples`."""
    made_up.write(folder / "rows.jsonl", rows, turns or None)
    for script, *arguments in (
        ("step1_apply_tool_template.py", folder / "rows.jsonl", folder / "plain.jsonl"),
        ("step2_to_alpaca_mask_history.py", folder / "plain.jsonl", folder / "samples", "--dataset-dir", folder),
    ):
        subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--without-loading", action="store_true", help="of all of EnvScaler it takes half an hour")
    args = parser.parse_args()
    settings = ["qwen3_full_sft.yaml", "dataset=samples", f"model_name_or_path={Path(args.model).absolute()}"]
    settings += [f"preprocessing_num_workers={os.cpu_count()}", "deepspeed=null", "bf16=false"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        settings.append(f"dataset_dir={folder}")
        check = [sys.executable, "check_training_tokens.py", *settings]
        if args.growth:
            for times in (1, 4, 16):
                samples(folder, args.rows * times // 16, args.turns)
                print(f"{args.rows * times // 16} rows:", told(measure(check, folder)), flush=True)
            return
        samples(folder, args.rows, args.turns)
        contenders = {"loading": ["-c", LOAD], "check": ["check_training_tokens.py"], "trees": ["-c", TREES]}
        first = None
        for name, command in contenders.items():
            if name == "loading" and args.without_loading:
                continue
            figures = measure([sys.executable, *command, *settings], folder)
            first = first or figures["s"]
            print(f"{name:<8} {told(figures)}; {figures['s'] / first:.2f} of the first", flush=True)


def told(figures: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} {unit}" for unit, value in figures.items())


if __name__ == "__main__":
    main()
