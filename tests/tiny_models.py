"""Small models of the classes that users name in params, with random weights, made on the spot."""

import json
from pathlib import Path

import torch


def save_tiny_vae(folder: Path | str, *, seed: int = 0) -> Path:
    """A deterministic VAE: AutoencoderTiny with 8x down-sampling and 4 latent channels."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    widths = (8,) * 4
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    vae.save_pretrained(folder)
    return Path(folder)


def save_kl_vae(folder: Path | str, *, seed: int = 0) -> Path:
    """A VAE with a distribution: AutoencoderKL with 8x down-sampling and 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.save_pretrained(folder)
    return Path(folder)


def save_byte_tokenizer(
    folder: Path | str, *, start: str | None, end: str, padding: str, max_length: int | None = None
) -> dict[str, int]:
    """A tokenizer with a token for each byte, and those that mark a text's start, its end and padding; its ids.

    The special tokens come first, so that padding has the small number that models of the RoBERTa kind want.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = dict.fromkeys(token for token in (start, padding, end) if token)
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([start, "$A", end] if start else ["$A", end]),
        special_tokens=[(token, vocabulary[token]) for token in special],
    )
    marks = {"bos_token": start} if start else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **marks,
        eos_token=end,
        pad_token=padding,
        unk_token=end,
        **({"model_max_length": max_length} if max_length else {}),
    ).save_pretrained(folder)
    return vocabulary


def save_clip(folder: Path | str, *, dim: int = 24, seed: int = 0) -> Path:
    """A CLIP text model with a projection to ``dim`` and a byte-level tokenizer of its own."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = save_byte_tokenizer(folder, start=start, end=end, padding=end, max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=dim,
        bos_token_id=vocabulary[start],
        eos_token_id=vocabulary[end],
        pad_token_id=vocabulary[end],
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return Path(folder)


def save_whole_clip(folder: Path | str, *, seed: int = 0) -> Path:
    """A CLIP model with both towers, for pictures of 32x32, with its tokenizer and its image processor."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = save_byte_tokenizer(folder, start=start, end=end, padding=end, max_length=77)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"projection_dim": 24}
    tokens = {"vocab_size": len(vocabulary), "bos_token_id": vocabulary[start], "eos_token_id": vocabulary[end]}
    config = CLIPConfig(
        text_config=tower | tokens | {"pad_token_id": vocabulary[end]},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    _save_image_processor(folder, "CLIPImageProcessor", edge=32, crop=32)
    return Path(folder)


def save_dinov2(folder: Path | str, *, seed: int = 0) -> Path:
    """A DINOv2, which crops 28x28 pixels out of pictures resized to 32x32."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    _save_image_processor(folder, "BitImageProcessor", edge=32, crop=28)
    return Path(folder)


def _save_image_processor(folder: Path | str, name: str, *, edge: int, crop: int) -> None:
    settings = {"image_processor_type": name, "size": {"shortest_edge": edge}}
    settings |= {"crop_size": {"height": crop, "width": crop}}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))


def save_t5(folder: Path | str, *, seed: int = 0) -> Path:
    """A whole T5, encoder and decoder, of which a text encoder is a part, with a byte-level tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    vocabulary = save_byte_tokenizer(folder, start=None, end="</s>", padding="<pad>")
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=vocabulary["<pad>"],
        eos_token_id=vocabulary["</s>"],
        decoder_start_token_id=vocabulary["<pad>"],
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return Path(folder)


def save_bert(
    folder: Path | str, *, model_type: str = "bert", pooling: dict | None = None, positions: int = 40, seed: int = 0
) -> Path:
    """A BERT, or a model of its like, with a byte-level tokenizer; ``pooling`` is what its ``1_Pooling`` holds."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    vocabulary = save_byte_tokenizer(folder, start="<s>", end="</s>", padding="<pad>")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        pad_token_id=vocabulary["<pad>"],
    )
    AutoModel.from_config(config).save_pretrained(folder)
    if pooling is not None:
        path = Path(folder) / "1_Pooling/config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(pooling))
    return Path(folder)


def save_tiny_unet(
    folder: Path | str,
    *,
    seed: int = 0,
    vae: str = "bundled",
    text_encoder: str = "bundled",
    tokens: bool = False,
    max_tokens: int | None = None,
    shapes: tuple[tuple[int, int, int], ...] | None = None,
) -> Path:
    """A model folder as a training leaves it: 64x64 pictures, random weights, the encoders that are named.

    ``shapes``: of the latents, where there are several.
    """
    from latentloom.encoding.text_encoder import load_text_encoder
    from latentloom.encoding.vae import load_vae
    from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig, save_model

    loaded_vae, loaded_text = load_vae(vae), load_text_encoder(text_encoder)
    config = ModelConfig(
        format_version=FORMAT_VERSION,
        latent_shape=(4, 8, 8),
        latent_shapes=shapes,
        widths=(16, 32),
        block_depth=1,
        emb_size=16,
        text_dim=loaded_text.dim,
        token_dim=loaded_text.token_dim if tokens else None,
        max_tokens=max_tokens,
        schedule="vp",
        latent_mean=(0.1,) * 4,
        latent_std=(0.9,) * 4,
        latent_bound=3.0,
        vae=EncoderReference(reference=vae, class_name=loaded_vae.class_name, fingerprint=loaded_vae.fingerprint),
        text_encoder=EncoderReference(
            reference=text_encoder, class_name=loaded_text.class_name, fingerprint=loaded_text.fingerprint
        ),
        attribution="Drawn by somebody",
        licence="CC BY-SA 4.0",
    )
    torch.manual_seed(seed)
    network = config.build()
    with torch.no_grad():  # the last layer starts at zero: such a network would draw the same whatever it is asked
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(Path(folder), network.state_dict(), config)
    return Path(folder)
