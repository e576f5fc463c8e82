"""Starts the step scripts as a user does, and checks how they refuse."""

import os
import subprocess
import sys

from tests.helpers import ROOT

STEPS = {
    "step1": "step1_train_tokenizer.py",
    "step2": "step2_merge_tokenizer.py",
    "step3": "step3_resize_model.py",
    "step4": "step4_test_zero.py",
    "step5": "step5_train_pt_single_gpu.py",
    "step6": "step6_train_sft_single_gpu.py",
    "step7": "step7_eval_chat.py",
}


def start(step, cwd, *words, **variables):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PROFILE", "CORPUS_DIR", "BASE_MODEL_DIR")
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "WORK_DIR": str(cwd / "work"),
        **{key: str(value) for key, value in variables.items()},
    }
    command = [sys.executable, str(ROOT / STEPS[step]), *words]
    return subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def refused(result, *parts):
    """One message, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for part in parts:
        assert part in result.stderr
