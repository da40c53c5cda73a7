"""Published checkpoints of SAM, CLIP and R(2+1)D: what they are, whether they are there and intact.

Nothing is downloaded. The files are put into one folder by hand, and no byte of one is interpreted
before its SHA-256 was found right, in full or as far as it is published; then it is read without
executing anything in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from lib.inference import file_sha256

ABSENT, INTACT, DAMAGED, WRONG_SIZE = "absent", "intact", "damaged", "wrong size"
SAFETENSORS = ".safetensors"

_SEGMENT_ANYTHING = "https://dl.fbaipublicfiles.com/segment_anything"
_TIMM_HUB = "https://huggingface.co/timm"


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights as its makers published it.

    Attributes:
        file: its name.
        url: where it is published.
        sha256: of the whole file, in hexadecimal digits; where not all 64 are published, the first.
        size: in bytes; 0 where it is not published.
        licence: of the weights.
        purpose: what the study uses it for.
    """

    file: str
    url: str
    sha256: str
    size: int
    licence: str
    purpose: str

    @property
    def where(self) -> str:
        """Where to get it and how to know it, for messages."""
        return f"{self.url}, SHA-256 {self.sha256}{'' if len(self.sha256) == 64 else '...'}"


def _sam(file: str, sha256: str, size: int, purpose: str) -> Checkpoint:
    """A checkpoint of segment-anything."""
    url = f"{_SEGMENT_ANYTHING}/{file}"
    return Checkpoint(file, url, sha256, size, licence="Apache-2.0", purpose=purpose)


# URLs and the first digits in the file names: segment-anything's README. Full hashes and sizes:
# stated alike by several public projects that check them for SAM (the size of ViT-L by one of
# them); for CLIP in full by one project, and its first ten digits by a second. The files themselves
# were not at hand.
CHECKPOINTS = {
    "vit_h": _sam(
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        2_564_550_879,
        "SAM of SAM2CLIP2SAM (section 4.3)",
    ),
    "vit_l": _sam(
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        1_249_524_607,
        "SAM at half the cost",
    ),
    "vit_b": _sam(
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375_042_383,
        "SAM for small machines",
    ),
    # OpenAI's own ViT-L-14.pt is a TorchScript archive, which cannot be read without executing it;
    # these are its weights, as a plain table of tensors under open_clip's names.
    "ViT-L-14": Checkpoint(
        file="clip_vit_l_14_openai.safetensors",
        url=f"{_TIMM_HUB}/vit_large_patch14_clip_224.openai/resolve/main/open_clip_model.safetensors",
        sha256="9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
        size=1_710_517_724,
        licence="MIT",
        purpose="CLIP of SAM2CLIP2SAM (section 4.3)",
    ),
    # Converted from Caffe2. Only the first eight digits of its hash are published, in its name, as
    # PyTorch's hub checks them; that finds a damaged file, and no more is claimed.
    "r2plus1d_34_ig65m": Checkpoint(
        file="r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth",
        url="https://github.com/moabitcoin/ig65m-pytorch/releases/download/v1.0.0/"
        "r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth",
        sha256="449a7af9",
        size=0,
        licence="MIT",
        purpose="start of the 3-D CNN with BERT (section 4.1)",
    ),
}


class CheckpointError(RuntimeError):
    """A checkpoint that is needed and absent or not intact; the message is one sentence."""


