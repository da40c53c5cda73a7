"""How papermill ends the kernel of a notebook: at once.

After the last cell nothing of a notebook is left to do: its files are closed and its outputs are
with papermill. A kernel that is asked to end politely yet takes up to 2.6 s, in most notebooks of
this study: it waits for the resource tracker of multiprocessing, which ignores the signal to end
while the kernel lives, or it takes PyTorch and all else apart piece by piece. Some fifty notebooks
pay that. papermill has this engine by the entry point in pyproject.toml.
"""

from typing import Any

from nbformat import NotebookNode
from papermill.engines import NBClientEngine, NotebookExecutionManager


class ImmediateShutdown(NBClientEngine):
    """papermill's own engine, but the kernel is killed after the last cell, not asked to end."""

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
        return super().execute_managed_notebook(
            nb_man, kernel_name, **settings, shutdown_kernel="immediate"
        )
