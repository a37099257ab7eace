"""Check: LlamaFactory trains on the very tokens that the model sees and produces when it is served.

    python check_training_tokens.py [qwen3_full_sft.yaml] [key=value …] [--trajectories FILE] [--max-samples N]
                                    [--trees] [--report FILE.html] | [--show ROW:TURN]
    python check_training_tokens.py qwen3_full_sft.yaml dataset_dir=data dataset=mine_samples

Takes the YAML and the overrides of `llamafactory-cli train`. LlamaFactory itself (its parser, converter, template and
processor) makes the token ids of each sample. Beside it, the served prompt and the target of its turn are rendered from
the original trajectory with the tokenizer's own chat template, prefix by prefix, and tokenized as the server does.
Token ids and loss mask must be the same, all of them; and each text of the row as it was given must be in the samples
that should hold it. Exit code 1 where anything differs, is cut or lost.
--trees makes the rows of train_on_trees.py too, and looks at what each supervised token sees there.
--report draws what the check learns on its way; --show prints one sample and checks nothing.

The one idea: nothing of step 1 and step 2 is trusted. That holds for the reading of rows too: plain ones are read
by the check's own rules as well, and in others each text is looked for.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import sys
from array import array
from collections import Counter
from pathlib import Path

from served_tokens import llamafactory, training
from served_tokens.files.command_line import CommandLine, Took, exit_on_signals, positive_count, run
from served_tokens.files.write import shown, whole_file
from served_tokens.llamafactory import TrainingSet
from served_tokens.marks import many
from served_tokens.proof import server
from served_tokens.proof.compare import OtherRows, Truth, check_dataset
from served_tokens.proof.findings import Findings
from served_tokens.report.choice import samples_of_turn, samples_to_show
from served_tokens.report.cost import Schedule
from served_tokens.report.page import Checked, report_page
from served_tokens.report.summary import SHOWN_MISMATCHES, made_of_others, print_findings, problems_of
from served_tokens.report.tokens import terminal_view
from served_tokens.trees.check import AS_WRITTEN, TREES, check_rows
from served_tokens.trees.files import own_options
from served_tokens.trees.rows import Sample

ROOT = Path(__file__).resolve().parent


def main() -> None:
    exit_on_signals()
    args, command, took = parsed_arguments(), shlex.join(["python", *sys.argv]), Took()
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    overrides, own = own_options(args.overrides)
    config = training.read_config(args.yaml, overrides)  # before what takes long, so that a mistake costs nothing
    llamafactory.use_the_hub_if_it_answers()
    model_args, data_args, training_args = llamafactory.parse_arguments(args.yaml, overrides)
    problems = llamafactory.settings_beyond_the_samples(data_args)
    schedule = Schedule(
        epochs=training_args.num_train_epochs,
        max_steps=training_args.max_steps,
        batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        gpus=args.gpus,
        packing=data_args.packing,
    )
    if training.is_enabled("FORCE_TORCHRUN") and (lacks := training.lacks_a_gpu(config)):
        print(lacks)
    data_args = llamafactory.for_the_check(data_args, args.max_samples)
    with llamafactory.refusals():
        sets, encode = llamafactory.training_sets(model_args, data_args, training_args)
    tokenizer = encode.tokenizer
    steps = math.inf if args.trees else math.ceil(sum(its.total for its in sets if its.trains) / schedule.of_step)
    files = [file for its in sets if its.trains for file in (its.path, *its.path.glob("*"))]
    written = max((file.stat().st_mtime for file in files), default=0)
    earlier, afresh = training.earlier_training(training_args, config, steps, written)
    problems += [earlier] if afresh else []
    took.done("loading")
    if args.show:
        show(sets, args.show, tokenizer)
        return
    if not tokenizer.chat_template:
        sys.exit(f"{model_args.model_name_or_path}: the tokenizer has no chat template to compare with")
    truth = Truth(encode, data_args.cutoff_len, args.trajectories, data_args.max_samples is not None)
    # before the work, so that a wrong address costs nothing
    asked = server.Server(args.server) if args.server else None
    found, of_samples = check_sets(sets, truth, data_args)
    problems += of_samples
    took.done("comparing")
    if args.trees or args.report:
        of_trees = check_trees(sets, found, own.get("row_tokens", data_args.cutoff_len), own.get("row_samples"))
        problems += of_trees if args.trees else []
        took.done("token trees")
    if asked:
        problems += ask_server(asked, sets, truth, args)
        took.done("asking the server")
    program = ["python", shown(ROOT / "train_on_trees.py")] if args.trees else ["llamafactory-cli", "train"]
    way_on = training.training_command(program, args.yaml, [*args.overrides, *filter(None, [afresh])], config)
    if args.report:
        checked = Checked(
            command=command,
            model=model_args.model_name_or_path,
            cutoff_len=data_args.cutoff_len,
            problems=problems,
            next=way_on if problems in ([], [earlier]) else "",
            found=found,
            schedule=schedule,
        )
        samples, special = samples_to_show(found, sets), set(tokenizer.added_tokens_decoder)
        with whole_file(args.report) as part:
            part.write_text(report_page(checked, samples, tokenizer.decode, special), encoding="utf-8")
        print(f"report: {shown(args.report)}")
        took.done("drawing the report")
    print(took)
    verdict(found, problems, way_on, earlier)


def parsed_arguments() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.group("what is read")
    add("yaml", nargs="?", default=shown(ROOT / "qwen3_full_sft.yaml"), metavar="YAML", help="of the training")
    settings = "as for llamafactory-cli train: dataset, template, cutoff_len, …"
    add("overrides", nargs="*", metavar="key=value", help=settings)
    add("--trajectories", metavar="FILE", help="what step 1 read (default: where the samples say)")
    add = parser.group("limits")
    add("--max-samples", type=positive_count, metavar="N", help="check the first N samples of each data set only")
    add = parser.group("what else is checked")
    add("--server", metavar="URL", help="ask this server, such as http://127.0.0.1:8000, for its own prompts too")
    field = "what the agent sends reasoning back as (default: reasoning_content, of a template history only)"
    add("--reasoning-field", choices=server.REASONING_FIELDS, help=field)
    asked = f"ask the server for so many turns of each data set, evenly chosen (default: {server.TURNS_ASKED})"
    add("--max-turns", type=positive_count, default=server.TURNS_ASKED, metavar="N", help=asked)
    add("--trees", action="store_true", help="check the rows of train_on_trees.py too")
    add = parser.group("what is written")
    add("--report", type=html_file, metavar="FILE.html", help="write what is found, of trees too, as a page")
    add("--gpus", type=positive_count, default=1, metavar="N", help="for the cost in the page (default: 1)")
    shown_one = "print the sample of this message, both counted from 0; check nothing"
    add("--show", type=row_and_turn, metavar="ROW:TURN", help=shown_one)
    args = parser.parse_intermixed_args()
    given = [args.yaml, *args.overrides]
    args.overrides, yamls = [text for text in given if "=" in text], [text for text in given if "=" not in text]
    args.yaml = yamls[0] if yamls else parser.get_default("yaml")
    if yamls[1:]:
        parser.error(f"{yamls[1]}: a second YAML; overrides are key=value")
    if args.show and args.report:
        parser.error("--show checks nothing, so there is nothing to draw; run it without --report")
    return args


def row_and_turn(text: str) -> tuple[int, int]:
    """Of 17:4, for argparse."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} does not name a row and a turn; write it as 17:4")
    return int(match[1]), int(match[2])


