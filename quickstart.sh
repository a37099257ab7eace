#!/usr/bin/env bash
# The whole way on the embedded sample, offline and without a GPU: both steps, the check, and a short training of a tiny
# random Qwen3. The real commands differ in names and overrides only. All it writes is data/quickstart/.
set -euo pipefail
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1
python -c 'import llamafactory' || { echo 'activate the environment with the requirements first: . .venv/bin/activate'; exit 1; }

out=data/quickstart
rm -rf "$out"
python tests/tiny_qwen3.py "$out/model" 2> /dev/null
settings=(dataset_dir="$out" dataset=samples model_name_or_path="$out/model" preprocessing_num_workers=2)

python step1_apply_tool_template.py data/envscaler_sample.jsonl "$out/plain.jsonl"
python step2_to_alpaca_mask_history.py "$out/plain.jsonl" "$out/samples" --dataset-dir "$out"
python check_training_tokens.py qwen3_full_sft.yaml "${settings[@]}"

echo "a short training; its log: $out/train.log"
llamafactory-cli train qwen3_full_sft.yaml "${settings[@]}" output_dir="$out/saves" deepspeed=null bf16=false \
    gradient_accumulation_steps=1 max_steps=4 learning_rate=1.0e-3 > "$out/train.log" 2>&1 || { tail -n 30 "$out/train.log"; exit 1; }
grep -ho "'loss': '[0-9.]*'" "$out/train.log"
echo "done: every sample is exact, and the model is trained and saved in $out/saves"
