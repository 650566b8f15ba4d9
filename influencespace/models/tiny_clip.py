"""A tiny CLIP, trained in a minute: an encoder for small data sets, without a download.

It is a plain Hugging Face CLIPModel, so whatever loads a published CLIP loads it too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from influencespace.errors import InputError
from influencespace.models.encoders import quiet
from influencespace.models.pixels import pixel_pipeline

SIDE = 64  # pixels
CONTEXT = 32  # tokens: captions of the synthetic world have up to 25 words
WORDS = 500  # known whole; the synthetic world has about 200
PAD, UNKNOWN, START, END = range(4)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[START]", "[END]")

# Tried on the synthetic world (4,000 pairs, 25 % wrong): Recall@10 among 500 unseen scenes, chance 2 %. In 85
# core-seconds: as it is 61 and 63 (two seeds); learning rate 1e-3 53 and 65; 1.5e-3 51. In 108 core-seconds at
# 1e-3: batches of 64 68, of 128 63. A small ResNet has 52 after 28, then fits the wrong captions (46 after 118).
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
VISION = {**TOWER, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 8}
TEXT = {**TOWER, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
DIMENSION = 64
LEARNING_RATE = 7e-4
WARM_UP = 0.1  # of the steps
WEIGHT_DECAY = 0.1
TEMPERATURE = 0.07


def train_tiny_clip(
    images: Sequence[Image.Image] | NDArray[np.uint8],
    captions: Sequence[str],
    *,
    seed: int,
    out: Path,
    steps: int = 400,
    batch_size: int = 64,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> None:
    """Fit a small CLIP on pairs of images, RGB or uint8 (N, 64, 64, 3), and captions; save it as a folder.

    The same seed and data give the same weights on the same machine with the same number of threads.
    `on_step(step, steps, loss)` is called after each of the steps 1 to `steps`. Raises InputError where
    images and captions differ in number, are fewer than a batch, or where an array has another shape or type.
    """
    if len(images) != len(captions):
        raise InputError(f"{len(images)} images but {len(captions)} captions; a tiny CLIP learns from pairs")
    if not 2 <= batch_size <= len(captions):
        raise InputError(
            f"a batch of {batch_size} cannot be drawn from {len(captions)} pairs; give 2 or more"
        )
    tokenizer = _make_tokenizer(captions)
    processor = transformers.CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    pipeline = pixel_pipeline(processor)
    assert pipeline is not None
    pixels = pipeline(images) if not isinstance(images, np.ndarray) else _channels_first(images)
    tokens = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")["input_ids"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.CLIPModel(_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    batches = _batches(len(captions), batch_size, torch.Generator().manual_seed(seed))
    for step, rows in zip(range(1, steps + 1), batches):
        loss = _loss(model, pipeline.normalise(pixels[rows]), tokens[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, steps, loss.item())
    with quiet():
        for part in (model, tokenizer, processor):
            part.save_pretrained(out)


def _loss(model: Any, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric InfoNCE of a batch: pixels (B, 3, S, S), padded tokens (B, L)."""
    mask = tokens != PAD
    longest = int(mask.sum(dim=1).max())
    u = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
    output = model.get_text_features(input_ids=tokens[:, :longest], attention_mask=mask[:, :longest].long())
    t = normalize(output.pooler_output, dim=1)
    logits = model.logit_scale.exp() * u @ t.T  # (B, B)
    own = torch.arange(len(logits))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate at a step counted from 0: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Epoch after epoch in a new order, without end; a last short batch is left out."""
    while True:
        order = torch.randperm(rows, generator=generator)
        yield from order[: rows - rows % batch_size].view(-1, batch_size)


def _channels_first(images: NDArray[np.uint8]) -> Tensor:
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        raise InputError(f"an array of {images.dtype} {images.shape}, not uint8 (N, {SIDE}, {SIDE}, 3)")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _config(words: int) -> Any:
    return transformers.CLIPConfig(
        text_config={
            **TEXT,
            "vocab_size": words,
            "pad_token_id": PAD,
            "bos_token_id": START,
            # Pooled where this token is; 2 in its place would mean the largest id, for old checkpoints' sake.
            "eos_token_id": END,
        },
        vision_config=VISION,
        projection_dim=DIMENSION,
        logit_scale_init_value=math.log(1 / TEMPERATURE),
    )


def _make_tokenizer(captions: Sequence[str]) -> Any:
    """Word pieces: the frequent words whole, all others letter by letter.

    The trainers of `tokenizers` break ties by hash, so the same captions would give other ids on every run.
    """
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    frequent = sorted(words, key=lambda word: (-words[word], word))[:WORDS]
    letters = sorted({letter for word in words for letter in word})
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *frequent])
    tokenizer = Tokenizer(
        models.WordPiece(
            {piece: index for index, piece in enumerate(pieces)}, unk_token=SPECIAL_TOKENS[UNKNOWN]
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    start, end = SPECIAL_TOKENS[START], SPECIAL_TOKENS[END]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, START), (end, END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        pad_token=SPECIAL_TOKENS[PAD],
        unk_token=SPECIAL_TOKENS[UNKNOWN],
        bos_token=start,
        eos_token=end,
    )
