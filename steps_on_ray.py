"""Both steps on Ray, for data that one machine should not have to go through alone.

    python steps_on_ray.py INPUT OUTPUT [--history-thinking drop|template] [--chat-template FILE_OR_MODEL]

INPUT   a folder of .jsonl, .json or .parquet shards, or one of them; rows as in step 1.
OUTPUT  a new folder of Parquet shards, which LlamaFactory loads as one data set; samples as in step 2.
        Both are paths, or addresses that pyarrow or fsspec know (s3://…, gs://…, hdfs://…), which every machine can reach.

Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. The one idea: a shard is a task. It reads its
shard as a stream and yields the samples; Ray sorts them by a key that is drawn for each sample, so their order is the
same on any cluster. A task that is lost with its worker runs again, and yields the same.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import os
import posixpath
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

import step1_apply_tool_template as step1
import step2_to_alpaca_mask_history as step2
from trajectories import LEFT_OUT_TURNS, READERS, REJECTS, ROOT, SHOWN_REASONS, Place, convert_batch, shown

BATCH = 16  # trajectories whose samples are in memory at a time


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


def find_shards(system: pa.fs.FileSystem, path: str) -> list[str]:
    info = system.get_file_info(path)
    infos = [info] if info.is_file else []
    if info.type == pa.fs.FileType.Directory:
        infos = [info for info in system.get_file_info(pa.fs.FileSelector(path, recursive=True)) if info.is_file]
    inside = {info.path: PurePosixPath(info.path.removeprefix(path)).parts for info in infos}
    return sorted(
        found for found, parts in inside.items()
        if PurePosixPath(found).suffix in READERS and not any(part.startswith((".", "_")) for part in parts)
    )  # fmt: skip


def convert_row(row: dict, place: Place, step2_options: step2.Options, **options) -> tuple:
    """One input row -> what step 1 notes of it, and what `row_samples` of step 2 returns; raises TrajectoryError."""
    plain, notes = step1.convert_row(row, place, as_json=False, **options)
    return notes, *step2.row_samples(plain, step2_options)


def shard_samples(batch: pa.Table, system, output_system, summaries: str, seed: int, **options):
    """A task: yield the samples of one shard as tables with their keys; its summary becomes a file.

    Args:
        batch: one row: number, path of the shard.
        system, output_system: the file systems of the shard and of the summaries.
        summaries: a folder. A task that runs twice writes the same file twice.
        options: see `convert_row`.
    """
    [shard] = batch.to_pylist()
    schema = step2.sample_schema().append(pa.field("key", pa.int64()))
    totals, seen, left_out, rejected, given = Counter(), Counter(), [], [], ""

    convert = functools.partial(convert_row, **options)
    with system.open_input_file(shard["path"]) as file:
        rows = READERS[PurePosixPath(shard["path"]).suffix](io.BufferedReader(file), shard["path"])
        rows = ((Place(shard["path"], index), row) for index, row in enumerate(rows))
        try:
            while rows_of_batch := list(itertools.islice(rows, BATCH)):
                samples = []
                for place, result, reason in convert_batch(convert, json.loads, rows_of_batch):
                    if reason:
                        rejected.append({**place._asdict(), "reason": reason, "trajectory": result})
                        continue
                    notes, row_samples, row_totals, row_left_out, row_given = result
                    seen.update(notes)
                    totals.update(row_totals)
                    left_out += row_left_out
                    given = given or row_given
                    samples += [{**sample, "key": key(seed, sample)} for sample in row_samples]
                yield pa.Table.from_pylist(samples, schema=schema)
        except SystemExit as error:  # which would end the worker, and Ray would try again
            raise ValueError(str(error)) from None
    summary = {"totals": totals, "seen": seen, "left_out": left_out, "rejected": rejected, "given": given}
    with output_system.open_output_stream(f"{summaries}/{shard['number']:08}.json") as file:
        file.write(json.dumps(summary, default=str).encode())


def key(seed: int, sample: dict) -> int:
    """Where the sample comes in the shuffled order."""
    name = json.dumps([seed, sample["source"], sample["trajectory"], sample["turns"]])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)


def write_samples(shards: list[str], system, output_system, work: str, work_here: str, **options) -> None:
    """Write the samples of the shards to `work`/samples, with a summary of each in `work`/summaries.

    work_here: an empty folder of this machine.
    """
    import ray

    code = Path(work_here, "code")  # the modules alone, for all workers
    code.mkdir()
    for module in [*ROOT.glob("*.py"), *ROOT.glob("served_tokens/*.py")]:
        (code / module.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(module, code / module.relative_to(ROOT))
    address = os.environ.get("RAY_ADDRESS", "local")  # without one, Ray would try a cluster that was here before
    try:
        ray.init(address, runtime_env={"working_dir": str(code)}, include_dashboard=False, logging_level="warning")
    except ConnectionError as error:
        sys.exit(f"RAY_ADDRESS={address}: {error}; is Ray started there, and RAY_AUTH_MODE the same here?")
    items = [{"number": number, "path": path} for number, path in enumerate(shards)]
    options |= {"system": system, "output_system": output_system, "summaries": f"{work}/summaries"}
    samples = ray.data.from_items(items, override_num_blocks=len(items))
    samples = samples.map_batches(shard_samples, batch_size=1, batch_format="pyarrow", fn_kwargs=options)
    samples = samples.sort("key").drop_columns(["key"])
    try:
        samples.write_parquet(f"{work}/samples", filesystem=output_system, compression="zstd", row_group_size=step2.ROW_GROUP)
    except ray.exceptions.RayTaskError as error:  # one in a task, which the pages of the trace would hide
        sys.exit(str(error.cause).splitlines()[0])


def move_shards(system: pa.fs.FileSystem, source: str, target: str, seed: int) -> None:
    """Number the files by the order of their samples. File by file: an object store cannot move a folder."""
    first = {}
    for info in system.get_file_info(pa.fs.FileSelector(source)):
        with system.open_input_file(info.path) as file, pa.parquet.ParquetFile(file) as shard:
            if shard.metadata.num_rows:
                [sample, *_] = shard.read_row_group(0, ["source", "trajectory", "turns"]).to_pylist()
                first[key(seed, sample)] = info.path
    system.create_dir(target)
    for number, (_, path) in enumerate(sorted(first.items())):
        system.move(path, f"{target}/{number:05}-of-{len(first):05}.parquet")


def read_summaries(system: pa.fs.FileSystem, folder: str):
    """Yield what `shard_samples` says of each shard."""
    for path in sorted(info.path for info in system.get_file_info(pa.fs.FileSelector(folder))):
        with system.open_input_file(path) as file:
            yield json.loads(file.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT")
    step1.add_options(parser)
    step2.add_options(parser)
    args = parser.parse_intermixed_args()
    address, args.output = args.output.rstrip("/"), Path(args.output)
    step2.check_options(parser, args)
    chat_template = step1.read_chat_template(args.chat_template)
    step1.prepared_template(chat_template)  # before the work, so that a bad one costs nothing
    system, path = find(args.input)
    output_system, output = find(address)
    shards = find_shards(system, path)
    if not shards:
        sys.exit(f"{args.input}: no {', '.join(READERS)} file there")
    if PurePosixPath(output).suffix in READERS:
        sys.exit(f"{address}: names a file; OUTPUT is a folder")
    if output_system.get_file_info(output).type != pa.fs.FileType.NotFound:
        sys.exit(f"{address}: is there already; remove it, or name another folder")

    parent, name = posixpath.split(output)
    work = f"{parent}/.{name}.{os.getpid()}.work"
    totals, seen, left_out, reasons, given = Counter(), Counter(), Counter(), Counter(), ""
    try:
        output_system.create_dir(f"{work}/summaries")
        with tempfile.TemporaryDirectory() as work_here:
            write_samples(shards, system, output_system, work, work_here, seed=args.seed, chat_template=chat_template,
                          allow_control_tokens=args.allow_control_tokens, validate_tools=args.validate_tools,
                          step2_options=args.options)  # fmt: skip
        with (
            output_system.open_output_stream(f"{work}/rejects.jsonl") as file,
            output_system.open_output_stream(f"{work}/left_out.jsonl") as left_out_file,
        ):
            for summary in read_summaries(output_system, f"{work}/summaries"):
                totals.update(summary["totals"])
                seen.update(summary["seen"])
                left_out.update(turn["reason"] for turn in summary["left_out"])
                reasons.update(row["reason"] for row in summary["rejected"])
                given = given or summary["given"]
                file.write("".join(json.dumps(row) + "\n" for row in summary["rejected"]).encode())
                left_out_file.write("".join(json.dumps(turn) + "\n" for turn in summary["left_out"]).encode())
        for what in (REJECTS, LEFT_OUT_TURNS):  # those of an earlier run
            if output_system.get_file_info(output + what).is_file:
                output_system.delete_file(output + what)
        if reasons:
            output_system.move(f"{work}/rejects.jsonl", output + REJECTS)
            print(f"{reasons.total()} rows set aside with their reasons: {address}{REJECTS}", file=sys.stderr)
            for reason, number in reasons.most_common(SHOWN_REASONS):
                print(f"  {number}: {reason}", file=sys.stderr)
        if not totals["samples"]:
            sys.exit(f"{args.input}: no sample is left; {address} is not written")
        if left_out:
            output_system.move(f"{work}/left_out.jsonl", output + LEFT_OUT_TURNS)
        move_shards(output_system, f"{work}/samples", output, args.seed)
    finally:
        output_system.delete_dir(work)

    step2.print_counts(totals, left_out, args.merge_turns, totals["trajectories"] + reasons.total())
    step1.print_notes(seen)
    if "://" in address:
        print(f"{address}: copy it to a folder that each machine of the training can reach, and register it there")
        return
    step2.register(args.dataset_info, args.dataset_name, args.output)
    print(f"{address}: {len(shards)} shards read, registered as {args.dataset_name} in {shown(args.dataset_info)}")
    step2.print_next(args, given, not totals["without thinking"])


if __name__ == "__main__":
    main()
