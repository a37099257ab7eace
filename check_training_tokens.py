"""Check: LlamaFactory trains on the very tokens that the model sees and produces when it is served.

    python check_training_tokens.py [qwen3_full_sft.yaml] [key=value …] [--trajectories FILE] [--max-samples N]
                                    [--report FILE.html] [--plots FOLDER] | [--show TRAJECTORY:TURN]

Takes the YAML and the overrides of `llamafactory-cli train`. LlamaFactory itself (its parser, its template, its data
loader) builds the training set. Beside it, for each sample, the served prompt and the target of its turn are rendered
from the original trajectory with the tokenizer's own chat template, prefix by prefix, and tokenized as the server does.
Token ids and loss mask must be the same, all of them. Exit code 1 where anything differs or is cut.
--report and --plots draw what the check learns on its way; --show prints one sample and checks nothing.

The one idea: nothing of step 1 and step 2 is trusted; the two sides share only the trajectories.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
from array import array
from collections import Counter, defaultdict
from pathlib import Path

import jinja2

from served_tokens.charts import plots
from served_tokens.findings import (
    IGNORE_INDEX,
    MISMATCHES_KEPT,
    PLACES_KEPT,
    REASONS_KEPT,
    SAMPLES_IN_PAGE,
    Findings,
    Sample,
    Schedule,
    choice_of_samples,
    training_cost,
)
from served_tokens.report import Checked, report_page
from served_tokens.token_view import terminal_view
from trajectories import (
    CONTROL_TOKENS,
    LEFT_OUT_TURNS,
    ROOT,
    TrajectoryError,
    positive_count,
    read_rows,
    served_trajectory,
    shown,
    time_limit,
    whole_file,
    with_stand_ins,
    without_reasoning,
)

ASSISTANT = "<|im_start|>assistant\n"
SERVED_AS = ("drop", "template", "no-thinking")
HELD_OUT, NOT_SAID = "held out, to be evaluated", "step 2 does not say why"
PROVENANCE = ("source", "trajectory", "turns", "served_as")
# What the machine that trains has and the one that checks may lack. No data depends on these.
ANY_MACHINE = {"deepspeed": None, "fsdp": None, "bf16": False, "fp16": False, "pure_bf16": False, "report_to": "none"}
SHOWN_MISMATCHES = 3
SHOWN_TOKENS = 12  # on each side of the first difference


# ---------------------------------------------------------------- pure functions


def served_turn(messages: list[dict], tools: list[dict] | None, turn: int, served_as: str, render) -> tuple[str, str]:
    """The naive definition: (served prompt, target) of messages[turn].

    Args:
        messages, tools: as `served_trajectory` returns them.
        served_as: "drop", "template" or "no-thinking", as step 2 writes it.
        render: render(messages, tools, add_generation_prompt, **variables) -> str, the tokenizer's chat template.
    Raises TrajectoryError where the target cannot be told.
    """
    history, message = messages[:turn], messages[turn]
    variables = {}
    if served_as != "template":
        history = without_reasoning(history)
    if served_as == "no-thinking":
        [message], variables = without_reasoning([message]), {"enable_thinking": False}
    prompt = render(history, tools, True, **variables)
    given = prompt.rpartition(ASSISTANT)[2]  # what the generation prompt holds already of the assistant block
    whole = [*messages[:turn], message]
    hidden, hidden_tools, reveal = with_stand_ins(whole, tools)  # the texts of the turn may hold role marks of their own
    rendered = render(hidden, hidden_tools, False)
    generated = rendered.rpartition(ASSISTANT)[2]
    if reveal:
        generated = reveal(generated)
        if reveal(rendered) != render(whole, tools, False):
            raise TrajectoryError("the chat template alters texts with control tokens, so the target cannot be told")
    if not generated.startswith(given):
        raise TrajectoryError("the target does not begin as the generation prompt does, so the model cannot write it")
    return prompt, generated.removeprefix(given)


def expected_sample(spans: list[tuple[list[int], list[int]]]) -> dict:
    """{"input_ids", "labels"} of a sample that supervises these turns: token ids of (served prompt, target), in order.

    Each served prompt and target must be what the last ones begin with; else no loss mask is right, and there is none.
    """
    prompt, target = spans[-1]
    input_ids = prompt + target
    labels = [IGNORE_INDEX] * len(input_ids)
    for prompt, target in spans:
        start, end = len(prompt), len(prompt) + len(target)
        if input_ids[:end] != prompt + target:
            return {"input_ids": input_ids, "labels": []}
        labels[start:end] = target
    return {"input_ids": input_ids, "labels": labels}


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first position at which two lists differ; None where they are equal."""
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def first_mismatch(expected: dict, trained: dict) -> tuple[str, str, int]:
    """(column, what is wrong, position) of the first difference of two samples ({"input_ids", "labels"}) that differ."""
    for column, what in (("input_ids", "the tokens differ"), ("labels", "the loss mask differs")):
        position = first_difference(expected[column], trained[column])
        if position is not None:
            return column, what, position


