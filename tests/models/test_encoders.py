from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_encoders import CAPTIONS, CROP, TEXT, make_tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from influencespace.errors import InputError
from influencespace.models.encoders import FAMILIES, DualEncoder, load_encoder, load_preprocessing
from influencespace.models.pixels import probe_images

FAMILY_NAMES = ["clip", "siglip", "flava", "vision-text-dual-encoder"]
LONG = "a boat " * 40


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def encoders(encoder_folders: dict[str, Path]) -> dict[str, DualEncoder]:
    return {family: load_encoder(folder) for family, folder in encoder_folders.items()}


@pytest.fixture
def encoder(family: str, encoders: dict[str, DualEncoder]) -> DualEncoder:
    return encoders[family]


def embed_images(encoder: DualEncoder, images: list[Image.Image]) -> Tensor:
    return encoder.encode_image(encoder.preprocess_images(images))


def embed_texts(encoder: DualEncoder, texts: list[str]) -> Tensor:
    return encoder.encode_text(encoder.tokenize(texts)[0])


def own_image_features(model: Any, pixels: Tensor) -> Tensor:
    features = model.get_image_features(pixel_values=pixels).pooler_output
    return features[:, 0] if features.ndim == 3 else features


def own_text_features(family: str, model: Any, tokenizer: Any) -> Tensor:
    if family == "siglip":
        tokens = tokenizer(
            CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        return model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    # One caption at a time: without padding no mask can go wrong.
    rows = []
    for caption in CAPTIONS:
        ids = tokenizer([caption], return_tensors="pt")["input_ids"]
        features = model.get_text_features(input_ids=ids).pooler_output
        rows.append(features[:, 0] if features.ndim == 3 else features)
    return torch.cat(rows)


@torch.no_grad()
def test_embeddings_are_the_models_own(
    family: str, encoder_folders: dict[str, Path], encoder: DualEncoder, pictures: list[Image.Image]
) -> None:
    folder = encoder_folders[family]
    model = getattr(transformers, FAMILIES[family].model_class).from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]

    images, texts = embed_images(encoder, pictures), embed_texts(encoder, CAPTIONS)
    torch.testing.assert_close(images, normalize(own_image_features(model, pixels), dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        texts, normalize(own_text_features(family, model, tokenizer), dim=1), rtol=0, atol=1e-5
    )
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert images.shape == (len(pictures), encoder.dimension)
    assert texts.shape == (len(CAPTIONS), encoder.dimension)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_unit_rows_in_float32(
    family: str, encoder_folders: dict[str, Path], pictures: list[Image.Image], dtype: str
) -> None:
    encoder = load_encoder(encoder_folders[family], dtype=dtype)
    assert not encoder.training
    for rows in (embed_images(encoder, pictures), embed_texts(encoder, CAPTIONS)):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=0, atol=1e-5)


def test_bfloat16_is_close_to_float32(
    family: str, encoder_folders: dict[str, Path], encoder: DualEncoder, pictures: list[Image.Image]
) -> None:
    rough = load_encoder(encoder_folders[family], dtype="bfloat16")
    assert (embed_images(rough, pictures) * embed_images(encoder, pictures)).sum(dim=1).min() > 0.99
    assert (embed_texts(rough, CAPTIONS) * embed_texts(encoder, CAPTIONS)).sum(dim=1).min() > 0.99
    assert rough.fingerprint != encoder.fingerprint


def test_batch_size_changes_nothing(encoder: DualEncoder, pictures: list[Image.Image]) -> None:
    texts = [*CAPTIONS, LONG]
    one_by_one = torch.cat([embed_texts(encoder, [text]) for text in texts])
    torch.testing.assert_close(embed_texts(encoder, texts), one_by_one, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        embed_images(encoder, pictures),
        torch.cat([embed_images(encoder, [picture]) for picture in pictures]),
        rtol=0,
        atol=1e-5,
    )


def test_the_size_near_which_pictures_are_decoded(family: str, encoder: DualEncoder) -> None:
    assert encoder.input_size == (36 if family in ("clip", "vision-text-dual-encoder") else 32)


