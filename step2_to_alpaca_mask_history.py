"""Step 2: plain messages -> prefix samples in alpaca format, for LlamaFactory's `mask_history`.

    python step2_to_alpaca_mask_history.py [INPUT] [OUTPUT] [--history-thinking drop|template] [--no-thinking]
    python step2_to_alpaca_mask_history.py data/mine_apply_qwen3_template.jsonl

INPUT   what step 1 wrote: "messages" of plain text, and "served".
OUTPUT  a folder of Parquet files, or one .parquet, .jsonl or .json file: one sample per turn, in the order of
        the rows and turns:
        {"instruction": "…", "input": "", "output": "<target of the turn>", "system": "…", "history": [["…", "…"], …],
         "source": "data/x.jsonl", "trajectory": 17, "turns": [4], "served_as": "drop" | "template" | "no-thinking",
         "reading": "<the options by which step 1 read the row, and digests, as JSON>"}
        Beside it go those that are held out (--val-ratio), and lists of the turns that are
        left out and of the rows set aside. dataset_info.json gets an entry for it.
        With --tokens it is a folder of token ids instead, which LlamaFactory loads by `tokenized_path`.

--merge-turns lets a sample supervise several turns, where the served prompt of each begins with the one before and its
target; "history" then holds the turns before the last one.

The one idea: a sample spells out the served prompt of its turn, as it is when the model generates that turn, and
supervises the target alone. Text that has no place in LlamaFactory's user/assistant pairs is written out in a user (or
system) text with its role blocks, where LlamaFactory's tokenizer turns it into the same tokens.
"""

import argparse
import functools
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

from served_tokens.files import read, write
from served_tokens.files.command_line import CommandLine, exit_on_signals, positive_count, print_command, run
from served_tokens.files.processes import Totals, Work, convert_files, finish_rejects
from served_tokens.files.read import LEFT_OUT, REJECTS
from served_tokens.files.write import accounted, shown
from served_tokens.marks import many
from served_tokens.samples.alpaca import sample_schema, training_settings
from served_tokens.samples.dataset_info import name_of, read_dataset_info, register
from served_tokens.samples.select import VALIDATION, Options, Selected, samples_of_row
from served_tokens.samples.tokens import EVALUATED, HELD, PROVENANCE_FILE, TRAIN, load_encoder, save_tokens

ROOT = Path(__file__).resolve().parent
DEFAULT_INPUT = ROOT / "data" / "envscaler_sample_apply_qwen3_template.jsonl"
SHIPPED = ROOT / "data" / "envscaler_samples"  # which the YAML and the dataset_info.json beside this script name
SUFFIX_OF_STEP_1 = re.compile("_(plain|apply_qwen3_template)$")


def add_options(parser: CommandLine) -> None:
    """What samples are made, and under which name LlamaFactory finds them."""
    add = parser.group("how the past looks")
    history = "the reasoning of earlier turns: dropped (default), or kept where the chat template keeps it"
    add("--history-thinking", choices=("drop", "template"), default="drop", help=history)
    add("--no-thinking", action="store_true", help="targets without reasoning, for a non-thinking model")
    merge = "one sample for all turns whose served prompts begin with one another (with --history-thinking template)"
    add("--merge-turns", action="store_true", help=merge)
    add = parser.group("which turns")
    turns = "train all turns of a row (default), or the last only: for logs with a row for each call"
    add("--turns", choices=("all", "last"), default="all", help=turns)
    add("--require-reasoning", action="store_true", help="leave turns without reasoning out")
    cutoff = "leave samples out that are not shorter: LlamaFactory may cut them at this cutoff_len"
    add("--cutoff-len", type=positive_count, metavar="TOKENS", help=cutoff)
    add("--tokenizer", metavar="MODEL", help="counts the tokens: a model directory or a Hub model id")
    ratio = "hold about this part of the tasks out, for validation: OUTPUT's name with _val"
    add("--val-ratio", type=float, default=0.0, metavar="R", help=ratio)
    add("--seed", type=int, default=42, help="of the validation set (default: 42)")
    add = parser.group("what is written")
    tokens = "token ids of this model (a directory or a Hub id) instead of texts, for any chat template"
    add("--tokens", metavar="MODEL", help=tokens)
    add("--dataset-name", help="the name in dataset_info.json (default: OUTPUT's name)")
    folder = "of dataset_info.json, LlamaFactory's dataset_dir (default: beside OUTPUT; of envscaler_samples, here)"
    add("--dataset-dir", type=Path, metavar="FOLDER", help=folder)