def describe_mismatch(expected: dict, trained: dict, decode) -> str:
    """The first difference of two samples ({"input_ids", "labels"}), as text on both sides."""
    column, what, position = first_mismatch(expected, trained)
    start, end = max(0, position - SHOWN_TOKENS), position + SHOWN_TOKENS
    lines = [f"{what} from token {position} of {len(expected['input_ids'])}:"]
    for side, sample in (("served ", expected), ("trained", trained)):
        loss = "" if column == "input_ids" else f" (loss: {position < len(sample['labels']) and sample['labels'][position] != IGNORE_INDEX})"
        lines.append(f"  {side}: …{decode(sample['input_ids'][start:position])!r} >>> {decode(sample['input_ids'][position:end])!r}{loss}")
    return "\n".join(lines)


# ---------------------------------------------------------------- LlamaFactory's side


def parse_arguments(yaml: str, overrides: list[str]):
    """(model, data, training) arguments, as LlamaFactory parses them, less what depends on the machine."""
    from llamafactory.hparams import get_train_args
    from llamafactory.hparams.parser import read_args

    if not Path(yaml).is_file() or Path(yaml).suffix not in (".yaml", ".yml"):
        sys.exit(f"{yaml}: no such .yaml file")
    sys.argv = ["llamafactory-cli", yaml, *overrides]
    with tempfile.TemporaryDirectory() as nowhere, refusals():
        config = {**read_args(), **ANY_MACHINE, "output_dir": nowhere}
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(config)
    if finetuning_args.stage != "sft":
        sys.exit(f"{yaml}: stage is {finetuning_args.stage}; only sft samples can be checked")
    return model_args, data_args, training_args


@contextlib.contextmanager
def refusals():
    """What LlamaFactory and its libraries find wrong with the settings, as one line instead of a traceback."""
    try:
        yield
    except Exception as error:
        offline = "; is model_name_or_path a local folder, or the Hub within reach?" if isinstance(error, OSError) else ""
        sys.exit(f"LlamaFactory refuses these settings: {type(error).__name__}: {error}{offline}")


def settings_beyond_the_samples(data_args) -> list[str]:
    """What is wrong with settings that act after the samples are built, where comparing samples cannot show it."""
    from llamafactory.data.template import TEMPLATES

    problems = []
    if data_args.template in TEMPLATES and TEMPLATES[data_args.template].replace_jinja_template:
        problems.append(f"template {data_args.template} puts a chat template of its own into the trained model")
    if len(data_args.dataset or []) > 1 and data_args.mix_strategy != "concat":
        problems.append(f"mix_strategy {data_args.mix_strategy} draws some samples more than once, or not at all")
    if data_args.packing and not data_args.neat_packing:
        problems.append("packing without neat_packing: samples see the tokens of other samples, which no served prompt has")
    if not data_args.ignore_pad_token_for_loss:
        problems.append("ignore_pad_token_for_loss is false: the padding after each sample has loss too")
    return problems


