"""The files of a Hugging Face data set that hold trajectories: found without downloading the others, downloaded alone.

A file is named by its address, hf://datasets/ID@COMMIT/NAME, as huggingface_hub writes it. Once downloaded it is in the
Hub's cache, and found there offline too.
"""

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from served_tokens.files.read import FORMATS, download, first_columns, format_of, one_line

DATA_SET = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
LOOKED_AT = 1 << 14  # bytes of a file read at a time until its first row is whole


def is_data_set(source: str) -> bool:
    """Whether this is the ID or ID@REVISION of a data set, and not a file."""
    return DATA_SET.fullmatch(source) is not None and not format_of(source) and not Path(source).exists()


def download_trajectories(source: str, pattern: str | None, is_of_trajectories) -> list[str]:
    """Download the files of a data set that hold trajectories; their addresses, in the order of their names.

    Args:
        source: ID, or ID@REVISION.
        pattern: only files whose name, with or without its folder, matches this glob. Without one, the files must be
            shards of one split: two splits, or the same rows under two names, are not read together unasked.
        is_of_trajectories: is_of_trajectories(columns) -> whether a row with these columns is one.
    """
    data_set, revision = DATA_SET.fullmatch(source).groups("main")
    commit, names = _commit_and_names(source)
    splits = defaultdict(list)
    for name in sorted(name for name in names if format_of(name)):
        if pattern in (None, name) or PurePosixPath(name).match(pattern):
            splits[re.sub(r"\d+-of-\d+", "*", name)].append(name)
    # shards have one writer, so the first says it for all
    why_not = {split: _why_not(data_set, commit, files[0], is_of_trajectories) for split, files in splits.items()}
    read = [name for split, files in splits.items() if not why_not[split] for name in files]
    listed = "\n".join(f"  {split}: {reason or 'holds trajectories'}" for split, reason in why_not.items())
    if not read:
        raise SystemExit(f"{source}: no {pattern or ', '.join(FORMATS)} file there holds trajectories\n{listed}")
    if not pattern and [*why_not.values()].count(None) > 1:
        several = "several of its files hold trajectories, and they are not shards of one split"
        raise SystemExit(f"{source}: {several}; say which to read by --file NAME_OR_GLOB:\n{listed}")
    print(f"{data_set} at revision {commit[:12]}:\n{listed}")
    for name in read:
        download(data_set, name, revision)
    return [f"hf://datasets/{data_set}@{commit}/{name}" for name in read]


def _commit_and_names(source: str) -> tuple[str, list[str]]:
    """The commit of a data set and the names of its files, as the Hub says, or what its cache holds."""
    from huggingface_hub import HfApi, snapshot_download

    data_set, revision = DATA_SET.fullmatch(source).groups("main")
    try:
        info = HfApi().dataset_info(data_set, revision=revision)
        return info.sha, [file.rfilename for file in info.siblings]
    except Exception as error:  # many kinds again
        reason = one_line(error)
    try:
        folder = Path(snapshot_download(data_set, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:
        raise SystemExit(f"{source}: no such file, and not to be had from the Hugging Face Hub ({reason})") from None
    return folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _why_not(data_set: str, commit: str, name: str, is_of_trajectories) -> str | None:
    """Why a file is none of trajectories, by its first row; of one on the Hub only what is read is downloaded."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(data_set, name, revision=commit, repo_type="dataset")
        address = f"datasets/{data_set}@{commit}/{name}"
        with open(cached, "rb") if cached else HfFileSystem().open(address, block_size=LOOKED_AT) as file:
            columns = first_columns(file, name)
    except (SystemExit, ValueError) as error:
        return str(error).removeprefix(f"{name}: ")
    except Exception as error:  # the Hub client raises many kinds
        raise SystemExit(f"{name}: cannot be read from the Hub ({one_line(error)}); run this again") from None
    return None if is_of_trajectories(columns) else f"its rows have no column messages, but {', '.join(columns)}"
