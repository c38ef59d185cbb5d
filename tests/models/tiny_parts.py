"""Parts that several tiny pipelines share: an autoencoder, small text encoders, tokenizers of single letters."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tokenizers.pre_tokenizers import ByteLevel


def image_vae() -> diffusers.AutoencoderKL:
    """Three levels: 4 pixels a latent."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def clip_encoder(kind: type) -> Any:
    """SD3's projects to 16 and joins two; FLUX's gives its own 32."""
    size = 16 if kind is transformers.CLIPTextModelWithProjection else 32
    return kind(
        transformers.CLIPTextConfig(
            hidden_size=size,
            projection_dim=size,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(clip_tokenizer()),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def t5_encoder(kind: type, config: type, words: int = 0) -> Any:
    return kind(
        config(
            vocab_size=words or len(t5_tokenizer()),
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
        )
    )


def clip_tokenizer() -> transformers.CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
    )


def qwen3(kind: type, layers: int) -> Any:
    """A language model of 16 channels."""
    return kind(
        transformers.Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=len(qwen_tokenizer()),
        )
    )


def t5_tokenizer() -> transformers.T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.-"]
    scored = [(word, 0.0 if index < 3 else -2.0) for index, word in enumerate(words)]
    return transformers.T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=512)


def qwen_tokenizer(chat_template: str | None = None) -> transformers.Qwen2Tokenizer:
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        model_max_length=2048,
        chat_template=chat_template,
    )
