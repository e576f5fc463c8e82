#!/usr/bin/env bash
# Step 5 on several GPUs or machines: step5_train_pt_single_gpu.py under torchrun with DeepSpeed ZeRO-2.
#
#   bash step5_train_pt_multi_gpu.sh                                   every GPU of this machine
#   CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=2 bash step5_train_pt_multi_gpu.sh
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash step5_train_pt_multi_gpu.sh    on each machine, with its own NODE_RANK
#   NPROC_PER_NODE=2 DS_ACCELERATOR=cpu bash step5_train_pt_multi_gpu.sh       two processes on the CPU, to try it
#
# After training the first process merges, as after the single-GPU script. Further words are settings: --learning_rate 5e-5
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/llmtuner/train/launch.sh"
launch "$here/step5_train_pt_single_gpu.py" "$@"