def test_repeating_changes_no_bit(encoder: DualEncoder, pictures: list[Image.Image]) -> None:
    assert torch.equal(embed_images(encoder, pictures), embed_images(encoder, pictures))
    assert torch.equal(embed_texts(encoder, CAPTIONS), embed_texts(encoder, CAPTIONS))


def test_cut_captions_are_reported(encoder: DualEncoder) -> None:
    tokens, truncated = encoder.tokenize(["a boat", LONG, "two dogs"])
    assert truncated == [False, True, False]
    assert {values.shape[1] for values in tokens.values()} == {TEXT["max_position_embeddings"]}


def test_very_long_captions_are_cut_before_the_tokenizer(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word of a million characters is one unknown token: cut all the same, and reported."""
    seen: list[int] = []
    tokenizer = encoder.preprocessing.tokenizer

    def spy(texts: list[str], **options: Any) -> Any:
        seen.extend(map(len, texts))
        return tokenizer(texts, **options)

    monkeypatch.setattr(encoder.preprocessing, "tokenizer", spy)
    _, truncated = encoder.tokenize([1_000_000 * "x", 300_000 * "a boat ", "a boat"])
    assert truncated == [True, True, False]
    assert max(seen) == encoder.preprocessing.max_characters == 4096


def test_only_siglip_pads_to_full_length(family: str, encoder: DualEncoder) -> None:
    tokens, _ = encoder.tokenize(["a boat"])
    if family == "siglip":
        assert set(tokens) == {"input_ids"}
        assert tokens["input_ids"].shape == (1, 16)
    else:
        assert tokens["input_ids"].shape == (1, 4)
        assert "attention_mask" in tokens


def test_preprocessing_from_many_threads_is_the_same(
    encoder: DualEncoder, pictures: list[Image.Image]
) -> None:
    def prepare(k: int) -> tuple[Tensor, dict[str, Tensor]]:
        return encoder.preprocess_images([pictures[k % 4]]), encoder.tokenize([CAPTIONS[k % 4]])[0]

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(prepare, range(64)))
    for k, (pixels, tokens) in enumerate(results):
        expected_pixels, expected_tokens = prepare(k)
        assert torch.equal(pixels, expected_pixels)
        assert torch.equal(tokens["input_ids"], expected_tokens["input_ids"])


def test_features_are_differentiable(encoder: DualEncoder, pictures: list[Image.Image]) -> None:
    tokens, _ = encoder.tokenize(CAPTIONS)
    pixels = encoder.preprocess_images(pictures)
    (encoder.image_features(pixels).sum() + encoder.text_features(tokens).sum()).backward()
    gradients = [weights.grad for weights in encoder.parameters() if weights.grad is not None]
    encoder.zero_grad()
    assert len(gradients) > 20


def test_fingerprint_follows_the_weights_and_the_preprocessing(
    encoder_folders: dict[str, Path], encoders: dict[str, DualEncoder], tmp_path: Path
) -> None:
    folder, known = encoder_folders["clip"], encoders["clip"].fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_encoder(copy).fingerprint == known

    transformers.CLIPImageProcessorPil(**CROP, image_mean=[0.5, 0.5, 0.5]).save_pretrained(copy)
    assert load_encoder(copy).fingerprint != known

    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    other = shutil.copytree(folder, tmp_path / "other")
    model.save_pretrained(other)
    assert load_encoder(other).fingerprint != known


def test_float16_weights_are_computed_in_float32(
    encoder_folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    folder = shutil.copytree(encoder_folders["clip"], tmp_path / "half")
    transformers.CLIPModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    encoder = load_encoder(folder)
    assert {weights.dtype for weights in encoder.parameters()} == {torch.float32}
    assert embed_images(encoder, pictures).isfinite().all()


def test_a_processor_that_does_more_is_called_itself(
    encoder_folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    folder = shutil.copytree(encoder_folders["clip"], tmp_path / "more")
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.8)
    processor.save_pretrained(folder)
    encoder = load_encoder(folder)
    assert encoder.pipeline is None
    assert encoder.input_size == 32
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.preprocess_images(pictures), expected)
    assert embed_images(encoder, pictures).shape == (4, encoder.dimension)


def break_bert(folder: Path) -> str:
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)
    make_tokenizer(16).save_pretrained(folder)
    return "'bert' model, not a dual encoder"


def break_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "clip",')
    return "cannot load its config.json"


def break_without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "cannot load its config.json"


def break_without_tokenizer(folder: Path) -> str:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return "its tokenizer knows no words"


def break_without_processor(folder: Path) -> str:
    (folder / "preprocessor_config.json").unlink()
    return "cannot load its image processor"


def break_weights(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    return "cannot load its weights"


def break_pickled(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return "cannot load its weights"


def break_lacking(folder: Path) -> str:
    model = transformers.CLIPModel.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(folder, state_dict=state)
    return "lacks 1 of its weights (visual_projection.weight"


def break_dimensions(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    return "cannot load its weights"


@pytest.mark.parametrize(
    "damage",
    [
        break_bert,
        break_config,
        break_without_config,
        break_without_tokenizer,
        break_without_processor,
        break_weights,
        break_pickled,
        break_lacking,
        break_dimensions,
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    damage: Callable[[Path], str], encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(encoder_folders["clip"], tmp_path / "broken")
    message = damage(folder)
    with pytest.raises(InputError) as caught:
        load_encoder(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_image_size_is_reported(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(encoder_folders["clip"], tmp_path / "size")
    transformers.CLIPImageProcessorPil().save_pretrained(folder)
    with pytest.raises(InputError, match="cannot embed a probe"):
        load_encoder(folder)


KINDS = ("image_processor_type", "processor_class", "tokenizer_class", "model_type")
"""What says in the files of an encoder which of transformers' own classes reads them."""


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("preprocessor_config.json", "AutoImageProcessor"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("config.json", "AutoConfig"),
    ],
)
@pytest.mark.parametrize("load", [load_encoder, load_preprocessing])
def test_code_of_a_folder_is_not_run_whatever_the_user_answers(
    encoder_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    key: str,
    load: Any,
) -> None:
    """transformers asks where it is not told, and "y" would run it."""
    folder, ran = tmp_path / "encoder", tmp_path / "ran"
    shutil.copytree(encoder_folders["clip"], folder)
    tree = {
        name: value for name, value in json.loads((folder / file).read_text()).items() if name not in KINDS
    }
    names = ["code.Own", None] if key == "AutoTokenizer" else "code.Own"
    (folder / file).write_text(json.dumps(tree | {"auto_map": {key: names}}))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    with contextlib.suppress(InputError):
        load(folder)
    assert not asked
    assert not ran.exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none", "none", "a/b/c", "../x"])
