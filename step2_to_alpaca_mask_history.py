"""Step 2: plain messages -> prefix samples in alpaca format, for LlamaFactory's `mask_history`.

    python step2_to_alpaca_mask_history.py [INPUT] [OUTPUT] [--history-thinking drop|template] [--no-thinking]

INPUT   what step 1 wrote: "messages" of plain text, and "served".
OUTPUT  a .parquet, .jsonl or .json file: one sample per turn of each trajectory, in shuffled order:
        {"instruction": "…", "input": "", "output": "<target of the turn>", "system": "…", "history": [["…", "…"], …],
         "source": "data/x.jsonl", "trajectory": 17, "turns": [4], "served_as": "drop" | "template" | "no-thinking"}
        A preview of the first samples is written beside it, and dataset_info.json gets an entry for it.

--merge-turns lets a sample supervise several turns, where the served prompt of each begins with the one before and its
target; "history" then holds the turns before the last one.

The one idea: a sample spells out the served prompt of its turn, as it is when the model generates that turn, and
supervises the target alone. Text that has no place in LlamaFactory's user/assistant pairs is written out in a user (or
system) text with its role blocks, where LlamaFactory's tokenizer turns it into the same tokens.
"""

import argparse
import io
import json
import os
import pickle
import random
import re
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from trajectories import (
    BLOCK_END,
    BLOCK_START,
    ROOT,
    SAMPLE,
    Rejects,
    TrajectoryError,
    row_writer,
    positive_count,
    shown,
    still_there,
    whole_file,
)

DEFAULT_INPUT = SAMPLE.with_name(SAMPLE.stem + "_apply_qwen3_template.jsonl")
DEFAULT_OUTPUT = ROOT / "data" / "alpaca_mask_history_envscaler_sft_traj_9k.parquet"
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
BUCKETS = 256  # of the shuffle; one of them is in memory when samples are written
MEMORY = 1 << 27  # bytes of samples held in memory before they go to disk
DATE_LIKE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}([T ].*)?\s*", re.DOTALL)


# ---------------------------------------------------------------- pure functions


def to_samples(row: dict, served_as: str = "drop", merge_turns: bool = False) -> tuple[list[dict], list[str]]:
    """The samples of one trajectory, and the reasons for which its other turns are left out.

    Args:
        row: one row of step 1.
        served_as: "drop" (the history has no reasoning), "template" (it has what the chat template keeps) or
            "no-thinking" (no reasoning in the targets either; the served prompt ends with an empty think block).
        merge_turns: a sample goes on, supervising turn after turn, while the served prompt of the next turn begins with
            the text so far. Its history then holds supervised turns only. Else each turn has a sample of its own.
    Returns (samples, reasons): the turns of the samples and the reasons add up to the turns of the trajectory.
    Raises TrajectoryError where the row is not one of step 1.
    """
    messages, served = _step1_columns(row)
    given = "" if served_as == "no-thinking" else served["given"]
    samples, reasons, spans = [], [], []  # spans: the messages that the last sample supervises
    for turn, prompt, changed_from in served_prompts(messages, served, served_as):
        goes_on = merge_turns and spans and _begins_with(prompt, spans[-1], changed_from, given)
        spans = [*(spans if goes_on else []), turn["message"]]
        try:
            if turn["left_out"]:
                raise _Inexpressible(turn["left_out"])
            target = _target(messages[turn["message"]]["content"], turn["answer"], served_as, given)
            pairs = spans[:-1] if merge_turns else history_pairs(prompt, served_as, given)
            columns = {**alpaca_prompt(prompt, pairs, given), "output": target}
        except _Inexpressible as reason:
            reasons.append(str(reason))
            spans = []
            continue
        turns = [*samples.pop()["turns"], turn["turn"]] if goes_on else [turn["turn"]]
        samples.append({**columns, "source": served["source"], "trajectory": served["trajectory"], "turns": turns,
                        "served_as": served_as})  # fmt: skip
    return samples, reasons


def served_prompts(messages: list[dict], served: dict, served_as: str):
    """Yield (turn, prompt, changed_from) for each turn of a row of step 1.

    prompt: [(role, text)], the blocks of its served prompt; the first `changed_from` of them are those of the served
    prompt of the turn before, and its target.
    """
    contents = [message["content"] for message in messages]
    edits = served["template" if served_as == "template" else "drop"]
    for turn in served["turns"]:
        changed = [edit for edit in edits if edit["turn"] == turn["turn"]]
        for edit in changed:
            contents[edit["message"]] = edit["content"]
        prompt = [(message["role"], text) for message, text in zip(messages[: turn["message"]], contents)]
        yield turn, prompt, min((edit["message"] for edit in changed), default=len(prompt))


