"""dvc.yaml's dependencies are what the stages import: an edit reruns what it must, and nothing else."""

from pathlib import Path

import pytest
import yaml

from latentloom.source_code import deciding_modules

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_that_decides_its_outs(stage):
    modules = deciding_modules(ROOT / "pipelines" / f"{stage}.py", ROOT / "src" / "latentloom")
    expected = {path.relative_to(ROOT).as_posix() for path in modules}
    assert {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")} == expected
