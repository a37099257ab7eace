"""Rows as tests write them: read as step 1 reads them, with all that it can be told to keep."""

from served_tokens.rows.trajectory import CONTROL_TOKENS, Reading, read_trajectory


def served_trajectory(row: dict, control_tokens: tuple = CONTROL_TOKENS, **options) -> tuple:
    reading = Reading(allow_control_tokens=not control_tokens, allow_calls_without_tools=True, **options)
    trajectory = read_trajectory(row, reading, control_tokens)
    return trajectory.messages, trajectory.tools


def served_text(sample: dict) -> tuple[str, str]:
    """What LlamaFactory makes of a sample before it tokenizes: (prompt, target)."""
    text = f"<|im_start|>system\n{sample['system']}<|im_end|>\n" if sample["system"] else ""
    for user_text, assistant_text in [*sample["history"], [sample["instruction"], ""]]:
        text += f"<|im_start|>user\n{user_text}<|im_end|>\n<|im_start|>assistant\n{assistant_text}<|im_end|>\n"
    return text.removesuffix("<|im_end|>\n"), sample["output"] + "<|im_end|>\n"


READ_AS_IT_IS = {
    "reading": {"server_style": "vllm", "echo": "none"},
    "enable_thinking": None,
}  # what step 1 tells of a row, beside where it is from
