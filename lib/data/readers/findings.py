"""What comes up while one scan is read: flags, faults, slices left out. Shared by all readers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lib.data.scan import ScanError

REASONS = {
    "no such file": "The file, folder or link target does not exist.",
    "no permission": "The operating system refuses to open the file or folder.",
    "outside the data folder": "The path, links resolved, leaves the data folder.",
    "no readable slices": "The folder or file holds no slice that can be read.",
    "empty file": "The file has zero bytes.",
    "unknown format": "The content is none of NIfTI, DICOM, TIFF, JPEG and PNG.",
    "damaged file": "The file ends early, or its content cannot be decoded.",
    "mixed formats": "The slices of one scan have different formats or pixel types.",
    "several volumes": "The folder holds more than one file with a whole volume in it.",
    "too large": "The size that the header declares is beyond any scan.",
    "unsupported compression": "No installed decoder knows the compression of the pixels.",
    "unsupported pixel type": "The pixels are of a kind that no CT has (colour, complex, ...).",
    "16-bit picture": "How the grey values of a 16-bit PNG map to Hounsfield units is unknown.",
    "4-D": "The volume has more than three dimensions.",
    "NaN intensities": "Some voxels are not a number.",
    "infinite intensities": "Some voxels are infinite.",
    "intensity not in Hounsfield units": "The intensities hold no air at about -1000 HU.",
    "missing rescale": "The DICOM header lacks the rescale slope or intercept.",
    "not CT": "The DICOM header names another modality.",
    "missing slice position": "A DICOM slice has neither a position nor an instance number.",
    "missing frame positions": "A multi-frame DICOM file says nothing about its single frames.",
    "unusable geometry": "The orientation, position or spacing in the header is impossible.",
    "not axial": "The slices do not lie across the long axis of the body.",
    "mixed series": "The folder holds several DICOM series.",
    "mixed slice geometry": "The DICOM slices differ in size, orientation or pixel spacing.",
    "duplicate slice positions": "Two DICOM slices lie at the same place.",
    "not a label mask": "The mask holds something else than whole numbers from 0 to 255.",
}
"""Every reason that a reader gives in a `ScanError`, with its meaning."""

FLAGS = {
    "padding": "Values below -1024 HU or marked as padding were set to air.",
    "unsigned intensities, offset -1024 assumed": "Soft tissue lay at about 1024 instead of 0.",
    "uneven slice spacing": "The distances between slices differ.",
    "tilted gantry": "The slices are sheared; they are not straightened.",
    "ordered by instance number": "Positions were missing; instance 1 is taken as nearest to head.",
    "orientation assumed": "The header has no orientation; the usual one was assumed.",
    "localizers left out": "Scout views in the folder were not read.",
    "files without an image left out": "DICOM objects without pixels were not read.",
    "inverted grey scale": "MONOCHROME1 pixels were inverted.",
    "mixed slice sizes": "Slices of an unusual size were resized to the most common one.",
    "coloured picture": "Parts of a picture have a colour, as an overlay or arrow has.",
    "turned as EXIF says": "A picture was turned or mirrored as its EXIF orientation asks.",
    "unreadable slices left out": "Damaged slices were dropped; their number stands before this.",
}
"""Every flag that a reader sets on a `Scan`, with its meaning."""

UNREADABLE = ("empty file", "unknown format", "damaged file")
"""Reasons for which `skipping` drops a slice."""


@dataclass
class Findings:
    """How one scan or mask is to be read, and what came up while reading it.

    Attributes:
        skip_unreadable: whether damaged slices are left out instead of raising.
        labels: whether the voxels are labels of a mask, to be kept exactly.
        flags: keys of `FLAGS`, added to while reading.
        unreadable: number of slices left out.
    """

    skip_unreadable: bool = False
    labels: bool = False
    flags: set[str] = field(default_factory=set)
    unreadable: int = 0

    def as_flags(self) -> tuple[str, ...]:
        """The flags as a `Scan` has them: sorted, then the number of slices left out."""
        dropped = (f"{self.unreadable} unreadable slices left out",) if self.unreadable else ()
        return (*sorted(self.flags), *dropped)


@contextmanager
def faults_of(file: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into a `ScanError`.

    Decoders raise almost anything on hostile bytes, so all exceptions count. Their texts are
    dropped, and their warnings, because they can quote the header or the file name of a patient.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except ScanError:
        raise
    except FileNotFoundError:
        raise ScanError("no such file", file) from None
    except PermissionError:
        raise ScanError("no permission", file) from None
    except (MemoryError, Image.DecompressionBombError):
        raise ScanError("too large", file) from None
    except NotImplementedError:
        raise ScanError("unsupported compression", file) from None
    except Exception as error:
        detail = f"the decoder raised {type(error).__name__}"
        raise ScanError("damaged file", file, detail) from None


@contextmanager
def skipping(findings: Findings) -> Iterator[None]:
    """Count a slice that turns out to be unreadable, where the caller allows that."""
    try:
        yield
    except ScanError as error:
        if not findings.skip_unreadable or error.reason not in UNREADABLE:
            raise
        findings.unreadable += 1