def training_sets(model_args, data_args, training_args):
    """Yield (name, file or folder, provenance, built) for each data set of the YAML: two data sets with the same rows."""
    from datasets import load_dataset
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.extras.constants import FILEEXT2TYPE
    from llamafactory.model import load_tokenizer

    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    for name, attributes in zip(names, get_dataset_list(names, data_args.dataset_dir)):
        if attributes.num_samples is not None:
            raise ValueError(f"data set {name} has num_samples, which draws samples at random; check it without")
        path = Path(data_args.dataset_dir, attributes.dataset_name)
        if not path.exists():
            raise ValueError(f"data set {name}: no file {path}; write it with step2_to_alpaca_mask_history.py")
        files = [str(path / file) for file in os.listdir(path)] if path.is_dir() else [str(path)]  # LlamaFactory's order
        provenance = load_dataset(FILEEXT2TYPE[Path(files[0]).suffix[1:]], data_files=files, split=attributes.split,
                                  cache_dir=model_args.cache_dir)  # fmt: skip
        missing = set(PROVENANCE) - set(provenance.column_names)
        if missing:
            raise ValueError(f"data set {name}: no column {', '.join(sorted(missing))}; write it with step 2")
        provenance = provenance.select_columns(PROVENANCE)
        if data_args.max_samples is not None:
            provenance = provenance.select(range(min(data_args.max_samples, len(provenance))))
        data_args.dataset, data_args.eval_dataset, data_args.val_size = [name], None, 0.0
        built = get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer_module)["train_dataset"]
        if len(provenance) != len(built):
            raise ValueError(f"data set {name}: it drops {len(provenance) - len(built)} samples that it finds invalid")
        yield name, path, provenance, built


# ---------------------------------------------------------------- the comparison


def reasons_of(path: Path) -> dict:
    """Why step 2 left turns out, as it says beside its samples: {(source, trajectory, turn): reason}."""
    path = path.with_name(path.name + LEFT_OUT_TURNS)
    rows = read_rows(str(path)) if path.is_file() else ()
    return {(row["source"], row["trajectory"], row["turn"]): row["reason"] for _, row, error in rows if not error}


def check_dataset(found: Findings, provenance, built, trajectories: str | None, tokenizer, cutoff_len: int, why: dict, held_out: set) -> tuple[list, set]:
    """Compare each sample with its turns, and note what is found; returns (what is supervised, the tasks of which it is).

    What is supervised: (source, trajectory, turn), as often as it is; the tasks: see `task_of`. Of a data set for evaluation, only
    trajectories that have samples count.

    Args:
        why: {(source, trajectory, turn): reason} for turns without a sample.
        held_out: (source, trajectory) of those that are evaluated.
    """
    counts, supervised, tasks = found.counts, [], set()

    def mismatch(position: int, kind: str, at: int | None, text: str) -> None:
        counts["mismatched"] += 1
        found.kinds[kind] += 1
        if len(found.mismatches) < MISMATCHES_KEPT:
            found.mismatches[position] = (at, text)

    wanted = defaultdict(lambda: defaultdict(list))  # source -> trajectory -> [(position, turns, served_as)]
    for position, sample in enumerate(provenance):
        source = trajectories or sample["source"]
        if not (source and sample["turns"] and sample["trajectory"] is not None and sample["served_as"] in SERVED_AS):
            sys.exit(f"sample {position} does not say which turns of which trajectory it is; write it with step 2")
        wanted[source][sample["trajectory"]].append((position, sample["turns"], sample["served_as"]))

    def render(messages, tools, add_generation_prompt, **variables):
        with time_limit():
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                                 add_generation_prompt=add_generation_prompt, **variables)  # fmt: skip

    for source, by_trajectory in wanted.items():
        for index, row, error in read_rows(source, "check"):
            counts["rows"] += 1
            try:
                if error:
                    raise error  # where there are samples, step 1 was told to keep control tokens
                messages, tools = served_trajectory(row, () if index in by_trajectory else CONTROL_TOKENS)
            except TrajectoryError as error:
                counts["rows set aside"] += 1
                new = str(error) not in found.reasons and len(found.reasons) >= REASONS_KEPT
                found.reasons["other reasons" if new else str(error)] += 1
                continue
            samples = by_trajectory.pop(index, [])
            if not (found.trains or samples):
                counts["rows"] -= 1
                continue
            roles = [message["role"] for message in messages]
            counts["trajectories"] += 1
            counts["turns"] += roles.count("assistant")
            found.turns[roles.count("assistant")] += 1
            sampled = {turn for _, turns, _ in samples for turn in turns}
            left_out = [turn for turn, role in enumerate(roles) if role == "assistant" and turn not in sampled]
            found.left_out += [f"{index}:{turn}" for turn in left_out][: PLACES_KEPT - len(found.left_out)]
            unsaid = HELD_OUT if found.trains and (source, index) in held_out else NOT_SAID
            found.why_left_out.update(why.get((source, index, turn), unsaid) for turn in left_out)
            if samples:
                tasks.add(task_of(row))
            for position, turns, served_as in samples:
                place = f"{source}: trajectory {index}, turn {turns[-1]}"
                if any(roles[turn : turn + 1] != ["assistant"] for turn in turns):
                    sys.exit(f"{place}: no such turn; name the file that step 1 read by --trajectories")
                supervised += [(source, index, turn) for turn in turns]
                trained = built[position]
                found.lengths[position] = len(trained["input_ids"])
                counts["tokens"] += len(trained["input_ids"])
                counts["supervised tokens"] += len(trained["labels"]) - trained["labels"].count(IGNORE_INDEX)
                try:
                    texts = [text for turn in turns for text in served_turn(messages, tools, turn, served_as, render)]
                except (jinja2.TemplateError, TrajectoryError) as error:
                    refused = "the model's chat template refuses it"
                    mismatch(position, refused, None, f"{place}: {refused}: {error}")
                    continue
                ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
                expected = expected_sample(list(zip(ids[::2], ids[1::2])))
                found.lengths[position] = len(expected["input_ids"])
                found.targets.update(map(len, ids[1::2]))
                if all(expected[column] == trained[column] for column in expected):
                    counts["exact"] += 1
                    found.exact[position] = 1
                elif len(expected["input_ids"]) > cutoff_len:
                    counts["cut"] += 1
                else:
                    _, kind, at = first_mismatch(expected, trained)
                    mismatch(position, kind, at, f"{place}: {describe_mismatch(expected, trained, tokenizer.decode)}")
        if by_trajectory:
            sys.exit(f"{source}: has no usable trajectory {min(by_trajectory)}, of which there are samples; "
                     "name the file that step 1 read by --trajectories")  # fmt: skip
    counts["supervised turns"] = len(set(supervised))
    return supervised, tasks


