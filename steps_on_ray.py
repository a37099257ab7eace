"""Both steps on Ray, for data that one machine should not have to go through alone.

    python steps_on_ray.py INPUT OUTPUT [--history-thinking drop|template] [--chat-template FILE_OR_MODEL]

INPUT   a folder of .jsonl, .jsonl.gz, .json or .parquet files, or one of them; rows as in step 1.
OUTPUT  a new folder of Parquet files, which LlamaFactory loads as one data set; samples as in step 2.
        Both are paths, or addresses that pyarrow or fsspec know (s3://…, gs://…, hdfs://…), which every machine can
        reach.

Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. The one idea: a file is a task, and a task
is what the scripts do with a shard. One that is lost with its worker runs again, and writes the same.
"""

import argparse
import functools
import io
import os
import posixpath
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import orjson
import pyarrow as pa
import pyarrow.fs
from tqdm import tqdm

import step1_apply_tool_template as step1
import step2_to_alpaca_mask_history as step2
from served_tokens.files.command_line import CommandLine, run
from served_tokens.files.processes import Totals, Work, convert_shard, print_reasons
from served_tokens.files.read import FORMATS, LEFT_OUT, REJECTS, Place, is_data, stream_rows
from served_tokens.files.write import shown
from served_tokens.marks import Counts
from served_tokens.prompts.chat_template import ChatTemplate, load_chat_template, read_chat_template
from served_tokens.rows.notes import Noted
from served_tokens.rows.trajectory import Reading
from served_tokens.samples import select
from served_tokens.samples.alpaca import sample_schema
from served_tokens.samples.dataset_info import register
from served_tokens.samples.select import VALIDATION, Options, Selected

ROOT = Path(__file__).resolve().parent
STREAMS = ("", VALIDATION, REJECTS, LEFT_OUT)


def find(address: str) -> tuple[pa.fs.FileSystem, str]:
    """(file system, path in it) of an address or a local path."""
    if "://" not in address:
        return pa.fs.LocalFileSystem(), str(Path(address).absolute())
    try:
        return pa.fs.FileSystem.from_uri(address)
    except pa.ArrowInvalid:
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(system)), path


def find_files(system: pa.fs.FileSystem, path: str) -> list[str]:
    """The data files at a path or below it, in the order of their names."""
    info = system.get_file_info(path)
    infos = [info] if info.is_file else []
    if info.type == pa.fs.FileType.Directory:
        infos = [info for info in system.get_file_info(pa.fs.FileSelector(path, recursive=True)) if info.is_file]
    inside = {info.path: info.path.removeprefix(path).lstrip("/") or info.base_name for info in infos}
    data = {found: PurePosixPath(name) for found, name in inside.items() if is_data(PurePosixPath(name))}
    return sorted(data, key=data.get)


@dataclass
class BothCounted(Counts):
    """What both steps count."""

    rows: Noted
    samples: Selected


def convert_row(
    row: dict, place: Place, options: Options, chat_template: ChatTemplate, reading: Reading
) -> tuple[BothCounted, list]:
    """One input row -> what step 2 makes of what step 1 makes of it; raises TrajectoryError."""
    counts, messages, served = step1.plain_row(row, place, chat_template, reading)
    with step1.lone_surrogates_refused():
        orjson.dumps([messages, served])
    of_samples, made = select.samples_of_row({**row, "messages": messages, "served": served}, place, options)
    return BothCounted(counts, of_samples), made


def convert_file(number: int, path: str, systems: tuple, work: str, convert) -> Totals:
    """A task: what `convert_shard` writes of one file, moved to the folder `work` of the output's file system."""
    system, output_system = systems
    with tempfile.TemporaryDirectory() as folder:
        here = Work(convert, Path(path), Path(folder), ".parquet", sample_schema())
        with system.open_input_file(path) as file:
            rows = stream_rows(io.BufferedReader(file), path)
            try:
                totals = convert_shard(here, number, ((Place(path, index), row) for index, row in enumerate(rows)))
            except SystemExit as error:  # which would end the worker, and Ray would try again
                raise ValueError(str(error)) from None
        for part in Path(folder).iterdir():
            pa.fs.copy_files(str(part), f"{work}/{part.name}", pa.fs.LocalFileSystem(), output_system)
    return totals


