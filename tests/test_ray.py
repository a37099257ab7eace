"""The steps on Ray, on a real local one."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HANGS, ROOT, read_jsonl, write_jsonl

from served_tokens.proof.told import MADE_OF
from step1_apply_tool_template import SAMPLE


def start(*arguments, cwd: Path, **environment) -> subprocess.Popen:
    environment = {**{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}, **environment}
    command = [sys.executable, ROOT / "steps_on_ray.py", *arguments, "--dataset-dir", "."]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **options)


def workers_of(task: str) -> list[int]:
    """The processes in which Ray runs a task right now: it names them so."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_text().startswith(f"ray::{task}"):
                found.append(int(process.name))
        except OSError:  # it has ended
            pass
    return found


def test_same_samples_as_the_scripts_though_a_worker_is_killed(run, tmp_path):
    rows = read_jsonl(SAMPLE) * 30
    bad = {"messages": [{"role": "user", "content": "q"}]}
    shards = tmp_path / "shards"
    write_jsonl(shards / "a.jsonl", [*rows, bad])
    write_jsonl(shards / "_left_by_another.jsonl", rows)
    write_jsonl(shards / "sub" / "c.jsonl", [bad, *rows])
    pq.write_table(
        pa.Table.from_pylist([{"messages": row["messages"], "tools": row["tools"]} for row in rows]),
        shards / "b.parquet",
    )
    (shards / "d.json").write_text(json.dumps(rows))
    (shards / "e.jsonl.gz").write_bytes(gzip.compress((shards / "a.jsonl").read_bytes()))

    process = start(f"file://{shards}", "out", cwd=tmp_path)
    while not (working := workers_of("convert_file")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.1)
    assert working[0] in workers_of("convert_file")
    os.kill(working[0], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr

    samples = [sample for path in sorted((tmp_path / "out").iterdir()) for sample in pq.read_table(path).to_pylist()]
    expected = []
    for name in ("a.jsonl", "b.parquet", "d.json", "e.jsonl.gz", "sub/c.jsonl"):
        run("step1_apply_tool_template.py", f"shards/{name}", "plain.jsonl")
        run("step2_to_alpaca_mask_history.py", "plain.jsonl", "samples.parquet", "--dataset-dir", ".")
        of_shard = pq.read_table(tmp_path / "samples.parquet").to_pylist()
        for sample in of_shard:
            told = json.loads(sample["reading"])
            told = {
                key: value for key, value in told.items() if key not in MADE_OF
            }  # of which Ray's samples say nothing
            expected.append({**sample, "source": str(shards / name), "reading": json.dumps(told)})
    assert samples == expected
    assert f"{5 * len(rows)} trajectories, {len(samples)} turns: {len(samples)} samples" in stdout
    rejected = read_jsonl(tmp_path / "out.rejects.jsonl")
    assert [(Path(row["source"]).name, row["row"]) for row in rejected] == [
        ("a.jsonl", len(rows)),
        ("e.jsonl.gz", len(rows)),
        ("c.jsonl", 0),
    ]
    assert json.loads((tmp_path / "dataset_info.json").read_text())["out"]["file_name"] == "out"
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


@pytest.fixture(scope="module")
def cluster():
    """The environment that names a cluster, which is started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--head", "--block", "--num-cpus=2", "--include-dashboard=false", f"--port={port}"]
    command = [Path(sys.executable).with_name("ray"), "start", *options]
    head = subprocess.Popen(command, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, stdout=subprocess.PIPE, text=True)
    assert any("Ray runtime started" in line for line in head.stdout)
    yield {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
    head.terminate()
    head.communicate(timeout=HANGS)
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # else the next ray.init here waits for it


def test_joins_the_cluster_that_ray_address_names(tmp_path, cluster):
    write_jsonl(tmp_path / "shards" / "a.jsonl", read_jsonl(SAMPLE))
    process = start("shards", "out", cwd=tmp_path, **cluster)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0 and "16 trajectories, 277 turns: 277 samples" in stdout, stderr


def test_shard_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path, cluster):
    write_jsonl(tmp_path / "shards" / "good.jsonl", read_jsonl(SAMPLE))
    (tmp_path / "shards" / "bad.json").write_text('[{"messages": [')
    process = start("shards", "out", cwd=tmp_path, **cluster)
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    assert "bad.json: no array of rows" in stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("none", "out"), "none: no .json, .jsonl, .jsonl.gz, .parquet file there"),
        (("data", "data"), "data: holds more than Parquet files of these scripts; name another folder"),
        (("data", "data/x.jsonl/out"), "/data/x.jsonl/out: cannot be written ("),
    ],
)
def test_wrong_argument_is_a_clear_error_before_ray_starts(tmp_path, arguments, reason):
    write_jsonl(tmp_path / "data" / "x.jsonl", [])
    process = start(*arguments, cwd=tmp_path)
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 1 and reason in stderr and len(stderr.splitlines()) == 1
