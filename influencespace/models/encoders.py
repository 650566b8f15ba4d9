"""Loading dual encoders of every family that transformers knows, by folder or hub id.

CLIP, SigLIP, FLAVA and VisionTextDualEncoder differ in what their text tower wants and where it leaves its
result: `FAMILIES` holds these differences, and nothing else knows them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from influencespace.errors import InputError
from influencespace.models.dual_encoder import DualEncoder
from influencespace.models.pixels import probe_images
from influencespace.models.preprocessing import Family, Preprocessing

__all__ = ["FAMILIES", "DualEncoder", "load_encoder", "load_preprocessing"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The least cosine of embeddings in bfloat16 and in float32 at which the former are used: JPEG of quality 85 costs as much.
MIN_COSINE = 0.999
PROBE_TEXTS = ("a photo of a dog", "two men in red shirts play football on a wet field", "snow")
SCALE = "logit_scale"  # logarithm of the factor on cosines, as CLIP's weights call it
SENTENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

FAMILIES: dict[str, Family] = {
    "clip": Family(model_class="CLIPModel"),
    "metaclip_2": Family(model_class="MetaClip2Model"),
    "siglip": Family(model_class="SiglipModel", text_inputs=("input_ids",), pads_to_full_length=True),
    "flava": Family(model_class="FlavaModel", text_inputs=SENTENCE_INPUTS, projects_every_token=True),
    "vision-text-dual-encoder": Family(model_class="VisionTextDualEncoderModel", text_inputs=SENTENCE_INPUTS),
}
# With trusted code only: whatever follows the interface of VisionTextDualEncoder.
UNKNOWN_FAMILY = Family(model_class="AutoModel", text_inputs=SENTENCE_INPUTS)


def load_encoder(
    path_or_hub_id: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> DualEncoder:
    """Load a dual encoder from a folder or from the Hugging Face hub.

    Weights come from safetensors only; `trust_remote_code` also allows pickled weights, and model types that
    are not in `FAMILIES`, with the code that they bring. Raises InputError when there is no such model, when
    it is no dual encoder, when files cannot be read or lack weights, or when device or dtype cannot be had.
    `dtype="auto"` is float32 on the CPU, and on a GPU what `in_bfloat16` gives.
    """
    name = _existing(str(path_or_hub_id))
    target = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' of the encoder is unknown; use one of: auto, {', '.join(DTYPES)}")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}  # left out, transformers asks
    with quiet():
        config = _load(name, "config.json", transformers.AutoConfig, **trust)
        family = _family(name, config.model_type, trust_remote_code)
        tokenizer = _load(name, "tokenizer", transformers.AutoTokenizer, **trust)
        processor = _load(name, "image processor", transformers.AutoImageProcessor, backend="pil", **trust)
        model, report = _load(
            name,
            "weights",
            getattr(transformers, family.model_class),
            config=config,
            dtype=DTYPES.get(dtype, torch.float32),
            use_safetensors=None if trust_remote_code else True,
            output_loading_info=True,
            **(trust if family is UNKNOWN_FAMILY else {}),
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"encoder '{name}' lacks {len(missing)} of its weights ({', '.join(missing[:3])})")
    _check_words(name, tokenizer)
    try:
        encoder = DualEncoder(model, tokenizer, processor, family=family, device=target)
        dimension = encoder.encode_image(encoder.preprocess_images(probe_images())).shape[1]
    except Exception as error:
        raise InputError(f"encoder '{name}' loads but cannot embed a probe: {_one_line(error)}") from error
    if dimension != encoder.dimension:
        raise InputError(
            f"encoder '{name}' embeds images in {dimension} dimensions and texts in {encoder.dimension}"
        )
    return in_bfloat16(encoder) if dtype == "auto" and target.type == "cuda" else encoder


def in_bfloat16(exact: DualEncoder, min_cosine: float = MIN_COSINE) -> DualEncoder:
    """The encoder in bfloat16 if its embeddings of a probe agree with those in float32, else itself, with a warning.

    They agree where the least cosine of an image's or a text's two embeddings is above `min_cosine`.
    """
    rough = DualEncoder(
        copy.deepcopy(exact.model).to(torch.bfloat16),
        exact.preprocessing.tokenizer,
        exact.preprocessing.processor,
        family=exact.family,
        device=exact.device,
    )
    pixels, tokens = exact.preprocess_images(probe_images()), exact.tokenize(PROBE_TEXTS)[0]
    cosines = torch.cat(
        [
            (rough.encode_image(pixels) * exact.encode_image(pixels)).sum(1),
            (rough.encode_text(tokens) * exact.encode_text(tokens)).sum(1),
        ]
    )
    if (least := float(cosines.min())) > min_cosine:
        return rough
    warnings.warn(
        f"in bfloat16 this encoder's embeddings of a probe have a cosine of {least:.4f} with those in float32, less than "
        f"{min_cosine}: float32 is used",
        stacklevel=2,
    )
    return exact


def load_preprocessing(path_or_hub_id: str | Path, *, trust_remote_code: bool = False) -> Preprocessing:
    """The image processor and tokenizer of a dual encoder, without its weights; raises InputError as `load_encoder` does."""
    name = _existing(str(path_or_hub_id))
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with quiet():
        config = _load(name, "config.json", transformers.AutoConfig, **trust)
        family = _family(name, config.model_type, trust_remote_code)
        tokenizer = _load(name, "tokenizer", transformers.AutoTokenizer, **trust)
        processor = _load(name, "image processor", transformers.AutoImageProcessor, backend="pil", **trust)
    _check_words(name, tokenizer)
    return Preprocessing(tokenizer, processor, config, family)


def _check_words(name: str, tokenizer: Any) -> None:
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"encoder '{name}': its tokenizer knows no words; are its tokenizer files missing?")


def _existing(name: str) -> str:
    """The name; raises InputError where it can only be a path and there is no folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if path.exists() or looks_like_path or path.parent.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise InputError(
            f"encoder '{name}' {what}; give a folder with config.json and model.safetensors, "
            "or a hub id such as openai/clip-vit-large-patch14"
        )
    return name


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device '{name}' is unknown; use cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{name}' is not available: torch sees no CUDA device; use cpu")
    return device


