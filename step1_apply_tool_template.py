"""Step 1: structured trajectories -> plain messages, by the model's own chat template.

    python step1_apply_tool_template.py [INPUT] [OUTPUT] [--chat-template FILE_OR_MODEL]

INPUT   a .json, .jsonl, .jsonl.gz or .parquet file, a folder of them, or a Hugging Face data set id such as
        XXHStudyHard/EnvScaler-SFT-Traj-9K, also with a revision (ID@REVISION). Of a data set only the files that hold
        trajectories are downloaded.
        Row: {"messages": [{"role": "user", "content": "…"},
                           {"role": "assistant", "reasoning_content": "…", "content": "…", "tool_calls": […]},
                           {"role": "tool", "content": "…"}, …],
              "tools": […] or null, any other columns}
OUTPUT  a .jsonl, .json or .parquet file, or a folder of Parquet files: the same row with
        "messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …]   (the blocks of the rendering)
        "served":   what each turn's prompt looks like when the model is served (see `apply_chat_template`)

The one idea: every assistant message becomes its target, the text that the model generates at that turn, reasoning
included. How that message looks later, as history in the prompts of other turns, is kept beside it as edits.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import shlex
import sys
from pathlib import Path

import orjson

from served_tokens.files import hub
from served_tokens.files.command_line import CommandLine, exit_on_signals, positive_count, run
from served_tokens.files.processes import Totals, Work, convert_files, parts_of, print_reasons, save_beside
from served_tokens.files.read import (
    FORMATS,
    REJECTS,
    Place,
    find_files,
    first_columns,
    format_of,
    local_file,
    open_parquet,
    read_rows,
)
from served_tokens.files.write import (
    accounted,
    check_output,
    inferred_schema,
    join,
    json_row,
    part_suffix,
    refuse_inputs,
    shown,
    still_there,
    work_folder,
)
from served_tokens.marks import TrajectoryError
from served_tokens.prompts.chat_template import QWEN3, ChatTemplate, load_chat_template, read_chat_template
from served_tokens.prompts.echo import ECHOES
from served_tokens.prompts.turns import apply_chat_template, apply_despite_control_tokens
from served_tokens.rows.keys import FIELDS, KNOWN
from served_tokens.rows.notes import Noted, digest, noted
from served_tokens.rows.other import holds_conversation
from served_tokens.rows.servers import STYLES
from served_tokens.rows.trajectory import AS_IT_IS, Reading, read_trajectory
from served_tokens.samples.dataset_info import name_of

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "data" / "envscaler_sample.jsonl"
SUFFIX = "_apply_qwen3_template"
OURS = ("messages", "served")
UNSEEN = "turns have reasoning that this chat template does not render; their targets are without it"
ROWS_OF_SCHEMA = 512  # that decide the types of a Parquet file


def convert_row(
    row: dict, place: Place, chat_template: ChatTemplate, as_json: bool, reading: Reading = AS_IT_IS
) -> tuple[Noted, list]:
    """One input row -> (what to know of it, counted; [("", output row or its JSON)]); raises TrajectoryError."""
    if "served" in row:
        raise TrajectoryError("the row has a column `served`: it is one of step 1 already")
    counts, messages, served = plain_row(row, place, chat_template, reading)
    converted = {**row, "messages": messages, "served": served}
    with lone_surrogates_refused():
        if as_json:
            return counts, [("", json_row(converted, OURS))]
        json.dumps(row, ensure_ascii=False, default=str).encode()
        return counts, [("", {**converted, **{column: orjson.dumps(converted[column]).decode() for column in OURS}})]


@contextlib.contextmanager
def lone_surrogates_refused():
    """Half a character, which can be in JSON but in no file: raises TrajectoryError where it is to be written."""
    try:
        yield
    except (UnicodeEncodeError, orjson.JSONEncodeError):
        raise TrajectoryError("the text holds a lone surrogate, which no tokenizer can read") from None


def plain_row(row: dict, place: Place, chat_template: ChatTemplate, reading: Reading) -> tuple[Noted, list, dict]:
    """(counts, the plain messages of a row, what is served of it: see `apply_chat_template`)"""
    trajectory = read_trajectory(row, reading, chat_template.control_tokens)
    counts = noted(trajectory)
    render = load_chat_template(chat_template)
    apply = apply_despite_control_tokens if reading.allow_control_tokens else apply_chat_template
    plain, served = apply(trajectory.messages, trajectory.tools, render, reading.echo)
    for turn in served["turns"]:
        turn["left_out"] = trajectory.not_trained.get(turn["turn"], turn["left_out"])
        counts.left_out.update([turn["left_out"]] if turn["left_out"] else [])
        reasoning = trajectory.messages[turn["turn"]].get("reasoning_content", "").strip()
        counts.not_rendered += reasoning not in plain[turn["message"]]["content"]
    counts.digests.append(digest(plain))
    told = {"source": place.source, "trajectory": place.row, "reading": reading.told()}
    return counts, plain, {**told, "enable_thinking": trajectory.given.thinking, **served}


def is_on_hub(source: str) -> bool:
    """Whether INPUT is the id of a data set, and not a file."""
    return hub.is_data_set(source) and not format_of(source) and not Path(source).exists()


def default_output(source: str) -> Path:
    path, kind = Path(source), format_of(source) or Path(source).suffix
    if is_on_hub(source):
        path, kind = ROOT / "data" / hub.name_of(source), ""
    elif path.is_dir():
        path, kind = path if path.name.strip(".") else path.resolve(), ""
    return path.with_name(path.name.removesuffix(kind) + SUFFIX + (kind.removesuffix(".gz") or ".jsonl"))


def output_of_step2(output: Path) -> list[str]:
    """Where the samples go, but for EnvScaler's, whose place is the default of step 2."""
    name = name_of(output).removesuffix(SUFFIX)
    return [] if "envscaler" in name.lower() else [shown(output.with_name(f"alpaca_mask_history_{name}"))]


