"""How a training is launched, on which device it computes, and which settings of its surroundings change nothing."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import train_in_processes
from projects import ROOT, Project
from safetensors.torch import load_file

from latentloom.errors import UserError
from latentloom.training.processes import check_environment, launch, make_accelerator

SRC = str(ROOT / "src")
SCRIPT = """
import os, sys, time
sys.path.insert(0, SRC)
from latentloom.training.processes import launch
launch(sys.argv[0])
print(os.getpid(), sys.argv[1:], os.environ.get("X"), flush=True)
time.sleep(60)
"""


def environment(**values: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LATENTLOOM_LAUNCH")} | values


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (None, None),
        ("", None),
        (" ", None),
        ("python", ["python", "a script.py"]),
        ("env X=1 python", ["env", "X=1", "python", "a script.py"]),
        ("env 'X=two words' '/a b/python'", ["env", "X=two words", "/a b/python", "a script.py"]),
    ],
)
def test_the_launch_command_is_split_as_a_shell_would(monkeypatch, command, words):
    started = []
    monkeypatch.setattr("os.execvp", lambda program, arguments: started.append((program, arguments)))
    monkeypatch.setenv("LATENTLOOM_LAUNCHED", "")  # so that it is as before when the test ends
    monkeypatch.delenv("LATENTLOOM_LAUNCHED")
    monkeypatch.delenv("LATENTLOOM_LAUNCH", raising=False)
    if command is not None:
        monkeypatch.setenv("LATENTLOOM_LAUNCH", command)
    launch("a script.py")
    assert started == ([] if words is None else [(words[0], words)])
    launch("a script.py")  # as the script that was launched does
    assert len(started) == (words is not None)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_script_is_launched_once_in_the_process_that_was_started_so_that_signals_reach_it(tmp_path):
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT.replace("SRC", repr(SRC)))
    given = environment(LATENTLOOM_LAUNCH=f"env 'X=two words' '{sys.executable}'")
    process = subprocess.Popen([sys.executable, str(script)], env=given, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"{process.pid} [] two words\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.stdout.close()


@pytest.mark.parametrize(
    ("command", "why"), [("no-such-launcher --x", "No such file"), ("'open", "No closing quotation")]
)
def test_a_launch_command_that_cannot_start_is_named(monkeypatch, command, why):
    monkeypatch.delenv("LATENTLOOM_LAUNCHED", raising=False)
    monkeypatch.setenv("LATENTLOOM_LAUNCH", command)
    with pytest.raises(UserError, match=f"LATENTLOOM_LAUNCH={command} cannot be started .*{why}"):
        launch("train.py")
    monkeypatch.delenv("LATENTLOOM_LAUNCHED", raising=False)


def test_a_job_is_warned_that_the_rank_decides_which_gpu_it_takes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("latentloom.training.processes.Accelerator", lambda **settings: settings)
    with pytest.warns(UserWarning, match="LATENTLOOM_DEVICE=cuda:1 names one device, .* its LOCAL_RANK decides"):
        make_accelerator(torch.device("cuda:1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_accelerator(torch.device("cuda"))


@pytest.mark.filterwarnings("ignore:LATENTLOOM_DEVICE=cuda")
@pytest.mark.parametrize(
    ("device", "rank", "chosen"),
    [
        ("cuda:1", None, "cuda:1"),
        ("cuda", None, None),
        ("cpu", None, None),
        ("mps", None, None),
        ("cuda:1", "0", None),
        ("cuda", "0", None),
    ],
)
def test_accelerate_gets_a_numbered_gpu_in_a_single_process_and_the_launchers_rank_decides_in_a_job(
    monkeypatch, device, rank, chosen
):
    given, current = [], []
    monkeypatch.setattr(
        "latentloom.training.processes.Accelerator",
        lambda **settings: given.append(os.environ.get("ACCELERATE_TORCH_DEVICE")),
    )
    monkeypatch.setattr("torch.cuda.set_device", lambda device: current.append(str(device)))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")  # of the surroundings: no choice of the project's
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    make_accelerator(torch.device(device))
    assert given == [chosen]
    assert current == ([chosen] if chosen else [])


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_what_would_change_the_algorithm_is_rejected_by_name(variable, name):
    with pytest.raises(UserError, match=f"{variable}=true asks for {name}"):
        check_environment({variable: "true"})
    check_environment({variable: "false"})


@pytest.mark.slow
def test_settings_of_an_accelerate_config_change_no_bit_of_a_training(tmp_path):
    config = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_TORCH_DEVICE": "meta",
    }
    train_in_processes.main(tmp_path / "plain")
    command = ["python", train_in_processes.__file__, tmp_path / "config"]
    given = Project(ROOT).environment | config | {"PYTHONPATH": "src"}
    subprocess.run(command, cwd=ROOT, env=given, check=True, timeout=300)
    plain, configured = (load_file(tmp_path / name / "0.safetensors") for name in ("plain", "config"))
    assert plain.keys() == configured.keys()
    assert all(torch.equal(tensor, configured[name]) for name, tensor in plain.items())
