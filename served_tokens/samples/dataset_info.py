"""Validation sets and data sets: what is held out, and how LlamaFactory finds what is written."""

import hashlib
import json
import os
from pathlib import Path

from served_tokens.files.read import format_of
from served_tokens.files.write import whole_file
from served_tokens.marks import in_json
from served_tokens.samples.alpaca import COLUMNS

# What is hashed with a task or a content: in other words, the same rows would fall on other sides.
BY_TASK = "task (rows with the same task_info.task_id fall on one side)"
BY_CONTENT = "content (rows with the same messages fall on one side; they name no task_info.task_id)"


def is_held_out(task_info, messages: list[dict], ratio: float, seed: int) -> bool:
    """Whether a row is held out for validation.

    It hangs on the task alone, or on the content of a row that names none, so no other row moves it to the other side.
    task_info: the column of the row, an object or its JSON. messages: of step 1. ratio: what part is held out.
    """
    task = in_json(task_info)
    if isinstance(task, dict) and task.get("task_id") is not None:
        by, group = BY_TASK, str(task["task_id"])
    else:
        by, group = BY_CONTENT, hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    digest = hashlib.sha256("\n".join((str(seed), by, group)).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < ratio * 2**64


def read_dataset_info(path: Path) -> dict:
    """The entries of LlamaFactory's dataset_info.json; none where there is no file yet."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(entries, dict):
            raise ValueError("it holds no object")
        return entries
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{path}: not a dataset_info.json ({error}); mend it, or name another folder by --dataset-dir"
        ) from None


def register(dataset_info: Path, name: str, output: Path) -> None:
    """Add the output to dataset_info.json, or replace its entry; all others stay."""
    file_name = Path(os.path.relpath(output.absolute(), dataset_info.absolute().parent)).as_posix()
    entry = {"file_name": file_name, "formatting": "alpaca", "columns": COLUMNS}
    with whole_file(dataset_info) as part:
        entries = {**read_dataset_info(dataset_info), name: entry}
        part.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_of(output: Path) -> str:
    """The name of a file without its format, or of a folder."""
    return output.stem if format_of(output) else output.name
