"""Runs torchrun, and prints the error of a failed run once, without torchrun's own traceback.

A process that fails writes its message or traceback into the error file that torchrun provides
(`console.report_to_launcher`). The launcher prints one of them: a UserError rather than a crash that follows from it, else
the earliest. Its exit code becomes that of the run. Arguments are those of torchrun.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

USER_ERROR_EXIT_CODE = 2  # of a UserError


def main() -> int:
    """Runs torchrun and returns the exit code."""
    os.environ["REPORT_ERRORS_TO_LAUNCHER"] = "1"
    if "LOGLEVEL" not in os.environ:  # torchrun logs each process that it terminates after a failure
        logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        failure = min(error.failures.values(), key=_root_cause_key)
        return report_failure(failure)
    except SignalException as stopped:  # the processes received the signal and have reported it themselves
        return 128 + stopped.sigval
    except (DistError, RendezvousError, ValueError) as error:  # the port is in use, another machine cannot be reached
        print(
            f"\nerror: the processes cannot be started: {str(error).splitlines()[0]}. Check NPROC_PER_NODE, NNODES, "
            "NODE_RANK, MASTER_ADDR and MASTER_PORT (a free port, the same on all machines).",
            file=sys.stderr,
        )
        return USER_ERROR_EXIT_CODE
    return 0


def _root_cause_key(failure: ProcessFailure) -> tuple[bool, bool, int, int]:
    """Sorts failures so that the cause of the others comes first; the launcher itself ends processes by SIGTERM."""
    ended_by_launcher = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return failure.exitcode != USER_ERROR_EXIT_CODE, ended_by_launcher, failure.timestamp, failure.local_rank


def report_failure(failure: ProcessFailure) -> int:
    """Prints the error of a failed process, and returns its exit code as shells report it."""
    if os.path.isfile(failure.error_file):
        print(failure.message, file=sys.stderr)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (often the system is out of memory)" if name == "SIGKILL" else ""
        print(f"\nerror: process {failure.local_rank} was killed by {name}{hint}.", file=sys.stderr)
    elif failure.exitcode < 128:  # above: the process handled a signal and exited
        print(f"\nerror: process {failure.local_rank} ended with exit code {failure.exitcode}.", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    raise SystemExit(main())
