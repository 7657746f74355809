"""The files that docs/scaling.md shows have the form that the tools which read them ask for."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def manifests() -> dict[str, dict]:
    """Those of Kubernetes, by kind."""
    documents = [own for block in blocks("yaml") for own in yaml.safe_load_all(block)]
    return {own["kind"]: own for own in documents if "kind" in own}


def test_the_cluster_of_virtual_machines_is_one_that_ray_up_accepts():
    pytest.importorskip("ray")
    from ray.autoscaler._private import util

    (shown,) = [yaml.safe_load(block) for block in blocks("yaml") if block.startswith("# cluster.yaml")]
    config = util.prepare_config(shown)
    util.validate_config(config)
    assert config["head_node_type"] in shown["available_node_types"]
    with pytest.raises(Exception, match="max_worker"):
        util.validate_config(config | {"max_worker": 4})


@pytest.mark.parametrize("script", [own for own in blocks("bash") if own.startswith("#!")])
def test_job_scripts_are_bash_and_ask_slurm_at_their_top(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    head = script.partition("\n\n")[0].splitlines()
    assert len(head) > 3 and all(line.startswith("#SBATCH --") for line in head[1:])


def test_manifests_name_what_kubernetes_and_kuberay_require():
    shown = manifests()
    assert shown.keys() == {"Service", "Job", "RayJob"}
    assert all(own["apiVersion"] and own["metadata"]["name"] for own in shown.values())
    spec = shown["RayJob"]["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["LATENTLOOM_ENGINE"] == "ray"
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(group["groupName"] and group["replicas"] <= group["maxReplicas"] for group in groups[1:])
    pods = [group["template"]["spec"] for group in groups] + [shown["Job"]["spec"]["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        assert container["name"] and container["image"]
        assert {own["name"] for own in container["volumeMounts"]} == {own["name"] for own in pod["volumes"]}
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
