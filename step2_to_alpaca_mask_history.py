"""Step 2: plain messages -> prefix samples in alpaca format, for LlamaFactory's `mask_history`.

    python step2_to_alpaca_mask_history.py [INPUT] [OUTPUT] [--history-thinking drop|template] [--no-thinking]

INPUT   what step 1 wrote: "messages" of plain text, and "served".
OUTPUT  a .parquet, .jsonl or .json file, or with --num-shards a folder: one sample per turn, in shuffled order:
        {"instruction": "…", "input": "", "output": "<target of the turn>", "system": "…", "history": [["…", "…"], …],
         "source": "data/x.jsonl", "trajectory": 17, "turns": [4], "served_as": "drop" | "template" | "no-thinking"}
        Beside it go a preview of the first samples, those that are held out (--val-ratio), a list of the turns that are
        left out and of the rows set aside. dataset_info.json gets an entry for it.

--merge-turns lets a sample supervise several turns, where the served prompt of each begins with the one before and its
target; "history" then holds the turns before the last one.

The one idea: a sample spells out the served prompt of its turn, as it is when the model generates that turn, and
supervises the target alone. Text that has no place in LlamaFactory's user/assistant pairs is written out in a user (or
system) text with its role blocks, where LlamaFactory's tokenizer turns it into the same tokens.
"""

import argparse
import array
import contextlib
import functools
import hashlib
import itertools
import json
import mmap
import os
import random
import re
import shlex
import struct
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import orjson
from tqdm import tqdm

from trajectories import (
    BLOCK_END,
    BLOCK_START,
    FORMATS,
    LEFT_OUT_TURNS,
    ROOT,
    SAMPLE,
    Place,
    Rejects,
    TrajectoryError,
    check_output,
    exit_on_sigterm,
    in_order,
    load_text,
    positive_count,
    refuse_input,
    row_writer,
    shown,
    still_there,
    whole_file,
    working_file,
    write_at,
)

DEFAULT_INPUT = SAMPLE.with_name(SAMPLE.stem + "_apply_qwen3_template.jsonl")
DEFAULT_OUTPUT = ROOT / "data" / "alpaca_mask_history_envscaler_sft_traj_9k.parquet"
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
TEXTS = ("instruction", "input", "output", "source", "served_as")  # the columns of text, but for system
FEW_TEXTS = ["input", "system", "source", "served_as"]  # of which many samples have the same
ROW_GROUP, GATHERED_BYTES = 2048, 1 << 24  # the most samples, and about the most text, in memory when samples are written
MAPPED_BYTES = 1 << 28  # of packed samples, that may stay mapped into memory; where there are more,
FEW = 512  # samples are gathered at a time: each may map 64 KB around it in every file
FEW_ROWS = 64  # samples that are Python objects at a time
PREVIEW = "_preview.json"
OTHER_LENGTH = "their trajectory has fewer turns than --min-turns or more than --max-turns"
NO_REASONING = "they have no reasoning"
TOO_LONG = "their sample does not fit in --cutoff-len"
BY_TASK = "task (rows with the same task_info.task_id fall on one side)"
BY_CONTENT = "content (rows with the same messages fall on one side; they name no task_info.task_id)"
DATE_LIKE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}([T ].*)?\s*", re.DOTALL)


# ---------------------------------------------------------------- pure functions


def to_samples(messages: list, served: dict, served_as: str = "drop", merge_turns: bool = False, refuse=None) -> tuple[list, list]:
    """The samples of one trajectory, and the reasons for which its other turns are left out.

    Args:
        messages, served: the columns of step 1, see `step1_columns`.
        served_as: "drop" (the history has no reasoning), "template" (it has what the chat template keeps) or
            "no-thinking" (no reasoning in the targets either; the served prompt ends with an empty think block).
        merge_turns: a sample goes on, supervising turn after turn, while the served prompt of the next turn begins with
            the text so far. Its history then holds supervised turns only. Else each turn has a sample of its own.
        refuse: refuse(turn, columns) -> a reason to leave a turn of `served` out, or None, where `columns` are the texts
            that the sample would have with it.
    Returns (samples, reasons): the turns of the samples and the reasons add up to the turns of the trajectory.
    """
    given = "" if served_as == "no-thinking" else served["given"]
    roles = [message["role"] for message in messages]
    written = _AlpacaPrompt(given)
    samples, reasons, spans = [], [], []  # spans: the messages that the last sample supervises
    for turn, contents, changed_from in served_prompts(messages, served, served_as):
        end = turn["message"]
        goes_on = merge_turns and spans and _begins_with(roles, contents, spans[-1], end, changed_from, given)
        spans = [*(spans if goes_on else []), end]
        written.cut(0 if merge_turns and not goes_on else changed_from)
        for j in range(len(written), end):
            pairs = j in spans if merge_turns else _can_close_pair(roles[j], contents[j], roles[j + 1], served_as, given)
            written.add(roles[j], contents[j], pairs)
        try:
            if turn["left_out"]:
                raise _Inexpressible(turn["left_out"])
            target = _target(messages[end]["content"], turn["answer"], served_as, given)
            columns = {**written.columns(), "output": target}
            if refuse and (reason := refuse(turn, columns)):
                raise _Inexpressible(reason)
        except _Inexpressible as reason:
            reasons.append(str(reason))
            spans = []
            continue
        turns = [*samples.pop()["turns"], turn["turn"]] if goes_on else [turn["turn"]]
        samples.append({**columns, "source": served["source"], "trajectory": served["trajectory"], "turns": turns,
                        "served_as": served_as})  # fmt: skip
    return samples, reasons


