"""How papermill runs the notebooks of this study: quickly, with equal results.

**End.** After the last cell nothing of a notebook is left to do: its files are closed and its
outputs are with papermill. A kernel that is asked to end politely yet takes up to 2.6 s, in most
notebooks of this study: it waits for the resource tracker of multiprocessing, which ignores the
signal to end while the kernel lives, or it takes PyTorch and all else apart piece by piece. Some
fifty notebooks pay that, so the kernel is killed.

**Memory.** glibc gives large blocks back to the system as soon as they are free, and the system
clears each page when it is asked for again: up to a tenth of the time of training the small SAM.
The kernel therefore keeps what is free for the next batch. Other C libraries ignore the settings.

papermill has this engine by the entry point in pyproject.toml.
"""

import os
from typing import Any

from nbformat import NotebookNode
from papermill.engines import NBClientEngine, NotebookExecutionManager

MALLOC_SETTINGS = {  # of mallopt(3), in bytes; both or none, since one alone turns the other's off
    "MALLOC_MMAP_THRESHOLD_": 32 * 2**20,  # larger blocks always go back; no glibc allows more
    "MALLOC_TRIM_THRESHOLD_": 512 * 2**20,  # so much may be kept
}


class QuickEngine(NBClientEngine):
    """papermill's own engine with a kernel that keeps free memory and is killed at the end."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, **settings: Any
    ) -> NotebookNode:
        """Run the cells of a notebook.

        Args:
            nb_man: the notebook.
            kernel_name: of Jupyter's kernels.
            settings: of papermill's own engine and of nbclient.

        Returns:
            The notebook with its outputs.
        """
        if not MALLOC_SETTINGS.keys() & os.environ.keys():  # those of the user go first
            os.environ.update({name: str(value) for name, value in MALLOC_SETTINGS.items()})
        return super().execute_managed_notebook(
            nb_man, kernel_name, **settings, shutdown_kernel="immediate"
        )