def html_file(text: str) -> Path:
    """A name that cannot be that of the YAML or of data, for argparse."""
    if Path(text).suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a page; end it with .html")
    return Path(text)


def show(sets: list[TrainingSet], place: tuple[int, int], tokenizer) -> None:
    """Print the samples that supervise a turn."""
    for sample in samples_of_turn(sets, *place):
        print(terminal_view(sample, tokenizer.decode))


def check_sets(sets: list[TrainingSet], truth: Truth, data_args) -> tuple[list[Findings], list[str]]:
    """(what is found in each data set, why the training is not to start)"""
    found, problems = [], []
    how = f"template {data_args.template}, mask_history {str(data_args.mask_history).lower()}, "
    how += f"cutoff_len {data_args.cutoff_len}"
    if data_args.tokenized_path:
        how = "token ids as they are in tokenized_path, of which no max_samples, mask_history or cutoff_len is read"
    if data_args.max_samples is not None:
        how += f", max_samples {data_args.max_samples}"
    for its in sets:
        size = len(its.provenance)
        findings = Findings(
            name=its.name,
            trains=its.trains,
            settings=f"served as {', '.join(sorted({*map(str, its.provenance['served_as'][:])}))}; {how}",
            lengths=array("q", [0]) * size,
            exact=bytearray(size),
            path=its.path,
            total=its.total,
        )
        try:
            check_dataset(findings, its.provenance, its.built, truth)
        except OtherRows as error:
            raise SystemExit("; ".join([*made_of_others(its.provenance, truth), str(error)])) from None
        found.append(findings)
        problems += [f"{its.name}: {problem}" for problem in problems_of(findings, its, truth, data_args)]
        print_findings(findings, data_args.max_samples)
    trained = Counter(turn for one in found if one.trains for turn in one.supervised)
    if repeated := sum(times > 1 for times in trained.values()):
        problems.append(f"{many(repeated, 'turn is', 'turns are')} trained more than once")
    evaluated = {task for one in found if not one.trains for task in one.tasks}
    if both := evaluated.intersection(task for one in found if one.trains for task in one.tasks):
        shared = many(len(both), "task is", "tasks are")
        problems.append(f"{shared} both trained on and evaluated; hold them out by step 2 --val-ratio")
    return found, problems


