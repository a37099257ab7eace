"""Both steps on Ray, for data that one machine should not have to go through alone.

    python steps_on_ray.py INPUT OUTPUT [--history-thinking drop|template] [--chat-template FILE_OR_MODEL]

INPUT   a folder of .jsonl, .jsonl.gz, .json or .parquet files; rows as in step 1. A path, or an address that pyarrow
        knows (s3://…, gs://…, hdfs://…), which every machine can reach.
OUTPUT  samples as in step 2, where every machine can write: best a folder of Parquet files.

Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. The one idea: a file is a task, which does with
its rows what the scripts do. One that is lost with its worker runs again.
"""

import functools
import io
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import step1_apply_tool_template as step1
import step2_to_alpaca_mask_history as step2
from served_tokens.files import read, write
from served_tokens.files.command_line import CommandLine, exit_on_signals, run
from served_tokens.files.processes import Totals, Work, collect, convert_chunk, finish_rejects
from served_tokens.marks import Counts
from served_tokens.prompts.chat_template import load_chat_template, read_chat_template
from served_tokens.rows.notes import Noted
from served_tokens.samples.alpaca import sample_schema
from served_tokens.samples.select import Selected, samples_of_row

SCRIPTS = [str(Path(__file__).resolve().parent / "served_tokens"), step1.__file__, step2.__file__]


@dataclass
class BothCounted(Counts):
    """What both steps count."""

    rows: Noted = field(default_factory=Noted)
    samples: Selected = field(default_factory=Selected)


def both_steps(row: dict, place: read.Place, first, second) -> tuple[BothCounted, list]:
    """One input row -> what the second step makes of what the first makes of it; raises TrajectoryError."""
    of_row, [(_, plain)] = first(row, place)
    of_samples, made = second(plain, place)
    return BothCounted(of_row, of_samples), made


def convert_file(number: int, path: str, system, work: Work) -> Totals:
    """A task: what comes of the rows of a file, which is one of many, by this number; system: see `find_files`."""
    totals = Totals(work.counts())
    try:
        chunks = read.read_chunks([path], opened=lambda path: io.BufferedReader(system.open_input_file(path)))
        for of_file, chunk in enumerate(chunks):
            totals.add(convert_chunk(work, (f"{number:06}-{of_file:06}", chunk)))
        return totals
    except SystemExit as error:  # which would end the worker, and Ray would try again
        raise ValueError(str(error)) from None


def find_files(address: str) -> tuple:
    """(the pyarrow.fs.FileSystem of an address, its data files in the order of their names)."""
    import pyarrow.fs

    system, path = pyarrow.fs.FileSystem.from_uri(address if "://" in address else os.path.abspath(address))
    if system.get_file_info(path).is_file:
        return system, [path] if read.is_data(PurePosixPath(PurePosixPath(path).name)) else []
    infos = system.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
    names = sorted(PurePosixPath(info.path).relative_to(path) for info in infos if info.is_file)
    return system, [f"{path}/{name}" for name in names if read.is_data(name)]


def convert_files(paths: list[str], system, work: Work) -> Totals:
    """Convert the rows of files, which are tasks of a Ray cluster."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")  # without one, Ray would try a cluster that was here before
    ray.init(address, runtime_env={"py_modules": SCRIPTS}, include_dashboard=False, logging_level="warning")
    task = ray.remote(convert_file)
    tasks = [task.remote(number, path, system, work) for number, path in enumerate(paths)]
    try:
        return collect((ray.get(each) for each in tasks), work, "both steps")
    except ray.exceptions.RayTaskError as error:  # one in a task, which the pages of the trace would hide
        sys.exit(str(error.cause).splitlines()[0])
    finally:
        ray.shutdown()


def main() -> None:
    exit_on_signals()
    parser = CommandLine(__doc__)
    parser.group("what is read")("input", metavar="INPUT", help="a file or folder, here or at an address")
    step1.add_options(parser)
    step2.add_options(parser)
    parser.group("what is written")("output", type=Path, metavar="OUTPUT", help="on this machine")
    args = parser.parse_intermixed_args()
    options, template = step2.options_of(parser, args), read_chat_template(args.chat_template)
    load_chat_template(template)  # before the work, so that a bad one costs nothing
    system, paths = find_files(args.input)
    if not paths:
        sys.exit(f"{args.input}: no {', '.join(read.FORMATS)} file there")
    first = functools.partial(step1.plain_row, chat_template=template, reading=step1.reading_of(args, template))
    second = functools.partial(samples_of_row, options=options)
    outputs = step2.outputs_of(args.output, [args.input, *paths], options)
    with write.work_folder(args.output.absolute()) as folder:
        convert = functools.partial(both_steps, first=first, second=second)
        work = Work(convert, BothCounted, outputs, folder, sample_schema(bool(args.tokens)))
        totals = convert_files(paths, system, work)
        finish_rejects(work, totals)
        step1.print_unread(totals)
        print("\n".join(totals.counts.rows.lines()))
        step2.finish(args, options, work, replace(totals, counts=totals.counts.samples))


if __name__ == "__main__":
    run(main)
