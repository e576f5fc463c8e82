"""What benchmarks of training share: the work directory in which steps 1 to 3 have run."""

import os
from pathlib import Path


def use_work_dir(work_dir: Path | None) -> None:
    """Lets `constants` look into a work directory (None: as for the steps); to be called before it is imported.

    Raises:
        UserError: if steps 1 to 3 have not finished there.
    """
    if work_dir:
        os.environ["WORK_DIR"] = str(work_dir.resolve())
    import constants
    import pipeline

    pipeline.require_artifacts(constants.ZERO_DIR)
    pipeline.require_corpus()
