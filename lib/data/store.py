"""The store: one compressed file per scan or mask, readable slice by slice.

A stored volume is an ordinary Blosc2 array (``.b2nd``, as nnU-Net v2 uses), so
``blosc2.open(path)[:]`` reads it without this module. One chunk is one axial slice in one block,
which makes the decoded chunk the slice itself, whatever its height and width. Beside the voxels
the file holds the spacing and the attributes as JSON (``vlmeta["volume"]``; never a pickle), and a
CRC-32 of every compressed slice: Blosc2 has no checksum of its own, and LZ4 or Zstandard decode
many damaged streams without complaint.

Why this format. 118 slices of three chest CTs (512 x 512, int16, JPEG Lossless DICOM decoded to
HU), one core of a two-core AMD EPYC machine, files in the page cache. Ratio is raw size to file
size; read is a slice at a time. "Checked" includes the CRC-32.

======================================  =====  ==========  =========  ============
format                                  ratio  write/s     read/s     read checked
======================================  =====  ==========  =========  ============
Blosc2 LZ4 level 5, shuffle              1.71       1,490      5,578         3,420
Blosc2 LZ4HC level 9, shuffle            1.83          48      7,180         3,521
Blosc2 LZ4HC level 9, bitshuffle         1.90          98      4,139         2,852
Blosc2 Zstandard level 1, shuffle        1.94         681      2,555         2,043
Blosc2 Zstandard level 3, shuffle        1.96         449      2,665         2,130
Blosc2 Zstandard level 5, shuffle        1.97         214      3,029         2,375
Blosc2 Zstandard level 5, bitshuffle     1.95         295      2,536         2,021
Blosc2 Zstandard level 9, shuffle        1.98           7      2,516         2,048
Blosc2 Zstandard level 5, byte delta     2.13         194      2,289         1,902
the same with whole-slice blocks         2.13         160      2,518         2,189
**level 5, shuffle, whole-slice block**  1.94         177      3,458         2,778
Zarr 3 zip store, Zstandard level 5      1.94         178      1,040             -
Zarr 3 zip store, LZ4 level 5            1.73         948      1,380             -
Deflate level 6 (gzip, compressed NPZ)   1.59          30        421             -
======================================  =====  ==========  =========  ============

(Blocks are 64 x 512 where nothing else is said; a whole-slice block needs only one reading of the
chunk for checksum and voxels. Blocks of 16 rows up to the whole slice change the ratio by 3 % and
the reading by 10 %; square tiles of 64 x 64 read a third slower.)

Half of a chest CT's bits are noise, so no lossless codec gets far beyond 2. Zstandard at level 5
with the byte shuffle stays well above the 2,000 checked slices per second that training asks for;
the byte delta filter saves another 9 % but leaves no margin; a higher level buys nothing. A Zarr
zip store holds the same bytes but spends a millisecond per slice in its own layers. Data of 8 bits
takes the bit shuffle: 54 : 1 and 5,673 slices/s on thresholded lungs (45 : 1 without), 1.46 : 1 and
3,438 slices/s on windowed CT (1.47 : 1 and 1,682 without).
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import blosc2
import numpy as np

from lib.data.scan import Scan, ScanError

SUFFIX = ".b2nd"

_FILTERS = {  # keyed by the dtypes that the store takes; see the figures above
    np.dtype(np.int16): blosc2.Filter.SHUFFLE,
    np.dtype(np.uint8): blosc2.Filter.BITSHUFFLE,
}
_ZSTANDARD_LEVEL = 5
_THREADS = 1  # the study is parallel over scans; threads inside would only compete
_DAMAGED = "damaged store file"


def save_volume(
    path: Path | str,
    voxels: np.ndarray,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Write a scan or a mask as one file, atomically; the same input gives the same bytes.

    (Blosc2 notes its number of threads in the file: one, unless the environment variable
    BLOSC_NTHREADS says otherwise.)

    The file appears under its name only when it is complete and on the disk; an older file of that
    name is replaced, never written to. Voxels are compressed a slice at a time, so a view or a
    memory map need not fit in memory a second time.

    Args:
        path: file to write, by convention ending in ``SUFFIX``; its folder must exist.
        voxels: shape (slices, height, width), int16 or uint8, any memory layout.
        spacing_mm: distance between slices, rows and columns in mm, or None where unknown.
        attributes: further texts to keep; never patient identity.

    Raises:
        TypeError: other dtype or number of axes, or attributes that are not text.
        ValueError: an axis of length 0, or a spacing that is not three positive numbers.
        OSError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    header = _describe(voxels, spacing_mm, attributes or {})
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        try:
            _write(temporary, voxels, header)
        except RuntimeError:
            # blosc2 does not say why a write failed; writing a slice ourselves raises the cause.
            (Path(folder) / "probe").write_bytes(voxels[0].tobytes())
            raise
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def open_volume(path: Path | str) -> "StoredVolume":
    """Open a stored volume for reading, without decoding any slice.

    Args:
        path: a file written by `save_volume`.

    Returns:
        The volume; slices are decoded when they are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ScanError: ``"damaged store file"`` for anything but a complete stored volume. Damage inside
            a slice is raised when that slice is read.
    """
    path = Path(path)
    with path.open("rb"):  # a missing or forbidden file is not a damaged one
        pass
    try:
        array = blosc2.open(
            str(path.absolute()), mode="r", dparams=blosc2.DParams(nthreads=_THREADS)
        )
        header = _read_header(array)
    except Exception as error:  # blosc2 raises many kinds for a file that it cannot read
        raise ScanError(_DAMAGED, path, "not a complete stored volume") from error
    return StoredVolume(
        path=path,
        shape=tuple(header["shape"]),
        dtype=np.dtype(header["dtype"]),
        spacing_mm=tuple(header["spacing_mm"]) if header["spacing_mm"] else None,
        attributes=header["attributes"],
        _array=array,
        _checksums=header["crc32"],
    )


@dataclass(frozen=True, eq=False)
class StoredVolume:
    """A stored volume: index it for slices, or load it whole. Made by `open_volume`.

    It can be sent to another process (only the path travels) and read from several threads.

    Attributes:
        path: the file.
        shape: (slices, height, width).
        dtype: int16 or uint8.
        spacing_mm: distance between slices, rows and columns in mm, or None where unknown.
        attributes: the texts given to `save_volume`.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    spacing_mm: tuple[float, float, float] | None
    attributes: Mapping[str, str]
    _array: blosc2.NDArray = field(repr=False)
    _checksums: list[int] = field(repr=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """Decode one slice (height, width) or several (slices, height, width), and no others.

        Raises:
            IndexError: there is no such slice.
            ScanError: ``"damaged store file"`` where the slice does not match its checksum.
        """
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            return self._decode(wanted, np.empty(self.shape[1:], self.dtype))
        voxels = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for number, out in zip(wanted, voxels, strict=True):
            self._decode(number, out)
        return voxels

    def __reduce__(self):
        return open_volume, (self.path,)

    def load(self) -> np.ndarray:
        """All voxels, shape (slices, height, width)."""
        return self[:]

    def scan(self) -> Scan:
        """All voxels and the spacing as a scan."""
        return Scan(self.load(), self.spacing_mm)

    def _decode(self, number: int, out: np.ndarray) -> np.ndarray:
        try:
            chunk = self._array.schunk.get_chunk(number)
            if zlib.crc32(chunk) != self._checksums[number]:
                raise RuntimeError("checksum differs")
            blosc2.decompress2(chunk, out, nthreads=_THREADS)
        except (RuntimeError, ValueError) as error:
            raise ScanError(_DAMAGED, self.path, f"slice {number} cannot be read") from error
        return out


def _describe(
    voxels: np.ndarray,
    spacing_mm: tuple[float, float, float] | None,
    attributes: Mapping[str, str],
) -> dict:
    """The header of a volume, checked; the checksums come when the slices are written."""
    if voxels.ndim != 3 or voxels.dtype not in _FILTERS:
        raise TypeError(
            "the store takes (slices, height, width) in int16 or uint8, "
            f"got {voxels.shape} in {voxels.dtype}"
        )
    if voxels.size == 0:
        raise ValueError(f"a stored volume needs at least one voxel, got shape {voxels.shape}")
    if not all(isinstance(text, str) for item in attributes.items() for text in item):
        raise TypeError(f"attributes of a stored volume are texts, got {dict(attributes)}")
    if spacing_mm is not None:
        spacing_mm = [float(distance) for distance in spacing_mm]
        if len(spacing_mm) != 3 or not all(0 < distance < np.inf for distance in spacing_mm):
            raise ValueError(f"spacing is three positive numbers of mm, got {spacing_mm}")
    return {
        "attributes": dict(attributes),
        "dtype": voxels.dtype.name,
        "shape": list(voxels.shape),
        "spacing_mm": spacing_mm,
    }


def _write(path: Path, voxels: np.ndarray, header: dict) -> None:
    one_slice = (1, *voxels.shape[1:])
    array = blosc2.asarray(
        voxels,
        chunks=one_slice,
        blocks=one_slice,
        urlpath=str(path.absolute()),
        mode="w",
        cparams=blosc2.CParams(
            codec=blosc2.Codec.ZSTD,
            clevel=_ZSTANDARD_LEVEL,
            filters=[_FILTERS[voxels.dtype]],
            filters_meta=[0],
            typesize=voxels.dtype.itemsize,
            nthreads=_THREADS,
        ),
        dparams=blosc2.DParams(nthreads=_THREADS),
    )
    checksums = [zlib.crc32(array.schunk.get_chunk(number)) for number in range(len(voxels))]
    text = json.dumps({**header, "crc32": checksums}, sort_keys=True).encode()
    array.schunk.vlmeta["volume"] = text
    array.schunk.vlmeta["volume_crc32"] = zlib.crc32(text)


def _read_header(array: blosc2.NDArray) -> dict:
    """The JSON header of an opened file; any exception means damage."""
    text = array.schunk.vlmeta["volume"]
    if zlib.crc32(text) != array.schunk.vlmeta["volume_crc32"]:
        raise ValueError("checksum of the header differs")
    header = json.loads(text)
    one_slice = (1, *array.shape[1:])
    if (list(array.shape), array.dtype.name) != (header["shape"], header["dtype"]):
        raise ValueError("header and voxels differ in shape or dtype")
    if array.chunks != one_slice or array.blocks != one_slice:
        raise ValueError("a chunk is not a slice")
    return header
