"""Tiny scans of every format, made on the spot."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SERIES = generate_uid()
PATIENT = "Secret^Patient"
GREY = np.arange(120, dtype=np.uint8).reshape(10, 12)


def phantom(slices=4, height=10, width=12) -> np.ndarray:
    """HU in the convention; no two flips or turns of it are alike."""
    volume = np.full((slices, height, width), -1000, np.int16)
    volume[:, 2:-2, 2:-2] = 40
    volume[:, 2:4, 3] = 700  # anterior, right
    volume += np.arange(slices, dtype=np.int16)[:, None, None]
    return volume


def dicom_header(pixels, position=(0, 0, 0), **fields) -> pydicom.Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    header = pydicom.Dataset()
    header.file_meta = meta
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    header.PatientName, header.PatientID, header.StudyDate = PATIENT, "id-4711", "20200131"
    header.Modality, header.SeriesInstanceUID = "CT", SERIES
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.ImagePositionPatient = [float(value) for value in position]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing, header.SliceThickness = [0.7, 0.8], 5
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.Rows, header.Columns = pixels.shape[-2:]
    header.PixelData = pixels.tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    return header


def write_dicom(file: Path, pixels, position=(0, 0, 0), **fields) -> Path:
    dicom_header(pixels, position, **fields).save_as(file, enforce_file_format=True)
    return file


def write_series(folder: Path, volume=None, step=5.0, **fields) -> Path:
    """One file per slice; names in feet-to-head order, so that the reader has to sort."""
    volume = phantom() if volume is None else volume
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(volume):
        stored = (pixels.astype(np.int32) + 1024).astype(np.uint16)
        name = f"secret_patient_{len(volume) - index}.dcm"
        write_dicom(
            folder / name, stored, (0, 0, -index * step), InstanceNumber=index + 1, **fields
        )
    return folder


def nifti_of(volume, spacing=(0.8, 0.7, 5.0)) -> nib.Nifti1Image:
    """The volume in the axes (L, P, I), which is its transpose."""
    affine = np.diag([-spacing[0], -spacing[1], -spacing[2], 1.0])
    return nib.Nifti1Image(np.ascontiguousarray(volume.T), affine)


def write_nifti(file: Path, volume, **options) -> Path:
    nib.save(nifti_of(volume, **options), file)
    return file


def write_pictures(folder: Path, names=("1.jpg", "2.jpg", "10.jpg"), size=(12, 10)) -> Path:
    folder.mkdir(exist_ok=True)
    for level, name in enumerate(names):
        Image.new("L", size, 40 * level).save(folder / name)
    return folder


def cut(file: Path, fraction=0.5) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * fraction)])
    return file


def put(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file
