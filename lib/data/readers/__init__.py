"""Readers: NIfTI, DICOM, TIFF, JPEG and PNG files or folders to one `Scan` (FACTS 7.1-7.7).

What a file is follows from its first bytes, never from its name. Volumes with a geometry (NIfTI,
DICOM) are brought to the convention of `lib.data.scan`. Pictures and TIFF slices carry none: they
keep the numeric order of their names and are taken to run from head to feet, in the usual
radiological view.

Every volume is decoded slice by slice into one preallocated array, so that reading needs the
memory of the scan itself and little more.

The modules, each of which imports only from those before it: `findings`; `intensities`,
`geometry`; `dicom_header`, `dicom`, `nifti`, `pictures`; `files`; `scans`.
"""

from lib.data import scan
from lib.data.readers import (
    dicom,
    dicom_header,
    files,
    findings,
    geometry,
    intensities,
    nifti,
    pictures,
    scans,
)
from lib.data.readers.files import describe_source, source_files, source_sha256
from lib.data.readers.findings import FLAGS, REASONS
from lib.data.readers.scans import read_label_volume, read_scan

# What a scan that was read depends on, for the `code` of `map_scans`.
CODE = (
    *(scans, files, pictures, nifti, dicom, dicom_header),
    *(geometry, intensities, findings, scan),
    *("numpy", "nibabel", "pydicom", "python-gdcm", "tifffile", "pillow"),
)

__all__ = [
    "CODE",
    "FLAGS",
    "REASONS",
    "describe_source",
    "read_label_volume",
    "read_scan",
    "source_files",
    "source_sha256",
]
