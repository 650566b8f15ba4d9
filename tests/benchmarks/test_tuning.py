"""The text tower tuned by low-rank adapters: what learns, what stays, what is never seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import CAPTIONS, FAMILY_MAKERS
from torch import Tensor, nn

from benchmarks.methods.tuning import TunedTower, TuningConfig, adapt_text_tower, tune
from influencespace.core.batches import training_batches
from influencespace.core.contrastive import InfoNce, Sigmoid
from influencespace.errors import InputError
from influencespace.models.dual_encoder import DualEncoder
from influencespace.models.encoders import load_encoder

pytest.importorskip("peft")

LOSS = InfoNce(10.0)
CONFIG = TuningConfig(rank=4, steps=12, batch_size=8, learning_rate=1e-2)
WORDS = sorted({word for text in CAPTIONS for word in text.split()})


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of the words that the tiny tokenizer knows, of 1 to 10 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 11))) for _ in range(count)]


def images(count: int, dimension: int = 24) -> Tensor:
    rows = torch.randn(count, dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nn.functional.normalize(rows, dim=1)


def encoder_of(folders: dict[str, Path], family: str = "clip") -> DualEncoder:
    return load_encoder(folders[family]).double()


def tuned(
    encoder: DualEncoder, said: Sequence[str], weights: np.ndarray | None = None, seed: int = 0
) -> tuple[TunedTower, list[float]]:
    """An encoder's text tower tuned on pairs of their own image each, in float64."""
    tower = adapt_text_tower(encoder, CONFIG.rank, seed)
    tower.adapted.double()
    u = images(len(said), encoder.dimension)
    weights = np.ones(len(said)) if weights is None else weights
    batches = training_batches(weights, np.arange(len(said)), CONFIG.batch_size, CONFIG.steps, seed)
    losses = tune(tower, lambda rows: (u[rows], [said[row] for row in rows]), batches, LOSS, CONFIG)
    return tower, losses


def state(tower: TunedTower) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tower.adapters.items()}


def test_new_adapters_leave_the_embeddings(encoder_folders: dict[str, Path]) -> None:
    for family in encoder_folders:
        encoder = encoder_of(encoder_folders, family)
        before = encoder.encode_text(encoder.tokenize(CAPTIONS)[0])
        found = adapt_text_tower(encoder, 4, 0).embed(CAPTIONS)
        torch.testing.assert_close(found, before, rtol=1e-6, atol=1e-6)


def test_the_loss_falls_on_rightly_captioned_pairs(encoder_folders: dict[str, Path]) -> None:
    said = captions(CONFIG.batch_size)  # one batch over and over: it can be learned by heart
    _, losses = tuned(encoder_of(encoder_folders), said)
    assert len(losses) == CONFIG.steps
    assert losses[-1] < 0.7 * losses[0]


def test_the_first_loss_is_the_objectives(encoder_folders: dict[str, Path]) -> None:
    said = captions(CONFIG.batch_size)
    encoder = encoder_of(encoder_folders)
    wanted = LOSS.terms(images(len(said)), encoder.encode_text(encoder.tokenize(said)[0])).mean()
    _, losses = tuned(encoder, said)
    assert losses[0] == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("family", FAMILY_MAKERS)
def test_only_adapters_of_the_text_tower_change(encoder_folders: dict[str, Path], family: str) -> None:
    encoder = encoder_of(encoder_folders, family)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    tower, _ = tuned(encoder, captions(16))
    after = encoder.model.state_dict()
    for name, value in before.items():
        renamed = name if name in after else ".base_layer.".join(name.rsplit(".", 1))
        assert torch.equal(after[renamed], value), name
    with_gradient = {name for name, value in tower.adapted.named_parameters() if value.grad is not None}
    assert with_gradient <= set(tower.adapters)
    assert any(".lora_A." in name for name in with_gradient)
    assert all(".text_model." in name or ".text_projection." in name for name in tower.adapters)
    trainable = {name for name, value in tower.adapted.named_parameters() if value.requires_grad}
    assert trainable == set(tower.adapters)


def test_the_seed_settles_the_adapters(encoder_folders: dict[str, Path]) -> None:
    said = captions(32)
    before = torch.random.get_rng_state()
    first, again, other = (
        state(tuned(encoder_of(encoder_folders), said, seed=seed)[0]) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_pairs_without_weight_are_never_seen(encoder_folders: dict[str, Path]) -> None:
    said = captions(32)
    weights = (np.arange(32) % 3 > 0).astype(np.float64)
    others = [text if weight else "boat boat boat" for text, weight in zip(said, weights)]
    found = [state(tuned(encoder_of(encoder_folders), text, weights)[0]) for text in (said, others)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    everything = state(tuned(encoder_of(encoder_folders), others)[0])
    assert not all(torch.equal(found[0][name], everything[name]) for name in everything)


def test_parts_of_like_length_change_nothing(
    encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = captions(23)
    for family in encoder_folders:
        tower = adapt_text_tower(encoder_of(encoder_folders, family), 4, 0)
        with torch.no_grad():
            alone = torch.cat([tower.embed([text]) for text in said])
            for part in (5, 100):
                monkeypatch.setattr("benchmarks.methods.tuning.PART", part)
                torch.testing.assert_close(tower.embed(said), alone, rtol=1e-9, atol=1e-9)


def test_other_objectives_serve_too(encoder_folders: dict[str, Path]) -> None:
    said = captions(CONFIG.batch_size)
    tower = adapt_text_tower(encoder_of(encoder_folders, "siglip"), 4, 0)
    u, rows = images(len(said), tower.encoder.dimension), np.arange(len(said))
    losses = tune(tower, lambda rows: (u[rows], said), [rows] * 5, Sigmoid(10.0, -3.0), CONFIG)
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_names_the_step(encoder_folders: dict[str, Path]) -> None:
    tower = adapt_text_tower(encoder_of(encoder_folders), 4, 0)
    u = torch.full((4, tower.encoder.dimension), float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0; lower learning_rate"):
        tune(tower, lambda rows: (u, CAPTIONS), [np.arange(4)], LOSS, CONFIG)


def test_a_text_tower_without_linear_layers_is_told(encoder_folders: dict[str, Path]) -> None:
    encoder = encoder_of(encoder_folders)
    model: Any = encoder.model
    model.text_model = nn.Embedding(5, 24)
    model.text_projection = nn.Identity()
    with pytest.raises(
        InputError, match=r"CLIPModel has none in text_model or text_projection; its parts are"
    ):
        adapt_text_tower(encoder, 4, 0)


def test_tuning_needs_peft(encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install \"influencespace\[lora\]\""):
        adapt_text_tower(encoder_of(encoder_folders), 4, 0)
