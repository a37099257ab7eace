"""Both steps on Ray, for data that one machine should not have to go through alone.

    python steps_on_ray.py INPUT OUTPUT [--history-thinking drop|template] [--chat-template FILE_OR_MODEL]

INPUT   a folder of .jsonl, .jsonl.gz, .json or .parquet files, or one of them; rows as in step 1. A path, or an address
        that pyarrow knows (s3://…, gs://…, hdfs://…), which every machine can reach.
OUTPUT  samples as in step 2, on this machine: best a folder of Parquet files, which LlamaFactory loads as one data set.

Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. The one idea: a file is a task, which does with
its rows what the scripts do, and hands them back to be written here. One that is lost with its worker runs again.
"""

import functools
import io
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pyarrow.fs
from tqdm import tqdm

import step1_apply_tool_template as step1
import step2_to_alpaca_mask_history as step2
from served_tokens.files import read, write
from served_tokens.files.command_line import CommandLine, exit_on_signals, run
from served_tokens.files.processes import Work, collect, convert_chunk, print_reasons
from served_tokens.marks import Counts
from served_tokens.prompts.chat_template import ChatTemplate, load_chat_template, read_chat_template
from served_tokens.rows.notes import Noted
from served_tokens.rows.trajectory import Reading
from served_tokens.samples import select
from served_tokens.samples.alpaca import sample_schema

ROOT = Path(__file__).resolve().parent


@dataclass
class BothCounted(Counts):
    """What both steps count."""

    rows: Noted = field(default_factory=Noted)
    samples: select.Selected = field(default_factory=select.Selected)


def both_steps(
    row: dict, place: read.Place, options: select.Options, chat_template: ChatTemplate, reading: Reading
) -> tuple[BothCounted, list]:
    """One input row -> what step 2 makes of what step 1 makes of it; raises TrajectoryError."""
    of_row, [(_, plain)] = step1.plain_row(row, place, chat_template, reading)
    of_samples, made = select.samples_of_row(plain, place, options)
    return BothCounted(of_row, of_samples), made


def convert_file(path: str, system: pyarrow.fs.FileSystem, work: Work) -> list:
    """A task: what comes of the chunks of a file, see `convert_chunk`."""
    try:
        with system.open_input_file(path) as file:
            return [convert_chunk(work, chunk) for chunk in read.chunks_of(io.BufferedReader(file), path)]
    except SystemExit as error:  # which would end the worker, and Ray would try again
        raise ValueError(str(error)) from None


def find_files(address: str) -> tuple[pyarrow.fs.FileSystem, list[str]]:
    """The data files at an address, or below it, in the order of their names, and the file system that they are in."""
    system, path = pyarrow.fs.LocalFileSystem(), str(Path(address).absolute())
    if "://" in address:
        system, path = pyarrow.fs.FileSystem.from_uri(address)
    if system.get_file_info(path).is_file:
        return system, [path]
    infos = system.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
    names = {PurePosixPath(info.path).relative_to(path): info.path for info in infos if info.is_file}
    return system, [names[name] for name in sorted(names) if read.is_data(name)]


def results_of(paths: list[str], *options):
    """Yield what comes of the chunks of files, which are tasks of a Ray cluster; see `convert_file`."""
    import ray

    modules = {"py_modules": [str(ROOT / "served_tokens"), step1.__file__, step2.__file__]}
    address = os.environ.get("RAY_ADDRESS", "local")  # without one, Ray would try a cluster that was here before
    try:
        ray.init(address, runtime_env=modules, include_dashboard=False, logging_level="warning")
    except ConnectionError as error:
        sys.exit(f"RAY_ADDRESS={address}: {error}; is Ray started there, and RAY_AUTH_MODE the same here?")
    task = ray.remote(convert_file)
    tasks = [task.remote(path, *options) for path in paths]
    try:
        while tasks:
            yield from ray.get(tasks.pop(0))
    except ray.exceptions.RayTaskError as error:  # one in a task, which the pages of the trace would hide
        sys.exit(str(error.cause).splitlines()[0])
    finally:
        ray.shutdown()


def main() -> None:
    exit_on_signals()
    parser = CommandLine(__doc__)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    step1.add_options(parser)
    step2.add_options(parser)
    args = parser.parse_intermixed_args()
    settings = step2.settings_of(parser, args)
    chat_template, reading = read_chat_template(args.chat_template), step1.reading_of(args)
    load_chat_template(chat_template)  # before the work, so that a bad one costs nothing
    system, paths = find_files(args.input)
    if not paths:
        sys.exit(f"{args.input}: no {', '.join(read.FORMATS)} file there")
    outputs = step2.outputs_of(args.output, [args.input, *paths], settings)
    convert = functools.partial(both_steps, options=settings.options, chat_template=chat_template, reading=reading)
    with write.work_folder(args.output) as folder:
        work = Work(convert, BothCounted, outputs, folder, sample_schema(bool(args.tokens)))
        with tqdm(desc="both steps", unit="B", unit_scale=True) as bar:
            totals = collect(results_of(paths, system, work), work, bar)
        print_reasons(work.finish(read.REJECTS), totals.set_aside, len(paths) > 1)
        step1.print_unread(totals)
        print("\n".join(totals.counts.rows.lines()))
        step2.finish(args, settings, work, replace(totals, counts=totals.counts.samples))


if __name__ == "__main__":
    run(main)