def served_prompts(messages: list[dict], served: dict, served_as: str):
    """Yield (turn, contents, changed_from) for each turn of a row of step 1.

    contents: the texts of all messages as its served prompt has them, which is those before the turn. The first
    `changed_from` of them are as in the served prompt of the turn before and its target. The list goes on changing.
    """
    contents, edits = [message["content"] for message in messages], defaultdict(list)
    for edit in served["template" if served_as == "template" else "drop"]:
        edits[edit["turn"]].append(edit)
    for turn in served["turns"]:
        for edit in edits[turn["turn"]]:
            contents[edit["message"]] = edit["content"]
        yield turn, contents, min((edit["message"] for edit in edits[turn["turn"]]), default=turn["message"])


def _can_close_pair(role: str, text: str, next_role: str, served_as: str, given: str) -> bool:
    """Whether a block of a served prompt can stand as an assistant text in LlamaFactory's history.

    LlamaFactory (0.9.5, data/template.py) tokenizes each text by itself, so one that opens with whitespace would lose
    the token that this whitespace forms with the newline before it. Its `qwen3` template, which is for the histories
    without reasoning, removes think blocks from assistant texts.
    """
    if (role, next_role) != ("assistant", "user") or not text.startswith(given) or text[len(given) :][:1].isspace():
        return False
    return served_as == "template" or "<think>" not in text


class _AlpacaPrompt:
    """A served prompt in LlamaFactory's alpaca columns, block by block: a later prompt goes on where it is like the last.

    LlamaFactory (0.9.5, data/template.py) begins with a non-empty system text or a user text, and goes on in pairs of a
    user and an assistant text. What does not fit is written out, role marks and all. Its user format replaces
    `{{idx}}`, so a prompt with such a text is beyond it. `given` is what the generation prompt puts before each
    assistant text of a pair.
    """

    def __init__(self, given: str):
        self.given, self.history = given, []
        self.states = [(0, "", None, False, None)]  # per block: pairs so far, system, user, pair just closed, problem

    def __len__(self) -> int:
        return len(self.states) - 1

    def cut(self, blocks: int) -> None:
        """Keep the first blocks."""
        del self.states[blocks + 1 :]
        del self.history[self.states[-1][0] :]

    def add(self, role: str, text: str, closes_pair: bool) -> None:
        """A block after the others; closes_pair only for an assistant block that a user block follows."""
        pairs, system, user, closed, problem = self.states[-1]
        if user is None and role != "user":
            if len(self):
                system += _written_out(role, text)
            elif role != "system":
                problem = f"its prompt opens with a block of {role}, which LlamaFactory cannot write"
            else:
                system, problem = text, None if text else "its system prompt is empty, and LlamaFactory writes no block for that"
        elif closes_pair and user is not None:
            self.history.append([user, text.removeprefix(self.given)])
            pairs += 1
        else:
            user = text if user is None or closed else user + _written_out(role, text)
        if user is not None and "{{idx}}" in text:
            problem = problem or "its prompt holds {{idx}}, which LlamaFactory replaces by a number"
        self.states.append((pairs, system, user, pairs > self.states[-1][0], problem))

    def columns(self) -> dict:
        """{"instruction", "input", "system", "history"}; raises _Inexpressible with the reason."""
        _, system, user, _, problem = self.states[-1]
        if user is None or problem:
            raise _Inexpressible(problem if user is not None else "no user block comes before it, and LlamaFactory's alpaca format needs one")  # fmt: skip
        return {"instruction": user, "input": "", "system": system, "history": self.history[:]}


class _Inexpressible(Exception):
    """Why a turn cannot become a sample."""


