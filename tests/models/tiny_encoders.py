"""Tiny random dual encoders of every family, made without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CAPTIONS = [
    "a red ball",
    "two dogs run over a green field",
    "a boat",
    "the old man and the sea at night under a full moon",
]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL)


TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SQUARE = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def make_clip() -> tuple[Any, Any]:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "bos_token_id": 2, "eos_token_id": 3}, vision_config=VISION, projection_dim=24
    )
    return transformers.CLIPModel(config), transformers.CLIPImageProcessorPil(**CROP)


def make_siglip() -> tuple[Any, Any]:
    config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)
    return transformers.SiglipModel(config), transformers.SiglipImageProcessorPil(**SQUARE)


def make_flava() -> tuple[Any, Any]:
    config = transformers.FlavaConfig(
        text_config=TEXT,
        image_config=VISION,
        multimodal_config={**VISION, "num_hidden_layers": 1},
        projection_dim=24,
        hidden_size=32,
    )
    processor = transformers.FlavaImageProcessorPil(**SQUARE, crop_size={"height": 32, "width": 32})
    return transformers.FlavaModel(config), processor


def make_vision_text() -> tuple[Any, Any]:
    vision = transformers.MobileNetV2Config(
        image_size=32,
        depth_multiplier=0.35,
        hidden_size=1280,
        initializer_range=0.2,  # of 0.02 hardly anything is left after 17 blocks
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, transformers.BertConfig(**TEXT), projection_dim=24
    )
    model = transformers.VisionTextDualEncoderModel(config)
    return model, transformers.MobileNetV2ImageProcessorPil(**CROP)


FAMILY_MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "flava": make_flava,
    "vision-text-dual-encoder": make_vision_text,
}
