"""The files of a Hugging Face data set that hold trajectories: found without downloading the others, downloaded alone.

A file is named by its address, hf://datasets/ID@COMMIT/NAME, as huggingface_hub writes it. Once downloaded it is in the
Hub's cache, and found there offline too.
"""

import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

DATA_SET = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@([^/]+)/(.+)")
LOOKED_AT, FIRST_ROW = 1 << 14, 1 << 26  # bytes of a file read at a time until its first row is whole; the most of it
SHOWN_FILES = 10  # on the screen, of each kind

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # a download by Xet that breaks off begins anew


@dataclass(frozen=True)
class Repository:
    """A data set at the commit of a revision: the bytes of each of its files, by name, as far as they can be had."""

    id: str
    revision: str
    commit: str
    sizes: dict[str, int]
    is_cache: bool = False

    def lines(self, names: list[str], reasons: dict | None = None) -> str:
        """A line for each file, for the first of them, with the reason why it is not read."""
        sizes = {name: tqdm.format_sizeof(self.sizes[name], "B") for name in names[:SHOWN_FILES]}
        lines = [f"  {name} ({size})" + (f": {reasons[name]}" if reasons else "") for name, size in sizes.items()]
        return "\n".join([*lines, f"  and {len(names) - SHOWN_FILES} more"] if names[SHOWN_FILES:] else lines)


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
        split: only files with this word in their names.
        formats: what the names of data files end with.
        why_no_trajectories: why_no_trajectories(file, name) -> why an open file holds no trajectories, or None. It
            raises SystemExit or ValueError where it has no row.
    Ends with a message where no file holds trajectories, or where those that do are not shards of one split: two
    splits, or the same rows under two names, are never read together.
    """
    repository, why_not, read = _open_repository(source), {}, []
    shards = _shards(repository, source, pattern, split, formats)
    for of_split in tqdm(shards, "look into files", disable=len(shards) < SHOWN_FILES, leave=False):
        if reason := _why_not(repository, of_split[0], why_no_trajectories):  # shards have one writer
            why_not.update(dict.fromkeys(of_split, reason))
        else:
            read.append(of_split)
    if not read:
        listed = repository.lines([*why_not], why_not)
        raise SystemExit(f"{source}: none of its files holds trajectories:\n{listed}")
    if len(read) > 1:
        raise SystemExit(
            f"{source}: several of its files hold trajectories, and they are not shards of one split; name one, by "
            f"--file NAME or --split NAME:\n{repository.lines([name for of_split in read for name in of_split])}"
        )
    cached = ", from the cache" if repository.is_cache else ""
    print(f"{repository.id} at revision {repository.commit[:12]}{cached}: reads\n{repository.lines(read[0])}")
    if why_not:
        print(f"and not\n{repository.lines([*why_not], why_not)}")
    for name in read[0]:
        _download(repository.id, name, repository.revision)
    return [f"hf://datasets/{repository.id}@{repository.commit}/{name}" for name in read[0]]


def _shards(repository: Repository, source: str, pattern: str | None, split: str | None, formats: tuple) -> list:
    """The names of the data files that the user wants, those of each split together."""
    names, shards = sorted(name for name in repository.sizes if name.endswith(formats)), {}
    for name in names:
        if pattern and not any(fnmatch.fnmatchcase(part, pattern) for part in (name, PurePosixPath(name).name)):
            continue
        if not split or re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", name):
            numbers = r"\d+" if pattern else r"\d+-of-\d+"  # without a glob, other numbers may be of versions
            shards.setdefault(re.sub(numbers, "*", name), []).append(name)
    if not shards:
        options = {"--file": pattern, "--split": split}
        wanted = " and ".join(f"{option} {value}" for option, value in options.items() if value) or ", ".join(formats)
        there = f"; it has\n{repository.lines(names)}" if names else ""
        raise SystemExit(f"{source}: the data set has no file for {wanted}{there}")
    return [*shards.values()]


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

    data_set, revision = DATA_SET.fullmatch(source).groups("main")
    try:
        info = HfApi().dataset_info(data_set, revision=revision, files_metadata=True)
        return Repository(data_set, revision, info.sha, {file.rfilename: file.size or 0 for file in info.siblings})
    except Exception as error:  # many kinds again
        reason = _one_line(error)
    try:
        folder = Path(snapshot_download(data_set, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:
        raise SystemExit(f"{source}: no such file, and not to be had from the Hugging Face Hub ({reason})") from None
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Repository(data_set, revision, folder.name, sizes, is_cache=True)


def _why_not(repository: Repository, name: str, why_no_trajectories) -> str | None:
    """Why a file is none of trajectories, by its first row; of one on the Hub only what is read is downloaded."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    path = try_to_load_from_cache(repository.id, name, revision=repository.commit, repo_type="dataset")
    try:
        if isinstance(path, str):
            file = open(path, "rb")  # noqa: SIM115
        else:
            size = repository.sizes[name]
            seen = size if name.endswith(".parquet") else min(size, FIRST_ROW)  # what Parquet holds is said at its end
            address = f"datasets/{repository.id}@{repository.commit}/{name}"
            file = HfFileSystem().open(address, "rb", block_size=LOOKED_AT, size=seen)
        with file:
            return why_no_trajectories(file, name)
    except (SystemExit, ValueError) as error:
        return str(error).removeprefix(f"{name}: ")
    except Exception as error:  # many kinds again
        raise SystemExit(f"{name}: cannot be read from the Hub ({_one_line(error)}); run this again") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
