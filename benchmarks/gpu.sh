#!/usr/bin/env bash
# What a GPU says of token trees, in ten minutes at most:
#
#     bash benchmarks/gpu.sh FOLDER            on a GPU of 80 GB, with torch and transformers
#     SIZE=tiny bash benchmarks/gpu.sh FOLDER  the same on a CPU, to try this script
#
# 1. The self-check and benchmarks/trees.py: needs neither LlamaFactory nor data.
# 2. LlamaFactory trains a random model of Qwen3-0.6B's shape on made-up rows with EnvScaler's statistics, by its own
#    command on samples and by train_on_trees.py on trees: six steps of the same samples, losses side by side, tokens a
#    second from the second step on, peak memory. Once more with Liger's kernels, where they are installed, and with one
#    long row. What is missing for this part is said at the start, and it is left out then.
#
# FOLDER holds all that is written. A run that fails is said to, and the next one goes on.
set -u
folder=$(mkdir -p "${1:?name a folder for what is written}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=. HF_DATASETS_CACHE=$folder/cache HF_HUB_OFFLINE=1 DISABLE_VERSION_CHECK=1 LLAMAFACTORY_VERBOSITY=WARN
size=${SIZE:-gpu}
turns=18 steps=6 long=65536 settings="bf16=true"
if [ "$size" = tiny ]; then turns=2 steps=2 long=8192 settings="bf16=false use_cpu=true"; fi

within() {  # within SECONDS COMMAND…: at most so long, and not beyond the ten minutes
    local left=$((580 - SECONDS))
    timeout $(($1 < left ? $1 : left > 1 ? left : 1)) "${@:2}"
}

missing=$(python - <<'EOF'
from importlib.util import find_spec
needed = "llamafactory datasets dill multiprocess pyarrow pandas xxhash aiohttp peft trl accelerate omegaconf "
needed += "pydantic pydantic_core annotated_types typing_inspection psutil scipy sentencepiece yaml matplotlib "
needed += "jinja2 tqdm orjson"
print(" ".join(name for name in needed.split() if not find_spec(name)))
EOF
)
if [ -z "$missing" ] && ! error=$(python -c "import llamafactory.train.tuner" 2>&1); then
    missing=${error##*$'\n'}
fi
if [ -n "$missing" ]; then
    echo "missing, so LlamaFactory is left out: $missing (pip install --no-deps, from wheels)"
fi

# ---------------------------------------------------------------- the self-check and the benchmark
if [ "$size" = tiny ]; then
    within 120 python -m benchmarks.trees --size cpu --rounds 1 --rows 0
else
    within 240 python -m benchmarks.trees --size gpu --rounds 3 --rows 0
fi
if [ -n "$missing" ]; then exit 1; fi

# ---------------------------------------------------------------- LlamaFactory
python - "$folder/model" "$size" <<'EOF'
import sys
import torch, transformers
sys.path.append("tests")
import tiny_qwen3
from benchmarks.trees import QWEN3_06B, TINY
torch.manual_seed(0)
shape = TINY if sys.argv[2] == "tiny" else QWEN3_06B
tokenizer = tiny_qwen3.build_tokenizer()  # 2,048 words of the made-up text: about as many tokens as Qwen's make of it
shape = {**shape, "vocab_size": max(shape["vocab_size"], len(tokenizer))}
config = transformers.Qwen3Config(**shape, max_position_embeddings=131072, tie_word_embeddings=True)
transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
EOF
python -m benchmarks.made_up "$folder/rows.jsonl" --rows $((2 * steps)) --turns $turns
python step1_apply_tool_template.py "$folder/rows.jsonl" "$folder/plain.jsonl" > "$folder/step1.log"
python step2_to_alpaca_mask_history.py "$folder/plain.jsonl" "$folder/made_up.parquet" \
    --dataset-dir "$folder" > "$folder/step2.log"

# train NAME COMMAND… -- SETTINGS…: two trajectories a step, in order
train() {
    local name=$1 command=()
    shift
    while [ "$1" != -- ]; do command+=("$1"); shift; done
    shift
    within 120 "${command[@]}" qwen3_full_sft.yaml model_name_or_path="$folder/model" dataset_dir="$folder" \
        dataset=made_up deepspeed=null output_dir="$folder/$name" save_strategy="'no'" plot_loss=false max_steps=$steps \
        disable_shuffling=true gradient_accumulation_steps=$((2 * turns)) preprocessing_num_workers=4 \
        dataloader_num_workers=0 learning_rate=1.0e-4 lr_scheduler_type=constant warmup_ratio=0 \
        skip_memory_metrics=false $settings "$@" > "$folder/$name.log" 2>&1 ||
        { echo "$name: failed, or took too long"; tail -n 3 "$folder/$name.log"; }
    grep -h "attention on token trees" "$folder/$name.log"
}
train samples llamafactory-cli train --
train trees python train_on_trees.py -- row_samples=$turns
if python -c "import liger_kernel" 2>/dev/null; then
    train samples_liger llamafactory-cli train -- enable_liger_kernel=true
    train trees_liger python train_on_trees.py -- row_samples=$turns enable_liger_kernel=true
else
    echo "liger_kernel is not installed, so enable_liger_kernel is left out"
fi
train long_rows python train_on_trees.py -- row_tokens=$long gradient_accumulation_steps=1 max_steps=2

python - "$folder" <<'EOF'
import json, re, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*/trainer_state.json")):
    folder = path.parent
    losses = [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
    results = json.loads((folder / "train_results.json").read_text())
    clock = [json.loads(line)["elapsed_time"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    clock = [sum(60**place * int(part) for place, part in enumerate(reversed(one.split(":")))) for one in clock]
    seconds = max(1, clock[len(losses) - 1] - clock[0])
    names = ("before_init_mem_gpu", "init_mem_gpu_alloc_delta", "train_mem_gpu_alloc_delta")
    memory = sum(results.get(name, 0) for name in (*names, "train_mem_gpu_peaked_delta")) / 1e9
    print(
        f"{folder.name}: {seconds} s from the second step on, {results['train_runtime']:.0f} s in all, "
        f"peak {memory:.1f} GB of GPU memory"
    )
    print("  losses", " ".join(f"{loss:.4f}" for loss in losses))
    if told := re.search("^train: .*", Path(f"{folder}.log").read_text(), re.M):
        print(" ", told[0])
    told = re.search("train: .* samples of ([0-9,]+) tokens", (folder.parent / "trees.log").read_text())
    if told and folder.name != "long_rows":  # whose steps hold other samples
        tokens = int(told[1].replace(",", "")) * (len(losses) - 1) / len(losses)
        print(f"  {tokens / seconds:,.0f} tokens of samples a second from the second step on")
EOF