def history_pairs(prompt: list[tuple[str, str]], served_as: str, given: str) -> set[int]:
    """The blocks of a served prompt that can stand as assistant texts in LlamaFactory's history.

    LlamaFactory (0.9.5, data/template.py) tokenizes each text by itself, so one that opens with whitespace would lose
    the token that this whitespace forms with the newline before it. Its `qwen3` template, which is for the histories
    without reasoning, removes think blocks from assistant texts.
    """
    return {
        position
        for position, ((role, text), (next_role, _)) in enumerate(zip(prompt, prompt[1:]))
        if (role, next_role) == ("assistant", "user")
        and text.startswith(given)
        and not text[len(given) :][:1].isspace()
        and (served_as == "template" or "<think>" not in text)
    }


def alpaca_prompt(prompt: list[tuple[str, str]], pairs, given: str = "") -> dict:
    """Spell out a served prompt in LlamaFactory's alpaca columns.

    LlamaFactory (0.9.5, data/template.py) begins with a non-empty system text or a user text, and goes on in pairs of
    a user and an assistant text. What does not fit is written out, role marks and all. Its user format replaces
    `{{idx}}`, so a prompt with such a text is beyond it.

    Args:
        prompt: [(role, text)], the blocks of the served prompt.
        pairs: positions of the assistant blocks that close a pair; each is followed by a user block.
        given: what the generation prompt puts before each assistant text of a pair.
    Returns {"instruction", "input", "system", "history"}. Raises _Inexpressible with the reason.
    """
    first_user = next((position for position, (role, _) in enumerate(prompt) if role == "user"), None)
    if first_user is None:
        raise _Inexpressible("no user block comes before it, and LlamaFactory's alpaca format needs one")
    opening = prompt[:first_user]
    if opening and opening[0][0] != "system":
        raise _Inexpressible(f"its prompt opens with a block of {opening[0][0]}, which LlamaFactory cannot write")
    if opening and not opening[0][1]:
        raise _Inexpressible("its system prompt is empty, and LlamaFactory writes no block for that")
    system = "".join(text if position == 0 else _written_out(role, text) for position, (role, text) in enumerate(opening))
    history, user = [], prompt[first_user][1]
    for position, (role, text) in enumerate(prompt[first_user + 1 :], first_user + 1):
        if position in pairs:
            history.append([user, text.removeprefix(given)])
        elif position - 1 in pairs and position - 1 > first_user:
            user = text
        else:
            user += _written_out(role, text)
    if any("{{idx}}" in text for text in (user, *(pair[0] for pair in history))):
        raise _Inexpressible("its prompt holds {{idx}}, which LlamaFactory replaces by a number")
    return {"instruction": user, "input": "", "system": system, "history": history}


class _Inexpressible(Exception):
    """Why a turn cannot become a sample."""


def _written_out(role: str, text: str) -> str:
    return f"{BLOCK_END}\n{BLOCK_START}{role}\n{text}"


def _begins_with(prompt: list[tuple[str, str]], last: int, changed_from: int, given: str) -> bool:
    """Whether the prompt begins with the one before and its target, block `last`, in tokens as well as in text."""
    follows = [role for role, _ in prompt[last + 1 : last + 2]]
    if not prompt[last][1].startswith(given):
        return False
    return changed_from > last and follows == ["user"] and not prompt[last][1][len(given) :][:1].isspace()


def _target(text: str, answer_start: int | None, served_as: str, given: str) -> str:
    if served_as != "no-thinking":
        return text.removeprefix(given)
    answer = None if answer_start is None else text[answer_start:]
    if answer is None or "<think>" in answer or "</think>" in answer or answer.startswith("\n"):
        raise _Inexpressible("its answer holds a think tag or opens with a newline, which LlamaFactory removes")
    return answer


