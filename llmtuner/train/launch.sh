# shellcheck shell=bash
# How a step script is started in several processes; sourced by the multi-GPU wrappers. Also for bash 3.2, macOS's.

launch() {
    local script="$1"
    shift
    local root python
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
    python="${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}"
    local processes="${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
    # Each process gets its part of the cores; more threads than cores make CPU processes wait for one another.
    local cores
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)" # macOS has no nproc
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    exec "$python" -P "$root/llmtuner/train/launch.py" \
        --nproc_per_node "$processes" \
        --nnodes "${NNODES:-1}" \
        --node_rank "${NODE_RANK:-0}" \
        --master_addr "${MASTER_ADDR:-127.0.0.1}" \
        --master_port "${MASTER_PORT:-29500}" \
        "$script" --deepspeed "$root/ds_config_zero2.json" "$@"
}
