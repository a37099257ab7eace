#!/usr/bin/env bash
# The whole way on the embedded sample, offline and without a GPU: both steps, the check, and a short training of a tiny
# random Qwen3. The real training differs from the last command in its overrides only.
set -euo pipefail
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1 LLAMAFACTORY_VERBOSITY=WARN

rm -rf data/tiny_qwen3 data/tiny_qwen3_sft
python tests/tiny_qwen3.py data/tiny_qwen3
python step1_apply_tool_template.py
python step2_to_alpaca_mask_history.py
python check_training_tokens.py qwen3_full_sft.yaml model_name_or_path=data/tiny_qwen3
llamafactory-cli train qwen3_full_sft.yaml model_name_or_path=data/tiny_qwen3 output_dir=data/tiny_qwen3_sft \
    deepspeed=null bf16=false gradient_accumulation_steps=2 max_steps=4 learning_rate=1.0e-3