def task_of(row: dict) -> bytes:
    """A digest of what no two sides of a split may share: the row's task_info.task_id, else its messages and tools."""
    task = _parsed(row.get("task_info"))
    task = task.get("task_id") if isinstance(task, dict) else None
    same = [_parsed(row["messages"]), _parsed(row.get("tools")) or None] if task is None else str(task)
    return hashlib.sha256(json.dumps(same, default=str).encode()).digest()


def _parsed(value):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


# ---------------------------------------------------------------- what is shown


def print_findings(found: Findings, max_samples: int | None) -> None:
    counts, samples = found.counts, len(found.lengths)
    for _, text in list(found.mismatches.values())[:SHOWN_MISMATCHES]:
        print(text)
    print(f"{found.name}: {samples} samples {found.settings}")
    print(f"  exact            {counts['exact']:>8}  ({counts['exact'] / max(1, samples):.2%})")
    print(f"  mismatched       {counts['mismatched']:>8}")
    print(f"  over cutoff_len  {counts['cut']:>8}  (the longest sample has {max(found.lengths, default=0)} tokens)")
    print(f"  turns            {counts['turns']:>8}  in the trajectories")
    print(f"  supervised       {counts['supervised turns']:>8}  turns")
    limit = f" (max_samples is {max_samples})" if max_samples is not None else ""
    print(f"  left out         {counts['turns'] - counts['supervised turns']:>8}  turns without a sample{limit}")
    for why, number in found.why_left_out.most_common():
        print(f"                   {number:>8}  of them: {why}")
    if counts["rows set aside"]:
        print(f"  set aside        {counts['rows set aside']:>8}  trajectories that cannot be read or hold control tokens")
    print(f"  {counts['rows']} rows in = {counts['trajectories']} rows checked for samples + {counts['rows set aside']} set aside")
    print(f"  {counts['turns']} turns in = {counts['supervised turns']} turns in samples + "
          f"{counts['turns'] - counts['supervised turns']} left out")  # fmt: skip
    if counts["cut"]:
        print("  those over cutoff_len would be cut: leave them out by step 2 --cutoff-len N --tokenizer MODEL, or raise cutoff_len")
    if counts["mismatched"]:
        print("  are the settings those that step 2 ended with, and the chat template and trajectories those of step 1?")


def samples_to_show(found: Findings, provenance, built, limit: int) -> list[tuple[str, Sample]]:
    """(name of the data set, sample) for a bounded choice: each reason to show it in turn, by trajectory and turn."""
    reasons, samples = [], []
    for position, why in choice_of_samples(found, limit).items():
        reasons += [why] * (why not in reasons)
        sample = sample_at(provenance, built, position)
        by_length = {"longest": -found.lengths[position], "shortest": found.lengths[position]}.get(why, 0)
        order = reasons.index(why), by_length, sample.source, sample.trajectory, sample.turns, position
        why += "" if found.exact[position] or why == "mismatch" else ", not exact"
        mismatch = found.mismatches.get(position, (None, ""))
        samples.append((order, sample._replace(why=why, served=found.lengths[position], mismatch=mismatch)))
    return [(found.name, sample) for _, sample in sorted(samples)]