def why_no_trajectories(file, name: str) -> str | None:
    """Why an open file holds no trajectories, by the columns of its first row; None where it does."""
    columns = first_columns(file, name)
    if holds_conversation(columns):
        return None
    return f"its rows have no column messages, but {', '.join(columns) or 'none at all'}"


def input_files(source: str, pattern: str | None, split: str | None) -> list[str]:
    """The files behind INPUT, or the addresses of those that hold trajectories in a data set of the Hub."""
    if is_on_hub(source):
        return hub.download_trajectories(source, pattern, split, FORMATS, why_no_trajectories)
    if pattern or split:
        raise SystemExit(f"{source}: is no Hugging Face data set id; --file and --split choose among the files of one")
    return find_files(source)


def output_schema(files: list[str], reading: Reading, control_tokens: tuple):
    """The columns of a Parquet output: those of Parquet inputs keep their types, else the first good rows tell."""
    if {format_of(local_file(file)) for file in files} != {".parquet"}:
        rows = (row for file in files for _, row, error in read_rows(file) if not error)
        first = itertools.islice((row for row in rows if is_good(row, reading, control_tokens)), ROWS_OF_SCHEMA)
        return inferred_schema([{**row, **dict.fromkeys(OURS, "")} for row in first])
    import pyarrow as pa

    first, *others = (open_parquet(local_file(file), file).schema_arrow for file in files)
    for file, other in zip(files[1:], others):
        if not other.equals(first):
            raise SystemExit(f"{file}: has other columns than {files[0]}; write .jsonl, or run this for each file")
    fields = {field.name: field for field in first}
    return pa.schema([*{**fields, "messages": pa.field("messages", pa.string())}.values(), ("served", pa.string())])


def is_good(row: dict, reading: Reading, control_tokens: tuple) -> bool:
    """Whether a row is not set aside for what a server makes of it."""
    with contextlib.suppress(TrajectoryError, RecursionError):
        return bool(read_trajectory(row, reading, control_tokens))
    return False


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--chat-template",
        default=str(QWEN3),
        metavar="FILE_OR_MODEL",
        help="a .jinja file, a model directory or a Hub model id (default: the embedded Qwen3 template)",
    )
    add(
        "--server-style",
        choices=[*STYLES],
        default="vllm",
        help="whose way of handing tools, text parts and arguments to the chat template the prompts follow (default: "
        "vllm; template: the chat template alone)",
    )
    add(
        "--echo",
        choices=ECHOES,
        default="none",
        help="past turns as an agent has them that sends the server's answers back as they came, streamed or not "
        "(default: as the rows have them)",
    )
    add(
        "--read-as",
        action="append",
        default=[],
        type=key_and_field,
        metavar="KEY=FIELD",
        help=f"read what stands under KEY as {', '.join(FIELDS)}; can be given again",
    )
    add(
        "--ignore-key",
        action="append",
        default=[],
        type=ignored_key,
        metavar="KEY",
        help="a key that nobody reads is no part of the conversation: `note`, at any level, or with its level, "
        "`message.note`, where it is not read even if it could be; can be given again",
    )
    add(
        "--allow-control-tokens",
        action="store_true",
        help="keep trajectories whose texts hold control tokens such as "
        "<|im_start|>, which the model reads as such when it is served and trained (default: set them aside)",
    )
    add(
        "--allow-calls-without-tools",
        action="store_true",
        help="keep trajectories that call tools and offer none, because their system text holds them",
    )


