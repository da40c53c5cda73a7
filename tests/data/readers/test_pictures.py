import numpy as np
import pytest
import tifffile
from PIL import Image

from lib.data.readers import read_label_volume, read_scan, source_files
from tests.data.readers.made_files import GREY, write_pictures


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_grey_pictures_of_every_mode_are_exact(tmp_path, mode):
    Image.fromarray(GREY).convert(mode).save(tmp_path / "a.png")
    scan = read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.voxels[0], GREY)
    assert (scan.voxels.dtype, scan.spacing_mm, scan.flags) == (np.uint8, None, ())


def test_transparent_pixels_are_black(tmp_path):
    pixels = np.dstack([np.full((4, 4), 255, np.uint8)] * 3 + [np.eye(4, dtype=np.uint8) * 255])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.png").voxels[0], pixels[..., 3])


def test_exif_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    scan = read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.voxels[0], GREY[::-1, ::-1])
    assert scan.flags == ("turned as EXIF says",)


def test_jpeg_named_png_is_read(tmp_path):
    Image.new("L", (9, 8), 77).save(tmp_path / "a.png", format="JPEG")
    assert (read_scan(tmp_path / "a.png").voxels == 77).all()


@pytest.mark.parametrize("odd_name", ["0.png", "5.png"])
def test_mixed_sizes_become_the_most_common_size(tmp_path, odd_name):
    folder = write_pictures(tmp_path / "s", ("1.png", "2.png"))
    Image.new("L", (24, 20), 200).save(folder / odd_name)
    scan = read_scan(folder)
    assert scan.voxels.shape == (3, 10, 12)
    assert sorted(scan.voxels[:, 5, 5].tolist()) == [0, 40, 200]
    assert scan.flags == ("mixed slice sizes",)
    assert read_label_volume(folder).shape == (3, 10, 12)


def test_coloured_picture_is_flagged(tmp_path):
    picture = Image.new("RGB", (40, 40), (90, 90, 90))
    picture.paste((255, 0, 0), (4, 4, 16, 16))
    picture.save(tmp_path / "a.png")
    assert read_scan(tmp_path / "a.png").flags == ("coloured picture",)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_label_pictures_are_exact(tmp_path, mode):
    labels = (GREY % 3).astype(np.uint8)
    if mode == "1":
        labels = (labels > 0).astype(np.uint8)
        picture = Image.fromarray(labels.astype(bool))
    elif mode == "P":
        picture = Image.fromarray(labels).convert("P")
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    else:
        picture = Image.fromarray(labels).convert(mode)
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_label_volume(tmp_path / "m.png")[0], labels)


@pytest.mark.real
def test_real_tiff_slices(real_data):
    folder = real_data / "finding-lungs"
    for file in source_files(folder / "2d_images")[::20]:
        scan = read_scan(file)
        stored = tifffile.imread(file)
        np.testing.assert_array_equal(scan.voxels[0], np.where(stored < -1024, -1000, stored))
        assert scan.flags == (("padding",) if stored.min() < -1024 else ())
        mask = read_label_volume(folder / "2d_masks" / file.name)
        np.testing.assert_array_equal(mask[0], tifffile.imread(folder / "2d_masks" / file.name))


@pytest.mark.real
def test_all_real_pictures_are_readable(real_data):
    files = [file for file in (real_data / "covid-ct").rglob("*") if file.is_file()]
    assert len(files) == 331
    flags = [read_scan(file).flags for file in files]
    assert set(flags) <= {(), ("coloured picture",)}


@pytest.mark.real
def test_real_picture_folder(real_data):
    folder = next((real_data / "cov19-ct-db-sample" / "validation" / "covid").iterdir())
    scan = read_scan(folder)
    assert scan.voxels.shape == (25, 512, 512) and scan.voxels.dtype == np.uint8
