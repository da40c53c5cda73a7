"""Scans as input of slice-wise classifiers: windowed, masked, resized, packed one after another.

Source: Kollias et al. 2024 (SAM2CLIP2SAM), sections 3.2 and 4.3; FACTS 2. Scans differ in their
number of slices; here they are *packed* (all real slices of a batch in one tensor, beside the
lengths), never padded, so that no time is spent on slices that do not exist.
"""

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lib.data.scan import LUNG_WINDOW, Window, to_grey
from lib.data.selection import Selection
from lib.data.store import open_volume

BINARY_CLASSES = ("non_covid", "covid")  # a target is an index of it


class Volume(Protocol):
    """What is read slice by slice: a stored volume or an array, shape (slices, height, width)."""

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class ScanItem:
    """One scan to be classified.

    Attributes:
        scan_id: pseudonymous name of the scan.
        volume: file of the scan in the store.
        mask: file of its lung mask in the store; None to show the scan unsegmented.
        target: index of the class.
        severity: of the disease, in the data set's words; None where unknown.
        selection: slices and box that count, for classifiers that look at no others; None takes the
            whole scan.
    """

    scan_id: str
    volume: Path
    mask: Path | None
    target: int
    severity: str | None = None
    selection: Selection | None = None

    def content(self) -> Iterator[bytes]:
        """All that a classifier may see of it, for ``content_digest``."""
        if self.selection is not None:
            yield f"{self.selection}\n".encode()
        known = (self.scan_id, str(self.target), self.severity)
        yield (" ".join(filter(None, known)) + "\n").encode()
        for path in (self.volume, self.mask):
            if path is not None:
                yield path.with_suffix(".json").read_bytes()


class ScanBatch(NamedTuple):
    """Several scans, their slices one after another.

    Attributes:
        slices: uint8, shape (total slices, 1, size, size), or features of them.
        lengths: number of slices of each scan.
        targets: int64, shape (scans,).
        scan_ids: pseudonymous name of each scan.
    """

    slices: Tensor
    lengths: list[int]
    targets: Tensor
    scan_ids: list[str]


