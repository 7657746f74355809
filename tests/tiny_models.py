"""Small models of the classes that users name in params, with random weights, made on the spot."""

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


def save_clip(folder: Path | str, *, dim: int = 24, seed: int = 0) -> Path:
    """A CLIP text model with a projection to ``dim`` and a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: index for index, token in enumerate([*sorted(alphabet), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=77,
    ).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=dim,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return Path(folder)


def save_tiny_unet(folder: Path | str, *, seed: int = 0, vae: str = "bundled", text_encoder: str = "bundled") -> Path:
    """A model folder as a training leaves it: 64x64 pictures, random weights, the encoders that are named."""
    from latentloom.encoding.text_encoder import load_text_encoder
    from latentloom.encoding.vae import load_vae
    from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig, save_model

    loaded_vae, loaded_text = load_vae(vae), load_text_encoder(text_encoder)
    config = ModelConfig(
        format_version=FORMAT_VERSION,
        latent_shape=(4, 8, 8),
        widths=(16, 32),
        block_depth=1,
        emb_size=16,
        text_dim=loaded_text.dim,
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
    save_model(Path(folder), network, config)
    return Path(folder)
