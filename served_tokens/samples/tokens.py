"""Samples as token ids: the served prompt of a turn as a server tokenizes it, and its target, for any chat template."""

import functools
from pathlib import Path

from served_tokens.files import write
from served_tokens.marks import BLOCK_END, BLOCK_START, IGNORE_INDEX, Tokens
from served_tokens.samples.alpaca import IDS, PROVENANCE, NoSample, generated, sample_schema, served_prompts, told_of

TRAIN, EVALUATED = "train", "validation"  # splits, as LlamaFactory names them
PROVENANCE_FILE = "provenance_{}.parquet"  # of a split
HELD = f"dataset_dict.json|{TRAIN}|{EVALUATED}|{PROVENANCE_FILE.format('.*')}"  # by a folder of samples


@functools.cache
def load_encoder(name: str) -> Tokens:
    """encode(text) -> token ids, as the tokenizer of a model makes them of the whole text; ends where there is none."""
    from transformers import AutoTokenizer

    try:
        return Tokens(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # transformers raises many kinds; each means that there is no tokenizer to be had
        hint = "name the folder of a model, or a Hub id within reach"
        raise SystemExit(f"{name}: no tokenizer to be had from this model; {hint} ({error})") from None


def to_token_samples(
    messages: list[dict], served: dict, served_as: str, merge_turns: bool, encode
) -> tuple[list[dict], dict[int, str]]:
    """`to_samples` with the columns "input_ids", "attention_mask" and "labels"; encode: see `load_encoder`."""
    given = served["given_without_thinking" if served_as == "no-thinking" else "given"]
    samples, left_out = [], {}
    for turn, blocks in served_prompts(messages, served, served_as):
        try:
            if turn["left_out"]:
                raise NoSample(turn["left_out"])
            target = generated(turn, messages[turn["message"]]["content"], served_as, given)
        except NoSample as reason:
            left_out[turn["turn"]] = str(reason)
            continue
        past = "".join(f"{BLOCK_START}{role}\n{text}{BLOCK_END}\n" if role else text for role, text in blocks)
        prompt, supervised = encode(f"{past}{BLOCK_START}assistant\n{given}"), encode(f"{target}{BLOCK_END}\n")
        ids, labels = prompt + supervised, [IGNORE_INDEX] * len(prompt) + supervised
        columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        samples.append(columns | told_of(served, [turn["turn"]], served_as))
    return _merged(samples) if merge_turns else samples, left_out


def _merged(samples: list[dict]) -> list[dict]:
    """Samples that begin with the whole sample before them as one with it, which supervises the turns of both."""
    merged = []
    for sample in samples:
        before = merged[-1] if merged else None
        if before and sample["input_ids"][: (size := len(before["input_ids"]))] == before["input_ids"]:
            labels, turns = before["labels"] + sample["labels"][size:], before["turns"] + sample["turns"]
            merged[-1] = sample | {"labels": labels, "turns": turns}
        else:
            merged.append(sample)
    return merged


def save_tokens(parts: dict[str, Path], output: Path) -> None:
    """Make of samples a folder that `datasets.load_from_disk` reads as a DatasetDict, in place of an earlier one.

    In it is a Parquet file for each split too, which says where its samples come from, row by row.
    parts: {split: a folder of Parquet files}, in a work folder.
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    work_folder = next(iter(parts.values())).parent
    whole, files = work_folder / "whole", {split: sorted(map(str, part.iterdir())) for split, part in parts.items()}
    made = load_dataset("parquet", data_files=files, cache_dir=str(work_folder / "cache"))
    made.select_columns([*IDS]).save_to_disk(str(whole))
    for split, rows in made.items():
        rows.select_columns([*PROVENANCE]).to_parquet(whole / PROVENANCE_FILE.format(split))
    write.finish(whole, output)


def read_tokens(folder: Path) -> dict[str, tuple]:
    """Of such a folder {split: (what step 2 says of each sample, the samples as LlamaFactory takes them)}.

    Raises ValueError where step 2 has not written it so.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset, load_from_disk

    read, splits = {}, load_from_disk(str(folder))
    if TRAIN not in splits or not all((folder / PROVENANCE_FILE.format(split)).exists() for split in splits):
        raise ValueError(
            f"tokenized_path: {folder} has no split {TRAIN}, or does not say which turns its samples are of; write it "
            "with step 2 --tokens, or remove it where LlamaFactory tokenized it earlier"
        )
    for split, rows in splits.items():
        told = pq.read_table(folder / PROVENANCE_FILE.format(split))
        as_written = [*told.schema] == [*sample_schema(True)][len(IDS) :] and {*rows.column_names} == {*IDS}
        if not as_written or len(told) != len(rows) or not _all_is_seen(rows.data.table):
            raise ValueError(
                f"tokenized_path: {folder} holds more or less than {', '.join(IDS)} of each sample and where it comes "
                "from, or hides tokens by its attention_mask; run step 2 again"
            )
        read[split] = Dataset(told), rows.select_columns(["input_ids", "labels"])
    return read


def _all_is_seen(table) -> bool:
    """Whether each sample has as many labels as token ids, and an attention mask of ones as long."""
    import pyarrow.compute as pc

    sizes, seen = pc.list_value_length(table["input_ids"]), pc.list_flatten(table["attention_mask"])
    whole = all(table[name].null_count == 0 and pc.list_value_length(table[name]).equals(sizes) for name in IDS)
    return whole and seen.null_count == 0 and pc.all(pc.equal(seen, 1)).as_py() is not False
