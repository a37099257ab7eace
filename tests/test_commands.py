import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, assistant, golden, user, write_jsonl

from served_tokens.rows.notes import NO_REASONING

ROWS = [{"messages": [user("où?"), assistant("là", "pensée")]}]


def test_output_that_the_terminal_cannot_show_is_escaped(process, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{**ROWS[0], "clé": "é"}])
    said = process("step1_apply_tool_template.py", "x.jsonl", "y.jsonl", expect=1, PYTHONIOENCODING="ascii").stderr
    assert "row.cl\\xe9 (1)" in said


def test_pipe_that_is_closed_ends_a_script_without_a_trace(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, ROOT / "step1_apply_tool_template.py", "x.jsonl", "y.jsonl"]
    process = subprocess.run(command, cwd=tmp_path, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert process.returncode == 1 and "Traceback" not in process.stderr and "Exception" not in process.stderr
    assert (tmp_path / "y.jsonl").exists()


def test_name_of_a_data_set_that_is_a_number_and_a_yaml_behind_overrides_are_taken(run, pipeline, tiny_model):
    pipeline(golden()[:3], name="7")
    overrides = "dataset_dir=.", "dataset=7", f"model_name_or_path={tiny_model}", "preprocessing_num_workers=8"
    process = run(
        "check_training_tokens.py", *overrides, ROOT / "qwen3_full_sft.yaml", "tf32=true", "enable_liger_kernel=true"
    )
    assert "PASSED: " in process.stdout
    assert process.stdout.splitlines()[-1].startswith("next: FORCE_TORCHRUN=1 llamafactory-cli train ")


def test_mistake_in_a_command_is_one_line(process):
    errors = process("step1_apply_tool_template.py", "x", "--num-proc", "none", expect=2).stderr
    assert errors == (
        "step1_apply_tool_template.py: argument --num-proc: 'none' is no whole number above 0 (--help tells the "
        "options)\n"
    )


STEP2 = "next: python step2_to_alpaca_mask_history.py 'my rows_apply_qwen3_template.jsonl'"


@pytest.mark.parametrize(
    "reasoning, options, line",
    [("r", [], STEP2), (None, [], f"{STEP2} --no-thinking"), (None, ["--echo", "vllm"], STEP2)],
)
def test_next_lines_lead_to_samples_that_pass_and_without_any_reasoning_to_a_model_that_does_not_think(
    run, tmp_path, tiny_model, reasoning, options, line
):
    write_jsonl(tmp_path / "my rows.jsonl", [{"messages": [user("q"), assistant("a", reasoning)]}])
    said = run("step1_apply_tool_template.py", "my rows.jsonl", *options).stdout
    assert said.splitlines()[-1] == line and (NO_REASONING in said) == (reasoning is None)
    said = run(*shlex.split(line)[2:]).stdout
    assert "reasoning" not in said
    script, yaml, *settings = shlex.split(said.splitlines()[-1])[2:]
    said = run(script, ROOT / yaml, *settings, f"model_name_or_path={tiny_model}", "preprocessing_num_workers=1").stdout
    assert "PASSED: 1 of 1 samples are exact" in said and (NO_REASONING in said) == (options != [])


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_has_a_line_for_each_argument_and_no_option_outside_of_a_group(process, script):
    said = process(script, "--help").stdout
    groups = re.split(r"\n\n(what is read|how the past looks|limits|what else is checked|what is written):\n", said)
    [(_, options)] = re.findall(r"\n(options):\n(.*)", groups[0], re.DOTALL)
    assert options.split() == "-h, --help show this help message and exit".split()
    arguments = re.findall(r"^  (\S.*?)(?:  +(\S.*)|\n {10,}(\S.*))?$", "\n".join(groups[2::2]), re.MULTILINE)
    assert len(arguments) > 1 and all(beside or below for _, beside, below in arguments)
