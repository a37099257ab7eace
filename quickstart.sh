#!/usr/bin/env bash
# The whole way on the embedded sample, offline and without a GPU: both steps, the check, and a short training of a tiny
# random Qwen3. Each command is the one that the last named next; only the overrides are its own. All it writes is
# data/quickstart/.
set -euo pipefail
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1
python -c 'import llamafactory' 2> /dev/null || { echo 'activate the environment with the requirements first: . .venv/bin/activate'; exit 1; }

out=data/quickstart
rm -rf "$out"
python tests/tiny_qwen3.py "$out/model" 2> /dev/null
settings="model_name_or_path=$out/model preprocessing_num_workers=2 use_cpu=true output_dir=$out/saves"
settings+=" gradient_accumulation_steps=1 max_steps=4 learning_rate=1.0e-3"

paste() {  # run a command, and keep the one that it names next
    printf '\n$ %s\n' "$1"
    eval "$1" | tee "$out/said"
    next=$(sed -n 's/^next: //p' "$out/said")
}

paste "python step1_apply_tool_template.py data/envscaler_sample.jsonl $out/plain.jsonl"
paste "$next"
paste "$next $settings"
printf '\n$ %s\na short training; its log: %s\n' "$next" "$out/train.log"
eval "$next" > "$out/train.log" 2>&1 || { tail -n 30 "$out/train.log"; exit 1; }
grep -ho "'loss': '[0-9.]*'" "$out/train.log"
echo "done: every sample is exact, and the model is trained and saved in $out/saves"