def default_output(source: str, suffix: str) -> Path:
    """A folder beside INPUT, with its name: data/mine_plain.jsonl, "_samples" -> data/mine_samples."""
    path = Path(source) if Path(source).name.strip(".") else Path(source).resolve()
    return path.with_name(SUFFIX_OF_STEP_1.sub("", name_of(path)) + suffix)


def options_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Options:
    """What the arguments come to; ends where they exclude each other or cannot be, before the work."""
    if args.no_thinking and args.history_thinking == "template":
        parser.error("--no-thinking leaves no reasoning for --history-thinking template to keep; drop one of the two")
    if args.merge_turns and args.history_thinking != "template":
        parser.error(
            "--merge-turns needs --history-thinking template: where the history drops the reasoning of a turn, "
            "no later served prompt begins with that turn as the model wrote it, so no sample can hold both"
        )
    if args.tokens and (args.tokenizer or args.dataset_name or args.dataset_dir):
        parser.error("--tokens counts by itself, and is found by its folder; drop --tokenizer and --dataset-…")
    if (args.cutoff_len is None) != (args.tokenizer is None) and not args.tokens:
        parser.error("--cutoff-len and --tokenizer go together: tokens are counted to see what would be cut")
    if not 0 <= args.val_ratio < 1:
        parser.error(f"--val-ratio {args.val_ratio}: is no number from 0 up to, but not, 1")
    name = args.dataset_name or name_of(args.output)
    if "," in name:
        parser.error(f"{name}: LlamaFactory separates data sets by commas; name it without by --dataset-name")
    is_shipped = args.output.resolve() == SHIPPED and name == SHIPPED.name
    folder = args.dataset_dir or (ROOT if is_shipped else args.output.parent)
    made = {
        "served_as": "no-thinking" if args.no_thinking else args.history_thinking,
        "tokenizer": args.tokens or args.tokenizer,
        "dataset_name": name,
        "dataset_info": folder / "dataset_info.json",
    }
    options = Options(**{its.name: (vars(args) | made)[its.name] for its in fields(Options)})
    if options.tokenizer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
        load_encoder(options.tokenizer)
    read_dataset_info(options.dataset_info)
    return options


def outputs_of(output: Path, inputs: list[str], options: Options) -> dict[str, Path]:
    """{stream: the file or folder that its rows go into}, see `Work`; ends where one cannot be, or is an input too."""
    samples = {"": output}
    if options.val_ratio:
        name = name_of(output)
        samples[VALIDATION] = output.with_name(name + VALIDATION + output.name.removeprefix(name))
    may_hold = [("",), HELD] if options.tokens else []
    for its in samples.values():
        write.check_output(its, *may_hold)
        holds_any = its.is_dir() and any(its.iterdir())
        if options.tokens and holds_any and not (its / PROVENANCE_FILE.format(TRAIN)).exists():
            sys.exit(f"{its}: holds folders that are not of these scripts; name another folder")
    outputs = samples | {stream: output.with_name(output.name + stream) for stream in (REJECTS, LEFT_OUT)}
    write.refuse_inputs(inputs, *outputs.values(), options.dataset_info)
    return outputs


def finish(args: argparse.Namespace, options: Options, work: Work, totals: Totals) -> None:
    """Give what is written its names, and say what there is now; ends where one of the two sides would be empty."""
    counts, why = totals.counts, ""
    print_counts(totals)
    if counts.samples == counts.validation:
        why = "no sample is left to train on"
    elif args.val_ratio and not counts.validation:
        why = "no sample is held out; raise --val-ratio, or take another --seed"
    if why:
        sys.exit(f"{args.input}: {why}; {shown(args.output)} is not written")
    saved = save(work, "", options)
    if left_out := work.finish(LEFT_OUT):
        print(f"each turn without a sample to train on, with its reason: {shown(left_out)}")
    print(saved)
    if counts.validation:
        where = f"its split {EVALUATED}" if args.tokens else save(work, VALIDATION, options)
        print(f"{counts.validation} of the samples are held out, for validation: {where}")
    print_next(options, counts, args.output)


