"""A model as three graphs for ONNX Runtime, which runs them from many languages, and a script that shows how.

    text_encoder.onnx    input_ids, attention_mask (B, T) -> pooled (B, dim), states (B, T, token_dim)
    network.onnx         x_t (B, C, h, w), noise_levels (B,), pooled[, tokens (B, T, token_dim), mask (B, T)] -> x0_hat
    decoder.onnx         latents (B, C, h, w), standardised -> pixels (B, 3, H, W) from -1 to 1
    tokenizer.json, sampling.json
    sample.py            samples with NumPy: `onnx_sample`
    README.md, samples/, latentloom.json

A folder is left only where the graphs compute what the model does, at other sizes than they were traced with, too.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from latentloom.encoding.text_embedder import TextEmbedder
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.export.card import card
from latentloom.export.diffusers_folder import unet_config
from latentloom.export.diffusers_unet import LatentLoomUNet
from latentloom.export.folders import Exported, new_folder
from latentloom.files import write_json, write_text
from latentloom.registry.figures import Figures
from latentloom.registry.models import FoundModel

SCRIPT = Path(__file__).with_name("onnx_sample.py")
AGREES = 1e-3  # the largest difference, in standardised latents, pixels from -1 to 1, and embeddings
LARGEST_FILE = 1_900_000_000  # bytes of weights in one file: what is more lies beside it
TOKENIZER = "tokenizer.json"
LONGEST_SIDE = 512  # of a latent
USE = """

```sh
pip install numpy onnxruntime pillow tokenizers
python sample.py {shell_prompt} --seed 0 -o picture.png
```

