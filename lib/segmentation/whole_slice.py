"""No segmentation: every pixel is kept (the rows "without segmentation" of paper 000's tables)."""

import numpy as np

from lib.data.scan import RIGHT_LUNG, Scan


class WholeSlice:
    """Stands where a segmenter would, and keeps everything."""

    def __call__(self, scan: Scan) -> np.ndarray:
        """Mark every pixel.

        Args:
            scan: whole scan or single slice.

        Returns:
            uint8, shape of the scan. There are no lungs to tell apart here, so all of it bears the
            value of the right one.
        """
        return np.full(scan.voxels.shape, RIGHT_LUNG, np.uint8)
