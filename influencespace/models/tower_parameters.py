"""The parameters of the towers in which influence is taken: by name, by pattern, or low-rank adapters."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from influencespace.errors import InputError
from influencespace.models.towers import TowerModel

PREFIX = "encoder.model."
TEMPERATURE = ("logit_scale", "logit_bias")
"""Outside every Space: with it inside, "be less confident" dominates each influence."""
LORA_RANK = 8


def tower_parameters(proxy: TowerModel, space: str, seed: int = 0) -> list[str]:
    """Names of the proxy's parameters in a space.

    `towers`: all of them, without the temperature. `last-blocks`: of each tower its last block and all that follows, the
    projections too. `lora`: low-rank adapters of all linear layers, which are added to the proxy (LoRA, arXiv 2106.09685):
    their A is drawn from `seed`, and as B is zero only B has a gradient, so B alone is in the space. Anything else:
    patterns of names, as in a shell, with commas between. Raises InputError for a pattern that fits none, or where
    peft is not installed.
    """
    model = proxy.encoder.model
    if space == "lora":
        add_adapters(model, LORA_RANK, seed)
        return [name for name, _ in proxy.named_parameters() if ".lora_B." in name]
    names = [name for name, _ in model.named_parameters() if name not in TEMPERATURE]
    if space == "last-blocks":
        names = [name for part, tower in model.named_children() for name in last_block(part, tower)]
    elif space != "towers":
        names = matching(names, space.split(","))
    return [PREFIX + name for name in names]


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Names that fit any of the patterns; raises InputError for a pattern that fits none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 4)][-4:])
            raise InputError(
                f"there is no space {pattern!r}: it is none of heads, last-blocks, lora, towers, and as a pattern (* for "
                f"anything) it fits no parameter of the towers, whose names are such as {some}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def last_block(name: str, tower: nn.Module) -> list[str]:
    """Parameters of a tower from its last block on; all of a module without blocks."""
    lists = [
        (f"{name}.{path}", len(module))
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    names = [f"{name}.{inner}" for inner, _ in tower.named_parameters()]
    if not lists:
        return names
    path, length = lists[0]  # outermost first
    first = next(at for at, inner in enumerate(names) if inner.startswith(f"{path}.{length - 1}."))
    return names[first:]


def add_adapters(model: nn.Module, rank: int, seed: int) -> None:
    """Put low-rank adapters beside all linear layers of a model; raises InputError without peft."""
    config = adapter_config(model, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        import_peft().inject_adapter_in_model(config, model)
    model.eval().requires_grad_(False)


def adapter_config(model: nn.Module, rank: int, parts: Sequence[str] = ()) -> Any:
    """peft's configuration of low-rank adapters beside a model's linear layers: all, or those in parts of these names.

    Raises InputError where there is no such layer, or without peft.
    """
    linear = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (not parts or name.split(".")[0] in parts)
    ]
    if not linear:
        names = ", ".join(name for name, _ in model.named_children())
        raise InputError(
            f"low-rank adapters need linear layers, and {type(model).__name__} has none in "
            f"{' or '.join(parts) or 'any part'}; its parts are {names}"
        )
    return import_peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=linear)


def import_peft() -> Any:
    """The package peft, which is an extra; raises InputError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise InputError(
            'low-rank adapters need peft, which is not installed: pip install "influencespace[lora]"'
        ) from None
    return peft
