"""One RunConfig composed of every stage's own config; read from YAML, changed by dotted overrides, saved resolved."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field as plain_field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as options

from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import atomic_path
from influencespace.data.mirror import here
from influencespace.data.yaml_text import read_yaml
from influencespace.errors import STRICT, InputError
from influencespace.estimators.influence import CurvatureConfig
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.ingest.shards import DataConfig
from influencespace.stages.ingest.split import SplitConfig
from influencespace.stages.proxies.proxy import ProxyConfig
from influencespace.stages.scoring.cluster_config import ClusterConfig
from influencespace.stages.scoring.influence import InfluenceConfig
from influencespace.stages.selection.redundancy import RedundancyConfig
from influencespace.stages.training.evaluate import EvaluateConfig
from influencespace.stages.training.train import TrainConfig


@options(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything that a run depends on; `config.yaml` in the run folder replays it.

    From the folder where it was begun, that is: paths are as they were given.
    """

    data: DataConfig = plain_field(default_factory=DataConfig)
    embed: EmbedConfig = plain_field(default_factory=lambda: EmbedConfig(encoder=""))
    split: SplitConfig = plain_field(default_factory=SplitConfig)
    proxy: ProxyConfig = plain_field(default_factory=ProxyConfig)
    cluster: ClusterConfig = plain_field(default_factory=ClusterConfig)
    redundancy: RedundancyConfig = plain_field(default_factory=RedundancyConfig)
    curvature: CurvatureConfig = plain_field(default_factory=CurvatureConfig)
    influence: InfluenceConfig = plain_field(default_factory=InfluenceConfig)
    selection: SelectionConfig = plain_field(default_factory=SelectionConfig)
    train: TrainConfig = plain_field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = plain_field(default_factory=EvaluateConfig)
    iterate: int = Field(default=1, ge=1)
    """Rounds of proxies, clusters, scores, selection and retraining at most; they end when the target loss stops falling."""
    seed: int = Field(default=0, ge=0)
    """From which every random choice of the run derives, but for the retraining's own `train.seeds`."""


_ADAPTER = TypeAdapter(RunConfig)
ADVICE = {
    "tuple_type": "it should be a list, such as [a, b]",
    "dataclass_type": "it is a section: give its settings by their names",
}
RENAMED = {
    "student": "proxy",
    "attribute": "influence",
    "curate": "selection",
    "target": "curvature.target_folds",
    "embed.keep_parts": "embed.keep_chunks",
    "embed.read.seed": "seed",
    "split.seed": "seed",
    "proxy.seed": "seed",
    "proxy.least_gain": "proxy.min_gain",
    "proxy.most_doublings": "proxy.max_doublings",
    "proxy.contexts": "proxy.negative_batches",
    "proxy.block_size": "proxy.bucket_size",
    "cluster.least_size": "cluster.min_cluster_size",
    "cluster.block_size": "cluster.bucket_size",
    "cluster.seed": "seed",
    "redundancy.most": "redundancy.max_compared",
    "curvature.seed": "seed",
    "influence.first_look": "influence.max_samples",
    "influence.budget": "influence.max_samples",
    "influence.initial_samples": "influence.max_samples",
    "influence.target_budget": "influence.target_samples",
    "influence.placebo": "influence.control_samples",
    "influence.form": "influence.options.form",
    "influence.block_size": "influence.bucket_size",
    "selection.margin": "selection.margin_se",
    "selection.false_share": "selection.max_false_discovery",
    "selection.cautious": "selection.conservative",
    "selection.floor": "selection.min_group_share",
    "selection.weights": "selection.weighting (confirmed is auto)",
    "selection.groups": "selection.fairness (confirmed is auto, ignored is off)",
    "curate.tau_high": "selection.temperature",  # what is called so now is a threshold
}
"""Settings of earlier versions, sections first: a setting within a renamed section is looked up by its new section."""


