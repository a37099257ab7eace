"""The files of a Hugging Face data set that hold trajectories: found without downloading the others, downloaded alone.

A file is named by its address, hf://datasets/ID@COMMIT/NAME, as huggingface_hub writes it. Once downloaded it is in the
Hub's cache, and found there offline too.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

DATA_SET = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@([^/]+)/(.+)")
LOOKED_AT = 1 << 14  # bytes of a file read at a time until its first row is whole
SHOWN_FILES = 10  # on the screen

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # a download by Xet that breaks off begins anew


@dataclass(frozen=True)
class Repository:
    """A data set at the commit of a revision, and the names of its files, as the Hub says or what its cache holds."""

    id: str
    revision: str
    commit: str
    names: list[str]
    is_cache: bool = False


def is_data_set(source: str) -> bool:
    """Whether this is how a data set is named: ID or ID@REVISION."""
    return DATA_SET.fullmatch(source) is not None


def name_of(source: str) -> str:
    """The name of a data set, without its owner and revision."""
    return DATA_SET.fullmatch(source)[1].rpartition("/")[2]


def download_trajectories(source: str, pattern: str | None, formats: tuple, why_no_trajectories) -> list[str]:
    """Download the files of a data set that hold trajectories; their addresses, in the order of their names.

    Args:
        source: ID, or ID@REVISION.
        pattern: only files whose name, with or without its folder, matches this glob. Without one, the files must be
            shards of one split: two splits, or the same rows under two names, are not read together unasked.
        formats: what the names of data files end with.
        why_no_trajectories: why_no_trajectories(file, name) -> why an open file holds no trajectories, or None. It
            raises SystemExit or ValueError where it has no row.
    """
    repository, splits, why_not = _open_repository(source), {}, {}
    names = sorted(name for name in repository.names if name.endswith(formats))
    for name in names:
        if pattern in (None, name) or PurePosixPath(name).match(pattern):
            splits.setdefault(re.sub(r"\d+-of-\d+", "*", name), []).append(name)
    if not splits:
        raise SystemExit(f"{source}: no file matches {pattern or ', '.join(formats)}; there are\n{_listed(names)}")
    for split, shards in [*splits.items()]:
        if reason := _why_not(repository, shards[0], why_no_trajectories):  # shards have one writer
            why_not.update(dict.fromkeys(splits.pop(split), reason))
    read = sorted(name for shards in splits.values() for name in shards)
    if not read:
        raise SystemExit(f"{source}: none of its files holds trajectories:\n{_listed(why_not, why_not)}")
    if len(splits) > 1 and not pattern:
        several = "several of its files hold trajectories, and they are not shards of one split"
        raise SystemExit(f"{source}: {several}; say which to read by --file NAME_OR_GLOB:\n{_listed(read)}")
    cached = ", from the cache" if repository.is_cache else ""
    print(f"{repository.id} at revision {repository.commit[:12]}{cached}: reads\n{_listed(read)}")
    if why_not:
        print(f"and not\n{_listed(why_not, why_not)}")
    for name in read:
        _download(repository.id, name, repository.revision)
    return [f"hf://datasets/{repository.id}@{repository.commit}/{name}" for name in read]


def local_copy(address: str) -> Path | None:
    """Where the file of an address is, downloaded unless it is in the Hub's cache; None for what is no address."""
    parts = ADDRESS.fullmatch(address)
    return parts and _download(parts[1], parts[3], parts[2])


def _listed(names, reasons: dict | None = None) -> str:
    """A line for each of the first files, with the reason why it is not read."""
    lines = [f"  {name}" + (f": {reasons[name]}" if reasons else "") for name in [*names][:SHOWN_FILES]]
    return "\n".join([*lines, f"  and {len(names) - SHOWN_FILES} more"] if len(names) > SHOWN_FILES else lines)


def _download(data_set: str, name: str, revision: str) -> Path:
    """A revision that is no commit is looked up on the Hub; the cache then knows which commit it is."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(data_set, name, repo_type="dataset", revision=revision, tqdm_class=tqdm))
    except Exception as error:  # the Hub client raises many kinds; each means that the file is not whole
        again = "run this again, and it goes on from where it ended"
        raise SystemExit(f"{data_set}: {name}: the download failed ({_one_line(error)}); {again}") from None


def _open_repository(source: str) -> Repository:
    from huggingface_hub import HfApi, snapshot_download

    data_set, revision = DATA_SET.fullmatch(source).groups("main")
    try:
        info = HfApi().dataset_info(data_set, revision=revision)
        return Repository(data_set, revision, info.sha, [file.rfilename for file in info.siblings])
    except Exception as error:  # many kinds again
        reason = _one_line(error)
    try:
        folder = Path(snapshot_download(data_set, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:
        raise SystemExit(f"{source}: no such file, and not to be had from the Hugging Face Hub ({reason})") from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return Repository(data_set, revision, folder.name, names, is_cache=True)


def _why_not(repository: Repository, name: str, why_no_trajectories) -> str | None:
    """Why a file is none of trajectories, by its first row; of one on the Hub only what is read is downloaded."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    address = f"datasets/{repository.id}@{repository.commit}/{name}"
    try:
        path = try_to_load_from_cache(repository.id, name, revision=repository.commit, repo_type="dataset")
        is_there = isinstance(path, str)
        with open(path, "rb") if is_there else HfFileSystem().open(address, block_size=LOOKED_AT) as file:
            return why_no_trajectories(file, name)
    except (SystemExit, ValueError) as error:
        return str(error).removeprefix(f"{name}: ")
    except Exception as error:  # many kinds again
        raise SystemExit(f"{name}: cannot be read from the Hub ({_one_line(error)}); run this again") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
