"""The base: a model that a training starts from, and what of it carries over to the network that is trained.

A tensor of the same name and shape is taken. One that the base lacks starts as in any training, one that the network
lacks is left behind, and both are named. Another shape is an error: then the two networks are not of one kind.

What the weights mean decides the rest. A latent of another VAE, or a noise level of another schedule, is another thing
by the same name: an error. The whitening of texts is part of the weights, so it is the base's, and a caption is read as
before; only with another text encoder it is measured anew. The latents' mean and standard deviation are those of the
new data, as for any model of it: so its figures compare, and weights that see little noise, which return what they see,
are right in any units.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from latentloom.diffusion.unet import UNet
from latentloom.errors import UserError
from latentloom.model_files import EncoderReference, ModelConfig, load_model

FAR = 1.25  # latents whose spread differs by more from the base's are worth a remark
WHITENING = ("text_whitening.", "token_whitening.")


@dataclass(frozen=True)
class Carried:
    """What a network takes of its base: tensors of the weights, by name."""

    taken: tuple[str, ...]
    new: tuple[str, ...]  # that start as in any training
    left: tuple[str, ...]  # of the base, that the network has no place for
    weights: int  # in `taken`
    remarks: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: what is taken, what starts anew and what is left behind, by the outermost module of each."""
        return [
            f"taken: {len(self.taken)} tensors with {self.weights:,} weights",
            f"start anew: {', '.join(_modules(self.new, [*self.taken, *self.left])) or 'none'}",
            *([f"left behind: {', '.join(_modules(self.left, [*self.taken, *self.new]))}"] if self.left else []),
            *(f"note: {remark}" for remark in self.remarks),
        ]


def compare(base: ModelConfig, wanted: ModelConfig, reference: str, *, strict: bool) -> Carried:
    """What a model of ``wanted`` takes of ``base``, by their configs alone.

    Args:
        reference: what the params call the base, for messages.
        strict: nothing may start anew or be left behind.

    Raises:
        UserError: naming all that does not fit, and what to set.
    """
    shapes, own = _shapes(base), _shapes(wanted)
    faults = _faults(base, wanted)
    common = [name for name in own if name in shapes]
    other = [f"  {name}: {shapes[name]} in the base, {own[name]} here" for name in common if shapes[name] != own[name]]
    if faults or other:
        raise UserError(
            "\n".join([f"train.init = {reference} does not fit:", *other, *faults, "or set train.init: null"])
        )
    remarks = []
    if base.text_encoder.fingerprint != wanted.text_encoder.fingerprint:
        common = [name for name in common if not name.startswith(WHITENING)]
        remarks.append(
            f"captions are read by {_named(wanted.text_encoder)}, and in the base by {_named(base.text_encoder)}: what "
            "it learnt of them holds as far as the two agree"
        )
    if set(wanted.trained_shapes) - set(base.trained_shapes):
        remarks.append(
            "which pictures are held out follows their pixels, and the base was trained on other sizes: it may have "
            "seen those that are held out now, so that their figures are too good"
        )
    ratios = [here / there for here, there in zip(wanted.latent_std, base.latent_std, strict=True)]
    if max(ratios) > FAR or min(ratios) < 1 / FAR:
        remarks.append(
            f"the channels of the latents have {min(ratios):.2f} to {max(ratios):.2f} times the standard deviation of "
            "the base's, and are standardised by their own: the weights have to adapt"
        )
    carried = Carried(
        taken=tuple(common),
        new=tuple(name for name in own if name not in common),
        left=tuple(name for name in shapes if name not in own),
        weights=sum(prod(own[name]) for name in common),
        remarks=tuple(remarks),
    )
    if strict and (carried.new or carried.left):
        line = f"train.init = {reference} has not just the layers of this network, as train.init_strict = true asks:"
        raise UserError("\n".join([line, *carried.lines(), "set train.init_strict: false"]))
    return carried


@torch.no_grad()
def take_weights(network: UNet, config: ModelConfig, folder: Path, reference: str, *, strict: bool) -> Carried:
    """Copy into ``network``, which ``config`` describes, what it takes of the model in ``folder``.

    Raises:
        UserError: as `compare`, or when the model cannot be read.
    """
    source, base = load_model(folder)
    carried = compare(base, config, reference, strict=strict)
    tensors, own = source.state_dict(), network.state_dict()
    for name in carried.taken:
        own[name].copy_(tensors[name])
    return carried


def _faults(base: ModelConfig, wanted: ModelConfig) -> list[str]:
    """What does not fit, by the params' keys, and what to set."""
    pairs = (
        ("model.widths", list(wanted.widths), list(base.widths)),
        ("model.emb_size", wanted.emb_size, base.emb_size),
        ("diffusion.schedule", wanted.schedule, base.schedule),
    )
    faults = [
        f"{key} = {here}, and the base has {there}: set {key}: {there}" for key, here, there in pairs if here != there
    ]
    if wanted.vae.fingerprint != base.vae.fingerprint:
        faults.append(
            f"encode_images.vae = {_named(wanted.vae)}, and the base knows the latents of {_named(base.vae)}: set "
            f"encode_images.vae: {base.vae.reference}"
        )
    dims = (("embeddings", wanted.text_dim, base.text_dim), ("token states", wanted.token_dim, base.token_dim))
    for what, here, there in dims:
        if here and there and here != there:
            faults.append(
                f"encode_text.model = {_named(wanted.text_encoder)}, whose {what} have {here} numbers, and the base "
                f"reads those of {_named(base.text_encoder)}, of {there}: set encode_text.model: "
                f"{base.text_encoder.reference}"
            )
    return faults


def _named(encoder: EncoderReference) -> str:
    return f"{encoder.reference} ({encoder.fingerprint[:12]})"


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model's weights, by name."""
    with torch.device("meta"):  # which needs no memory, and no random numbers
        return {name: tuple(tensor.shape) for name, tensor in config.network().state_dict().items()}


def _modules(names: Iterable[str], others: list[str]) -> list[str]:
    """The outermost modules that hold ``names`` and none of ``others``: all of a new layer is one name."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        outer = (".".join(parts[:count]) for count in range(1, len(parts)))
        found[next((own for own in outer if not any(other.startswith(f"{own}.") for other in others)), name)] = None
    return list(found)
