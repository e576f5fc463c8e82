"""Copies the figures of a finished `make demo`, and some of its answers, into results/demo.json, which the READMEs quote.

.venv/bin/python -m benchmarks.demo_results --work-dir runs/mini
"""

import argparse
import json
import os
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "demo.json"
FIGURES = ("accuracy", "bits_per_byte", "repetition", "generation")
QUOTED = {"ja": 6, "ja_unseen": 3}  # answers of each group, the first ones: nobody picks them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="of a finished make demo")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["WORK_DIR"] = str(options.work_dir.resolve())
    import constants
    import pipeline
    from llmtuner.outputs import atomic_write_json
    from llmtuner.report.environment import environment

    pipeline.require_artifacts(constants.CHAT_MODEL_DIR)
    metrics = pipeline.load_metrics("step7")
    lines = (constants.WORK_DIR / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    quoted = [
        row for group, count in QUOTED.items() for row in [row for row in answers if row["group"] == group][:count]
    ]
    atomic_write_json(
        options.output,
        {**environment(), "step7": {name: metrics[name] for name in FIGURES}, "answers": quoted},
    )


if __name__ == "__main__":
    main()
