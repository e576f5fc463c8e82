"""Copies the figures of a finished `make demo`, and some of its answers, into results/demo.json, which the READMEs quote.

.venv/bin/python -m benchmarks.demo_results --work-dir runs/mini
"""

import json

from benchmarks.common import make_parser, save_results, use_work_dir
from llmtuner.console import run_cli

FIGURES = ("accuracy", "bits_per_byte", "repetition", "generation", "ladder")
QUOTED = {"ja": 6, "ja_unseen": 3}  # answers of each group, the first ones: nobody picks them


def main() -> None:
    options = make_parser(__doc__, "demo.json", work_dir=...).parse_args()
    use_work_dir(options.work_dir, "CHAT_MODEL_DIR")
    import constants
    import pipeline

    metrics = pipeline.load_metrics("step7")
    lines = (constants.WORK_DIR / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    quoted = [
        row for group, count in QUOTED.items() for row in [row for row in answers if row["group"] == group][:count]
    ]
    save_results(options.output, {"step7": {name: metrics[name] for name in FIGURES}, "answers": quoted})


if __name__ == "__main__":
    run_cli(main)
