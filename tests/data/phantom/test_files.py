from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lib.data.phantom
from lib.data.datasets import list_scans
from lib.data.phantom import (
    CODE,
    PhantomRecord,
    draw_phantom,
    make_phantom,
    plan_phantoms,
    record_text,
    write_plan,
)
from lib.data.readers import read_scan
from lib.data.scan_map import map_scans

SIZE = 40


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_our_convention(image):
    """Voxels (towards feet, back, left) of an image of any orientation, by nibabel alone."""
    right_front_head = nibabel.as_closest_canonical(image)
    return np.asanyarray(right_front_head.dataobj)[::-1, ::-1, ::-1].transpose(2, 1, 0)


@pytest.mark.parametrize(("scanner", "codes"), [("A", "LPS"), ("B", "RAS")])
def test_drawn_scan_reads_back_equal(tmp_path, record, scanner, codes):
    record = replace(record, scanner=scanner)
    result = draw_phantom(record, tmp_path, size=SIZE, hounsfield=True)
    phantom = make_phantom(record, size=SIZE)
    volumes = {"scan": phantom.scan.voxels, "lungs": phantom.lungs, "lesions": phantom.lesions}
    assert contents(tmp_path).keys() == {f"{name}.nii.gz" for name in volumes}
    for name, expected in volumes.items():
        image = nibabel.load(tmp_path / f"{name}.nii.gz")
        assert "".join(nibabel.aff2axcodes(image.affine)) == codes
        assert image.get_data_dtype() == expected.dtype
        np.testing.assert_array_equal(in_our_convention(image), expected)
        spacing = image.header.get_zooms()[::-1]
        np.testing.assert_allclose(spacing, phantom.scan.spacing_mm, rtol=1e-5)
    assert result == {
        "label": record.label,
        "slices": record.slices,
        "lung_voxels": (phantom.lungs > 0).sum(),
        "lesion_voxels": (phantom.lesions > 0).sum(),
    }


def test_pictures_are_one_file_per_slice(tmp_path, record):
    draw_phantom(record, tmp_path, size=64, hounsfield=False)
    pictures = make_phantom(record, size=64, hounsfield=False).scan.voxels
    slices = [f"slices/{index}.jpg" for index in range(len(pictures))]
    assert contents(tmp_path).keys() == {*slices, "lungs.nii.gz", "lesions.nii.gz"}
    for name, picture in zip(slices, pictures, strict=True):
        with Image.open(tmp_path / name) as image:
            assert image.mode == "L"
            assert np.abs(np.asarray(image).astype(int) - picture).mean() < 4


@pytest.mark.parametrize("hounsfield", [True, False])
def test_second_drawing_gives_the_same_bytes(tmp_path, record, hounsfield):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        draw_phantom(record, tmp_path / name, size=SIZE, hounsfield=hounsfield)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_plan_file_holds_one_row_per_scan(tmp_path):
    plan = plan_phantoms(scans_per_class={"train": 2, "test": 1}, seed=0)
    path = write_plan(plan, tmp_path)
    assert path == tmp_path / "scans.csv"
    table = pd.read_csv(path)
    assert list(table.columns[:5]) == ["scan_id", "patient_id", "label", "split", "scanner"]
    assert [PhantomRecord(**row) for row in table.to_dict("records")] == plan


def draw_data_set(root, seed, *, hounsfield=True):
    plan = plan_phantoms(scans_per_class={"train": 1}, seed=seed, slices=(1, 2))
    write_plan(plan, root)
    return map_scans(
        draw_phantom,
        plan,
        root / "scans",
        suffix="",
        parameters={"size": SIZE, "hounsfield": hounsfield},
        inputs=record_text,
        code=CODE,
        description="draw",
        keep_going=False,
    )


def test_a_mapped_data_set_is_listed_read_and_redrawn_only_when_its_plan_changes(tmp_path):
    assert not any(result.skipped for result in draw_data_set(tmp_path, seed=0))
    listing = list_scans("phantom", tmp_path)
    assert len(listing.scans) == 3 and not listing.problems
    for source in listing.scans:
        scan = read_scan(source.files[0])
        assert scan.voxels.shape == (int(source.attributes["slices"]), SIZE, SIZE)
        assert source.lung_mask and source.lesion_mask
    assert all(result.skipped for result in draw_data_set(tmp_path, seed=0))
    assert not any(result.skipped for result in draw_data_set(tmp_path, seed=1))


def test_code_names_every_module_of_the_package():
    package = Path(lib.data.phantom.__file__).parent
    named = {Path(part.__file__) for part in CODE if not isinstance(part, str)}
    assert set(package.glob("*.py")) - {package / "__init__.py"} <= named
