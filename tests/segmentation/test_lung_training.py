from functools import partial

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric, seed_everything
from skimage.draw import ellipse
from torch.utils.data import DataLoader

from lib import training
from lib.data.scan import Scan
from lib.data.store import save_volume
from lib.segmentation.lung_networks import NetworkSegmenter, build_network
from lib.segmentation.lung_training import LungSlices, load_slices, mean_dice, pixel_loss

SIDE = 32
SETTINGS = {"widths": [8, 16], "dropout": 0.1, "size": SIDE}


def thorax(shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Two slices in HU, the second without lungs, and their lungs."""
    voxels, lungs = np.full((2, 64, 64), -1000, np.int16), np.zeros((2, 64, 64), np.uint8)
    body = ellipse(32, 32, 26, 30)
    voxels[:, body[0], body[1]] = 40
    for lung, column in ((1, 20 + shift), (2, 44 + shift)):
        shape = ellipse(32, column, 16, 9)
        lungs[0][shape], voxels[0][shape] = lung, -850
    return voxels, lungs


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set of four scans, of which the last has no mask."""
    for kind in ("scans", "lungs"):
        (tmp_path / "made" / kind).mkdir(parents=True)
    for number in range(4):
        voxels, lungs = thorax(shift=number - 2)
        save_volume(tmp_path / f"made/scans/s{number}.b2nd", voxels)
        if number < 3:
            save_volume(tmp_path / f"made/lungs/s{number}.b2nd", lungs)
    return tmp_path / "made"


NAMES = [f"s{number}" for number in range(4)]


@pytest.mark.parametrize("network", ["unet", "bcdunet"])
def test_slices_of_all_scans_with_a_mask_at_the_networks_size(prepared, network):
    slices = load_slices(NAMES, prepared, network=network, size=SIDE)
    assert len(slices) == 6
    picture, target = slices[0]
    for one in (picture, target):
        assert one.shape == (1, SIDE, SIDE) and one.dtype == torch.uint8
    inside = target[0, SIDE // 2, 20 // 2 - 1].item()
    assert inside == {"unet": 255, "bcdunet": 0}[network]  # bcdunet predicts what is around
    share = (thorax(-2)[1][0] > 0).mean()
    if network == "unet":
        assert target.float().mean().item() / 255 == pytest.approx(share, abs=0.01)
        assert not slices[1][1].any()


def test_flipping_mirrors_picture_and_target_together_and_every_other_time():
    pictures = torch.arange(8, dtype=torch.uint8).reshape(1, 1, 1, 8)
    slices = LungSlices(pictures, pictures + 8, flip=True)
    torch.manual_seed(0)
    drawn = [slices[0] for _ in range(200)]
    for picture, target in drawn:
        assert torch.equal(picture + 8, target)
    mirrored = sum(torch.equal(picture, pictures[0].flip(-1)) for picture, _ in drawn)
    assert 70 < mirrored < 130
    assert torch.equal(LungSlices(pictures, pictures)[0][0], pictures[0])


def test_the_digest_tells_slices_apart():
    values = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    other = values.clone()
    other[1, 0, 3, 3] = 1
    digests = {LungSlices(*pair).digest() for pair in ((values, other), (other, values))}
    assert len(digests | {LungSlices(values, other.clone()).digest()}) == 2


def test_scans_without_masks_or_with_those_of_others_are_refused(prepared):
    load = partial(load_slices, prepared=prepared, network="unet", size=SIDE)
    with pytest.raises(ValueError, match="none of these scans of made has a true lung mask"):
        load(NAMES[3:])
    save_volume(prepared / "lungs/s3.b2nd", np.zeros((1, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="of s3 do not match"):
        load(NAMES)


class Echo(torch.nn.Module):
    """Takes the picture for the probability."""

    def forward(self, pictures):
        return torch.logit(pictures.clamp(1e-4, 1 - 1e-4))


def test_loss_and_dice_by_hand():
    pictures = torch.tensor([[[[255, 255, 0, 0]]]], dtype=torch.uint8)
    targets = torch.tensor([[[[255, 0, 0, 0]]]], dtype=torch.uint8)
    batch = (pictures, targets)
    wrong, right = -np.log(1e-4), -np.log(1 - 1e-4)
    assert pixel_loss(Echo(), batch).item() == pytest.approx((wrong + 3 * right) / 4, rel=1e-3)
    dice = partial(mean_dice, Echo(), to_device=lambda given: given)
    assert dice([batch]) == pytest.approx(2 / 3)
    assert dice([batch, (targets, targets)]) == pytest.approx(4 / 5)  # pixels, not slices, count
    assert dice([(targets * 0, targets * 0)]) == 1


@pytest.mark.parametrize("network", ["unet", "bcdunet"])
def test_a_network_trained_on_few_slices_knows_them(prepared, tmp_path, network):
    settings = SETTINGS | {"network": network}
    slices = load_slices(NAMES, prepared, network=network, size=SIDE)
    fabric = Fabric(accelerator="cpu")
    seed_everything(0, verbose=False)
    model = build_network(network, settings)
    history = training.fit(
        model,
        fabric=fabric,
        optimizers=[torch.optim.Adam(model.parameters(), lr=0.01)],
        train_batches=DataLoader(slices, batch_size=2, shuffle=True),
        validation_batches=DataLoader(slices, batch_size=6),
        loss=pixel_loss,
        score=partial(mean_dice, to_device=fabric.to_device),
        epochs=40,
        folder=tmp_path / "trained",
        seed=0,
        fingerprint=settings,
    )
    assert max(row["validation_score"] for row in history) > 0.95
    segmenter = NetworkSegmenter(weights=tmp_path / "trained/best.safetensors", batch_size=4)
    for shift in (-2, -1, 0):
        voxels, truth = thorax(shift)
        mask = segmenter(Scan(voxels))
        assert (
            2 * ((mask == truth) & (truth > 0)).sum() / ((mask > 0).sum() + (truth > 0).sum()) > 0.9
        )
