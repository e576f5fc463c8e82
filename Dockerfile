# An image for machines with NVIDIA GPUs. Linted with hadolint; not yet built, and not run on any GPU by this project.
#
#   docker build --build-arg USER_ID="$(id -u)" --tag chatglm3-japanese .
#   docker run --rm -it --gpus all --ipc host \
#       --volume chatglm3-hub:/home/trainer/.cache/huggingface --volume "$PWD/runs:/opt/chatglm3-japanese/runs" \
#       chatglm3-japanese make demo
#
# docs/multi-gpu.md has the commands for ChatGLM3-6B. Secrets are given at run time (--env HF_TOKEN), never at build time.

# The wheel of torch brings CUDA's libraries. DeepSpeed compiles its operations at the first start, so nvcc is needed too, of the
# same major version as torch's CUDA: hence a devel image.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Ubuntu keeps only the newest version of a package, so a pinned one could not be installed later.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential make ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# As in a clone, so that every command of the documentation can be typed as it stands.
WORKDIR /opt/chatglm3-japanese
RUN python3 -m venv .venv
ENV PATH="/opt/chatglm3-japanese/.venv/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.txt requirements-optional.txt ./

# torch first, from another index if one is given: its default wheel for Linux is a CUDA build, which the check makes sure of.
ARG TORCH_INDEX_URL=""
# hadolint ignore=DL3013
RUN python -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' requirements.txt)" \
    && python -c 'import os, torch; ours, image = torch.version.cuda, os.environ["CUDA_VERSION"]; assert ours and ours.split(".")[0] == image.split(".")[0], f"torch is built for CUDA {ours}, the image has {image}: set --build-arg CUDA_IMAGE or TORCH_INDEX_URL"'
RUN python -m pip install --requirement requirements.txt --requirement requirements-optional.txt

COPY . .
RUN python -m pip install --no-deps --no-build-isolation --editable . && touch .venv/installed

# USER_ID: that of the host's user, who can then read what a run writes into a mounted directory.
ARG USER_ID=1000
RUN if id ubuntu >/dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --uid "$USER_ID" --create-home trainer \
    && install --directory --owner trainer runs models corpora /home/trainer/.cache/huggingface
USER $USER_ID
ENV HF_HOME=/home/trainer/.cache/huggingface
VOLUME ["/home/trainer/.cache/huggingface", "/opt/chatglm3-japanese/runs"]
CMD ["bash"]
