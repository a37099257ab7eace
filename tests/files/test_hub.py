"""Step 1 on a data set on the Hub.

It reads the files that hold trajectories, downloads no other, and reads none together with another.
"""

import contextlib
import http.server
import json
import threading
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import assistant, fill_hub_cache, read_jsonl, user

STEP1, STEP2 = "step1_apply_tool_template.py", "step2_to_alpaca_mask_history.py"
COMMIT, ENVSCALER = "0" * 40, "XXHStudyHard/EnvScaler-SFT-Traj-9K"


def row(number: int, characters: int = 1) -> dict:
    return {"id": number, "tools": "[]", "messages": json.dumps([user("q" * characters), assistant("a", "r")])}


SAMPLE = {"instruction": "q", "input": "", "output": "a" * 200, "system": "s", "history": []}
ALPACA = [SAMPLE] * 5000
TWO_FILES = {  # those of EnvScaler's repository
    "README.md": b"# EnvScaler",
    "envscaler_sft_traj_9k_metadata.json": json.dumps([row(number) for number in range(3)], indent=4).encode(),
    "mask_history_all_traj-9K_apply_qwen3_template.json": json.dumps(ALPACA, indent=4).encode(),
}


def in_json(*numbers: int) -> bytes:
    return json.dumps([row(number) for number in numbers]).encode()


@pytest.fixture
def step1(run, tmp_path, monkeypatch):
    """step1(files, *arguments) -> the finished step 1 on a data set me/t of which the cache has these files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def step1(files: dict[str, bytes], *arguments, expect: int = 0):
        fill_hub_cache(tmp_path / "hub", "dataset", "me/t", files)
        return run(STEP1, "me/t", "y.jsonl", *arguments, expect=expect)

    return step1


def ids(path) -> list[int]:
    return [row["id"] for row in read_jsonl(path)]


# ---------------------------------------------------------------- which files, from the cache


def test_file_of_trajectories_is_read_and_the_samples_made_of_them_are_not(step1, tmp_path):
    output = step1(TWO_FILES).stdout
    assert "3 rows in = 3 rows out + 0 set aside" in output
    assert "  envscaler_sft_traj_9k_metadata.json: holds trajectories\n" in output
    reason = "its rows have no column messages, but instruction, input, output, system, history"
    assert f"  mask_history_all_traj-9K_apply_qwen3_template.json: {reason}\n" in output
    served = read_jsonl(tmp_path / "y.jsonl")[2]["served"]
    source = f"hf://datasets/me/t@{COMMIT}/envscaler_sft_traj_9k_metadata.json"
    assert (served["source"], served["trajectory"]) == (source, 2)


def test_what_is_no_file_of_trajectories_does_not_end_the_run(step1, tmp_path):
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": ["x"]}), table)
    files = {
        "README.md": b"# t",
        "images/0.png": b"\x89PNG",
        "stats.json": b'{"rows": 1}',
        "a.jsonl": b"not json\n",
        "b.json": b"",
        "c.jsonl": b"3\n",
        "images/index.parquet": table.getvalue().to_pybytes(),
        "d.parquet": b"PAR1",
        "t.jsonl": json.dumps(row(1)).encode(),
    }
    output = step1(files).stdout
    assert ids(tmp_path / "y.jsonl") == [1] and "  t.jsonl: holds trajectories\n" in output
    assert "  stats.json: no array of rows" in output and "  a.jsonl: the row is not valid JSON" in output
    assert "index.parquet: its rows have no column messages, but image" in output
    assert "d.parquet: not a Parquet file" in output and "README" not in output and "png" not in output


SEVERAL = "several of its files hold trajectories, and they are not shards of one split; say which to read by --file"


@pytest.mark.parametrize(
    "files, arguments, expected",
    [
        (["train.json", "test.json", "all/traj.json"], [], None),
        (["data/train.json", "data/test.json"], ["--file", "test.json"], [1]),
        (["data/train.json", "data/test.json"], ["--file", "data/t?s*.json"], [1]),
        (["data/train-00000-of-00002.json", "data/train-00001-of-00002.json"], [], [0, 1]),
        (["train-00000-of-00001.json", "test-00000-of-00001.json"], [], None),
        (["train/0.json", "train/1.json"], [], None),  # they may be versions
        (["train/0.json", "train/1.json", "test/0.json"], ["--file", "train/*"], [0, 1]),
        (["a[1].json", "b.json"], ["--file", "a[1].json"], [0]),
    ],
)
def test_shards_of_one_split_are_read_together_and_other_files_only_by_their_names(
    step1, tmp_path, files, arguments, expected
):
    given = {name: in_json(number) for number, name in enumerate(files)}
    process = step1(given, *arguments, expect=0 if expected else 1)
    if expected:
        rows = [(row["id"], row["served"]["source"]) for row in read_jsonl(tmp_path / "y.jsonl")]
        assert rows == [(number, f"hf://datasets/me/t@{COMMIT}/{files[number]}") for number in expected]
    else:
        listed = "".join(f"\n  {name}: holds trajectories" for name in sorted(files)).replace("00000-of-00001", "*")
        assert f"me/t: {SEVERAL} NAME_OR_GLOB:{listed}" in process.stderr
        assert not (tmp_path / "y.jsonl").exists()


@pytest.mark.parametrize(
    "files, arguments, reason",
    [
        ({"a.json": b"[3]"}, [], "file there holds trajectories\n  a.json: the row is not an object but a number"),
        ({"README.md": b""}, [], "me/t: no .json, .jsonl, .jsonl.gz, .parquet file there holds trajectories"),
        ({"a.json": b"[]"}, ["--file", "b.json"], "me/t: no b.json file there holds trajectories"),
    ],
)
def test_data_set_without_such_a_file_is_a_clear_error(step1, files, arguments, reason):
    assert reason in step1(files, *arguments, expect=1).stderr


def test_row_of_a_shard_is_named_with_its_file_and_the_check_reads_it_there(step1, run, check, tmp_path):
    shards = {"train-0-of-2.jsonl": row(0), "train-1-of-2.jsonl": row(1)}
    errors = step1({name: json.dumps(its).encode() + b"\nbad\n" for name, its in shards.items()}).stderr
    source = f"hf://datasets/me/t@{COMMIT}/train-0-of-2.jsonl"
    assert "2 rows: the row is not valid JSON" in errors
    reject, _ = read_jsonl(tmp_path / "y.jsonl.rejects.jsonl")
    assert (reject["source"], reject["row"]) == (source, 1)
    run(STEP2, "y.jsonl", "out.parquet", "--dataset-dir", ".")
    output = check("out")
    assert "PASSED: 2 of 2 samples are exact" in output
    assert "4 rows in = 2 rows checked for samples + 2 set aside" in output


# ---------------------------------------------------------------- from a server that speaks the Hub's API


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does that has one data set, ENVSCALER, with the `files` of the server; see `hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        sizes = {name: len(content) for name, content in hub.files.items()}
        api, files = f"/api/datasets/{ENVSCALER}", f"/datasets/{ENVSCALER}/resolve/"
        hub.requests.append((path, self.headers.get("Range")))
        if path.startswith(files):
            self.answer_file(path.removeprefix(files).partition("/")[2])
        elif not path.startswith(api):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif (path.partition("/revision/")[2] or "main") not in ("main", "v1", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            files = [{"type": "file", "oid": COMMIT, "size": size, "path": name} for name, size in sizes.items()]
            self.answer(200, json.dumps(files).encode())
        else:
            files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            self.answer(200, json.dumps({"id": ENVSCALER, "sha": COMMIT, "siblings": files}).encode())

    do_HEAD = do_GET

    def answer_file(self, name: str) -> None:
        content, status = self.server.files[name], 200
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "ETag": f'"{len(content)}"'}
        if self.headers.get("Range"):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            first, size = int(first), len(content)
            last = min(int(last or size), size - 1)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.answer(status, content, headers, name)

    def answer(self, status: int, body: bytes, headers=(), name: str | None = None) -> None:
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = len(body)
        if name and self.server.breaks_after:
            left = max(0, self.server.breaks_after - self.server.sent[name])
        with contextlib.suppress(OSError):
            self.server.sent[name] += self.wfile.write(body[:left])
        self.close_connection = left < len(body)


@pytest.fixture
def hub():
    """A stub of the Hub: sent: bytes of each file, breaks_after: so many; requests: (path, range) of each."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        hub.files, hub.sent, hub.requests, hub.breaks_after = dict(TWO_FILES), Counter(), [], None
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.fixture
def from_hub(process, hub, tmp_path):
    """from_hub(*arguments) -> the finished process of step 1 on the stub's data set, with an empty cache at first."""
    address = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    folders = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "hub")}

    def from_hub(*arguments, data_set: str = ENVSCALER, expect: int = 0, **environment):
        return process(STEP1, data_set, "y.jsonl", *arguments, expect=expect, **address, **folders, **environment)

    return from_hub


