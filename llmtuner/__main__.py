"""The trainer and the converter on the command line; `USAGE` lists the commands."""

import sys
from pathlib import Path

from llmtuner.console import UserError, run_cli
from llmtuner.env import env_flag
from llmtuner.settings_help import format_settings

USAGE = """usage: python -m llmtuner COMMAND, which is one of
  train [FILE.yaml] [--name value ...]               a training run
  show [FILE.yaml] [--batch N] [--name value ...]    batch N of its training set, what is trained in it and what is not
  export [FILE.yaml] [--name value ...]              merges an adapter
  convert CHATGLM3_DIR OUT_DIR                       ChatGLM3 as published -> a directory that transformers loads
  gguf MODEL_DIR OUT.gguf                            one file for llama.cpp (needs: pip install gguf)"""


def main() -> None:
    """Runs the command that the first argument names."""
    match sys.argv[1:]:
        case words if not {"-h", "--help"}.isdisjoint(words):
            listed = words[0] in ("train", "show", "export")
            print(USAGE + (f"\n\nsettings and their defaults:\n{format_settings()}" if listed else ""))
        case ["train", *words]:
            from llmtuner.train.tuner import run_exp

            print(run_exp(words))
        case ["show", *words]:
            from llmtuner.data.preview import preview_batch

            print(preview_batch(words))
        case ["export", *words]:
            from llmtuner.train.tuner import export_model

            print(export_model(words))
        case ["convert", source, destination]:
            from llmtuner.weights.convert_chatglm import convert_chatglm

            print(convert_chatglm(Path(source), Path(destination), overwrite=env_flag("OVERWRITE")))
        case ["gguf", source, destination]:
            from llmtuner.weights.export_gguf import export_gguf

            print(export_gguf(Path(source), Path(destination)))
        case _:
            raise UserError(USAGE)


if __name__ == "__main__":
    run_cli(main)
