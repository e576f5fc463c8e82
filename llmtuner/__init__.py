"""A compact trainer that extends a chat model to a new language, in the shape and with the argument names of LLaMA-Factory."""

import os
import sys

# Checked here because every script imports this package first. This file, constants.py and the step scripts are kept in
# syntax that Python 3.6 can parse, so that an old interpreter prints this message instead of a SyntaxError.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write(
        f"\nerror: Python {sys.version_info[0]}.{sys.version_info[1]} ({sys.executable}) is too old: this project needs "
        "Python 3.11 or newer. "
    )
    if os.path.exists(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".venv", "bin")):
        sys.stderr.write("Use the one in .venv: .venv/bin/python\n")
    else:
        sys.stderr.write("Install one, then `make demo PYTHON3=python3.11` sets up .venv with it.\n")
    raise SystemExit(2)
