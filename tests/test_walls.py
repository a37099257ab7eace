"""The walls between the wings of served_tokens, held by import-linter (pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_no_import_breaks_a_wall():
    program = Path(sys.executable).with_name("lint-imports")
    process = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "Contracts: 5 kept, 0 broken." in process.stdout, process.stdout
