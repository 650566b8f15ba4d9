"""Towers as a proxy: the encoder's embeddings, a Space in parts, central differences against forward mode."""

from functools import partial
from pathlib import Path

import pytest
import torch
from nonlinear import towers
from PIL import Image
from tiny_encoders import CAPTIONS, FAMILY_MAKERS
from torch import Tensor, nn

from influencespace.core.contrastive import InfoNce
from influencespace.errors import InputError
from influencespace.models.encoders import load_encoder
from influencespace.models.space import Inputs, Space
from influencespace.models.streamed import StreamedSpace
from influencespace.models.tower_parameters import PREFIX, tower_parameters
from influencespace.models.tower_tangents import TowerTangents, choose_steps, moves_along, read_as
from influencespace.models.towers import TowerModel

LOSS = InfoNce(5.0)
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SPACES = ("towers", "last-blocks", "text_model.*")


@pytest.fixture(params=FAMILY_MAKERS)
def proxy(request: pytest.FixtureRequest, encoder_folders: dict[str, Path]) -> TowerModel:
    return TowerModel(load_encoder(encoder_folders[request.param]))


@pytest.fixture
def clip(encoder_folders: dict[str, Path]) -> TowerModel:
    return TowerModel(load_encoder(encoder_folders["clip"])).double()


def pairs(proxy: TowerModel, pictures: list[Image.Image]) -> Inputs:
    return proxy.encoder.preprocess_images(pictures), proxy.tokenize(CAPTIONS)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_proxy_gives_the_encoders_embeddings(proxy: TowerModel, pictures: list[Image.Image]) -> None:
    encoder = proxy.encoder
    u, t = proxy(*pairs(proxy, pictures))
    torch.testing.assert_close(u, encoder.encode_image(encoder.preprocess_images(pictures)))
    torch.testing.assert_close(t, encoder.encode_text(encoder.tokenize(CAPTIONS)[0]))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_space_in_parts_is_the_whole_space(rows: int) -> None:
    inputs = random((6, 3), 1), random((6, 5), 2)
    whole, parts = Space(towers()), StreamedSpace(towers(), rows=rows)
    directions, weights = random((3, whole.size), 3), random((2, 6), 4)
    for name in ("u", "t", "du", "dt"):
        found, wanted = (getattr(space.tangents(inputs, directions), name) for space in (parts, whole))
        torch.testing.assert_close(found, wanted, **EXACT)
    cotangents = random((3, 6, 2), 5), random((3, 6, 2), 6)
    torch.testing.assert_close(parts.pullback(inputs, *cotangents), whole.pullback(inputs, *cotangents))
    for method, given in (("gauss_newton", directions), ("loss_gradients", weights)):
        found, wanted = (getattr(space, method)(inputs, given, LOSS) for space in (parts, whole))
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("space", SPACES)
def test_tangents_and_pullback_of_towers_are_adjoint(
    proxy: TowerModel, pictures: list[Image.Image], space: str
) -> None:
    proxy = proxy.double()
    inputs = pairs(proxy, pictures)
    over = StreamedSpace(proxy, tower_parameters(proxy, space), rows=3)
    direction = 1e-2 * random((1, over.size), 1)
    tangents = over.tangents(inputs, direction)
    c_u, c_t = random((1, *tangents.u.shape), 2), random((1, *tangents.t.shape), 3)
    forward = (tangents.du * c_u).sum() + (tangents.dt * c_t).sum()
    torch.testing.assert_close(forward, (over.pullback(inputs, c_u, c_t) * direction).sum(), **EXACT)


@pytest.mark.parametrize("family", ["clip", "siglip", "flava"])
@pytest.mark.parametrize("space", SPACES)
def test_central_differences_are_forward_mode(
    encoder_folders: dict[str, Path], pictures: list[Image.Image], family: str, space: str
) -> None:
    proxy = TowerModel(load_encoder(encoder_folders[family])).double()
    inputs = pairs(proxy, pictures)
    over = StreamedSpace(proxy, tower_parameters(proxy, space))
    directions = 1e-2 * random((2, over.size), 1)
    exact = over.tangents(inputs, directions)
    steps, disagreement = choose_steps(over, directions, (inputs[0][:2], inputs[1][:2]))
    assert disagreement < 1e-6
    before = [value.clone() for value in proxy.parameters()]
    for rows in (1, 4):
        over.rows = rows
        found = TowerTangents(over, directions, steps).tangents(inputs, directions)
        torch.testing.assert_close(found.u, exact.u, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.t, exact.t, rtol=0, atol=1e-8)
        for dx, wanted in ((found.du, exact.du), (found.dt, exact.dt)):
            torch.testing.assert_close(dx, wanted, rtol=0, atol=1e-5 * float(exact.dt.abs().max()))
    for value, kept in zip(proxy.parameters(), before):
        assert torch.equal(value, kept), "the weights are as they were, to the last bit"


