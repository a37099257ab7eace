"""How long LlamaFactory's loader takes to read the samples of step 2, and in how much memory, format by format.

    python -m benchmarks.loading [--rows 9022]

Makes samples of as many rows as EnvScaler has (benchmarks/made_up.py), and loads them as `llamafactory-cli train` does,
up to tokenization: `datasets` reads the files into its cache (which is empty before), LlamaFactory aligns the columns.
The memory is what the process needs on top of its imports.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import made_up
from served_tokens.samples.dataset_info import register

ROOT = Path(__file__).resolve().parent.parent


def load(folder: str) -> None:
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import Seq2SeqTrainingArguments

    arguments = DataArguments(dataset="samples", dataset_dir=folder, template="qwen3", preprocessing_num_workers=None)
    [attributes] = get_dataset_list(["samples"], folder)
    training = Seq2SeqTrainingArguments(output_dir=folder, report_to=[])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = _load_single_dataset(attributes, ModelArguments(model_name_or_path=folder), arguments, training)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([time.perf_counter() - start, memory, len(samples)]))


def measure(samples: Path) -> tuple[float, float, int]:
    """(seconds, MB, samples) of loading what step 2 wrote, in a process of its own with an empty cache."""
    with tempfile.TemporaryDirectory(dir=samples.parent) as folder:
        register(Path(folder) / "dataset_info.json", "samples", samples)
        command = [sys.executable, "-m", "benchmarks.loading", "--part", folder]
        environment = {**os.environ, "HF_DATASETS_CACHE": folder}
        printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return tuple(json.loads(printed.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=made_up.ROWS)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a process of the benchmark's own
    args = parser.parse_args()
    if args.part:
        load(args.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made_up.write(folder / "rows.jsonl", args.rows)
        run = [sys.executable, "step1_apply_tool_template.py", folder / "rows.jsonl", folder / "plain.jsonl"]
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
        print(f"{args.rows} trajectories\n  format  samples  file MB  loading s       MB")
        for name in ("out.json", "out.jsonl", "out.parquet", "folder"):
            output = folder / name
            run = [
                sys.executable,
                "step2_to_alpaca_mask_history.py",
                folder / "plain.jsonl",
                output,
                "--dataset-dir",
                folder,
            ]
            subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
            size = sum(path.stat().st_size for path in (output.iterdir() if output.is_dir() else [output])) / 1e6
            seconds, memory, samples = measure(output)
            print(
                f"{output.suffix[1:] or name:>8}  {samples:>7}  {size:>7.0f}  {seconds:>9.1f}  {memory:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
