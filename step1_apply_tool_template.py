"""Step 1: structured trajectories -> plain messages, by the model's own chat template.

    python step1_apply_tool_template.py [INPUT] [OUTPUT] [--chat-template FILE_OR_MODEL]
    python step1_apply_tool_template.py data/mine.jsonl

INPUT   a .json, .jsonl, .jsonl.gz or .parquet file, a folder of them, or a Hugging Face data set id such as
        XXHStudyHard/EnvScaler-SFT-Traj-9K, also with a revision (ID@REVISION). Of a data set only the files that hold
        trajectories are downloaded.
        Row: {"messages": [{"role": "user", "content": "…"},
                           {"role": "assistant", "reasoning_content": "…", "content": "…", "tool_calls": […]},
                           {"role": "tool", "content": "…"}, …],
              "tools": […] or null, any other columns}
        or as ShareGPT, Anthropic or TRL have it (docs/shapes.md).
OUTPUT  a .jsonl or .json file: the same row with
        "messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …]   (the blocks of the rendering)
        "served":   what each turn's prompt looks like when the model is served

The one idea: every assistant message becomes its target, the text that the model generates at that turn, reasoning
included. How that message looks later, as history in the prompts of other turns, is kept beside it as edits.
"""

import argparse
import functools
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from served_tokens.files import hub, read, write
from served_tokens.files.command_line import CommandLine, exit_on_signals, print_command, run
from served_tokens.files.processes import Totals, Work, convert_files, finish_rejects
from served_tokens.marks import TrajectoryError, in_json, many
from served_tokens.prompts.chat_template import QWEN3, ChatTemplate, fingerprint, load_chat_template, read_chat_template
from served_tokens.prompts.echo import ECHOES
from served_tokens.prompts.turns import apply_chat_template, apply_despite_control_tokens
from served_tokens.rows.keys import FIELDS
from served_tokens.rows.notes import Noted, digest, noted
from served_tokens.rows.other import holds_conversation
from served_tokens.rows.servers import STYLES
from served_tokens.rows.trajectory import AS_IT_IS, NO_KWARGS, Reading, read_trajectory

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "data" / "envscaler_sample.jsonl"
SUFFIX = "_apply_qwen3_template"


def add_options(parser: CommandLine) -> None:
    """How rows are read, and which chat template they go through."""
    add = parser.group("how the past looks")
    template = "a .jinja file, a model directory or a Hub model id (default: the embedded Qwen3 template)"
    add("--chat-template", default=str(QWEN3), metavar="FILE_OR_MODEL", help=template)
    style = "whose way of printing tools and joining text parts the prompts follow (default: vllm; template: nobody's)"
    add("--server-style", choices=[*STYLES], default="vllm", help=style)
    echo = "past turns as an agent sends the server's answers back, streamed or not (default: as the rows have them)"
    add("--echo", choices=ECHOES, default="none", help=echo)
    kwargs = "what the chat template gets in each row, such as '{\"enable_thinking\": true}'; the row's own win"
    add("--template-kwargs", type=in_json, default={}, metavar="JSON", help=kwargs)
    add = parser.group("what is read")
    field = f"read what stands under KEY as {', '.join(FIELDS)}; repeatable"
    add("--read-as", action="append", default=[], type=key_and_field, metavar="KEY=FIELD", help=field)
    ignored = "a key that is no part of the conversation: `note`, or `message.note`, then not read either; repeatable"
    add("--ignore-key", action="append", default=[], dest="ignore_keys", metavar="KEY", help=ignored)
    control = "keep trajectories whose texts hold control tokens such as <|im_start|> (default: set them aside)"
    add("--allow-control-tokens", action="store_true", help=control)
    calls = "keep trajectories that call tools and offer none, because their system text holds them"
    add("--allow-calls-without-tools", action="store_true", help=calls)


def key_and_field(text: str) -> tuple[str, str]:
    """Of KEY=FIELD, for argparse."""
    key, _, field = text.partition("=")
    if not key or field not in FIELDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=FIELD with a FIELD of {', '.join(FIELDS)}")
    return key, field


def parsed_arguments() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.group("what is read")
    add("input", nargs="?", default=write.shown(SAMPLE), metavar="INPUT", help="default: the embedded sample")
    add("--file", metavar="NAME_OR_GLOB", help="of a data set, read this file only, or those that this glob matches")
    add_options(parser)
    parser.add_limits()
    output = f"default: INPUT's name with {SUFFIX}, beside it"
    parser.group("what is written")("output", nargs="?", type=Path, metavar="OUTPUT", help=output)
    return parser.parse_intermixed_args()


def reading_of(args: argparse.Namespace, chat_template: ChatTemplate) -> Reading:
    """How rows are to be read; ends with one line where options are of two servers, or the template reads no such."""
    if args.echo == "sglang" and args.server_style != "sglang":
        raise SystemExit("--echo sglang: the prompts are those of SGLang then; add --server-style sglang")
    if not isinstance(args.template_kwargs, dict):
        raise SystemExit("--template-kwargs: no JSON object, such as '{\"enable_thinking\": true}'")
    for name in args.template_kwargs:
        if name in NO_KWARGS or not re.search(rf"\b{re.escape(name)}\b", chat_template.text):
            raise SystemExit(f"--template-kwargs: {chat_template.name} takes no {name}; correct it, or leave it out")
    return Reading(**{its.name: getattr(args, its.name) for its in fields(Reading)})