def test_towers_that_stand_on_their_kinks_are_refused(
    encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    """Without training a MobileNetV2 has no biases: black pixels lie exactly where ReLU6 bends."""
    proxy = TowerModel(load_encoder(encoder_folders["vision-text-dual-encoder"])).double()
    over = StreamedSpace(proxy, tower_parameters(proxy, "towers"))
    with pytest.raises(InputError, match=r"disagree by \d+\.\d% on 4 pairs .* far from smooth"):
        choose_steps(over, 1e-2 * random((1, over.size), 1), pairs(proxy, pictures))


def test_the_end_of_a_tower_takes_forward_mode_and_a_whole_one_differences(
    clip: TowerModel, pictures: list[Image.Image]
) -> None:
    inputs = pairs(clip, pictures)
    steps = {}
    for space in ("towers", "*projection*", "text_model.*"):
        over = StreamedSpace(clip, tower_parameters(clip, space))
        direction = 1e-2 * random((1, over.size), 1)
        steps[space], _ = choose_steps(over, direction, inputs)
        found = TowerTangents(over, direction, steps[space]).tangents(inputs, direction)
        exact = over.tangents(inputs, direction)
        for dx, wanted in ((found.du, exact.du), (found.dt, exact.dt)):
            torch.testing.assert_close(dx, wanted, rtol=0, atol=1e-5 * float(exact.dt.abs().max()))
    assert (steps["towers"] > 0).all()
    assert (steps["*projection*"] == 0).all()
    assert steps["text_model.*"][0, 0] == 0 < steps["text_model.*"][0, 1], "images do not move"


def test_steps_are_of_given_directions_alone(clip: TowerModel, pictures: list[Image.Image]) -> None:
    inputs = pairs(clip, pictures)
    over = StreamedSpace(clip, tower_parameters(clip, "text_projection.*"))
    direction = random((1, over.size), 1)
    differences = TowerTangents(over, direction, choose_steps(over, direction, inputs)[0])
    with pytest.raises(ValueError, match="are of other directions"):
        differences.tangents(inputs, 2 * direction)


def test_tied_weights_move_together() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    x, change = torch.randn(2, 3), torch.randn(3, 3)
    weight = (tied[0].weight + 0.5 * change).T
    with torch.no_grad(), read_as(moves_along(tied, {"0.weight": change}), partial(torch.add, alpha=0.5)):
        torch.testing.assert_close(tied(x), x @ weight @ weight)


def test_shifts_end_with_an_error() -> None:
    layer = nn.Linear(3, 3)
    before = layer(torch.ones(1, 3))
    with pytest.raises(RuntimeError), read_as(moves_along(layer, {"weight": torch.ones(3, 3)}), torch.add):
        layer(torch.ones(1, 7))
    assert torch.equal(layer(torch.ones(1, 3)), before)


def test_weights_of_low_precision_are_refused(
    encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    proxy = TowerModel(load_encoder(encoder_folders["clip"], dtype="bfloat16"))
    over = StreamedSpace(proxy, tower_parameters(proxy, "*projection*"))
    with pytest.raises(
        InputError, match=r"in torch.bfloat16 are mostly rounding; load the encoder in float32"
    ):
        choose_steps(over, torch.randn(1, over.size).bfloat16(), pairs(proxy, pictures))


def test_a_direction_that_is_not_finite_is_refused(clip: TowerModel, pictures: list[Image.Image]) -> None:
    over = StreamedSpace(clip, tower_parameters(clip, "*projection*"))
    direction = torch.full((1, over.size), torch.nan, dtype=torch.float64)
    with pytest.raises(InputError, match=r"disagree by nan% on 4 pairs .* not finite"):
        choose_steps(over, direction, pairs(clip, pictures))


def test_the_temperature_is_in_no_space(proxy: TowerModel) -> None:
    names = tower_parameters(proxy, "towers")
    assert sorted(set(dict(proxy.named_parameters())) - set(names)) in (
        [PREFIX + "logit_scale"],
        [PREFIX + "logit_bias", PREFIX + "logit_scale"],
    )
    with pytest.raises(InputError, match="there is no space 'logit_scale'"):
        tower_parameters(proxy, "logit_scale")


def test_last_blocks_hold_the_end_of_each_tower(clip: TowerModel) -> None:
    names = [name.removeprefix(PREFIX) for name in tower_parameters(clip, "last-blocks")]
    for name in ("text_model.final_layer_norm.bias", "vision_model.post_layernorm.bias"):
        assert name in names
    for name in ("visual_projection.weight", "text_projection.weight"):
        assert name in names
    blocks = {".".join(name.split(".")[:4]) for name in names if ".layers." in name}
    assert blocks == {"text_model.encoder.layers.1", "vision_model.encoder.layers.1"}
    assert not any("embeddings" in name for name in names)


def test_a_pattern_that_fits_nothing_is_reported_with_some_names(clip: TowerModel) -> None:
    told = r"no space 'heds': it is none of heads, last-blocks, lora, towers, .* such as \S+, \S+, \S+, \S+$"
    with pytest.raises(InputError, match=told):
        tower_parameters(clip, "text_projection.*,heds")


def test_adapters_leave_the_embeddings_and_have_their_gradient_in_b_alone(
    encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    pytest.importorskip("peft")
    plain, adapted = (TowerModel(load_encoder(encoder_folders["clip"])).double() for _ in range(2))
    names = tower_parameters(adapted, "lora", seed=3)
    adapted.double()
    inputs = pairs(plain, pictures)
    for x, y in zip(adapted(*inputs), plain(*inputs)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    every = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    assert {name.split(".lora_")[1][0] for name in every} == {"A", "B"}
    weights = torch.full((1, 4), 0.25, dtype=torch.float64)
    space = StreamedSpace(adapted, every)
    gradient = space.unflatten(space.loss_gradients(inputs, weights, LOSS)[0])
    assert {name for name, value in gradient.items() if value.any()} == set(names)


def test_adapters_are_the_same_for_the_same_seed(encoder_folders: dict[str, Path]) -> None:
    pytest.importorskip("peft")
    drawn = []
    for seed in (0, 0, 1):
        proxy = TowerModel(load_encoder(encoder_folders["clip"]))
        tower_parameters(proxy, "lora", seed)
        drawn.append(
            torch.cat([value.flatten() for name, value in proxy.named_parameters() if ".lora_A." in name])
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_adapters_need_peft(clip: TowerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install \"influencespace\[lora\]\""):
        tower_parameters(clip, "lora")
