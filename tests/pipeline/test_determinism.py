"""Two runs from nothing on one machine end with the same bytes."""

import pytest
import yaml

pytestmark = pytest.mark.pipeline


def test_two_fresh_clones_give_the_same_data_latents_text_model_and_figures(finished, make_project):
    other = make_project("second-clone")
    other.repro()
    first, second = (
        yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"] for project in (finished, other)
    )
    depends_on_the_machine = {"reports/data_docs", "reports/train/run.json"}
    for stage in first:
        ours, theirs = ({out["path"]: out["md5"] for out in lock[stage]["outs"]} for lock in (first, second))
        assert ours.keys() == theirs.keys()
        for path in ours.keys() - depends_on_the_machine:
            assert ours[path] == theirs[path], f"{stage}: {path}"
