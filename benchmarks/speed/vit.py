"""A CLIP of the size of ViT-B/32 with random weights: what it costs to run one, without a download."""

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from influencespace.models.encoders import quiet

SPECIAL = ("[PAD]", "[UNK]", "[START]", "[END]")
VOCABULARY = 49_408
CONTEXT = 77


def vit_b_32(folder: Path, captions: Iterable[str], tiny: bool = False) -> str:
    """Write the encoder; its path. Its words are those of the captions, one token each, about as many as CLIP's own tokenizer
    would give. `tiny`: one layer a tower, for tests."""
    layers = {"num_hidden_layers": 1} if tiny else {}
    text = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=layers))
    with quiet():
        for part in (model, _tokenizer(captions), transformers.CLIPImageProcessorPil()):
            part.save_pretrained(folder)
    return str(folder)


def _tokenizer(captions: Iterable[str]) -> "transformers.PreTrainedTokenizerFast":
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in captions for word, _ in splitter.pre_tokenize_str(text.lower())}
    pieces = {piece: index for index, piece in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 2), ("[END]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
    )
