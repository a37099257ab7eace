import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import HANGS, ROOT, fill_hub_cache, read_jsonl

from served_tokens.rows.trajectory import Reading, read_trajectory

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path.name for path in ROOT.glob("*.py")]


def commands_of(page) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def copy_of_repo(tmp_path, tiny_model):
    """(folder, environment): the scripts, and a Hub cache that holds the data set and the model of the README."""
    folder, hub = tmp_path / "repo", tmp_path / "hub"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    rows = json.dumps(read_jsonl(ROOT / "data" / "envscaler_sample.jsonl")[:2]).encode()
    trajectories = {"envscaler_sft_traj_9k_metadata.json": rows}
    fill_hub_cache(hub, "dataset", "XXHStudyHard/EnvScaler-SFT-Traj-9K", trajectories)
    model = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    fill_hub_cache(hub, "model", "Qwen/Qwen3-4B", model)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return folder, {**os.environ, "HF_HUB_CACHE": str(hub), "PATH": path}


def test_commands_of_the_readme_run_as_they_stand(copy_of_repo):
    folder, environment = copy_of_repo
    steps = [line for line in commands_of(PAGES[0]) if line.startswith("python ") and "--server" not in line]
    steps = [line for line in steps if line.split()[1] in SCRIPTS]
    assert [line.split()[1].split("_")[0] for line in steps] == ["step1", "step2", "check", "check"]
    for step in steps:
        process = subprocess.run(
            step, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS
        )
        assert process.returncode == 0, step + process.stdout + process.stderr
    assert "PASSED: " in process.stdout and "token trees" in process.stdout
    assert " python train_on_trees.py qwen3_full_sft.yaml" in process.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_are_options_of_its_script(page):
    for command in commands_of(page):
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word in SCRIPTS), None)
        known = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")) if script else ""
        for option in [word for word in words if word.startswith("--")] if script else []:
            assert f'"{option.partition("=")[0]}"' in known, command


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_pages_are_short():
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in PAGES}
    assert words.pop("README.md") < 1300
    assert {name: count for name, count in words.items() if count > 700} == {}


def test_rows_that_the_docs_show_are_read():
    texts = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "shapes.md").read_text(encoding="utf-8"), re.DOTALL)
    rows = [json.loads(text) for text in texts]
    assert [len(read_trajectory(row, Reading(allow_calls_without_tools=True)).turns) for row in rows] == [2, 2, 1]
