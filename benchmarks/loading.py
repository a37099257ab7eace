"""How long LlamaFactory's loader takes to read the samples of step 2, and in how much memory, format by format.

    python benchmarks/loading.py [--rows 9022]

Makes samples of as many rows as EnvScaler has (benchmarks/made_up.py), and loads them as `llamafactory-cli train` does, up to
tokenization: `datasets` reads the file into its cache (which is empty before), LlamaFactory aligns the columns. The memory is
what the process needs on top of its imports.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import made_up  # noqa: E402
from speed import run  # noqa: E402


def load(folder: str, name: str) -> None:
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import Seq2SeqTrainingArguments

    arguments = DataArguments(dataset=name, dataset_dir=folder, template="qwen3", preprocessing_num_workers=None)
    [attributes] = get_dataset_list([name], folder)
    training = Seq2SeqTrainingArguments(output_dir=folder, report_to=[])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = _load_single_dataset(attributes, ModelArguments(model_name_or_path=folder), arguments, training)
    print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=made_up.ROWS)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # a process of the benchmark's own
    args = parser.parse_args()
    if args.part:
        load(*args.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made_up.write(folder / "rows.jsonl", args.rows)
        run(ROOT / "step1_apply_tool_template.py", folder / "rows.jsonl", folder / "plain.jsonl")
        print(f"{args.rows} trajectories\n  format  samples  file MB  loading s       MB")
        for name, options in (("a.json", ()), ("b.jsonl", ()), ("c.parquet", ()), ("shards", ("--num-shards", 4))):
            output = folder / name
            run(ROOT / "step2_to_alpaca_mask_history.py", folder / "plain.jsonl", output, "--dataset-dir", folder, *options)
            size = sum(path.stat().st_size for path in (output.iterdir() if output.is_dir() else [output])) / 1e6
            os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
            _, _, printed = run(__file__, "--part", folder, output.stem)
            seconds, memory, samples = map(float, printed.split()[-3:])
            print(f"{output.suffix[1:] or name:>8}  {samples:>7.0f}  {size:>7.0f}  {seconds:>9.1f}  {memory:>7.0f}", flush=True)
            shutil.rmtree(folder / "cache")


if __name__ == "__main__":
    main()