def test_only_the_file_of_trajectories_is_downloaded(from_hub, hub, tmp_path):
    process = from_hub()
    assert ids(tmp_path / "y.jsonl") == [0, 1, 2]
    of_trajectories, of_samples = (name for name in TWO_FILES if name.endswith(".json"))
    assert 0 < hub.sent[of_samples] < 33_000 < 1_000_000 < len(TWO_FILES[of_samples]) and hub.sent["README.md"] == 0
    assert "  mask_history_all_traj-9K_apply_qwen3_template.json: its rows have no column messages" in process.stdout

    hub.sent.clear()
    from_hub()  # nothing again
    assert hub.sent[of_trajectories] == 0
    hub.shutdown()
    hub.server_close()
    from_hub()  # the Hub is gone, but not the cache
    assert ids(tmp_path / "y.jsonl") == [0, 1, 2]


def test_pinned_revision_is_asked_for_and_recorded(from_hub, hub, tmp_path):
    from_hub(data_set=f"{ENVSCALER}@v1")
    assert any(path.endswith("/revision/v1") for path, _ in hub.requests)
    assert read_jsonl(tmp_path / "y.jsonl")[0]["served"]["source"].startswith(f"hf://datasets/{ENVSCALER}@{COMMIT}/")
    errors = from_hub(data_set=f"{ENVSCALER}@v2", expect=1).stderr
    assert "@v2: no such file, and not to be had from the Hugging Face Hub" in errors and "Traceback" not in errors


def test_download_that_breaks_is_one_line_and_the_next_run_goes_on(from_hub, hub, tmp_path):
    name = "envscaler_sft_traj_9k_metadata.json"
    hub.files[name] = json.dumps([row(number, 10_000) for number in range(3000)]).encode()
    hub.breaks_after = 20_000_000
    errors = from_hub(expect=1).stderr
    assert f"{name}: the download failed (" in errors and "run this again, and it goes on from where it ended" in errors
    assert "Traceback" not in errors and not (tmp_path / "y.jsonl").exists()
    hub.breaks_after = None
    hub.requests.clear()
    from_hub()
    assert len(ids(tmp_path / "y.jsonl")) == 3000
    starts = [int(asked[6:].split("-")[0]) for path, asked in hub.requests if path.endswith(name) and asked]
    assert max(starts) > 10_000_000
