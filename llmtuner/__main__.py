"""The command line: python -m llmtuner COMMAND, once installed llmtuner COMMAND."""

import argparse
from pathlib import Path

from llmtuner.console import is_console_command, print0, run_cli
from llmtuner.env import env_flag
from llmtuner.hparams.help import format_settings

WITH_SETTINGS = {
    "train": "a training run",
    "show": "a batch of its training set (--batch N), with the tokens on which the loss is computed",
    "export": "merge an adapter",
}
WITH_PATHS = {
    "convert": ("CHATGLM3_DIR", "OUT_DIR", "ChatGLM3 as published -> a directory that transformers loads"),
    "gguf": ("MODEL_DIR", "OUT.gguf", "one file for llama.cpp (needs: pip install gguf)"),
}


def main() -> None:
    """Runs the command that the first argument names."""
    program = "llmtuner" if is_console_command() else "python -m llmtuner"
    parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in WITH_SETTINGS.items():
        commands.add_parser(
            name,
            usage=f"{program} {name} [FILE.yaml] [--SETTING VALUE ...]",
            help=text,
            description=text,
            epilog=f"settings and their defaults:\n{format_settings()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    for name, (source, destination, text) in WITH_PATHS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("source", metavar=source, type=Path)
        command.add_argument("destination", metavar=destination, type=Path)
    text = "one page about several runs: curves over one another, settings that differ, results with intervals"
    command = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    command.add_argument(
        "directories",
        metavar="DIR",
        type=Path,
        nargs="+",
        help="WORK_DIR of the steps, or output_dir of a training run",
    )
    command.add_argument("--output", metavar="PAGE.html", type=Path, default=Path("compare.html"))
    text = "where a run stands: step, loss, hours left, last checkpoint, warnings; from another process"
    command = commands.add_parser("status", help=text, description=text, allow_abbrev=False)
    command.add_argument(
        "directory", metavar="DIR", type=Path, help="WORK_DIR of the steps, or output_dir of a training run"
    )
    options, settings = parser.parse_known_args()
    if settings and options.command not in WITH_SETTINGS:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    run(options, settings)


def run(options: argparse.Namespace, settings: list[str]) -> None:
    """Runs a command; only what it needs is imported."""
    match options.command:
        case "train":
            from llmtuner.train.tuner import run_exp

            print0(str(run_exp(settings)))  # once, also under torchrun
        case "show":
            from llmtuner.data.preview import preview_batch

            print(preview_batch(settings))
        case "export":
            from llmtuner.train.tuner import export_model

            print(export_model(settings))
        case "convert":
            from llmtuner.weights.convert_chatglm import convert_chatglm

            print(convert_chatglm(options.source, options.destination, overwrite=env_flag("OVERWRITE")))
        case "gguf":
            from llmtuner.weights.export_gguf import export_gguf

            print(export_gguf(options.source, options.destination))
        case "compare":
            from llmtuner.report.compare import write_comparison

            print(write_comparison(options.directories, options.output))
        case "status":
            from llmtuner.report.status import format_status

            print(format_status(options.directory))


def cli() -> None:
    """Runs a command as a program; the console command `llmtuner` starts here."""
    run_cli(main)


if __name__ == "__main__":
    cli()