def sample_at(provenance, built, position: int) -> Sample:
    told, trained = provenance[position], built[position]
    return Sample(told["source"] or "", told["trajectory"], told["turns"], trained["input_ids"], trained["labels"])


def samples_of_turn(sets: list, trajectory: int, turn: int) -> list[Sample]:
    """The samples that supervise a turn; ends with what there is instead where there is none."""
    found, others = [], set()
    for _, _, provenance, built in sets:
        for position, its_trajectory in enumerate(provenance["trajectory"][:]):
            if its_trajectory == trajectory:
                sample = sample_at(provenance, built, position)
                others.update(sample.turns)
                found += [sample] if turn in sample.turns else []
    if not found and others:
        sys.exit(f"--show {trajectory}:{turn}: no sample supervises message {turn} of trajectory {trajectory}, counted from 0; those "
                 f"that are supervised: {', '.join(map(str, sorted(others)))}")  # fmt: skip
    if not found:
        sys.exit(f"--show {trajectory}:{turn}: trajectory {trajectory} has no sample in {', '.join(name for name, *_ in sets)}; "
                 "rows are counted from 0; one that cannot be read has none, nor one whose turns are all left out")  # fmt: skip
    return found


def wants_colour(stream, environment) -> bool:
    """By https://no-color.org, where an empty NO_COLOR is none."""
    return stream.isatty() and not environment.get("NO_COLOR")


def cost_of(training: list[Findings], schedule: dict, gpus: int, cutoff_len: int) -> tuple[dict, str]:
    """(the cost, what it is reckoned with) of training on these data sets."""
    samples = sum(len(found.lengths) for found in training)
    tokens, supervised = (sum(found.counts[what] for found in training) for what in ("tokens", "supervised tokens"))
    length = "{max_steps} steps" if schedule["max_steps"] > 0 else "{epochs:g} epochs"
    said = (length + ", batches of {batch} × {accumulation} accumulated").format(**schedule)
    said += f", {gpus} GPU{'s' * (gpus > 1)} (--gpus)"
    schedule = dict(schedule)
    held_out = schedule.pop("val_size")
    if held_out:
        kept = samples - (int(held_out) if held_out > 1 else math.ceil(samples * held_out))
        tokens, supervised, samples = round(tokens * kept / samples), round(supervised * kept / samples), kept
        said += f"; less val_size {held_out:g}"
    if schedule.pop("packing"):
        samples = math.ceil(tokens / cutoff_len)
        said += "; packed samples count as if each was full, so there will be some more steps"
    return training_cost(samples, tokens, supervised, Schedule(**schedule, gpus=gpus)), said


