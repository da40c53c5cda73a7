"""A small copy of the study, with tiny parameters, that the tests may run and break."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

COPIED = ["lib", "notebooks", "params.yaml", "dvc.yaml", ".dvc/config", ".dvcignore", ".gitignore"]
TINY = {
    "study": {  # one of each to train
        "segmentations": ["none"],
        "comparators": ["densenet3d121"],
        "scored_segmentations": ["morphology", "conventional", "sam2clip2sam"],
        "cnn_bert_configurations": ["rml_msc_affine"],
        "mask_net_configurations": ["head"],
        "picture_classifiers": ["light_cnn"],
    },
    "phantom": {
        "phantom": {
            "size": 64,
            "scans_per_class": {"train": 3, "validation": 2, "test": 3},
            "slices": [3, 6],
            "extra_slices": [1],
        },
        "phantom-8-bit": {
            "size": 64,
            "scans_per_class": {"train": 2, "validation": 1, "test": 2},
            "slices": [3, 5],
        },
    },
    "train_lung_network": {
        network: {"small": {"size": 32, "slices_per_epoch": 32, "epochs": 3}}
        for network in ("unet", "bcdunet")
    },
    "train_sam": {
        "slices_per_scan": 2,
        "tested_scans": 2,
        "prompts": 2,
        "batch_slices": 2,
        "steps_per_epoch": 2,
        "epochs": 2,
        "schedule": {"kind": "one-cycle", "total_steps": 4, "pct_start": 0.5},
    },
    "train_clip": {
        "slices": {"train": 12, "validation": 12, "test": 12},
        "batch_crops": 16,
        "steps_per_epoch": 2,
        "epochs": 2,
    },
    "ablate_sam2clip2sam": {"scans": 2, "slices_per_scan": 2},
    "test_confounder": {
        "phantom": {"size": 32, "slices": [2, 3]},
        "default": {
            "classifiers": ["densenet3d121"],
            "inputs": ["none"],
            "strengths": [1.0],
            "scans_per_class": {"train": 1, "validation": 1, "test": 2},
        },
    },
    "cross_data": {
        "phantom": {"size": 32, "slices": [2, 3]},
        "default": {
            "classifiers": ["densenet3d121"],
            "inputs": ["true lungs"],
            "scans_per_class": {"train": 1, "validation": 1, "test": 2},
        },
    },
    "classify": {
        "racnet": {
            "small": {"image_size": 32, "epochs": 3, "schedule": {"kind": "cosine", "T_max": 3}}
        },
        "densenet3d121": {
            "small": {
                "slices": 16,  # the least that it takes
                "image_size": 32,
                "epochs": 2,
                "schedule": {"kind": "cosine", "T_max": 2},
            }
        },
        "cnn_bert": {
            "small": {
                "resized_size": 40,
                "image_size": 32,
                "epochs": 2,
                "schedule": {"kind": "one-cycle", "total_steps": 2},
            }
        },
    },
    "train_lesions": {
        "small": {
            "validation_slices": 2,
            "slices_per_epoch": 4,
            "epochs": 1,
            "schedule": {"total_steps": 2},
        }
    },
    "classify_pictures": {
        "mask_net": {
            "small": {"image_size": 64},
            "configurations": {
                "head": {"small": {"epochs": 2, "schedule": {"kind": "cosine", "T_max": 2}}}
            },
        },
        "light_cnn": {
            "small": {
                "image_size": 32,
                "epochs": 1,
                "schedule": {"kind": "cosine", "T_max": 1},
            }
        },
    },
    "classify_mlp": {"matrix": [["both", "sigmoid"]], "small": {"epochs": 2}},
    "explain_cnn_bert": {"steps": 2},
}


def merge(values: dict, changes: dict) -> dict:
    """Values with some of them changed, nested."""
    nested = {k: merge(values[k], v) for k, v in changes.items() if isinstance(v, dict)}
    return values | changes | nested


def change_parameters(study: Path, changes: dict) -> None:
    path = study / "params.yaml"
    values = merge(yaml.safe_load(path.read_text()), changes)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def copy_study(repository: Path, study: Path) -> Path:
    """What a clone holds of the study, with tiny parameters."""
    for name in COPIED:
        source, target = repository / name, study / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (study / "reports/notebooks").mkdir(parents=True)
    change_parameters(study, TINY)
    return study


def environment(study: Path) -> dict[str, str]:
    """The environment's own programs first, and lib from the copy."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(study)}


def use_one_core() -> None:
    """The work is tiny: other processes would take longer to start than to do it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def run_in(study: Path, *command: str, check: bool = True) -> str:
    """Output of a command run in the copy; its failure fails the test with that output."""
    done = subprocess.run(
        command,
        cwd=study,
        env=environment(study),
        preexec_fn=use_one_core,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="session")
def make_study(repository, tmp_path_factory) -> Callable[[str], Path]:
    """Make a fresh copy of the study."""
    return lambda name: copy_study(repository, tmp_path_factory.mktemp(name) / "study")


def notebook_code(path: Path) -> list[str]:
    """Code cells of a notebook."""
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
