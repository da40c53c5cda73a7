"""The graph, the notebooks, the parameters and the imports must tell the same story."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
PARAMETERS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
NOTEBOOKS = {path.stem: path for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb"))}
PICTURES_ONLY = "lib/reporting"  # of a notebook that computes: changes no output but the pictures


def commands(stage: str) -> dict[str, str]:
    """The command of every notebook that a stage runs.

    The first one's name begins the stage's own; what others are called begins like the stage.
    """
    listed = STAGES[stage]["cmd"]
    lines = listed if isinstance(listed, list) else [listed]
    found = {re.match(r"\$\{run\}/(\w+)\.ipynb ", line)[1]: line for line in lines}
    first, *others = found
    assert stage == first or stage.startswith(f"{first}_")
    assert all(name.startswith(f"{stage}_") for name in others)
    return found


def cells(name: str, kind: str = "code") -> list[dict]:
    return [c for c in json.loads(NOTEBOOKS[name].read_text())["cells"] if c["cell_type"] == kind]


def source(name: str) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(name))


def default_parameters(name: str) -> set[str]:
    (cell,) = [c for c in cells(name) if "parameters" in c["metadata"].get("tags", [])]
    tree = ast.parse("".join(cell["source"]))
    return {target.id for node in tree.body for target in node.targets}


def module_files(module: str) -> set[Path]:
    """The file of a module of lib, and the __init__ files above it."""
    parts = module.split(".")
    found = set()
    for end in range(1, len(parts) + 1):
        path = REPOSITORY.joinpath(*parts[:end])
        found |= {p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()}
    return found


def imports(code: str) -> set[Path]:
    """Files of lib that some code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "lib":
                found |= module_files(name)
    return found


def transitive_imports(code: str, *, without: str = "") -> set[str]:
    """Files of lib that some code imports, and those import, not looking into one folder."""
    waiting, seen = imports(code), set()
    while waiting:
        path = waiting.pop()
        left_out = without and path.is_relative_to(REPOSITORY / without)
        if path not in seen and not left_out:
            seen.add(path)
            waiting |= imports(path.read_text())
    files = {path.relative_to(REPOSITORY).as_posix() for path in seen}
    return {file for file in files if not file.endswith("__init__.py")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_notebook_of_its_name_with_parameters_that_it_has(stage):
    for name, command in commands(stage).items():
        assert command.split()[1].startswith(f"reports/notebooks/{name}")
        passed = re.findall(r"-p (\w+) ", command)
        assert set(passed) <= default_parameters(name)
    assert STAGES[stage]["desc"]


def chosen_modules(stage: str) -> list[str]:
    """What a stage imports by the name of a classifier, one at a time."""
    names = {
        "classify": ["racnet"],
        "classify_cnn_bert": ["cnn_bert"],
        "classify_comparators": [
            name for name in PARAMETERS["classify"] if name not in ("racnet", "cnn_bert")
        ],
        "classify_pictures": ["mask_net"],
        "classify_pictures_fine_tuned": ["mask_net"],
        "classify_pictures_comparators": PARAMETERS["sizes"]["full"]["picture_classifiers"],
        "cost": PARAMETERS["classify"],
        "cross_data": PARAMETERS["classify"],
        "test_confounder": PARAMETERS["classify"],
    }.get(stage)
    return [f"from lib.classification import {name}" for name in names] if names else [""]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_the_lib_files_that_its_notebook_really_uses(stage):
    declared = {dep for dep in STAGES[stage]["deps"] if dep.startswith("lib/")}
    without = "" if stage in ("audit", "tables", "figures", "cost") else PICTURES_ONLY
    needed = set()
    for chosen in chosen_modules(stage):
        module = f"lib/classification/{chosen.split()[-1]}.py" if chosen else ""
        named = {
            dep.replace("lib/classification/${item.classifier}.py", module) for dep in declared
        }
        assert [dep for dep in named if not (REPOSITORY / dep).exists()] == []
        code = "\n".join(map(source, commands(stage)))
        used = transitive_imports(f"{code}\n{chosen}", without=without)
        assert {f for f in used if not any(f == d or f.startswith(f"{d}/") for d in named)} == set()
        needed |= {d for d in named if any(f == d or f.startswith(f"{d}/") for f in used)}
    assert {dep for dep in declared if "${" not in dep} - needed == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_the_sections_of_parameters_that_its_notebook_reads(stage):
    tracked = {parameter.split(".")[0] for parameter in STAGES[stage].get("params", [])}
    read = set(re.findall(r'params\["(\w+)"\]', "".join(map(source, commands(stage)))))
    assert read <= tracked
    assert tracked <= set(PARAMETERS)


def test_data_sets_in_parameters_are_those_of_the_adapters():
    from lib.data.datasets import DATA_SETS, LABELS

    assert set(PARAMETERS["data_sets"]) == set(DATA_SETS)
    for described in PARAMETERS["data_sets"].values():
        models = {"lung_models", "lesion_models", "starts_from"}
        assert set(described) == {"preset", "positive", "shares", "options", *models}
        assert {described[name] for name in models} <= {*DATA_SETS, None}
        assert set(described["positive"]) <= set(LABELS)
    for size in PARAMETERS["sizes"].values():
        assert set(size["classification"]) <= set(size["data_sets"])


def test_the_study_is_one_of_its_sizes_and_full_leaves_nothing_out():
    default, full = PARAMETERS["sizes"]["default"], PARAMETERS["sizes"]["full"]
    assert PARAMETERS["study"] == default and default["size"] == "default"
    assert full["size"] == "full" and full.keys() == default.keys()
    for name, values in default.items():
        if isinstance(values, list):
            assert set(values) <= set(full[name])
    assert {*full["comparators"], "racnet", "cnn_bert"} == set(PARAMETERS["classify"])
    assert {*full["picture_classifiers"], "mask_net"} == set(PARAMETERS["classify_pictures"])
    assert {*full["lesion_configurations"]} == set(PARAMETERS["train_lesions"]["configurations"])
    for size in (default, full):  # DVC cannot join lists
        assert size["listed_pictures"] == size["picture_sets"] + size["fine_tuned"]
        assert not set(size["single_slices"]) & set(size["data_sets"])


def test_dvc_reads_the_graph():
    names = [stage.addressing for stage in Repo(REPOSITORY).index.stages]
    assert "classify@phantom-none-racnet" in names
    assert {name.split("@")[0] for name in names} == set(STAGES)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_thin_and_carries_no_outputs(name):
    code = cells(name)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in code}) == len(code)
    lines = [line for line in source(name).splitlines() if line.strip()]
    assert len(code) <= 14 and len(lines) <= 110
    assert not re.search(r"^(def|class|async def) ", source(name), flags=re.M)
    text = "\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    assert text.startswith("# ")
    assert "**Look.**" in text or name in ("figures",)
