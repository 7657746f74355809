"""The processes of a training: how they are launched, and which device each of them computes on.

A training is one process, or the many that a launcher such as `accelerate launch` or `torchrun` starts. Of Accelerate
only this much is used: the device, and gradients averaged over processes. Its other settings, which a launcher passes
on from an `accelerate config` file as ``ACCELERATE_...``, would change what ``params.yaml`` says.
"""

import os
import shlex
import warnings
from collections.abc import Mapping

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed import GradBucket, ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from latentloom.errors import UserError
from latentloom.params import TrainParams

LAUNCH = "LATENTLOOM_LAUNCH"
LAUNCHED = "LATENTLOOM_LAUNCHED"  # marks what `launch` started, which must not launch again

# What changes the algorithm, or splits the model itself over processes, and cannot be set back from here.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def launch(script: str) -> None:
    """Replace this process by the launcher that ``LATENTLOOM_LAUNCH`` names, with ``script`` appended, if it names one.

    So ``LATENTLOOM_LAUNCH="accelerate launch --num-processes 4"`` means the same under every shell. The launcher keeps
    this process's id, so signals reach it.

    Raises:
        UserError: when it cannot be parsed or started.
    """
    value = os.environ.get(LAUNCH, "")
    if not value.strip() or LAUNCHED in os.environ:
        return
    try:
        command = shlex.split(value)
        os.environ[LAUNCHED] = "1"
        os.execvp(command[0], [*command, script])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{LAUNCH}={value} cannot be started ({error}); it takes a command: accelerate launch"
        ) from error


def make_accelerator(device: torch.device, *, static_graph: bool = False) -> Accelerator:
    """The `Accelerator` of this process, on ``device``, with no setting but its own.

    Args:
        device: where a single process computes. In a job of several, it decides between CPU and GPU alone: the
            launcher's ``LOCAL_RANK`` says which GPU.
        static_graph: every backward pass uses the same weights, not all of them perhaps, and averages their gradients.
            torch 2.13 fails where some do not average, as with ``train.gradient_accumulation``.

    Raises:
        UserError: when the environment asks for an algorithm other than this one, such as DeepSpeed.
    """
    check_environment(os.environ)
    launched = int(os.environ.get("LOCAL_RANK", -1)) >= 0
    if launched and device.index is not None:
        warnings.warn(
            f"LATENTLOOM_DEVICE={device} names one device, but a launcher started this process: its LOCAL_RANK decides "
            "which GPU it takes",
            stacklevel=2,
        )
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if device.index is not None and not launched:  # else Accelerate's own choice is right
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    # The setting that is to take its place is in neither Accelerate nor older versions of torch.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # the loop has its own autocast, the same on every device
        dynamo_backend="no",
        # A plugin, because the environment overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # the network's are constants
                static_graph=static_graph,
            )
        ],
    )


def distribute(network: nn.Module, accelerator: Accelerator, params: TrainParams) -> nn.Module:
    """``network``, whose gradients are averaged over all processes, sent in ``train.reduce_precision``."""
    network = accelerator.prepare_model(network)
    if isinstance(network, DistributedDataParallel) and params.reduce_precision == "bf16":
        network.register_comm_hook(None, _average_in_bf16)
    return network


def _average_in_bf16(group: ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's hook under another name, by which torch does not know it: it allows its own on GPUs alone."""
    return bf16_compress_hook(group, bucket)


def check_environment(environment: Mapping[str, str]) -> None:
    """Reject what a launcher's config asks for and this training does not do.

    Raises:
        UserError: naming it.
    """
    for variable, name in UNSUPPORTED.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UserError(
                f"{variable}={environment[variable]} asks for {name}, which this training does not do: every process "
                "holds the whole network. Choose plain multi-GPU or multi-CPU in `accelerate config`"
            )