def test_a_missing_path_is_reported_without_asking_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing lies beside it
    with pytest.raises(InputError, match="does not exist"):
        load_encoder(name)


def test_a_file_is_no_folder(encoder_folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="is a file"):
        load_encoder(encoder_folders["clip"] / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float8"}, "dtype 'float8'"), ({"device": "abacus"}, "device 'abacus' is unknown")],
)
def test_unknown_options_are_reported(
    encoder_folders: dict[str, Path], options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_encoder(encoder_folders["clip"], **options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(encoder_folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        load_encoder(encoder_folders["clip"], device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees_with_the_cpu(
    family: str, encoder_folders: dict[str, Path], encoder: DualEncoder, pictures: list[Image.Image]
) -> None:
    fast = load_encoder(encoder_folders[family], device="cuda")
    for gpu, cpu in (
        (embed_images(fast, pictures), embed_images(encoder, pictures)),
        (embed_texts(fast, CAPTIONS), embed_texts(encoder, CAPTIONS)),
    ):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-4)


@pytest.mark.real_data
def test_the_small_real_encoder_works_as_it_is(real_data: Path) -> None:
    folder = real_data.parent / "models" / "mobilenetv2-minilm"
    if not folder.is_dir():
        pytest.skip(f"no encoder in {folder}")
    encoder = load_encoder(folder)
    assert encoder.dimension == 512
    assert encoder.pipeline is not None
    colours = {name: Image.new("RGB", (200, 150), name) for name in ("red", "green", "blue")}
    images = embed_images(encoder, [*colours.values(), *probe_images()])
    texts = embed_texts(encoder, ["a man plays with a dog", "snow"])
    assert images.shape == (6, 512)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