def trajectory_and_turn(text: str) -> tuple[int, int]:
    """Of 17:4, for argparse."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} does not name a trajectory and a turn; write it as 17:4")
    return int(match[1]), int(match[2])


def html_file(text: str) -> Path:
    """A name that cannot be that of the YAML or of data, for argparse."""
    if Path(text).suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a page; end it with .html")
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", nargs="?", default=shown(ROOT / "qwen3_full_sft.yaml"), metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for llamafactory-cli train")
    parser.add_argument("--trajectories", metavar="FILE", help="what step 1 read (default: where the samples say)")
    parser.add_argument("--max-samples", type=positive_count, metavar="N", help="check the first N samples of each data set only")
    parser.add_argument("--report", type=html_file, metavar="FILE.html", help="write what is found as a page, whether it passes or not")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the histograms of the page as PNG")
    parser.add_argument("--gpus", type=positive_count, default=1, metavar="N", help="for the cost in the page (default: 1)")
    parser.add_argument("--show", type=trajectory_and_turn, metavar="TRAJECTORY:TURN", help="print this sample; check nothing")
    args, command = parser.parse_intermixed_args(), shlex.join(["python", *sys.argv])
    if "=" in args.yaml:
        args.yaml, args.overrides = parser.get_default("yaml"), [args.yaml, *args.overrides]
    if args.show and (args.report or args.plots):
        parser.error("--show checks nothing, so there is nothing to draw; run it without --report and --plots")
    if (args.report or args.plots) and not importlib.util.find_spec("matplotlib"):
        parser.error("--report and --plots need matplotlib; python -m pip install -r requirements.txt")

    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    model_args, data_args, training_args = parse_arguments(args.yaml, args.overrides)
    problems, to_train = settings_beyond_the_samples(data_args), len(data_args.dataset or [])
    schedule = {
        "epochs": training_args.num_train_epochs, "max_steps": training_args.max_steps, "packing": data_args.packing,
        "batch": training_args.per_device_train_batch_size, "accumulation": training_args.gradient_accumulation_steps,
        "val_size": data_args.val_size,
    }  # fmt: skip
    data_args.packing = data_args.neat_packing = data_args.streaming = False
    if args.max_samples is not None:
        data_args.max_samples = args.max_samples
    if data_args.tokenized_path is not None and Path(data_args.tokenized_path).exists():
        sys.exit(f"tokenized_path: LlamaFactory trains on what it tokenized into {data_args.tokenized_path} earlier; "
                 "remove that folder, then check")  # fmt: skip
    data_args.tokenized_path = None

    from llamafactory.model import load_tokenizer

    as_served = copy.copy(model_args)
    as_served.split_special_tokens = False  # a server never does
    with contextlib.redirect_stdout(io.StringIO()), refusals():  # LlamaFactory prints whole samples
        tokenizer = load_tokenizer(as_served)["tokenizer"]
        sets = list(training_sets(model_args, data_args, training_args))
    special = set(tokenizer.added_tokens_decoder)
    if args.show:
        sys.stdout.reconfigure(errors="backslashreplace")
        colour = wants_colour(sys.stdout, os.environ)
        for sample in samples_of_turn(sets, *args.show):
            print(terminal_view(sample, tokenizer.decode, special, colour))
        return
    if not tokenizer.chat_template:
        sys.exit(f"{model_args.model_name_or_path}: the tokenizer has no chat template to compare with")
    trained, tasks, findings, samples = Counter(), (set(), set()), [], []  # tasks: that are evaluated, that are trained on
    held_out = {(told["source"], told["trajectory"]) for _, _, provenance, _ in sets[to_train:] for told in provenance}
    for number, (name, path, provenance, built) in enumerate(sets):
        trains = number < to_train  # the others are for evaluation
        settings = (f"served as {', '.join(sorted(set(provenance['served_as'])))}; template {data_args.template}, mask_history "
                    f"{str(data_args.mask_history).lower()}, cutoff_len {data_args.cutoff_len}")  # fmt: skip
        if data_args.max_samples is not None:
            settings += f", max_samples {data_args.max_samples}"
        findings.append(found := Findings(name, trains, settings, array("q", [0]) * len(built), bytearray(len(built)), path))
        why = reasons_of(path)
        supervised, its_tasks = check_dataset(found, provenance, built, args.trajectories, tokenizer, data_args.cutoff_len, why, held_out)
        tasks[trains].update(its_tasks)
        if trains:
            trained.update(supervised)
        if found.counts["exact"] < len(built):
            problems.append(f"{name}: the model would not be trained on what it is served with")
        print_findings(found, data_args.max_samples)
        if args.report:
            samples += samples_to_show(found, provenance, built, max(1, SAMPLES_IN_PAGE // len(sets)))
    if repeated := sum(times > 1 for times in trained.values()):
        problems.append(f"{repeated} turns are trained more than once")
    if both := tasks[0] & tasks[1]:
        problems.append(f"{len(both)} tasks are both trained on and evaluated; hold them out by step 2 --val-ratio")
    if args.report:
        cost, said = cost_of(findings[:to_train], schedule, args.gpus, data_args.cutoff_len)
        checked = Checked(command, model_args.model_name_or_path, data_args.cutoff_len, cost, said)
        with whole_file(args.report) as part:
            part.write_text(report_page(checked, problems, findings, samples, tokenizer.decode, special), encoding="utf-8")
        print(f"report: {shown(args.report)}")
    for found in findings if args.plots else ():
        for name, png in plots(found, data_args.cutoff_len).items():
            with whole_file(args.plots / name) as part:
                part.write_bytes(png)
            print(f"plot: {shown(args.plots / name)}")
    sys.exit("FAILED: " + "\nFAILED: ".join(problems) if problems else None)


if __name__ == "__main__":
    main()
