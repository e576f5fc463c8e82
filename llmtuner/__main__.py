"""python -m llmtuner train FILE.yaml | export FILE.yaml: the trainer's doors on the command line."""

import sys

from llmtuner.console import InputError, run_script


def main() -> None:
    """Runs the command that the first argument names."""
    from llmtuner.train.tuner import export_model, run_exp

    commands = {"train": run_exp, "export": export_model}
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        raise InputError(f"usage: python -m llmtuner {'|'.join(commands)} FILE.yaml")
    print(commands[sys.argv[1]](sys.argv[2]))


if __name__ == "__main__":
    run_script(main)
