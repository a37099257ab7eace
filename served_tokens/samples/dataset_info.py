"""Validation sets and data sets: what is held out, and how LlamaFactory finds what is written."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from served_tokens.files.read import format_of
from served_tokens.files.write import whole_file
from served_tokens.samples.alpaca import COLUMNS

BY_TASK = "task (rows with the same task_info.task_id fall on one side)"
BY_CONTENT = "content (rows with the same messages fall on one side; they name no task_info.task_id)"


def group_of(task_info, messages: list) -> tuple[str, str]:
    """What is held out together with a row: (BY_TASK, the id of its task), or where it names none (BY_CONTENT, a
    digest).

    Args:
        task_info: the column of the row, an object or its JSON.
        messages: the plain messages of step 1.
    """
    with contextlib.suppress(ValueError, RecursionError):
        task_info = json.loads(task_info) if isinstance(task_info, str) else task_info
    if isinstance(task_info, dict) and task_info.get("task_id") is not None:
        return BY_TASK, str(task_info["task_id"])
    return BY_CONTENT, hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def is_held_out(group: tuple[str, str], ratio: float, seed: int) -> bool:
    """By a hash of the group alone, so that no other row moves it to the other side."""
    digest = hashlib.sha256("\n".join((str(seed), *group)).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < ratio * 2**64


def read_dataset_info(path: Path) -> dict:
    """The entries of LlamaFactory's dataset_info.json; none where there is no file yet."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(entries, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{path}: not a dataset_info.json ({error}); mend it, or name another folder by --dataset-dir"
        ) from None
    return entries


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