def load_config(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a YAML file (or the defaults) with dotted overrides such as {"cluster.k": "200"}.

    Override values that are strings are read as YAML, but where a setting is text they are taken as they are, unless
    they are a list, null or quoted: globs and URLs are odd YAML. Raises InputError for an unreadable file, an unknown key (naming
    the nearest one, or what it is called now) or a value that does not fit.
    """
    tree = _merged(as_tree(RunConfig()), _read(path) if path is not None else {})
    for key, value in (overrides or {}).items():
        _set(tree, key, _parsed(key, value) if isinstance(value, str) else value)
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise InputError(f"config: {_advice(error.errors())}") from None


def _advice(errors: Sequence[Any]) -> str:
    """What to change, of the first thing that is wrong; an unknown key comes before values that do not fit."""
    first = next((one for one in errors if one["type"] == "unexpected_keyword_argument"), errors[0])
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(list(map(str, first["loc"])), first["input"])
    key = _key_of(first)
    # of a setting that may be one thing or another: what is wrong with it as each of them
    reasons = dict.fromkeys(ADVICE.get(one["type"], one["msg"]) for one in errors if _key_of(one) == key)
    return f"{key or 'a name'} is {first['input']!r}: {'; or: '.join(reasons)}"


def _unknown(names: list[str], value: Any) -> str:
    """Why a key is none, and the nearest one or its new name."""
    *sections, last = names
    while isinstance(value, dict) and value:  # of a section that has another name: its first setting
        name, value = next(iter(value.items()))
        names = [*names, str(name)]
    key = ".".join(names)
    known = [field.name for field in dataclasses.fields(_kind_of(sections))]
    if (new := _renamed(key)) is not None:
        return f"{key} is called {new} now"
    near = difflib.get_close_matches(last, known, 1)
    prefix = "".join(f"{section}." for section in sections)
    advice = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"there is no {prefix}{last or '(an empty name)'}; {advice}"


def _renamed(key: str) -> str | None:
    """The name that a setting of an earlier version has now, or None where it had none."""
    section, dot, rest = key.partition(".")
    if key in RENAMED:
        return RENAMED[key]
    if section == "target":
        return RENAMED["target"]
    now = RENAMED.get(section, section) + dot + rest
    new = RENAMED.get(now, now)
    return None if new == key else new


def _kind_of(sections: Sequence[str]) -> Any:
    """The class of options at a path of sections."""
    fields = list(_fields(sections))
    return _dataclass_of(fields[-1][1]) if fields else RunConfig


def _key_of(error: Any) -> str:
    return ".".join(name for name, _ in _fields(map(str, error["loc"])))


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML, atomically."""
    with atomic_path(path) as aside:
        aside.write_text(yaml.safe_dump(as_tree(config), sort_keys=False), encoding="utf-8")


def as_tree(config: RunConfig) -> dict[str, Any]:
    """The config as plain mappings and lists."""
    tree: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return tree


def _read(path: Path | str) -> dict[str, Any]:
    try:
        tree = read_yaml(here(Path(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise InputError(f"config file {path} holds a {type(tree).__name__}, not a mapping of sections")
    return tree or {}


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with `defaults` for what it leaves out; a section left empty is left out."""
    merged = dict(defaults)
    for key, value in given.items():
        default = defaults.get(key)
        if isinstance(default, dict) and isinstance(value, dict | None):
            merged[key] = _merged(default, value or {})
        else:
            merged[key] = value
    return merged


def _parsed(key: str, text: str) -> Any:
    """The value that the text of an override stands for."""
    names = key.split(".")
    fields = list(_fields(names))
    hint = fields[-1][1] if len(fields) == len(names) else Any
    is_text = str in (hint, *get_args(hint))
    try:
        value = read_yaml(text)
    except ValueError:
        value = text
    if not text or (is_text and not isinstance(value, list | None) and text[0] not in "'\""):
        return text
    return value


def _fields(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Each of a path of names with its type, as far as it leads through the sections."""
    kind: Any = RunConfig
    for name in names:
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in hints:
            return
        yield name, hints[name]
        kind = _dataclass_of(hints[name])


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"config: {key} cannot be set: {section} is no section")
    tree[last] = value


def _dataclass_of(hint: Any) -> Any:
    if get_origin(hint) is None:
        return hint
    return next((part for part in get_args(hint) if dataclasses.is_dataclass(part)), None)
