"""A step of the pipeline, as the report draws it and the terminal announces it; imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One of the numbered scripts."""

    name: str
    """Also the name of its metrics file: "step1"."""
    script: str
    title: str
    """What it does: "Train a Japanese tokenizer"."""
    inputs: tuple[str, ...]
    """Names of the artifacts that it reads; those of another step are called as in its `output`."""
    output: str

    @property
    def number(self) -> str:
        return self.name.removeprefix("step")
