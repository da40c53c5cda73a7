import hashlib
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lib.foundation import checkpoints
from lib.foundation.checkpoints import Checkpoint, CheckpointError

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A folder with an intact file in the place of the small SAM's checkpoint."""
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(WEIGHTS, path)
    published = checkpoints.CHECKPOINTS["vit_b"]
    right = Checkpoint(
        path.name, published.url, sha256(path), path.stat().st_size, "Apache-2.0", "a test"
    )
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "vit_b", right)
    return tmp_path


def test_an_intact_checkpoint_is_found_and_loaded(made):
    path = checkpoints.require_checkpoint(made, "vit_b")
    assert path == made / "sam_vit_b_01ec64.pth"
    loaded = checkpoints.load_checkpoint(path, sha256(path))
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def test_safetensors_are_loaded_after_the_same_check(tmp_path):
    path = tmp_path / "clip.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    loaded = checkpoints.load_checkpoint(path, sha256(path).upper())
    assert torch.equal(loaded["layer.weight"], WEIGHTS["layer.weight"])
    with pytest.raises(CheckpointError, match="does not have the SHA-256"):
        checkpoints.load_checkpoint(path, "0" * 64)


def change_nothing(path: Path) -> None:
    pass


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (change_nothing, "intact"),
        (remove, "absent"),
        (truncate, "wrong size"),
        (flip_a_bit, "damaged"),
    ],
)
def test_state_and_message_of_a_checkpoint(made, change, state):
    expected, path = checkpoints.CHECKPOINTS["vit_b"], made / "sam_vit_b_01ec64.pth"
    checkpoints.require_checkpoint(made, "vit_b")  # a hash of before must not be taken for now's
    change(path)
    assert checkpoints.check_checkpoint(path, expected) == state
    table = checkpoints.list_checkpoints(made).set_index("name")
    assert table.loc["vit_b", "state"] == state and table.loc["vit_h", "state"] == "absent"
    if state != "intact":
        with pytest.raises(CheckpointError) as error:
            checkpoints.require_checkpoint(made, "vit_b")
        message = str(error.value)
        assert f"is {state}" in message and expected.sha256 in message and expected.url in message
        assert "\n" not in message


class Trap:
    """Something whose unpickling runs code: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bare_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("pack", [torch.save, bare_pickle])
def test_code_in_a_checkpoint_is_never_executed(tmp_path, pack):
    path, sign = tmp_path / "evil.pth", tmp_path / "executed"
    pack({"weights": Trap(sign)}, path)
    with pytest.raises(CheckpointError, match="does not have the SHA-256"):
        checkpoints.load_checkpoint(path, "0" * 64)
    with pytest.raises(CheckpointError, match="holds more than tensors, or none"):
        checkpoints.load_checkpoint(path, sha256(path))
    assert not sign.exists()
    pickle.loads(pickle.dumps(Trap(sign)))  # the trap works where it is let
    assert sign.exists()


def test_a_hash_of_the_users_own_replaces_the_published_one(made):
    path = made / "sam_vit_b_01ec64.pth"
    torch.save({"other": torch.zeros(3)}, path)
    own = {"vit_b": sha256(path).upper()}
    assert checkpoints.require_checkpoint(made, "vit_b", own) == path
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.require_checkpoint(made, "vit_b", {"vit_b": "0" * 64})
    with pytest.raises(ValueError, match="64 hexadecimal digits, got 'abc'"):
        checkpoints.require_checkpoint(made, "vit_b", {"vit_b": "abc"})


def test_unknown_and_absent_files_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"one of vit_h, .*, r2plus1d_34_ig65m, got 'vit_g'"):
        checkpoints.require_checkpoint(tmp_path, "vit_g")
    with pytest.raises(CheckpointError, match="is absent"):
        checkpoints.load_checkpoint(tmp_path / "none.pth", "0" * 64)


def test_published_hashes_fit_the_file_names():
    for name, checkpoint in checkpoints.CHECKPOINTS.items():
        in_full = name != "r2plus1d_34_ig65m"  # of which eight digits are published, and no size
        assert re.fullmatch("[0-9a-f]{64}" if in_full else "[0-9a-f]{8}", checkpoint.sha256)
        assert checkpoint.url.startswith("https://")
        assert checkpoint.size > 3e8 if in_full else checkpoint.size == 0
    assert len({c.sha256 for c in checkpoints.CHECKPOINTS.values()}) == len(checkpoints.CHECKPOINTS)


def test_the_first_digits_of_a_hash_suffice_where_no_more_are_published(tmp_path, monkeypatch):
    path = tmp_path / "r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth"
    torch.save(WEIGHTS, path)
    with pytest.raises(
        CheckpointError, match=r"is damaged: put there https.*SHA-256 449a7af9\.\.\."
    ):
        checkpoints.require_checkpoint(tmp_path, "r2plus1d_34_ig65m")
    known = replace(checkpoints.CHECKPOINTS["r2plus1d_34_ig65m"], sha256=sha256(path)[:8])
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "r2plus1d_34_ig65m", known)
    assert checkpoints.require_checkpoint(tmp_path, "r2plus1d_34_ig65m") == path
    assert checkpoints.load_checkpoint(path, sha256(path)[:8]).keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match="eight digits of a SHA-256 are needed, got 'abc'"):
        checkpoints.load_checkpoint(path, "abc")