def _step1_columns(row: dict) -> tuple[list[dict], dict]:
    """The decoded columns `messages` and `served`, which a Parquet file of step 1 holds as JSON strings."""
    try:
        messages, served = (
            json.loads(value) if isinstance(value, str) else value for value in (row["messages"], row["served"])
        )
        texts = [text for message in messages for text in (message["role"], message["content"])]
        texts += [served["given"], served["source"], *(edit["content"] for edit in served["drop"] + served["template"])]
        places = [turn["message"] for turn in served["turns"] + served["drop"] + served["template"]]
        numbers = [served["trajectory"], *places, *(turn["turn"] for turn in served["turns"])]
        whole = [kind is str for kind in map(type, texts)] + [kind is int for kind in map(type, numbers)]
        whole += [0 <= place < len(messages) for place in places]
        whole += ["answer" in turn and "left_out" in turn for turn in served["turns"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        whole = [False]
    if not all(whole):
        raise TrajectoryError("the row is not one of step 1; run step1_apply_tool_template.py first")
    return messages, served


# ---------------------------------------------------------------- around them


def sample_schema():
    import pyarrow as pa

    text = pa.string()
    return pa.schema([("instruction", text), ("input", text), ("output", text), ("system", text),
                      ("history", pa.list_(pa.list_(text))), ("source", text), ("trajectory", pa.int64()),
                      ("turns", pa.list_(pa.int64())), ("served_as", text)])  # fmt: skip


def shuffled(samples, seed: int, folder: Path):
    """Yield the samples in an order drawn uniformly, with a share of 1 / BUCKETS of them in memory.

    Each draws a key; the key's bucket takes it, in memory first and on disk when there are many; bucket after bucket is
    sorted by key.
    """
    draw, number, held = random.Random(seed).random, 0, 0
    buckets = [[] for _ in range(BUCKETS)]
    with tempfile.TemporaryDirectory(prefix=".shuffle.", dir=folder) as spill:
        files = [Path(spill, str(bucket)) for bucket in range(BUCKETS)]
        for number, sample in enumerate(samples, 1):
            key = draw()
            pickled = pickle.dumps((key, number, sample))
            buckets[int(key * BUCKETS)].append(pickled)
            held += len(pickled)
            if held > MEMORY:
                for bucket, path in zip(buckets, files):
                    with path.open("ab") as file:
                        file.writelines(bucket)
                    bucket.clear()
                held = 0
        with tqdm(total=number, desc="write", unit=" samples") as bar:
            for bucket, path in zip(buckets, files):
                together = io.BytesIO((path.read_bytes() if path.exists() else b"") + b"".join(bucket))
                keyed = []
                while together.tell() < len(together.getbuffer()):
                    keyed.append(pickle.load(together))
                bucket.clear()
                for _, _, sample in sorted(keyed, key=lambda entry: entry[:2]):
                    yield sample
                    bar.update()


def for_json(samples):
    """Yield the samples in an order that the JSON reader of datasets (4.0.0) types rightly: one with a history first.

    It takes the types of a column from the first block of the file. Where all histories in it are empty, it takes them
    for lists of null and stops at the first other one; where all texts look like dates, it makes them timestamps.
    """
    waiting, only_dates = [], dict.fromkeys(("instruction", "output", "system", "history"), True)
    for sample in samples:
        texts = {**sample, "history": [text for pair in sample["history"] for text in pair]}
        for column in [column for column, so_far in only_dates.items() if so_far]:
            values = texts[column] if column == "history" else [texts[column]]
            only_dates[column] = all(map(DATE_LIKE.fullmatch, values))
        if waiting is not None and sample["history"]:
            yield sample
            yield from waiting
            waiting = None
        elif waiting is not None:
            waiting.append(sample)
        else:
            yield sample
    only_dates["history"] = only_dates["history"] and waiting is None
    yield from waiting or []
    for column in [column for column, so_far in only_dates.items() if so_far]:
        sys.exit(f"every {column} looks like a date, which JSON readers turn into a timestamp; write .parquet instead")


def training_settings(served_as: str, given: str, all_think: bool, merge_turns: bool) -> list[str]:
    """What to override in qwen3_full_sft.yaml, so that LlamaFactory trains on the samples as they are.

    Args:
        given: see step 1.
        all_think: every target of step 1 opens with a think block.
    """
    if served_as == "no-thinking" and all_think:
        settings = ["enable_thinking=false"]
    elif served_as != "no-thinking" and given:  # LlamaFactory then reads the generation prompt from the model
        settings = ["template=null"]
    elif served_as == "template" or not all_think:
        settings = ["template=qwen3_nothink"]
    else:
        settings = []
    return settings + ["mask_history=false"] * merge_turns


def characters(sample: dict) -> int:
    """The length of a sample's text, without its role marks."""
    texts = (sample["system"], *(text for pair in sample["history"] for text in pair), sample["instruction"], sample["output"])
    return sum(map(len, texts))


def read_dataset_info(path: Path) -> dict:
    """The entries of LlamaFactory's dataset_info.json; none where there is no file yet."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(entries, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: not a dataset_info.json ({error}); mend it, or name another folder by --dataset-dir")
    return entries


def register(dataset_info: Path, name: str, output: Path) -> None:
    """Add the output to dataset_info.json, or replace its entry; all others stay."""
    file_name = Path(os.path.relpath(output.absolute(), dataset_info.absolute().parent)).as_posix()
    entry = {"file_name": file_name, "formatting": "alpaca", "columns": COLUMNS}
    with whole_file(dataset_info) as part:
        entries = {**read_dataset_info(dataset_info), name: entry}
        part.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", default=shown(DEFAULT_INPUT), metavar="INPUT")
    parser.add_argument("output", nargs="?", type=Path, default=Path(shown(DEFAULT_OUTPUT)), metavar="OUTPUT",
                        help=f"default: {shown(DEFAULT_OUTPUT)}")  # fmt: skip
    parser.add_argument("--history-thinking", choices=("drop", "template"), default="drop",
                        help="the reasoning of earlier turns: dropped, as for an agent that does not send it back "
                             "(default), or kept where the chat template keeps it")  # fmt: skip
    parser.add_argument("--no-thinking", action="store_true", help="targets without reasoning, for a non-thinking model")
    parser.add_argument("--merge-turns", action="store_true",
                        help="train each token once: one sample for all turns whose served prompts begin with one another "
                             "(with --history-thinking template)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle (default: 42)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of trajectories and turns")
    parser.add_argument("--preview", type=positive_count, default=100, metavar="N", help="samples in the preview (default: 100)")
    parser.add_argument("--dataset-name", help="the name in dataset_info.json (default: OUTPUT's name)")
    parser.add_argument("--dataset-dir", type=Path, default=ROOT, metavar="FOLDER",
                        help="where dataset_info.json is, LlamaFactory's dataset_dir (default: here)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of setting it aside")
    args = parser.parse_args()
    if args.no_thinking and args.history_thinking == "template":
        parser.error("--no-thinking leaves no reasoning for --history-thinking template to keep; drop one of the two")
    if args.merge_turns and args.history_thinking != "template":
        parser.error("--merge-turns needs --history-thinking template: where the history drops the reasoning of a turn, "
                     "no later served prompt begins with that turn as the model wrote it, so no sample can hold both")  # fmt: skip
    served_as = "no-thinking" if args.no_thinking else args.history_thinking
    name = args.dataset_name or args.output.stem
    if "," in name:
        parser.error(f"{name}: LlamaFactory separates data sets by commas; name it without by --dataset-name")
    if not Path(args.input).is_file():
        sys.exit(f"{args.input}: no such file; run step1_apply_tool_template.py first")
    dataset_info = args.dataset_dir / "dataset_info.json"
    if args.output.absolute() == dataset_info.absolute():
        parser.error(f"{args.output} registers the data sets; name another output")
    read_dataset_info(dataset_info)  # before the work, so that a broken one costs nothing

    rejects = Rejects(args.input, args.output, args.strict)
    totals, left_out, given, preview = Counter(), Counter(), "", []

    def read_samples():
        nonlocal given
        for row, samples, reasons in rejects.convert(
            lambda row, _: (row, *to_samples(row, served_as, args.merge_turns)), "step 2"
        ):
            left_out.update(reasons)
            messages, served = _step1_columns(row)
            given = given or served["given"]
            targets = [messages[turn["message"]]["content"] for turn in served["turns"] if not turn["left_out"]]
            totals["without thinking"] += sum(not target.startswith("<think>") for target in targets)
            totals.update(trajectories=1, samples=len(samples), supervised=sum(len(sample["turns"]) for sample in samples))
            if args.merge_turns:
                totals["unmerged"] += sum(map(characters, to_samples(row, served_as)[0]))
                totals["merged"] += sum(map(characters, samples))
            yield from samples

    replaced = ", in place of an earlier one" if args.output.exists() else ""
    with row_writer(args.output, sample_schema()) as write:
        samples = read_samples() if args.no_shuffle else shuffled(read_samples(), args.seed, args.output.parent)
        for sample in samples if args.output.suffix == ".parquet" else for_json(samples):
            write(sample)
            if len(preview) < args.preview:
                preview.append(sample)
        rejects.save()
        if not totals["samples"]:
            sys.exit(f"{args.input}: no sample is left; {shown(args.output)} is not written{still_there(args.output)}")
    preview_path = args.output.with_name(args.output.stem + "_preview.json")
    with whole_file(preview_path) as part:
        part.write_text(json.dumps(preview, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    register(dataset_info, name, args.output)

    turns = totals["supervised"] + left_out.total()
    print(f"{totals['trajectories']} trajectories, {turns} turns: {totals['samples']} samples")
    if args.merge_turns:
        print(f"{totals['supervised']} turns merged into {totals['samples']} samples: "
              f"{totals['unmerged'] / totals['merged']:.1f} times less text to train on")  # fmt: skip
    for reason, count in left_out.items():
        print(f"{count} turns left out: {reason}")
    print(f"{shown(args.output)}{replaced}, registered as {name} in {shown(dataset_info)}; the first samples: {shown(preview_path)}")
    settings = training_settings(served_as, given, not totals["without thinking"], args.merge_turns)
    if name != DEFAULT_OUTPUT.stem:
        settings = [f"dataset={name}", *settings]
    if not args.dataset_dir.samefile(ROOT):
        settings = [f"dataset_dir={args.dataset_dir}", *settings]
    print(shlex.join(["next:", "python", "check_training_tokens.py", "qwen3_full_sft.yaml", *settings]))


if __name__ == "__main__":
    main()