def expected_checkpoint(name: str, hashes: Mapping[str, str] | None = None) -> Checkpoint:
    """What a checkpoint should be.

    Args:
        name: a key of `CHECKPOINTS`.
        hashes: SHA-256 by name, in place of the published ones, for weights of the user's own
            (fine-tuned ones, another file of the same network); their size is then not checked.

    Raises:
        ValueError: for an unknown name, or what cannot be a SHA-256.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"a checkpoint is one of {', '.join(CHECKPOINTS)}, got {name!r}")
    given = (hashes or {}).get(name)
    if given is None:
        return CHECKPOINTS[name]
    if len(given) != 64 or set(given.lower()) - set("0123456789abcdef"):
        raise ValueError(f"the SHA-256 of {name} has 64 hexadecimal digits, got {given!r}")
    return replace(CHECKPOINTS[name], sha256=given.lower(), size=0)


def check_checkpoint(path: Path, expected: Checkpoint) -> str:
    """State of a checkpoint file.

    Args:
        path: where it should be.
        expected: what it should be; a size of 0 is not checked.

    Returns:
        ``"absent"``; ``"wrong size"``, which is cheap to see and mostly a broken download;
        ``"damaged"`` where the hash differs; or ``"intact"``. A file is hashed once per process
        as long as its size and time stay.
    """
    if not path.is_file():
        return ABSENT
    status = path.stat()
    if expected.size not in (0, status.st_size):
        return WRONG_SIZE
    digest = _hash(path.resolve(), status.st_size, status.st_mtime_ns)
    return INTACT if digest.startswith(expected.sha256) else DAMAGED


@lru_cache
def _hash(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file as it is; size and time only tell one state of it from another."""
    return file_sha256(path)


def require_checkpoint(folder: Path, name: str, hashes: Mapping[str, str] | None = None) -> Path:
    """Path of an intact checkpoint, before any work starts.

    Args:
        folder: where checkpoints lie, ``data/models``.
        name: a key of `CHECKPOINTS`.
        hashes: see `expected_checkpoint`.

    Returns:
        The file's path.

    Raises:
        CheckpointError: where it is absent or not intact, in one sentence with URL and SHA-256.
        ValueError: for an unknown name.
    """
    expected = expected_checkpoint(name, hashes)
    path = folder / expected.file
    state = check_checkpoint(path, expected)
    if state == INTACT:
        return path
    found = (
        f" ({path.stat().st_size:,} bytes, not {expected.size:,})" if state == WRONG_SIZE else ""
    )
    raise CheckpointError(f"{path} is {state}{found}: put there {expected.where}")


def load_checkpoint(path: Path, sha256: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint, after its hash was checked; nothing in it is executed.

    Args:
        path: a safetensors file, or one of PyTorch that holds tensors only.
        sha256: that it must have, or where not all of it is known, at least its first eight digits.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        CheckpointError: where the file is absent, has another hash, or holds more than tensors.
        ValueError: for fewer digits, which too many files would fit.
    """
    if len(sha256) < 8:
        raise ValueError(f"at least eight digits of a SHA-256 are needed, got {sha256!r}")
    if not path.is_file():
        raise CheckpointError(f"{path} is absent")
    status = path.stat()
    digest = _hash(path.resolve(), status.st_size, status.st_mtime_ns)
    if not digest.startswith(sha256.lower()):
        raise CheckpointError(f"{path} does not have the SHA-256 {sha256}; it was not read")
    if path.suffix == SAFETENSORS:
        return safetensors.torch.load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no table of tensors
        # torch's own message explains how to execute the file all the same, so it is left out
        raise CheckpointError(f"{path} holds more than tensors, or none; not read") from error


def list_checkpoints(folder: Path, hashes: Mapping[str, str] | None = None) -> pd.DataFrame:
    """All checkpoints and their states.

    Args:
        folder: where checkpoints lie.
        hashes: see `expected_checkpoint`.

    Returns:
        One row per checkpoint: name, file, state, size (bytes, as published, else 0), purpose,
        licence, url, sha256.
    """
    rows = []
    for name in CHECKPOINTS:
        expected = expected_checkpoint(name, hashes)
        state = check_checkpoint(folder / expected.file, expected)
        about = {key: getattr(expected, key) for key in ("purpose", "licence", "url", "sha256")}
        size = CHECKPOINTS[name].size
        rows.append({"name": name, "file": expected.file, "state": state, "size": size} | about)
    return pd.DataFrame(rows)
