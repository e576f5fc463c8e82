"""The trainer and the converter on the command line.

python -m llmtuner train FILE.yaml                  a training run
python -m llmtuner export FILE.yaml                 merges an adapter
python -m llmtuner convert CHATGLM3_DIR OUT_DIR     ChatGLM3 as published -> a directory that transformers loads
"""

import os
import sys
from pathlib import Path

from llmtuner.console import InputError, run_script


def main() -> None:
    """Runs the command that the first argument names."""
    match sys.argv[1:]:
        case ["train", settings]:
            from llmtuner.train.tuner import run_exp

            print(run_exp(settings))
        case ["export", settings]:
            from llmtuner.train.tuner import export_model

            print(export_model(settings))
        case ["convert", source, destination]:
            from llmtuner.model.chatglm import convert

            convert(Path(source), Path(destination), overwrite=os.environ.get("OVERWRITE") == "1")
        case _:
            raise InputError(
                "usage: python -m llmtuner train FILE.yaml | export FILE.yaml | convert CHATGLM3_DIR OUT_DIR"
            )


if __name__ == "__main__":
    run_script(main)
