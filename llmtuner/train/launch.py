"""torchrun for this project's scripts: what went wrong is shown once, without torchrun's own traceback.

A process that fails writes its message, or its traceback, into the file that torchrun gives each process for this
(`console.report_to_launcher`), and the launcher prints one of them: an explained error rather than a crash that follows from
it, else the earliest. Its exit code becomes that of the run. Arguments are those of torchrun.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

USER_ERROR_EXIT_CODE = 2  # exit code of an UserError


def main() -> int:
    """Runs torchrun; returns the exit code."""
    os.environ["REPORT_ERRORS_TO_LAUNCHER"] = "1"
    if "LOGLEVEL" not in os.environ:  # torchrun would name each process that it ends after the first has failed
        logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        failure = min(error.failures.values(), key=_root_cause_key)
        return report_failure(failure)
    except SignalException as stopped:  # the processes have been asked to end, and have said so themselves
        return 128 + stopped.sigval
    except (DistError, RendezvousError, ValueError) as error:  # the port is in use, another machine is out of reach
        print(
            f"\nerror: the processes cannot be started: {str(error).splitlines()[0]}. Check NPROC_PER_NODE, NNODES, "
            "NODE_RANK, MASTER_ADDR and MASTER_PORT (a free port, the same on all machines).",
            file=sys.stderr,
        )
        return USER_ERROR_EXIT_CODE
    return 0


def _root_cause_key(failure: ProcessFailure) -> tuple[bool, bool, int, int]:
    """Sorts failures so that what explains the others comes first: those ended by SIGTERM were ended by the launcher."""
    ended_by_launcher = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return failure.exitcode != USER_ERROR_EXIT_CODE, ended_by_launcher, failure.timestamp, failure.local_rank


def report_failure(failure: ProcessFailure) -> int:
    """Prints what a failed process has left to say, and returns its exit code as shells count it."""
    if os.path.isfile(failure.error_file):
        print(failure.message, file=sys.stderr)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (often for want of memory)" if name == "SIGKILL" else ""
        print(f"\nerror: process {failure.local_rank} was ended by {name}{hint}.", file=sys.stderr)
    elif failure.exitcode < 128:  # above: ended by a signal in good order
        print(f"\nerror: process {failure.local_rank} ended with exit code {failure.exitcode}.", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    raise SystemExit(main())