def _written_out(role: str, text: str) -> str:
    return f"{BLOCK_END}\n{BLOCK_START}{role}\n{text}"


def _begins_with(roles: list, contents: list, last: int, end: int, changed_from: int, given: str) -> bool:
    """Whether the prompt begins with the one before and its target, block `last`, in tokens as well as in text."""
    if changed_from <= last or end <= last + 1 or roles[last + 1] != "user" or not contents[last].startswith(given):
        return False
    return not contents[last][len(given) :][:1].isspace()


def _target(text: str, answer_start: int | None, served_as: str, given: str) -> str:
    if served_as != "no-thinking":
        if not text.startswith(given):
            raise _Inexpressible("its target does not begin as the generation prompt does, so the model cannot write it")
        return text.removeprefix(given)
    answer = None if answer_start is None else text[answer_start:]
    if answer is None or "<think>" in answer or "</think>" in answer or answer.startswith("\n"):
        raise _Inexpressible("its answer holds a think tag or opens with a newline, which LlamaFactory removes")
    return answer


def step1_columns(row: dict) -> tuple[list[dict], dict]:
    """The columns `messages` and `served`, decoded: a Parquet file of step 1 holds JSON strings. Raises TrajectoryError."""
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


# Nearly all text of a sample is that of the samples before it too. So the samples of a trajectory are packed: each text
# once, and for each sample the numbers of its texts. Those of all trajectories go to three working files, straight from the
# processes that make them. In memory is where each sample starts, and this is what is shuffled.


class PackedFiles(NamedTuple):
    """The packed samples of many trajectories; descriptors, so that forked processes add to the same ones.

    texts: all texts in UTF-8, one after the other.
    ends: int64, 0 and where each text ends.
    entries: int64, for each sample: number of its trajectory's first text; number, checksum and bytes of the system text;
        bytes of the others; trajectory; how many turns; how many texts; its turns; its texts, counted from the first, those
        of the columns TEXTS before those of the history.
    taken, given: the ends of a pipe that holds how many texts, bytes of them and int64 of entries there are so far. Who adds
        some takes this out and gives back what will be there then.
    """

    texts: int
    ends: int
    entries: int
    taken: int
    given: int

    @classmethod
    def in_folder_of(cls, path: Path, stack: contextlib.ExitStack) -> "PackedFiles":
        files = [stack.enter_context(working_file(path)).fileno() for _ in range(3)]
        pipe = os.pipe()
        for end in pipe:
            stack.callback(os.close, end)
        self = cls(*files, *pipe)
        os.write(self.given, bytes(SO_FAR.size))
        SYSTEMS.clear()
        return self

    def add_texts(self, texts: list[bytes], n_entries: int = 0) -> tuple[int, int]:
        """(number of the first of these texts, place for so many int64 in `entries`)"""
        lengths = [*map(len, texts)]
        total = sum(lengths)
        number, size, place = SO_FAR.unpack(os.read(self.taken, SO_FAR.size))
        os.write(self.given, SO_FAR.pack(number + len(texts), size + total, place + n_entries))
        ends = array.array("q", itertools.accumulate(lengths, initial=size))
        write_at(self.ends, ends, ends.itemsize * number)
        write_at(self.texts, b"".join(texts), size)
        return number, place

    def add(self, samples: list[dict]) -> array.array:
        """Add the samples of a trajectory; where in `entries` each of them starts."""
        numbers = defaultdict()
        numbers.default_factory = numbers.__len__
        of_samples = [
            [*map(numbers.__getitem__, itertools.chain(map(sample.__getitem__, TEXTS), *sample["history"]))] for sample in samples
        ]
        texts = [text.encode() for text in numbers]
        lengths = [*map(len, texts)]
        systems = {text: self._system(text.encode()) for text in {sample["system"] for sample in samples}}
        n_entries = [ENTRY + len(sample["turns"]) + len(of_sample) for sample, of_sample in zip(samples, of_samples)]
        number, place = self.add_texts(texts, sum(n_entries))
        entries = array.array("q")
        for sample, of_sample in zip(samples, of_samples):
            size, turns = sum(map(lengths.__getitem__, of_sample)), sample["turns"]
            head = number, *systems[sample["system"]], size, sample["trajectory"], len(turns), len(of_sample)
            entries.extend((*head, *turns, *of_sample))
        write_at(self.entries, entries, entries.itemsize * place)
        return array.array("q", [*itertools.accumulate(n_entries, initial=place)][:-1])

    def _system(self, text: bytes) -> tuple[int, int, int]:
        """(number, checksum, bytes) of a system text, which trajectories with the same tools share."""
        if text not in SYSTEMS:
            if SYSTEMS.size > GATHERED_BYTES:
                SYSTEMS.clear()
            number, _ = self.add_texts([text])
            SYSTEMS[text] = number, zlib.crc32(text), len(text)
            SYSTEMS.size += len(text) + SYSTEM_OVERHEAD
        return SYSTEMS[text]


