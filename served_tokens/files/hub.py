"""The files of a Hugging Face data set that hold trajectories: found without downloading the others, downloaded alone.

A file is named by its address, hf://datasets/ID@COMMIT/NAME, as huggingface_hub writes it. Once downloaded it is in the
Hub's cache, and found there offline too.
"""

import contextlib
import fnmatch
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

DATA_SET = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@([^/]+)/(.+)")
SHARD = re.compile(r"\d+-of-\d+")
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
LOOKED_AT, FIRST_ROW = 1 << 14, 1 << 26  # bytes of a file read at a time until its first row is whole; the most of it
SHOWN_FILES = 10  # on the screen, of each kind

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # a download by Xet that breaks off begins anew


class Repository(NamedTuple):
    """A data set at the commit of a revision.

    sizes: bytes of each file, by name.
    folder: where they are, if only the cache can be had.
    """

    id: str
    revision: str
    commit: str
    sizes: dict[str, int]
    folder: Path | None


def is_data_set(source: str) -> bool:
    """Whether this is how a data set is named: ID or ID@REVISION."""
    return DATA_SET.fullmatch(source) is not None


def name_of(source: str) -> str:
    """The name of a data set, without its owner and revision."""
    return DATA_SET.fullmatch(source)[1].rpartition("/")[2]


def download_trajectories(
    source: str, pattern: str | None, split: str | None, formats: tuple[str, ...], why_no_trajectories
) -> list[str]:
    """Download the files of a data set that hold trajectories; their addresses, in the order of their names.

    Args:
        source: ID, or ID@REVISION.
        pattern: only files whose name, with or without its folder, matches this glob.
        split: only files of this split, by their names.
        formats: what the names of data files end with.
        why_no_trajectories: why_no_trajectories(file, name) -> why an open file holds no trajectories, or None. It
            raises SystemExit or ValueError where it has no row.
    Ends with a message where no file holds trajectories, or where those that do are not shards of one split: two
    splits, or the same rows under two names, are never read together.
    """
    repository = _open_repository(source)
    why_not, read = {}, []
    of_split = _chosen(repository, source, pattern, split, formats)
    for names in tqdm(of_split, "look into files", unit=" files", disable=len(of_split) < SHOWN_FILES, leave=False):
        if reason := _why_not(repository, names[0], why_no_trajectories):  # shards have one writer
            why_not.update(dict.fromkeys(names, reason))
        else:
            read.append(names)
    if not read:
        raise SystemExit(f"{source}: none of its files holds trajectories:\n{_listed(why_not, repository, why_not)}")
    if len(read) > 1:
        several = _listed([name for names in read for name in names], repository)
        raise SystemExit(
            f"{source}: several of its files hold trajectories, and they are not shards of one split; name one, by "
            f"--file NAME or --split NAME:\n{several}"
        )
    cached = ", from the cache" if repository.folder else ""
    print(f"{repository.id} at revision {repository.commit[:12]}{cached}: reads\n{_listed(read[0], repository)}")
    if why_not:
        print(f"and not\n{_listed(why_not, repository, why_not)}")
    for name in read[0]:
        _download(repository.id, name, repository.revision)
    return [f"hf://datasets/{repository.id}@{repository.commit}/{name}" for name in read[0]]


def _chosen(repository: Repository, source: str, pattern: str | None, split: str | None, formats: tuple) -> list:
    """The names of the data files that the user wants, those of each split together."""
    names, of_split = [name for name in sorted(repository.sizes) if name.endswith(formats)], {}
    for name in names:
        if (not pattern or _matches(name, pattern)) and (not split or _is_of_split(name, split)):
            of_split.setdefault(_split_of(name, split, pattern), []).append(name)
    if not of_split:
        wanted = [f"--file {pattern}"] * bool(pattern) + [f"--split {split}"] * bool(split)
        there = f"; it has\n{_listed(names, repository)}" if names else ""
        raise SystemExit(f"{source}: the data set has no file for {' and '.join(wanted) or ', '.join(formats)}{there}")
    return [*of_split.values()]


def local_copy(address: str) -> Path | None:
    """Where the file of an address is, downloaded unless it is in the Hub's cache; None for what is no address."""
    parts = ADDRESS.fullmatch(address)
    return parts and _download(parts[1], parts[3], parts[2])


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
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    data_set, revision = DATA_SET.fullmatch(source).groups("main")
    try:
        info = HfApi().dataset_info(data_set, revision=revision, files_metadata=True)
        return Repository(
            data_set, revision, info.sha, {file.rfilename: file.size or 0 for file in info.siblings}, None
        )
    except Exception as error:  # many kinds again
        reason, hidden = error, isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError))
    try:
        if hidden:
            raise reason
        folder = Path(snapshot_download(data_set, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:
        raise SystemExit(
            f"{source}: no such file, and not to be had from the Hugging Face Hub ({_one_line(reason)})"
        ) from None
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Repository(data_set, revision, folder.name, sizes, folder)


def _why_not(repository: Repository, name: str, why_no_trajectories) -> str | None:
    """Why a file is none of trajectories, by its first row."""
    try:
        with contextlib.closing(_open_file(repository, name)) as file:
            return why_no_trajectories(file, name)
    except (SystemExit, ValueError) as error:
        return str(error).removeprefix(f"{name}: ")
    except Exception as error:  # many kinds again
        raise SystemExit(f"{name}: cannot be read from the Hub ({_one_line(error)}); run this again") from None


def _open_file(repository: Repository, name: str):
    """The file in the cache, or one on the Hub of which only what is read is downloaded."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    path = repository.folder and repository.folder / name
    path = path or try_to_load_from_cache(repository.id, name, revision=repository.commit, repo_type="dataset")
    if isinstance(path, (str, Path)):
        return open(path, "rb")
    size = repository.sizes[name]
    seen = size if name.endswith(".parquet") else min(size, FIRST_ROW)  # what Parquet holds is said at its end
    return HfFileSystem().open(
        f"datasets/{repository.id}@{repository.commit}/{name}", "rb", block_size=LOOKED_AT, size=seen
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(PurePosixPath(name).name, pattern)


def _is_of_split(name: str, split: str) -> bool:
    return re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", name) is not None


def _split_of(name: str, split: str | None, pattern: str | None) -> str:
    """Files with the same one are shards of one split: by their numbers, or in a folder that is named like a split.

    Where a glob chooses the files, other numbers in their names will do: they are parts, and else they may be versions.
    """
    *folders, file = name.split("/")
    for depth, folder in enumerate(folders):
        if folder in (*SPLITS, split):
            return "/".join(folders[: depth + 1]) + "/"
    return "/".join([*folders, (re.compile(r"\d+") if pattern else SHARD).sub("*", file)])


def _listed(names, repository: Repository, reasons: dict | None = None) -> str:
    """A line for each file, for the first of them."""
    names = [*names]
    lines = [
        f"  {name} ({_size(repository.sizes[name])}){': ' + reasons[name] if reasons else ''}"
        for name in names[:SHOWN_FILES]
    ]
    return "\n".join(lines + [f"  and {len(names) - SHOWN_FILES} more"] * (len(names) > SHOWN_FILES))


def _size(size: int) -> str:
    return tqdm.format_sizeof(size, "B")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