def ignored_key(text: str) -> str:
    """Of KEY or LEVEL.KEY, for argparse."""
    level, named, _ = text.partition(".")
    if named and level not in KNOWN:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no level {level}; levels are {', '.join(KNOWN)}")
    return text


def key_and_field(text: str) -> tuple[str, str]:
    """Of KEY=FIELD, for argparse."""
    key, _, field = text.partition("=")
    if not key or field not in FIELDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=FIELD with a FIELD of {', '.join(FIELDS)}")
    return key, field


def reading_of(args: argparse.Namespace) -> Reading:
    """How rows are to be read."""
    return Reading(
        read_as=tuple(args.read_as),
        ignore_keys=tuple(args.ignore_key),
        allow_control_tokens=args.allow_control_tokens,
        allow_calls_without_tools=args.allow_calls_without_tools,
        server_style=args.server_style,
        echo=args.echo,
    )


def print_unread(totals: Totals) -> None:
    """The keys for which rows are set aside, and what to paste where they are no part of the conversation."""
    if totals.unread:
        keys = ", ".join(f"{key} ({number})" for key, number in totals.unread.most_common())
        print(f"rows are set aside for keys that nobody reads: {keys}", file=sys.stderr)
        options = " ".join(f"--ignore-key {shlex.quote(key)}" for key in totals.unread)
        fields = "|".join(FIELDS)
        print(f"  what belongs to the conversation: --read-as KEY={fields}", file=sys.stderr)
        print(f"  what does not: {options}", file=sys.stderr)


def parsed_arguments() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("input", nargs="?", default=shown(SAMPLE), metavar="INPUT")
    add("output", nargs="?", type=Path, metavar="OUTPUT", help=f"default: INPUT's name with {SUFFIX}")
    add("--file", metavar="NAME", help="of a data set, read this file only, or those that this glob matches")
    add("--split", metavar="NAME", help="of a data set, read the files of this split only")
    add_options(parser)
    add(
        "--num-proc", type=positive_count, default=os.cpu_count(), metavar="N", help="processes (default: one per core)"
    )
    add("--strict", action="store_true", help="stop at the first bad row instead of setting it aside")
    return parser.parse_intermixed_args()


def main() -> None:
    exit_on_signals()
    args = parsed_arguments()
    output = args.output or default_output(args.input)
    if args.output:
        check_output(output)
    chat_template = read_chat_template(args.chat_template)
    load_chat_template(chat_template)  # before the work, so that a bad one costs nothing
    files = input_files(args.input, args.file, args.split)
    refuse_inputs([args.input, *files], output, output.with_name(output.name + REJECTS))
    as_json, reading = part_suffix(output) == ".jsonl", reading_of(args)
    schema = None if as_json else output_schema(files, reading, chat_template.control_tokens)
    convert = functools.partial(convert_row, chat_template=chat_template, as_json=as_json, reading=reading)
    replaced = ", in place of an earlier one" if output.exists() else ""
    with work_folder(output) as parts:
        work = Work(convert, output, parts, part_suffix(output), schema, args.strict)
        totals = convert_files(files, work, args.num_proc, "step 1")
        print_reasons(totals, save_beside(parts, REJECTS, output), len(files) > 1)
        print_unread(totals)
        if not totals.counts:
            sys.exit(f"{args.input}: no trajectory is left; {shown(output)} is not written{still_there(output)}")
        join(parts_of(parts), output)
    counts, left_out = totals.counts, totals.counts.left_out.total()
    rows = accounted("rows", totals.rows_in, counts.trajectories, "out", totals.set_aside, "set aside")
    print(f"{rows}: {shown(output)}{replaced}")
    print(accounted("turns", counts.turns, counts.turns - left_out, "for samples", left_out, "left out"))
    print("\n".join(counts.lines()))
    if counts.not_rendered:
        print(f"{counts.not_rendered} {UNSEEN}")
    print(shlex.join(["next:", "python", "step2_to_alpaca_mask_history.py", shown(output), *output_of_step2(output)]))


if __name__ == "__main__":
    run(main)