def scan_items(
    manifest: pd.DataFrame,
    *,
    scans: Path,
    masks: Path | None,
    positive: Container[str],
    selections: Mapping[str, Selection] | None = None,
) -> list[ScanItem]:
    """The scans of a manifest as a classifier of COVID-19 against the rest takes them.

    Args:
        manifest: columns scan_id, label, perhaps severity; every row has a label.
        scans: folder of the stored scans.
        masks: folder of their masks, or None to show the scans unsegmented.
        positive: labels that count as COVID-19.
        selections: of every scan, by its name; None leaves the scans whole.

    Returns:
        One item per row; the target is an index of ``BINARY_CLASSES``.

    Raises:
        ValueError: if a scan has no label, or is not among the selections.
        FileNotFoundError: if a scan or mask is not stored, naming the first.
    """
    if manifest["label"].isna().any():
        raise ValueError("scans without a label cannot be classified; leave them out first")
    chosen = dict.fromkeys(manifest["scan_id"]) if selections is None else selections
    for scan_id in manifest["scan_id"]:
        if scan_id not in chosen:
            raise ValueError(f"{scan_id} is not in the lists of selected slices: run select_slices")
    items = [
        ScanItem(
            scan_id=row.scan_id,
            volume=scans / f"{row.scan_id}.b2nd",
            mask=None if masks is None else masks / f"{row.scan_id}.b2nd",
            target=int(row.label in positive),
            severity=severity if isinstance(severity, str) else None,
            selection=chosen[row.scan_id],
        )
        for row in manifest.itertuples()
        for severity in [getattr(row, "severity", None)]  # an empty cell may be None or NaN
    ]
    for path in (path for item in items for path in (item.volume, item.mask) if path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: prepare and segment the data set first")
    return items


class Item(Protocol):
    """What is classified: a scan, or a picture of `lib.classification.pictures`."""

    target: int

    def content(self) -> Iterator[bytes]:
        """All that a classifier may see of it."""
        ...


def content_digest(items: Sequence[Item]) -> str:
    """SHA-256 over what the items hold: names, targets, severities, selections, scans and masks.

    The contents of files are taken from the sidecars that ``map_scans`` leaves beside each.

    Args:
        items: of ``scan_items`` or ``picture_items``.
    """
    digest = hashlib.sha256()
    for item in items:
        for part in item.content():
            digest.update(part)
    return digest.hexdigest()


def subsample_indices(length: int, limit: int) -> np.ndarray:
    """Equidistant choice of at most ``limit`` of ``length`` positions, first and last included.

    The i-th of l chosen positions is ``round(i * (length - 1) / (l - 1))``, halves rounded up, in
    whole numbers, so that no floating-point error can merge two of them (FACTS 2).

    Args:
        length: number of positions there are, at least 1.
        limit: largest number to choose, at least 1; a single one is position 0.

    Returns:
        Strictly increasing int64 indices, shape (min(length, limit),).

    Raises:
        ValueError: if ``length`` or ``limit`` is below 1.
    """
    if length < 1 or limit < 1:
        raise ValueError(f"length and limit must be at least 1, got {length} and {limit}")
    gaps = max(min(length, limit) - 1, 1)
    steps = np.arange(min(length, limit), dtype=np.int64)
    return (2 * steps * (length - 1) + gaps) // (2 * gaps)


def resize_slice(grey: np.ndarray, size: int) -> np.ndarray:
    """Resize one slice to a square, each new pixel the mean of the pixels it covers.

    Averaging (Pillow's box filter) keeps small opacities that sampling would skip; half the size is
    the mean of 2 x 2. Enlarging is bilinear. A slice that is not square is stretched.

    Args:
        grey: uint8, shape (height, width).
        size: new height and width in pixels.

    Returns:
        uint8, shape (size, size).
    """
    if grey.shape == (size, size):
        return grey
    larger = size > min(grey.shape)
    filter_ = Image.Resampling.BILINEAR if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(grey).resize((size, size), filter_))


def load_slices(
    volume: Volume,
    lung_mask: Volume | None = None,
    *,
    size: int,
    limit: int | None = None,
    window: Window = LUNG_WINDOW,
) -> np.ndarray:
    """Slices of a scan as a classifier sees them.

    Only the chosen slices are decoded. Outside the lung mask a slice is black.

    Args:
        volume: the scan, int16 HU or uint8, shape (slices, height, width).
        lung_mask: above 0 where there is lung, same shape; None leaves the scan unsegmented.
        size: height and width of the result in pixels.
        limit: largest number of slices, chosen by ``subsample_indices``; None takes all.
        window: intensity window for scans in HU.

    Returns:
        uint8, shape (slices, size, size).

    Raises:
        ValueError: if scan and mask differ in shape.
    """
    if lung_mask is not None and tuple(lung_mask.shape) != tuple(volume.shape):
        raise ValueError(
            f"scan and lung mask differ in shape: {tuple(volume.shape)} and "
            f"{tuple(lung_mask.shape)}"
        )
    chosen = subsample_indices(len(volume), limit or len(volume)).tolist()
    slices = np.empty((len(chosen), size, size), np.uint8)
    for row, index in enumerate(chosen):
        grey = to_grey(volume[index], window)
        if lung_mask is not None:
            grey = grey * (lung_mask[index] > 0)
        slices[row] = resize_slice(grey, size)
    return slices