class _Systems(dict):
    """What `PackedFiles` knows of the system texts that this process added last; about how many bytes that takes."""

    size = 0

    def clear(self) -> None:
        super().clear()
        self.size = 0


SO_FAR, ENTRY = struct.Struct("3q"), 8
SYSTEMS, SYSTEM_OVERHEAD = _Systems(), 300


def gather(files: PackedFiles, starts):
    """Yield samples of packed files as pyarrow tables of `sample_schema`, but that `system` is a dictionary array.

    Args:
        starts: where the entries of the samples start, see `PackedFiles.add`.
    """
    import numpy as np
    import pyarrow as pa

    texts, ends, entries = maps = [mmap.mmap(file, 0, access=mmap.ACCESS_READ) for file in files[:3]]
    every = pa.LargeStringArray.from_buffers(len(ends) // 8 - 1, pa.py_buffer(ends), pa.py_buffer(texts))
    entries = np.frombuffer(entries, np.int64)
    large = sum(map(len, maps)) > MAPPED_BYTES
    for block in range(0, len(starts), ROW_GROUP):
        at = np.asarray(starts[block : block + ROW_GROUP])
        for some in np.split(at, _full(*(entries[at + field].tolist() for field in (2, 3, 4)))):
            tables = []
            for few in np.split(some, range(FEW, len(some), FEW) if large else []):
                tables.append(_table(every, entries, few))
                for file in maps if large else ():
                    file.madvise(mmap.MADV_DONTNEED)  # else all of it would come to count as memory of this process
            yield pa.concat_tables(tables).unify_dictionaries().combine_chunks()  # Parquet's pages tell where chunks end


def _full(systems: list[int], bytes_of_systems: list[int], bytes_of_others: list[int]) -> list[int]:
    """Before which samples a table is full. A system text that several of them have is in it once."""
    full, total, seen = [], 0, set()
    for at, (system, of_system, of_others) in enumerate(zip(systems, bytes_of_systems, bytes_of_others)):
        size = of_others + (0 if system in seen else of_system)
        if total and total + size > GATHERED_BYTES:
            full.append(at)
            total, size, seen = 0, of_others + of_system, set()
        total += size
        seen.add(system)
    return full


def _table(texts, entries, at):
    import numpy as np
    import pyarrow as pa

    def integers(values, kind=np.int64):  # pa.array would import pandas
        values = np.asarray(values, kind)
        return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(values), [None, pa.py_buffer(values)])

    def strings(numbers):
        return texts.take(integers(numbers)).cast(pa.string())

    def lists(lengths, values):
        return pa.ListArray.from_arrays(integers(np.concatenate([[0], np.cumsum(lengths)]), np.int32), values)

    def runs(starts, lengths):
        ends = np.cumsum(lengths)
        return entries[np.arange(ends[-1]) + np.repeat(starts + lengths - ends, lengths)]

    first_text, systems, _, _, _, trajectories, n_turns, n_texts = (entries[at + number] for number in range(ENTRY))
    first, n_history = at + ENTRY + n_turns, n_texts - len(TEXTS)
    columns = {name: strings(first_text + entries[first + number]) for number, name in enumerate(TEXTS)}
    history = strings(np.repeat(first_text, n_history) + runs(first + len(TEXTS), n_history))
    columns["history"] = lists(n_history // 2, lists(np.full(len(history) // 2, 2), history))
    few, first_at, of_sample = np.unique(systems, return_index=True, return_inverse=True)
    order = np.argsort(first_at)  # not that of their numbers, which each run and each process gives anew
    encoded = strings(few[order]).dictionary_encode()
    of_sample = encoded.indices.take(integers(np.argsort(order)[of_sample]))
    columns["system"] = pa.DictionaryArray.from_arrays(of_sample, encoded.dictionary)
    columns["trajectory"] = integers(trajectories)
    columns["turns"] = lists(n_turns, integers(runs(at + ENTRY, n_turns)))
    return pa.table({name: columns[name] for name in sample_schema().names})


def write_samples(output: Path, files: PackedFiles, starts, num_shards: int | None, num_proc: int) -> None:
    """Write samples of packed files, see `gather`, in the format that the output's name says."""
    import numpy  # noqa: F401  the processes of the shards inherit them
    import pyarrow.parquet  # noqa: F401

    with tqdm(total=len(starts), desc="write", unit=" samples") as bar:

        def tables():
            for table in gather(files, starts):
                yield table
                bar.update(len(table))

        if num_shards:
            with whole_file(output) as part:
                part.mkdir()
                bounds = [len(starts) * shard // num_shards for shard in range(num_shards + 1)]
                shards = (
                    (part / f"{shard:05}-of-{num_shards:05}", starts[start:end])
                    for shard, (start, end) in enumerate(itertools.pairwise(bounds))
                )
                with contextlib.closing(in_order(functools.partial(_write_shard, files=files), shards, num_proc, here=0)) as written:
                    for samples in written:
                        bar.update(samples)
                for shard in sorted(part.iterdir()):  # only now, so that no reader takes those of a run that was killed
                    shard.rename(shard.with_suffix(".parquet"))
        elif output.suffix == ".parquet":
            with whole_file(output) as part:
                write_parquet(part, tables())
        else:
            with row_writer(output) as write:
                batches = (batch for table in tables() for batch in table.to_batches(FEW_ROWS))
                for sample in for_json(sample for batch in batches for sample in batch.to_pylist()):
                    write(sample)


def name_of(output: Path) -> str:
    """The name of a file without its format, or of a folder."""
    return output.stem if output.suffix in FORMATS else output.name


def hold_out(starts, ends, held_out) -> tuple:
    """(samples to train on, samples for validation), where the samples of each trajectory end at `ends` in `starts`.

    `held_out` tells of each trajectory whether it is for validation.
    """
    split = array.array("q"), array.array("q")
    for (start, end), side in zip(itertools.pairwise(ends), held_out):
        split[side].extend(starts[start:end])
    return split


def group_of(row: dict) -> tuple[str, str]:
    """What is held out together with a row of step 1: (BY_TASK, the id of its task), or (BY_CONTENT, a digest) where it names none."""
    task = row.get("task_info")
    with contextlib.suppress(ValueError, RecursionError):
        task = json.loads(task) if isinstance(task, str) else task
    if isinstance(task, dict) and task.get("task_id") is not None:
        return BY_TASK, str(task["task_id"])
    messages = row["messages"] if isinstance(row["messages"], str) else orjson.dumps(row["messages"]).decode()
    return BY_CONTENT, hashlib.sha256(messages.encode()).hexdigest()


def is_held_out(group: tuple[str, str], ratio: float, seed: int) -> bool:
    """By a hash of the group alone, so that no other row moves it to the other side."""
    digest = hashlib.sha256("\n".join((str(seed), *group)).encode()).digest()
    return int.from_bytes(digest[:8]) < ratio * 2**64


def write_parquet(path: Path, tables) -> None:
    """Write what `gather` yields, without what would tell a reader that `system` is a dictionary array: it is text."""
    import pyarrow.parquet as pq

    table = next(tables, None)
    schema = sample_schema() if table is None else table.schema
    options = dict(compression="zstd", use_dictionary=FEW_TEXTS, store_schema=False)
    with pq.ParquetWriter(path, schema, **options) as writer, ThreadPoolExecutor(1) as thread:
        while table is not None:
            ahead = thread.submit(next, tables, None)  # gathered while this one is encoded
            writer.write_table(table)
            table = ahead.result()


def _write_shard(shard: tuple, files: PackedFiles) -> int:
    path, starts = shard
    write_parquet(path, gather(files, starts))
    return len(starts)


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


class Options(NamedTuple):
    """What `row_samples` makes of a trajectory; as in the command."""

    served_as: str = "drop"
    merge_turns: bool = False
    min_turns: int = 1
    max_turns: int | None = None
    require_reasoning: bool = False
    cutoff_len: int | None = None
    tokenizer: str | None = None


def row_samples(row: dict, options: Options) -> tuple[list, Counter, list, str]:
    """A row of step 1 -> (samples, counts, turns that are left out, `given`); raises TrajectoryError.

    A turn that is left out: {"source", "trajectory", "turn", "reason"}, and "tokens" where it is too long.
    """
    messages, served = step1_columns(row)
    turns, tokens_of = [turn["turn"] for turn in served["turns"]], {}
    given = "" if options.served_as == "no-thinking" else served["given"]
    count = token_counter(load_tokenizer(options.tokenizer), given) if options.cutoff_len else None

    def refuse(turn: dict, columns: dict) -> str | None:
        target = messages[turn["message"]]["content"]
        if options.require_reasoning and not reasoning_of(target):
            return NO_REASONING
        no_thinking = options.served_as == "no-thinking" and target.startswith("<think>")
        if options.cutoff_len and (tokens := count(columns, no_thinking)) >= options.cutoff_len:
            tokens_of[turn["turn"]] = {"tokens": tokens}
            return TOO_LONG
        return None

    if options.min_turns <= len(turns) <= (options.max_turns or len(turns)):
        samples, reasons = to_samples(messages, served, options.served_as, options.merge_turns, refuse)
    else:
        samples, reasons = [], [OTHER_LENGTH] * len(turns)
    once = {turn for sample in samples for turn in sample["turns"]}
    left_out = [
        {"source": served["source"], "trajectory": served["trajectory"], "turn": turn, "reason": reason, **tokens_of.get(turn, {})}
        for turn, reason in zip((turn for turn in turns if turn not in once), reasons)
    ]
    targets = [messages[turn["message"]]["content"] for turn in served["turns"] if not turn["left_out"]]
    notes = Counter(trajectories=1, turns=len(turns), samples=len(samples), supervised=len(once))
    notes["without samples"] = not samples
    notes["without thinking"] = sum(not target.startswith("<think>") for target in targets)
    if options.merge_turns:
        unmerged, _ = to_samples(messages, served, options.served_as)
        notes["unmerged"] = sum(characters(sample) for sample in unmerged if sample["turns"][0] in once)
        notes["merged"] = sum(map(characters, samples))
    return samples, notes, left_out, served["given"]


def reasoning_of(target: str) -> str:
    """What a target of step 1 thinks before it answers."""
    return target.removeprefix("<think>").partition("</think>")[0].strip() if target.startswith("<think>") else ""


def token_counter(tokenizer, given: str):
    """count(columns, no_thinking) -> tokens that LlamaFactory makes of a sample, for the samples of one trajectory.

    It tokenizes the system text, each user and each assistant text by itself (0.9.5, data/template.py), and control tokens
    split a text before it is tokenized. So each text is tokenized once, whatever number of samples it is in.
    """

    @functools.cache
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    @functools.cache
    def block(role: str, text: str) -> int:
        texts = re.split(r"<\|im_(?:start|end)\|>", f"{role}\n{text}")  # a text may spell out others
        return len(texts) + 1 + sum(map(tokens, filter(None, texts))) + tokens("\n")

    @functools.cache
    def answer(text: str) -> int:
        return tokens(f"assistant\n{given}") + tokens(text) + 2 + tokens("\n")

    def count(columns: dict, no_thinking: bool) -> int:
        total = block("system", columns["system"]) if columns["system"] else 0
        for user, assistant in [*columns["history"], [columns["instruction"], columns["output"]]]:
            total += block("user", user) + answer(assistant)
        return total + no_thinking * tokens("<think>\n\n</think>\n\n")

    return count


@functools.cache
def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is no tokenizer to be had
        raise SystemExit(f"{name}: no tokenizer to be had from this model ({error})") from None
    if any(len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1 for token in (BLOCK_START, BLOCK_END)):
        raise SystemExit(f"{name}: its tokenizer has no {BLOCK_START} and {BLOCK_END}, so it is none of a ChatML model")
    return tokenizer


def convert_row(row: dict, place: Place, options: Options, files: PackedFiles) -> tuple:
    """A row of step 1 -> (its group, where its samples are, see `PackedFiles.add`, and the rest of `row_samples`).

    Raises TrajectoryError.
    """
    samples, *rest = row_samples(row, options)
    try:
        return group_of(row), files.add(samples), *rest
    except (UnicodeEncodeError, OverflowError) as error:
        raise TrajectoryError(f"the row is not one of step 1 ({error}); run step1_apply_tool_template.py first") from None


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


def ratio(text: str) -> float:
    """A number from 0 up to, but not, 1, for argparse."""
    if not 0 <= float(text) < 1:
        raise ValueError
    return float(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What samples are made, and under which name LlamaFactory finds them."""
    parser.add_argument("--history-thinking", choices=("drop", "template"), default="drop",
                        help="the reasoning of earlier turns: dropped, as for an agent that does not send it back "
                             "(default), or kept where the chat template keeps it")  # fmt: skip
    parser.add_argument("--no-thinking", action="store_true", help="targets without reasoning, for a non-thinking model")
    parser.add_argument("--merge-turns", action="store_true",
                        help="train each token once: one sample for all turns whose served prompts begin with one another "
                             "(with --history-thinking template)")  # fmt: skip
    parser.add_argument("--min-turns", type=positive_count, default=1, metavar="N", help="leave shorter trajectories out")
    parser.add_argument("--max-turns", type=positive_count, metavar="N", help="leave longer trajectories out")
    parser.add_argument("--require-reasoning", action="store_true", help="leave turns without reasoning out")
    parser.add_argument("--cutoff-len", type=positive_count, metavar="TOKENS",
                        help="leave samples out that LlamaFactory would cut at this cutoff_len; they must be shorter, as it may cut "
                             "one of exactly this length")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="MODEL", help="counts the tokens: a model directory or a Hub model id")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle and the validation set (default: 42)")
    parser.add_argument("--dataset-name", help="the name in dataset_info.json (default: OUTPUT's name)")
    parser.add_argument("--dataset-dir", type=Path, default=ROOT, metavar="FOLDER",
                        help="where dataset_info.json is, LlamaFactory's dataset_dir (default: here)")  # fmt: skip


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop where the options exclude each other; set `options`, `served_as`, `dataset_info` and `dataset_name`."""
    if args.no_thinking and args.history_thinking == "template":
        parser.error("--no-thinking leaves no reasoning for --history-thinking template to keep; drop one of the two")
    if args.merge_turns and args.history_thinking != "template":
        parser.error("--merge-turns needs --history-thinking template: where the history drops the reasoning of a turn, "
                     "no later served prompt begins with that turn as the model wrote it, so no sample can hold both")  # fmt: skip
    if (args.cutoff_len is None) != (args.tokenizer is None):
        parser.error("--cutoff-len and --tokenizer go together: tokens are counted to see what would be cut")
    if args.max_turns and args.max_turns < args.min_turns:
        parser.error("--max-turns is below --min-turns, so nothing would be left")
    if args.tokenizer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
        load_tokenizer(args.tokenizer)  # before the work, so that a bad one costs nothing
    args.served_as = "no-thinking" if args.no_thinking else args.history_thinking
    args.options = Options(**{name: getattr(args, name) for name in Options._fields})
    args.dataset_info = args.dataset_dir / "dataset_info.json"
    args.dataset_name = args.dataset_name or name_of(args.output)
    if "," in args.dataset_name:
        parser.error(f"{args.dataset_name}: LlamaFactory separates data sets by commas; name it without by --dataset-name")
    read_dataset_info(args.dataset_info)  # before the work, so that a broken one costs nothing


def print_counts(totals: Counter, left_out: Counter, merge_turns: bool, rows_in: int) -> None:
    """Where all rows and turns went."""
    without, set_aside = totals["without samples"], rows_in - totals["trajectories"]
    print(f"{totals['trajectories']} trajectories, {totals['turns']} turns: {totals['samples']} samples")
    print(f"{rows_in} rows in = {totals['trajectories'] - without} rows out as samples + {set_aside} set aside"
          + f" + {without} of which all turns are left out" * bool(without))  # fmt: skip
    print(f"{totals['turns']} turns in = {totals['supervised']} turns in samples + {left_out.total()} left out")
    if merge_turns:
        print(f"{totals['supervised']} turns merged into {totals['samples']} samples: "
              f"{totals['unmerged'] / max(1, totals['merged']):.1f} times less text to train on")  # fmt: skip
    for reason, count in left_out.items():
        print(f"{count} turns left out: {reason}")


def print_next(args: argparse.Namespace, given: str, all_think: bool) -> None:
    settings = training_settings(args.served_as, given, all_think, args.merge_turns)
    if args.dataset_name != DEFAULT_OUTPUT.stem:
        settings = [f"dataset={args.dataset_name}", *settings]
    if args.cutoff_len:
        settings = [*settings, f"cutoff_len={args.cutoff_len}"]
    if getattr(args, "val_ratio", 0):
        settings = [f"eval_dataset={args.dataset_name}_val", *settings]
    if not args.dataset_dir.samefile(ROOT):
        settings = [f"dataset_dir={args.dataset_dir}", *settings]
    print(shlex.join(["next:", "python", "check_training_tokens.py", "qwen3_full_sft.yaml", *settings]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", default=shown(DEFAULT_INPUT), metavar="INPUT")
    parser.add_argument("output", nargs="?", type=Path, default=Path(shown(DEFAULT_OUTPUT)), metavar="OUTPUT",
                        help=f"default: {shown(DEFAULT_OUTPUT)}")  # fmt: skip
    add_options(parser)
    parser.add_argument("--val-ratio", type=ratio, default=0.0, metavar="R",
                        help="hold about this part of the tasks out, for validation: OUTPUT's name with _val")  # fmt: skip
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of trajectories and turns")
    parser.add_argument("--preview", type=positive_count, default=100, metavar="N", help="samples in the preview (default: 100)")
    parser.add_argument("--num-shards", type=positive_count, metavar="N", help="write OUTPUT as a folder of N Parquet files")
    parser.add_argument("--num-proc", type=positive_count, default=os.cpu_count(), metavar="N",
                        help="processes (default: one per core)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of setting it aside")
    args = parser.parse_intermixed_args()
    exit_on_sigterm()
    if args.num_shards and args.output == Path(shown(DEFAULT_OUTPUT)):
        args.output = args.output.with_suffix("")
    check_options(parser, args)
    if not Path(args.input).is_file():
        sys.exit(f"{args.input}: no such file; run step1_apply_tool_template.py first")
    if args.output.absolute() == args.dataset_info.absolute():
        parser.error(f"{args.output} registers the data sets; name another output")

    name = name_of(args.output)
    val_output = args.output.with_name(f"{name}_val{args.output.name.removeprefix(name)}")
    left_out_path = args.output.with_name(args.output.name + LEFT_OUT_TURNS)
    outputs = [args.output, val_output] if args.val_ratio else [args.output]
    for output in outputs:
        check_output(output, bool(args.num_shards))
    previews = (output.with_name(name_of(output) + PREVIEW) for output in outputs)
    refuse_input(args.input, *outputs, left_out_path, *previews, args.dataset_info)
    totals, left_out, given, write_left_out = Counter(), Counter(), "", None
    replaced = ", in place of an earlier one" if args.output.exists() else ""
    with (
        Rejects([args.input], args.output, args.strict) as rejects,
        contextlib.ExitStack() as stack,
    ):
        files = PackedFiles.in_folder_of(args.output, stack)
        convert = functools.partial(convert_row, options=args.options, files=files)
        starts, ends = array.array("q"), array.array("q", [0])  # the second: where those of each trajectory end in the first
        held_out, held_out_by = bytearray(), Counter()
        for group, of_row, notes, row_left_out, row_given in rejects.convert(convert, "step 2", args.num_proc, load_text):
            starts.extend(of_row)
            ends.append(len(starts))
            held_out.append(is_held_out(group, args.val_ratio, args.seed))
            held_out_by[group[0]] += held_out[-1] and len(of_row) > 0
            totals.update(notes)
            given = given or row_given
            for turn in row_left_out:
                write_left_out = write_left_out or stack.enter_context(row_writer(left_out_path))
                write_left_out(turn)
                left_out[turn["reason"]] += 1
        rejects.save()
        starts, val_starts = hold_out(starts, ends, held_out)
        if not starts:
            print_counts(totals, left_out, args.merge_turns, rejects.rows_in)
            beside = " beside the validation set" * bool(val_starts)
            sys.exit(f"{args.input}: no sample is left to train on{beside}; {shown(args.output)} is not written{still_there(args.output)}")
        if args.val_ratio and not val_starts:
            sys.exit(f"{args.input}: --val-ratio {args.val_ratio} holds none of its {totals['trajectories']} trajectories out; raise it, or "
                     f"take another --seed. {shown(args.output)} is not written{still_there(args.output)}")  # fmt: skip
        for output, of_output in ((args.output, starts), (val_output, val_starts)):
            if of_output:
                if not args.no_shuffle:
                    random.Random(args.seed).shuffle(of_output)
                write_samples(output, files, of_output, args.num_shards, args.num_proc)
                tables = gather(files, of_output[: args.preview])
                preview = [sample for table in tables for sample in table.to_pylist()]
                with whole_file(output.with_name(name_of(output) + PREVIEW)) as part:
                    part.write_bytes(orjson.dumps(preview, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    register(args.dataset_info, args.dataset_name, args.output)
    if not left_out:
        left_out_path.unlink(missing_ok=True)  # that of an earlier run

    print_counts(totals, left_out, args.merge_turns, rejects.rows_in)
    if left_out:
        print(f"each of them, with its reason: {shown(left_out_path)}")
    print(f"{shown(args.output)}{replaced}, registered as {args.dataset_name} in {shown(args.dataset_info)}; "
          f"the first samples: {shown(args.output.with_name(name_of(args.output) + PREVIEW))}")  # fmt: skip
    if val_starts:
        register(args.dataset_info, f"{args.dataset_name}_val", val_output)
        print(f"{shown(val_output)}: {len(val_starts)} of the samples, for validation; registered as {args.dataset_name}_val")
        for by, trajectories in sorted(held_out_by.items()):
            print(f"  of {trajectories} trajectories, held out by {by}")
    elif f"{args.dataset_name}_val" in read_dataset_info(args.dataset_info):
        print(f"{args.dataset_name}_val is of an earlier run, and its trajectories are trained on now: evaluate on it no more")
    print_next(args, given, not totals["without thinking"])


if __name__ == "__main__":
    main()
