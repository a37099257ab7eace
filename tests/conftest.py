import copy
import importlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_qwen3
from hypothesis import HealthCheck, settings

from served_tokens import training

ROOT = Path(__file__).resolve().parent.parent
HANGS = 3600  # seconds after which what a test started will not end any more
CACHE = tempfile.TemporaryDirectory()  # so that no test depends on what an earlier run left
os.environ.update(HF_HUB_OFFLINE="1", LLAMAFACTORY_VERBOSITY="ERROR", TOKENIZERS_PARALLELISM="false")
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_DATASETS_CACHE=CACHE.name)

GOLDEN = json.loads((ROOT / "tests" / "golden" / "qwen3_rendering.json").read_text(encoding="utf-8"))


def golden(*names) -> list[dict]:
    """The golden cases of these names, or all, as rows."""
    cases = [case for case in GOLDEN if not names or case["name"] in names]
    return [{"messages": case["messages"], "tools": case["tools"]} for case in cases]


# How many made-up examples a property is tried on: docs/rows.md.
for profile, examples in (("suite", 250), ("fuzz", 2000)):
    settings.register_profile(profile, max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")  # --hypothesis-profile=fuzz takes its place


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_qwen3")
    tiny_qwen3.build(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_qwen3.build_tokenizer()


@pytest.fixture
def process(tmp_path):
    """process("script.py", *arguments, expect=0, **environment) -> the finished process, with its output as text.

    In a folder of its own, as `run`; disk: bytes over which no file can grow, as where a disk is full.
    """

    def process(script: str, *arguments, expect: int = 0, disk: int = resource.RLIM_INFINITY, **environment):
        process = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=HANGS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk)),
        )
        assert process.returncode == expect, process.stdout + process.stderr
        return process

    return process


def run_here(folder: Path, script: str, *arguments):
    """Run a script in this process, which costs no start of Python; returns what it exits with."""
    own = ["--num-proc", "1"] if script.startswith("step") else []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        if script == "check_training_tokens.py":  # which sets LlamaFactory's templates up in place
            shipped = importlib.import_module("llamafactory.data.template")
            patch.setattr(shipped, "TEMPLATES", copy.deepcopy(shipped.TEMPLATES))
        patch.setattr(sys, "argv", [script, *map(str, arguments), *own])
        importlib.import_module(script.removesuffix(".py")).main()
        sys.exit()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return end.value.code


def parse_as_pasted(words: list[str]) -> None:
    """Read a command that is named next as its program does."""
    if str(ROOT / "step2_to_alpaca_mask_history.py") in words:
        assert Path(words[2]).exists()
        return
    at = next(number for number, word in enumerate(words) if word.endswith(".yaml"))
    config = training.read_config(words[at], words[at + 1 :])
    if str(ROOT / "check_training_tokens.py") not in words:
        assert words[0] == "FORCE_TORCHRUN=1" or not training.lacks_a_gpu(config)


@pytest.fixture
def run(tmp_path, capsys):
    """run("script.py", *arguments, expect=0) -> what it writes, in this process; expect=1: it fails."""

    def run(script: str, *arguments, expect: int = 0):
        capsys.readouterr()
        code = run_here(tmp_path, script, *arguments)
        said = capsys.readouterr()
        errors = said.err + (code if isinstance(code, str) else "")
        assert bool(code) == bool(expect), said.out + errors
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            for line in said.out.splitlines():
                if line.startswith("next: "):
                    parse_as_pasted(shlex.split(line)[1:])
        return SimpleNamespace(stdout=said.out, stderr=errors)

    return run


@pytest.fixture
def pipeline(run, tmp_path):
    """pipeline(rows, *step2_options) -> the name of a data set in tmp_path, made by both scripts."""

    def pipeline(rows, *options, step1=(), name="samples", suffix=".parquet", source="rows.jsonl") -> str:
        write_jsonl(tmp_path / source, rows)
        run("step1_apply_tool_template.py", source, "plain.jsonl", *step1)
        run("step2_to_alpaca_mask_history.py", "plain.jsonl", name + suffix, "--dataset-dir", ".", *options)
        return name

    return pipeline


@pytest.fixture
def finished_check(run, tmp_path, tiny_model):
    """finished_check(data set, *overrides) -> the finished check of it, by the shipped YAML."""

    def finished_check(dataset: str, *overrides, expect: int = 0):
        settings = (f"dataset_dir={tmp_path}", f"dataset={dataset}", f"model_name_or_path={tiny_model}")
        command = (ROOT / "qwen3_full_sft.yaml", *settings, "preprocessing_num_workers=1", *overrides)
        return run("check_training_tokens.py", *command, expect=expect)

    return finished_check


@pytest.fixture
def check(finished_check):
    """check(data set, *overrides) -> what the check prints."""
    return lambda *arguments, **options: finished_check(*arguments, **options).stdout


@pytest.fixture
def checked(pipeline, finished_check):
    """checked(rows, step 2's options, overrides) -> the finished check of these rows, made into samples."""

    def checked(rows: list[dict], options=(), overrides=(), *, step1=(), expect: int = 0):
        name = pipeline(rows, *options, step1=step1)
        return finished_check(name, "cutoff_len=100000", *overrides, expect=expect)

    return checked


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fill_hub_cache(cache, kind: str, repo_id: str, files: dict[str, bytes]) -> None:
    """What the Hub client leaves on disk after a download."""
    repo = cache / f"{kind}s--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)


def call(name: str, arguments, **more) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def user(content) -> dict:
    return {"role": "user", "content": content}


def tool(content) -> dict:
    return {"role": "tool", "content": content}


def assistant(content="", reasoning=None, calls=()) -> dict:
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": list(calls)} if calls else message


REFUND = [  # how two chains of calls begin
    {"role": "system", "content": "P"},
    user("where is W12?"),
    assistant("", "look it up", [call("get", {"id": "W12"})]),
    tool("sent"),
    assistant("Sent.", "tell them"),
    user("refund it"),
    assistant("", "look again", [call("get", {"id": "W12"})]),
    tool("sent"),
]
