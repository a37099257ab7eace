import os
import subprocess
import sys

from conftest import ROOT, assistant, golden, user, write_jsonl

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
    assert "llamafactory-cli train " in process.stdout.splitlines()[-1]


def test_mistake_in_a_command_is_one_line(process):
    errors = process("step1_apply_tool_template.py", "x", "--num-proc", "none", expect=2).stderr
    assert errors == (
        "step1_apply_tool_template.py: argument --num-proc: 'none' is no whole number above 0 (--help tells the "
        "options)\n"
    )


def test_next_line_of_step_1_names_an_output_of_its_own_for_other_data(run, tmp_path):
    write_jsonl(tmp_path / "my rows.jsonl", ROWS)
    process = run("step1_apply_tool_template.py", "my rows.jsonl")
    assert process.stdout.splitlines()[-1] == (
        f"next: python {ROOT}/step2_to_alpaca_mask_history.py 'my rows_apply_qwen3_template.jsonl' "
        "'alpaca_mask_history_my rows'"
    )