def _family(name: str, model_type: str, trust_remote_code: bool) -> Family:
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if trust_remote_code:
        return UNKNOWN_FAMILY
    raise InputError(
        f"encoder '{name}' is a '{model_type}' model, not a dual encoder; use one of: {', '.join(FAMILIES)}"
    )


def _load(name: str, part: str, loader: Any, **options: Any) -> Any:
    # A broken file surfaces as whatever its parser raises, so everything is caught and named.
    try:
        return loader.from_pretrained(name, **options)
    except Exception as error:
        taken = "" if Path(name).is_dir() else " (no folder of that name, so taken for a hub id)"
        raise InputError(f"encoder '{name}'{taken}: cannot load its {part}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and reports of transformers off the screen: what matters becomes an InputError."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def logit_scale(path_or_hub_id: str | Path, *, trust_remote_code: bool = False) -> float:
    """The factor on an encoder's cosines, of its weights file alone where that has it by its usual name; raises InputError as
    `load_encoder` does."""
    name = _existing(str(path_or_hub_id))
    file = transformers.utils.cached_file(
        name, "model.safetensors", _raise_exceptions_for_missing_entries=False
    )
    if file is not None:
        with safe_open(file, "pt") as weights:
            if SCALE in weights.keys():  # noqa: SIM118 - it is no mapping
                return float(weights.get_tensor(SCALE).float().exp())
    return load_encoder(name, trust_remote_code=trust_remote_code).logit_scale


def embedding_dimension(path_or_hub_id: str, trust_remote_code: bool = False) -> int:
    """D by an encoder's config.json, without its weights; raises InputError where it is no dual encoder."""
    name = _existing(str(path_or_hub_id))
    with quiet():
        config = _load(name, "config.json", transformers.AutoConfig, trust_remote_code=trust_remote_code)
    _family(name, config.model_type, trust_remote_code)
    text = getattr(config, "text_config", config)
    # SigLIP has no projection of its own: its text tower ends in `projection_size`.
    widths = (
        getattr(config, "projection_dim", None),
        getattr(text, "projection_size", None),
        text.hidden_size,
    )
    return int(next(width for width in widths if width))