def default_output(source: str) -> Path:
    """INPUT's name with SUFFIX, beside it, a .json file where it is one, else .jsonl; of a data set in ./data."""
    path, kind = Path(source), read.format_of(source) or ""
    if hub.is_data_set(source):
        path = ROOT / "data" / source.partition("@")[0].rpartition("/")[2]
    elif path.is_dir():
        path, kind = path if path.name.strip(".") else path.resolve(), ""
    return path.with_name(path.name.removesuffix(kind) + SUFFIX + (kind if kind == ".json" else ".jsonl"))


def input_files(source: str, pattern: str | None) -> list[str]:
    """The files behind INPUT, or the addresses of those that hold trajectories in a data set of the Hub."""
    if hub.is_data_set(source):
        return hub.download_trajectories(source, pattern, holds_conversation)
    if pattern:
        raise SystemExit(f"{source}: is no Hugging Face data set id; --file chooses among the files of one")
    return read.find_files(source)


def plain_row(
    row: dict, place: read.Place, chat_template: ChatTemplate, reading: Reading = AS_IT_IS, made_of: dict | None = None
) -> tuple[Noted, list]:
    """One input row -> (what to know of it, counted; [("", the output row)]); raises TrajectoryError.

    made_of: {file: what it tells of itself, beside the reading, to be compared by the check}.
    """
    if "served" in row:
        raise TrajectoryError("the row has a column `served`: it is one of step 1 already")
    trajectory = read_trajectory(row, reading, chat_template.control_tokens)
    counts = noted(trajectory)
    render = load_chat_template(chat_template, json.dumps(trajectory.template_kwargs, sort_keys=True))
    apply = apply_despite_control_tokens if reading.allow_control_tokens else apply_chat_template
    plain, served = apply(trajectory.messages, trajectory.tools, render, reading.echo)
    for turn in served["turns"]:
        turn["left_out"] = trajectory.not_trained.get(turn["turn"], turn["left_out"])
        counts.left_out.update([turn["left_out"]] if turn["left_out"] else [])
        reasoning = trajectory.messages[turn["turn"]].get("reasoning_content", "").strip()
        counts.not_rendered += reasoning not in plain[turn["message"]]["content"]
    counts.first = dict.fromkeys(+counts.notes, f"{place} (counted from 0)")
    try:
        counts.digests.append(digest(plain))
    except UnicodeEncodeError:
        raise TrajectoryError("the text holds a lone surrogate, which no tokenizer can read") from None
    told = {"source": place.source, "trajectory": place.row}
    told["reading"] = reading.told() | (made_of or {}).get(place.source, {})
    served = {**told, "enable_thinking": trajectory.given.thinking, **served}
    return counts, [("", {**row, "messages": plain, "served": served})]


def print_unread(totals: Totals) -> None:
    """The keys for which rows are set aside, and what to paste where they are no part of the conversation."""
    if totals.unread:
        keys = ", ".join(f"{key} ({number})" for key, number in totals.unread.most_common())
        options = " ".join(f"--ignore-key {shlex.quote(key)}" for key in totals.unread)
        print(f"rows are set aside for keys that nobody knows: {keys}", file=sys.stderr)
        print(f"  what belongs to the conversation: --read-as KEY={'|'.join(FIELDS)}", file=sys.stderr)
        print(f"  what does not: {options}", file=sys.stderr)


def print_counts(totals: Totals, output: str) -> None:
    """Where all rows and turns went, and what to know of them."""
    counts, left_out = totals.counts, totals.counts.left_out.total()
    rows = write.accounted("row", totals.rows_in, counts.trajectories, "out", {"set aside": totals.set_aside})
    print(f"{rows}: {output}")
    print(write.accounted("turn", counts.turns, counts.turns - left_out, "for samples", {"left out": left_out}))
    print("\n".join(counts.lines()))
    if counts.not_rendered:
        turns = many(counts.not_rendered, "turn has", "turns have")
        print(f"{turns} reasoning that this chat template does not render, so that their targets are without it")


def main() -> None:
    exit_on_signals()
    args = parsed_arguments()
    output = args.output or default_output(args.input)
    write.check_output(output, write.TEXT)
    chat_template = read_chat_template(args.chat_template)
    of_template = fingerprint(load_chat_template(chat_template))  # before the work, so that a bad one costs nothing
    reading = reading_of(args, chat_template)
    files = input_files(args.input, args.file)
    outputs = {"": output, read.REJECTS: output.with_name(output.name + read.REJECTS)}
    write.refuse_inputs([args.input, *files], *outputs.values())
    replaced = ", in place of an earlier one" if output.exists() else ""
    made_of = {file: {"sha256": read.digest_of(file), "chat_template": of_template} for file in files}
    convert = functools.partial(plain_row, chat_template=chat_template, reading=reading, made_of=made_of)
    with write.work_folder(output) as folder:
        work = Work(convert, Noted, outputs, folder, strict=args.strict)
        totals = convert_files(files, work, args.num_proc, "step 1")
        finish_rejects(work, totals)
        print_unread(totals)
        if not totals.counts.trajectories:
            sys.exit(f"{args.input}: no trajectory is left; {write.shown(output)} is not written")
        work.finish("")
    print_counts(totals, f"{write.shown(output)}{replaced}")
    no_thinking = totals.counts.reasoned.nowhere and args.echo == "none"  # with --echo step 2 would refuse it
    is_off = args.template_kwargs.get("enable_thinking") is False
    options = ["--no-thinking"] if no_thinking or is_off else []
    print_command(ROOT / "step2_to_alpaca_mask_history.py", write.shown(output), *options)


if __name__ == "__main__":
    run(main)
