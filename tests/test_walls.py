"""The walls between the wings of served_tokens, held by import-linter (pyproject.toml)."""

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def lint_imports(folder) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_no_import_breaks_a_wall():
    process = lint_imports(ROOT)
    assert process.returncode == 0, process.stdout
    assert "Contracts: 5 kept, 0 broken." in process.stdout


def test_a_wall_that_is_broken_is_seen(tmp_path):
    shutil.copytree(ROOT / "served_tokens", tmp_path / "served_tokens")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lost = tmp_path / "served_tokens" / "proof" / "lost.py"
    lost.write_text(
        lost.read_text(encoding="utf-8") + "\nfrom served_tokens.rows.keys import KNOWN\n", encoding="utf-8"
    )
    process = lint_imports(tmp_path)
    assert process.returncode == 1
    assert "What decides in the proof shares nothing with what it proves BROKEN" in process.stdout
    assert "served_tokens.proof.lost -> served_tokens.rows.keys" in process.stdout