class ScanSlices(Dataset):
    """Scans as (slices, target, scan_id), slices as ``load_slices`` gives them.

    Args:
        scans: what to read, in this order.
        size: height and width in pixels.
        limit: largest number of slices of a scan; None takes all.
        window: intensity window for scans in HU.
        cache: keep the resized slices in memory after first use. Worth it while ``size`` is small;
            each worker process of a loader holds its own copy, so use it with ``num_workers=0``.
        open_volume: opens a file of the store.
    """

    def __init__(
        self,
        scans: Sequence[ScanItem],
        *,
        size: int,
        limit: int | None = None,
        window: Window = LUNG_WINDOW,
        cache: bool = False,
        open_volume: Callable[[Path], Volume] = open_volume,
    ) -> None:
        self.scans = list(scans)
        self.size, self.limit, self.window = size, limit, window
        self.open_volume = open_volume
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, str]:
        scan = self.scans[index]
        return self._slices(index), scan.target, scan.scan_id

    def _slices(self, index: int) -> np.ndarray:
        """Slices of one scan, from memory where they are kept."""
        if self._cache is None:
            return self._load(self.scans[index])
        if index not in self._cache:
            self._cache[index] = self._load(self.scans[index])
        return self._cache[index]

    def _load(self, scan: ScanItem) -> np.ndarray:
        """Slices of one scan, from the store."""
        mask = None if scan.mask is None else self.open_volume(scan.mask)
        return load_slices(
            self.open_volume(scan.volume),
            mask,
            size=self.size,
            limit=self.limit,
            window=self.window,
        )


class ScanViews(Dataset):
    """Scans as (slices, target, scan_id), at random mirrored and with slices left out.

    An index asks for a scan as it is, a pair (index, seed) of `lib.training.SeededOrder` for a
    random view.

    Args:
        scans: the scans.
        mirrored: whether a random view is mirrored, left for right, half of the time.
        left_out: share of the slices that a random view leaves out, each by chance.
        prepare: applied to the slices of a scan, all at once; what it returns has as many entries.
            Kept in memory, as they are and mirrored; None leaves the slices as they are.
    """

    def __init__(
        self,
        scans: ScanSlices,
        *,
        mirrored: bool = False,
        left_out: float = 0.0,
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if not 0 <= left_out < 1:
            raise ValueError(f"left_out is a share below 1, got {left_out}")
        self.scans, self.mirrored, self.left_out = scans, mirrored, left_out
        self.prepare = prepare
        self._prepared: dict[tuple[int, bool], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, asked: int | tuple[int, int]) -> tuple[np.ndarray, int, str]:
        index, seed = asked if isinstance(asked, tuple) else (asked, None)
        scan = self.scans.scans[index]
        if seed is None:
            return self._view(index, mirrored=False), scan.target, scan.scan_id
        generator = np.random.default_rng(seed)
        slices = self._view(index, mirrored=self.mirrored and generator.random() < 0.5)
        kept = generator.random(len(slices)) >= self.left_out
        kept[generator.integers(len(slices))] = True  # never none
        return slices[kept], scan.target, scan.scan_id

    def _view(self, index: int, *, mirrored: bool) -> np.ndarray:
        """All slices of a scan, prepared."""
        if (index, mirrored) in self._prepared:
            return self._prepared[index, mirrored]
        slices, _, _ = self.scans[index]
        if mirrored:
            slices = np.ascontiguousarray(slices[..., ::-1])
        if self.prepare is not None:
            slices = self._prepared[index, mirrored] = self.prepare(slices)
        return slices


def pack(items: Sequence[tuple[np.ndarray, int, str]]) -> ScanBatch:
    """Put the slices of several scans one after another (the ``collate_fn`` of ``ScanSlices``).

    Args:
        items: (slices, target, scan_id) of each scan, slices uint8 (slices, size, size) or features
            of them, float32 (slices, channels, rows, columns).

    Returns:
        The batch, scans in the given order.
    """
    slices, targets, scan_ids = zip(*items, strict=True)
    together = torch.from_numpy(np.concatenate(slices))
    return ScanBatch(
        slices=together[:, None] if together.ndim == 3 else together,
        lengths=[len(part) for part in slices],
        targets=torch.tensor(targets, dtype=torch.int64),
        scan_ids=list(scan_ids),
    )


def scan_logits(model: nn.Module, batch: ScanBatch) -> Tensor:
    """Class scores of a batch from a network that takes slices and lengths.

    Args:
        model: called with slices and lengths.
        batch: on the network's device.

    Returns:
        Logits, shape (scans, classes).
    """
    return model(batch.slices, batch.lengths)