def convert_files(paths: list[str], *options) -> Totals:
    """The files as tasks of a Ray cluster; see `convert_file`."""
    import ray

    with tempfile.TemporaryDirectory() as code:  # the modules alone, for all workers
        for module in [*ROOT.glob("*.py"), *ROOT.glob("served_tokens/**/*.py")]:
            (Path(code) / module.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(module, Path(code) / module.relative_to(ROOT))
        address = os.environ.get("RAY_ADDRESS", "local")  # without one, Ray would try a cluster that was here before
        try:
            ray.init(address, runtime_env={"working_dir": code}, include_dashboard=False, logging_level="warning")
        except ConnectionError as error:
            sys.exit(f"RAY_ADDRESS={address}: {error}; is Ray started there, and RAY_AUTH_MODE the same here?")
        totals, task = Totals(), ray.remote(convert_file)
        tasks = [task.remote(number, path, *options) for number, path in enumerate(paths)]
        try:
            for result in tqdm(tasks, "both steps", unit=" files"):
                totals.add(ray.get(result))
        except ray.exceptions.RayTaskError as error:  # one in a task, which the pages of the trace would hide
            sys.exit(str(error.cause).splitlines()[0])
        finally:
            ray.shutdown()
    return totals


def collect(system: pa.fs.FileSystem, work: str, output: str) -> None:
    """Give the parts their names, one by one, as an object store cannot move a folder; join the lines of all files."""
    names = [info.base_name for info in system.get_file_info(pa.fs.FileSelector(work))]
    for stream in STREAMS:
        parts = [name for name in sorted(names) if name.removesuffix(".parquet").lstrip("0123456789") == stream]
        if not stream.endswith(".jsonl"):
            if parts:
                system.create_dir(output + stream)
            for number, name in enumerate(parts):
                system.move(f"{work}/{name}", f"{output}{stream}/{number:05}-of-{len(parts):05}.parquet")
        elif parts:
            with system.open_output_stream(output + stream) as file:
                for name in parts:
                    with system.open_input_stream(f"{work}/{name}") as part:
                        shutil.copyfileobj(part, file)
        elif system.get_file_info(output + stream).is_file:  # that of an earlier run
            system.delete_file(output + stream)


def parsed_arguments() -> tuple[argparse.Namespace, step2.Settings]:
    parser = CommandLine(__doc__)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT")
    step1.add_options(parser)
    step2.add_options(parser)
    args = parser.parse_intermixed_args()
    args.address, args.output = args.output.rstrip("/"), Path(args.output)
    return args, step2.settings_of(parser, args)


def main() -> None:
    args, settings = parsed_arguments()
    chat_template = read_chat_template(args.chat_template)
    load_chat_template(chat_template)  # before the work, so that a bad one costs nothing
    (system, path), (output_system, output) = find(args.input), find(args.address)
    paths = find_files(system, path)
    if not paths:
        sys.exit(f"{args.input}: no {', '.join(FORMATS)} file there")
    if PurePosixPath(output).suffix in FORMATS:
        sys.exit(f"{args.address}: names a file; OUTPUT is a folder")
    for folder in ("", VALIDATION) if args.val_ratio else ("",):
        if output_system.get_file_info(output + folder).type != pa.fs.FileType.NotFound:
            sys.exit(f"{args.address}{folder}: is there already; remove it, or name another folder")
    convert = functools.partial(
        convert_row, options=settings.options, chat_template=chat_template, reading=step1.reading_of(args)
    )
    parent, name = posixpath.split(output)
    work = f"{parent}/.{name}.{os.getpid()}.work"
    try:
        output_system.create_dir(work)
    except OSError as error:
        sys.exit(f"{args.address}: cannot be written ({error})")
    try:
        totals = convert_files(paths, (system, output_system), work, convert)
        print_reasons(totals, args.address + REJECTS if totals.set_aside else None, len(paths) > 1)
        step1.print_unread(totals)
        counts = totals.counts
        totals.counts = counts and counts.samples
        step2.refuse_nothing(args, totals)
        collect(output_system, work, output)
    finally:
        output_system.delete_dir(work)
    step2.print_counts(totals)
    print("\n".join(counts.rows.lines()))
    if "://" in args.address:
        print(f"{args.address}: copy it to a folder that each machine of the training can reach, and register it there")
        return
    register(settings.dataset_info, settings.dataset_name, args.output)
    if totals.counts.validation:
        register(settings.dataset_info, settings.dataset_name + VALIDATION, Path(f"{args.output}{VALIDATION}"))
    registered = f"registered as {settings.dataset_name} in {shown(settings.dataset_info)}"
    print(f"{args.address}: {len(paths)} files read, {registered}")
    step2.print_next(settings, totals.counts)


if __name__ == "__main__":
    run(main)