def print_counts(totals: Totals) -> None:
    """Where all rows and turns went."""
    counts = totals.counts
    trajectories, without = many(counts.trajectories, "trajectory", "trajectories"), counts.without_samples
    print(f"{trajectories}, {many(counts.turns, 'turn')}: {many(counts.samples, 'sample')}")
    others = {"of which all turns are left out": without, "set aside": totals.set_aside}
    print(accounted("row", totals.rows_in, counts.trajectories - without, "out as samples", others))
    others = {"held out": counts.held_out, "left out": counts.left_out.total()}
    print(accounted("turn", counts.turns, counts.supervised - counts.held_out, "in samples", others))
    for reason, number in counts.left_out.items():
        print(f"{many(number, 'turn')} left out: {reason}")


def save(work: Work, stream: str, options: Options) -> str:
    """Give samples their name, and register them.

    Token ids are one folder with both splits, and are not registered. Returns what there is now.
    """
    output, name = work.outputs[stream], options.dataset_name + stream
    replaced = ", in place of an earlier one" if output.exists() else ""
    if options.tokens:
        splits = {"": TRAIN, VALIDATION: EVALUATED}
        parts = {splits[its]: work.folder / work.outputs[its].name for its in splits if its in work.outputs}
        save_tokens(parts, output)
        return f"{shown(output)}{replaced}, the token ids of {options.tokens}"
    work.finish(stream)
    register(options.dataset_info, name, output)
    return f"{shown(output)}{replaced}, registered as {name} in {shown(options.dataset_info)}"


def print_next(options: Options, counts: Selected, output: Path) -> None:
    """The command that checks the samples, with the settings that they are for."""
    name, folder = options.dataset_name, options.dataset_info.parent
    told = []
    if options.tokens:
        told += [f"tokenized_path={shown(output)}", "template=qwen3_nothink"]  # of which it takes stop words alone
    else:
        told += [] if folder.samefile(Path()) else [f"dataset_dir={shown(folder)}"]  # the YAML's is here
        told += [f"eval_dataset={name}{VALIDATION}"] if options.val_ratio else []
        told += [f"dataset={name}"] if name != SHIPPED.name else []
        told += training_settings(options.served_as, max(counts.given), not counts.not_thinking, options.merge_turns)
    told += ["eval_strategy=epoch", "per_device_eval_batch_size=1"] if options.val_ratio else []
    told += [f"cutoff_len={options.cutoff_len}"] if options.cutoff_len else []
    told += [f"model_name_or_path={options.tokenizer}"] if options.tokenizer else []
    print_command(ROOT / "check_training_tokens.py", shown(ROOT / "qwen3_full_sft.yaml"), *told)


def main() -> None:
    exit_on_signals()
    parser = CommandLine(__doc__)
    made = "of step 1 (default: what it makes of the embedded sample)"
    parser.group("what is read")("input", nargs="?", default=shown(DEFAULT_INPUT), metavar="INPUT", help=made)
    add_options(parser)
    parser.add_limits()
    output = "default: a folder beside INPUT; of data/mine_apply_qwen3_template.jsonl data/mine_samples"
    parser.group("what is written")("output", nargs="?", type=Path, metavar="OUTPUT", help=output)
    args = parser.parse_intermixed_args()
    args.output = args.output or default_output(args.input, "_tokens" if args.tokens else "_samples")
    options = options_of(parser, args)
    if not Path(args.input).exists():
        sys.exit(f"{args.input}: no such file; run step1_apply_tool_template.py first")
    files = read.find_files(args.input)
    outputs, schema = outputs_of(args.output, [args.input, *files], options), sample_schema(bool(args.tokens))
    convert = functools.partial(samples_of_row, options=options)
    with write.work_folder(args.output) as folder:
        work = Work(convert, Selected, outputs, folder, schema, args.strict)
        totals = convert_files(files, work, args.num_proc, "step 2")
        finish_rejects(work, totals)
        finish(args, options, work, totals)


if __name__ == "__main__":
    run(main)