`sample.py` reads the files beside it, and needs neither torch nor the training code. It is short: in another language,
do what it does. The graphs, of which B, T, h and w may be any (h and w such that images are multiples of {multiple}
pixels; {size} is the model's own):

| graph | inputs | outputs |
|---|---|---|
| `text_encoder.onnx` | `input_ids`, `attention_mask` (B, T), int64, at most {max_tokens} tokens, from `tokenizer.json` | `pooled` (B, dim), `states` (B, T, token_dim) |
| `network.onnx` | `x_t` (B, C, h, w), `noise_levels` (B,), `pooled`; of a model of token states also `tokens` (the states) and `mask` (B, T), bool | `x0_hat` (B, C, h, w), the clean latent |
| `decoder.onnx` | `latents` (B, C, h, w) | `pixels` (B, 3, H, W), from -1 to 1 |

No text is a `pooled` of zeros and a `mask` of False. `sampling.json` has the schedule and the settings: {steps} steps,
guidance {guidance}. NumPy's noise is not torch's, so a seed gives another picture than `latentloom sample` does with
it; from the same noise the two differ by rounding.
"""  # noqa: E501


def export_onnx(
    found: FoundModel, folder: Path, root: Path, *, figures: Figures, prompts: Sequence[str] | None = None
) -> None:
    """Write the model as ``folder``; the arguments are those of `export_diffusers`.

    Raises:
        UserError: when the folder is not empty, the extra ``onnx`` is not installed, there is no prompt, the tokenizer
            has no ``tokenizer.json``, or a graph computes something else than the model.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install "latentloom[onnx]"') from error
    with new_folder(folder) as made:
        exported = Exported.load(found, root, prompts)
        model = exported.model
        _save_tokenizer(model, made, exported.prompts)
        for graph in graphs(model):
            graph.save(made)
        write_json(made / "sampling.json", sampling(exported))
        write_text(made / "sample.py", SCRIPT.read_text(encoding="utf-8"))
        exported.save_samples(made)
        exported.save_origin(made)
        write_text(made / "README.md", card(exported, figures, USE, library="onnx"))


def sampling(exported: Exported) -> dict:
    """What the script has to know besides the graphs."""
    model = exported.model
    known = {
        "schedule": model.config.schedule,
        "latent_bound": model.config.latent_bound,
        "latent_shape": list(model.config.latent_shape),
        "factor": model.codec.vae.factor,
        "multiple": model.codec.vae.factor * model.network.multiple,
        "max_tokens": model.text_encoder.max_tokens,
    }
    return known | {name: value for name, value in asdict(exported.settings).items() if name != "precision"}


class Graph:
    """A module that becomes a graph: its name, its inputs in two sizes, and which of their axes vary.

    The first inputs are traced; both are computed by the graph and by the module, and compared.
    """

    def __init__(self, name: str, module: nn.Module, axes: Mapping[str, dict], outputs: Sequence[str], *inputs: tuple):
        self.name, self.module, self.axes, self.outputs, self.inputs = name, module.eval(), axes, outputs, inputs

    def save(self, folder: Path) -> None:
        """Write ``NAME.onnx``.

        Raises:
            UserError: when ONNX Runtime computes something else with it than the module does.
        """
        path = folder / f"{self.name}.onnx"
        weights = sum(own.numel() * own.element_size() for own in self.module.state_dict().values())
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own calls, and that two inputs share an axis
            program = torch.onnx.export(
                self.module,
                self.inputs[0],
                dynamo=True,
                verbose=False,
                input_names=list(self.axes),
                output_names=list(self.outputs),
                dynamic_shapes=tuple(self.axes.values()),
            )
        program.save(str(path), external_data=weights > LARGEST_FILE)
        self._compare(path)

    def _compare(self, path: Path) -> None:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

        session = onnxruntime.InferenceSession(str(path))
        for inputs in self.inputs:
            asked = f"{path.name}, at inputs of {', '.join(str(tuple(own.shape)) for own in inputs)}"
            named = {name: own.numpy() for name, own in zip(self.axes, inputs, strict=True)}
            try:
                found = session.run(list(self.outputs), named)
            except (Fail, InvalidArgument, RuntimeException) as error:
                raise UserError(f"not exported: ONNX Runtime cannot run {asked}: {error}") from error
            with torch.no_grad():
                expected = self.module(*inputs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for name, own, wanted in zip(self.outputs, found, expected, strict=True):
                difference = float(np.abs(own - wanted.numpy()).max()) if own.shape == wanted.shape else np.inf
                if not difference <= AGREES:
                    raise UserError(
                        f"not exported: {name} of {asked}, differs by {difference:.2g} from the model's; at most "
                        f"{AGREES:g} is allowed"
                    )


def graphs(model: TextToImage) -> list[Graph]:
    """The three graphs of a model, with inputs of the model's own size and of another."""
    batch, length, tokens = (torch.export.Dim(name) for name in ("batch", "length", "tokens"))
    multiple, config, embedder = model.network.multiple, model.config, model.text_encoder.embedder
    high, wide = (torch.export.Dim(name, max=LONGEST_SIDE // multiple) for name in ("high", "wide"))
    channels, height, width = config.latent_shape
    map_axes, rows = {0: batch, 2: multiple * high, 3: multiple * wide}, {0: batch}
    draws = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    # Two of a kind each, of which no axis has the length 1: that would be taken for one which never varies.
    sizes = ((2, channels, height + multiple, width + 2 * multiple), (3, channels, height, width))
    read = [embedder.tokenizer(texts, padding=True, return_tensors="pt") for texts in (TEXTS[:2], TEXTS)]
    read = [(own["input_ids"], own["attention_mask"]) for own in read]
    with torch.no_grad():
        texts = [TextGraph(embedder)(*own) for own in read]
    labels = [(pooled,) for pooled, _ in texts]
    axes = {"x_t": map_axes, "noise_levels": rows, "pooled": rows}
    if config.token_dim is not None:
        axes |= {"tokens": {0: batch, 1: tokens}, "mask": {0: batch, 1: tokens}}
        labels = [(*own, states, mask.bool()) for own, (_, states), (_, mask) in zip(labels, texts, read, strict=True)]
    levels = (torch.tensor([0.1, 0.9]), torch.tensor([0.02, 0.5, 1.0]))
    asked = [(noise(*size), level, *own) for size, level, own in zip(sizes, levels, labels, strict=True)]
    each = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    return [
        Graph("text_encoder", TextGraph(embedder), each, ["pooled", "states"], *read),
        Graph("network", network_of_tensors(model), axes, ["x0_hat"], *asked),
        Graph("decoder", DecoderGraph(model), {"latents": map_axes}, ["pixels"], *((noise(*own),) for own in sizes)),
    ]


def network_of_tensors(model: TextToImage) -> LatentLoomUNet:
    """The network as it is exported to diffusers: it takes a caption as plain tensors."""
    network = LatentLoomUNet(**unet_config(model.config))
    network.load_state_dict(model.network.state_dict())
    return network


TEXTS = ["a red apple", "a snowman on the moon", "one two three four five six seven"]


class TextGraph(nn.Module):
    """Tokens -> embeddings (B, dim) and states (B, T, token_dim)."""

    def __init__(self, embedder: TextEmbedder):
        super().__init__()
        self.model, self.embedder = embedder.model, embedder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return self.embedder.read(output, attention_mask)


class DecoderGraph(nn.Module):
    """Standardised latents -> pixels from -1 to 1."""

    def __init__(self, model: TextToImage):
        super().__init__()
        self.vae, self.codec = model.codec.vae.module, model.codec

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(self.codec.destandardise(latents)).sample.clamp(-1, 1)


def _save_tokenizer(model: TextToImage, folder: Path, prompts: Sequence[str]) -> None:
    """Write ``tokenizer.json``, which the package tokenizers reads alone, and compare what it makes of ``prompts``."""
    from tokenizers import Tokenizer

    encoder = model.text_encoder
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"not exported: the tokenizer of {encoder.reference} cannot be saved as {TOKENIZER}, without which only "
            "Python reads prompts: choose an encoder that has one"
        )
    path = folder / TOKENIZER
    backend.save(str(path))
    saved = Tokenizer.from_file(str(path))
    saved.no_padding()
    saved.enable_truncation(encoder.max_tokens)
    for prompt in (*prompts, *TEXTS):
        expected = encoder.tokenizer(prompt, truncation=True, max_length=encoder.max_tokens)["input_ids"]
        if saved.encode(prompt).ids != expected:
            raise UserError(f"not exported: {TOKENIZER} of {encoder.reference} makes other tokens of {prompt!r}")