def check_trees(sets: list[TrainingSet], found: list[Findings], row_tokens: int, row_samples: int | None) -> list[str]:
    """Note in what is found how each data set can be trained; returns why it is not to be trained on token trees."""
    problems = []
    for its, findings in zip(sets, found):
        name, size = its.name, len(its.provenance)
        samples = itertools.starmap(Sample, llamafactory.all_built(its))
        findings.ways, differ = check_rows(samples, row_tokens, row_samples)
        (_, tokens), (rows, in_rows) = findings.ways[AS_WRITTEN], findings.ways[TREES]
        fewer = f"{in_rows} tokens, {tokens / max(1, in_rows):.1f} times fewer"
        seen = f"all supervised tokens of {size - len(differ)} of {size} samples see there what they see in them"
        print(f"{name}: {many(rows, 'row')} of token trees, {fewer}; {seen}")
        if differ:
            first = ", ".join(map(str, differ[:SHOWN_MISMATCHES]))
            samples = many(len(differ), "sample is", "samples are")
            problems.append(f"{name}: {samples} not seen in the rows as they are, the first: {first}")
    return problems


def ask_server(asked: server.Server, sets: list[TrainingSet], truth: Truth, args: argparse.Namespace) -> list[str]:
    """Compare the prompts with those that a server makes, print the result, and say why not to train."""
    problems = []
    for its in sets:
        how = args.max_turns, args.reasoning_field, truth
        compared = server.compare_with_server(asked, its.provenance, its.built, *how)
        print(f"{its.name}: asked the server", *compared.differences, *server.lines_of(compared, asked), sep="\n")
        if compared.off:
            prompts = f"{compared.off} of {compared.asked} prompts"
            problems.append(f"{its.name}: {prompts} are not those of the server at {asked.url}")
    return problems


def verdict(found: list[Findings], problems: list[str], command: str, earlier: str) -> None:
    """The last lines: whether to train, and by which command; ends with 1 where not to.

    earlier: what is said of an earlier training; where it is a problem, the command mends that.
    """
    if problems:
        way_on = f"\nnothing else is wrong\nnext: {command}" if problems == [earlier] else ""
        sys.exit("FAILED: " + "\nFAILED: ".join(problems) + way_on)
    if earlier:
        print(earlier)
    if aside := sum(one.reasons.total() for one in found if one.trains):
        print(f"not trained: {many(aside, 'row')} set aside, see above")
    samples, total = sum(len(one.lengths) for one in found), sum(one.total for one in found)
    exact = sum(sum(one.exact) for one in found)
    of = f" for {samples} of {total} samples, which" if samples < total else f": {exact} of {samples} samples"
    print(f"PASSED{of} are exact")
    print(f"next: {command}")


if __name__ == "__main__":
    run(main)
