"""One RunConfig composed of every stage's own config; read from YAML, changed by dotted overrides, saved resolved."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field as plain_field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as options

from influencespace.core.select import SelectionConfig
from influencespace.data.artifacts import atomic_path
from influencespace.errors import InputError
from influencespace.estimators.influence import CurvatureConfig
from influencespace.stages.ingest.encode import EmbedConfig
from influencespace.stages.ingest.shards import DataConfig
from influencespace.stages.ingest.split import SplitConfig
from influencespace.stages.proxies.proxy import ProxyConfig
from influencespace.stages.scoring.cluster import ClusterConfig
from influencespace.stages.scoring.influence import InfluenceConfig
from influencespace.stages.selection.redundancy import RedundancyConfig
from influencespace.stages.training.evaluate import EvaluateConfig
from influencespace.stages.training.train import TrainConfig


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
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


def load_config(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a YAML file (or the defaults) with dotted overrides such as {"cluster.k": "200"}.

    Override values that are strings are read as YAML, but where a setting is text they are taken as they are, unless
    they are a list, null or quoted: globs and URLs are odd YAML. Raises InputError for an unreadable file, an unknown key (naming
    the nearest one) or a value that does not fit.
    """
    tree = _merged(as_tree(RunConfig()), _read(path) if path is not None else {})
    for key, value in (overrides or {}).items():
        _set(tree, key, _parsed(key, value) if isinstance(value, str) else value)
    _refuse_unknown(tree, RunConfig, "")
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        first, *others = error.errors()
        key = _key_of(first)
        # of a setting that may be one thing or another: what is wrong with it as each of them
        said = dict.fromkeys(
            ADVICE.get(one["type"], one["msg"]) for one in (first, *others) if _key_of(one) == key
        )
        raise InputError(f"config: {key} is {first['input']!r}: {'; or: '.join(said)}") from None


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
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is no YAML: {' '.join(str(error).split())}") from None
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
        value = yaml.safe_load(text)
    except yaml.YAMLError:
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


def _refuse_unknown(tree: Any, kind: Any, prefix: str) -> None:
    if not (dataclasses.is_dataclass(kind) and isinstance(tree, dict)):
        return
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key, value in tree.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(names)}"
            raise InputError(f"config: there is no {prefix}{key or '(an empty name)'}; {advice}")
        _refuse_unknown(value, _dataclass_of(hints[key]), f"{prefix}{key}.")


def _dataclass_of(hint: Any) -> Any:
    if get_origin(hint) is None:
        return hint
    return next((part for part in get_args(hint) if dataclasses.is_dataclass(part)), None)
