"""The config: what is saved is what is loaded, and what cannot be is refused with the near key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from influencespace.config import RENAMED, RunConfig, as_tree, load_config, save_config
from influencespace.errors import InputError


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all settings."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, inner in tree.items()
        for name, value in leaves(inner, f"{prefix}.{key}" if prefix else key).items()
    }


DEFAULTS = leaves(as_tree(load_config()))


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_prototypes_settings_are_read() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "prototype.yaml")
    assert (config.cluster.k, config.curvature.rank, config.influence.max_samples) == (100, 10, 20_000)
    assert (config.selection.target_size, config.selection.tau_low, config.selection.max_weight) == (
        0.8,
        -0.001,
        5,
    )
    assert (config.selection.unit, config.selection.tau_high) == ("cluster", 0.01)
    assert config.proxy.first_steps(51_200) == 10 * 100


class TestRoundTrip:
    def test_the_defaults_are_saved_and_loaded(self, tmp_path: Path) -> None:
        save_config(load_config(), tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == load_config() == RunConfig()

    @settings(max_examples=25)
    @given(
        pool=st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=1).map(tuple)),
        k=st.one_of(st.just("auto"), st.integers(1, 10**6)),
        tau=st.floats(-1e6, 1e6),
        seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True).map(tuple),
        seed=st.integers(0, 2**63),
    )
    def test_any_settings_are_saved_and_loaded(
        self, tmp_path_factory: pytest.TempPathFactory, pool: Any, k: Any, tau: float, seeds: Any, seed: int
    ) -> None:
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        given_ = {
            "data": {
                "pool": list(pool) if isinstance(pool, tuple) else pool,
                "target": None,
                "test": "test set",
            },
            "cluster": {"k": k, "fusion": {"name": "weighted_sum", "weight": 0.25}},
            "selection": {"tau_low": tau, "conservative": True, "target_size": 0.5},
            "train": {"seeds": list(seeds)},
            "seed": seed,
        }
        path.write_text(yaml.safe_dump(given_), encoding="utf-8")
        config = load_config(path)
        save_config(config, path)
        assert load_config(path) == config
        assert (config.data.pool, config.cluster.k, config.selection.tau_low) == (pool, k, tau)
        assert (config.train.seeds, config.seed) == (seeds, seed)

    def test_every_setting_can_be_overridden_by_its_dotted_name(self) -> None:
        texts = {name: v if isinstance(v, str) else yaml.safe_dump(v) for name, v in DEFAULTS.items()}
        assert load_config(None, texts) == load_config(None, DEFAULTS) == load_config()
        assert len(DEFAULTS) > 50

    def test_saving_is_readable_and_leaves_nothing_aside(self, tmp_path: Path) -> None:
        save_config(load_config(None, {"cluster.k": "200"}), tmp_path / "config.yaml")
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["cluster"]["k"] == 200
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]

    def test_an_empty_file_is_the_defaults(self, tmp_path: Path) -> None:
        assert load_config(written(tmp_path, "# nothing\n")) == load_config()


class TestOverrides:
    def test_they_win_over_the_file(self, tmp_path: Path) -> None:
        path = written(tmp_path, "cluster: {k: 3, epochs: 5}\nseed: 1\n")
        config = load_config(path, {"cluster.k": "7", "proxy.train.steps": 9})
        assert (config.cluster.k, config.cluster.epochs, config.seed, config.proxy.train.steps) == (
            7,
            5,
            1,
            9,
        )

    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("cluster.k", "auto", "auto"),
            ("train.seeds", "[3, 4]", (3, 4)),
            ("evaluate.classes", "[cat, dog]", ("cat", "dog")),
            ("selection.target_size", "0.3", 0.3),
            ("selection.target_size", "null", None),
            ("selection.conservative", "true", True),
            ("selection.fairness", "off", "off"),
            ("embed.gpus_per_actor", "0.5", 0.5),
            ("data.target", "dev/*.tar", "dev/*.tar"),
            ("data.target", "[a.tar, b.tar]", ("a.tar", "b.tar")),
            ("curvature.tolerance", "1e-4", 1e-4),
            ("data.target", "", ""),
            ("data.target", "'[a]'", "[a]"),
        ],
    )
    def test_strings_are_read_as_yaml(self, key: str, text: str, value: object) -> None:
        found: object = load_config(None, {key: text})
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value

    @pytest.mark.parametrize(
        "path", ["*.tar", "s3://bucket/{000..123}.tar", "a: b.tar", "[odd", "@x", "%y", "007", "my #1.tar"]
    )
    def test_paths_are_taken_as_they_are(self, path: str) -> None:
        """A shell hands over globs and URLs that mean something else, or nothing, in YAML."""
        assert load_config(None, {"data.pool": path}).data.pool == path

    @pytest.mark.parametrize("text", ["[1", "*x", "a: b: c"])
    def test_text_that_is_no_yaml_is_a_bad_value(self, text: str) -> None:
        with pytest.raises(InputError, match=r"cluster\.k is"):
            load_config(None, {"cluster.k": text})

    def test_the_given_mapping_is_left_alone(self) -> None:
        overrides = {"cluster.k": "7"}
        load_config(None, overrides)
        assert overrides == {"cluster.k": "7"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "near"),
        [
            ("clutser.k", "did you mean cluster?"),
            ("cluster.epoch", "did you mean cluster.epochs?"),
            ("proxy.train.step", "did you mean proxy.train.steps?"),
            ("cluster.fusion.wieght", "did you mean cluster.fusion.weight?"),
            ("embed.read.caption", "did you mean embed.read.captions?"),
            ("sed", "did you mean seed?"),
            ("cluster.zzz", "known here: k, first"),
            ("proxy.train.zzz.zzz", "known here: dimension"),
        ],
    )
    def test_a_typo_names_the_near_key(self, key: str, near: str) -> None:
        with pytest.raises(InputError) as error:
            load_config(None, {key: "1"})
        assert "there is no " in str(error.value)
        assert near in str(error.value)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            *(pair for pair in RENAMED.items() if "." in pair[0]),
            *(("student.folds", "proxy.folds"), ("student.train.steps", "proxy.train.steps")),
            *(("student.most_doublings", "proxy.max_doublings"), ("student.seed", "seed")),
            *(("attribute.first_look", "influence.max_samples"), ("curate.tau_low", "selection.tau_low")),
            *(("attribute.quantiles", "influence.quantiles"), ("target.folds", "curvature.target_folds")),
            *(("curate.tau_high", "selection.temperature"), ("curate.weights", "selection.weighting")),
        ],
    )
    def test_an_old_key_is_refused_by_its_new_name(self, tmp_path: Path, old: str, new: str) -> None:
        *sections, last = old.split(".")
        tree: Any = {last: 1}
        for section in reversed(sections):
            tree = {section: tree}
        for refused in (
            lambda: load_config(None, {old: "1"}),
            lambda: load_config(written(tmp_path, yaml.safe_dump(tree))),
        ):
            with pytest.raises(InputError, match=re.escape(f"{old} is called {new}")):
                refused()

    def test_every_new_name_is_one(self) -> None:
        for old, new in RENAMED.items():
            name = new.split(" ")[0]
            assert old not in DEFAULTS
            sections = {key.rpartition(".")[0] for key in DEFAULTS} | {key.split(".")[0] for key in DEFAULTS}
            assert name in DEFAULTS or name in sections or name == "influence.options.form"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("cluster.k", "many"),
            ("cluster.k", "0"),
            ("seed", "-1"),
            ("train.seeds", "[-1]"),
            ("cluster.epochs", "0"),
            ("cluster.fusion.name", "addition"),
            ("proxy.folds", "1"),
            ("proxy.train.learning_rate", "-1"),
            ("selection.target_size", "1.5"),
            ("selection.weighting", "heavy"),
            ("train.seeds", "[one]"),
            ("data.pool", "[1, 2]"),
            ("embed.read.captions", "some"),
            ("iterate", "0"),
            ("influence.max_samples", "2.5"),
        ],
    )
    def test_a_bad_value_names_key_and_value(self, key: str, value: str) -> None:
        with pytest.raises(InputError) as error:
            load_config(None, {key: value})
        message = str(error.value)
        assert f"config: {key} is " in message
        assert str(yaml.safe_load(value)).strip("[]'").split(",")[0] in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("key", "value", "advice"),
        [
            ("cluster.k", "many", "'auto'"),
            ("evaluate.templates", "a", "a list, such as [a, b]"),
            ("cluster", "5", "a section: give its settings by their names"),
        ],
    )
    def test_a_bad_value_is_told_what_may_stand_there(self, key: str, value: str, advice: str) -> None:
        with pytest.raises(InputError, match=f"config: {key} is ") as error:
            load_config(None, {key: value})
        assert advice in str(error.value)

    @pytest.mark.parametrize("section", ["cluster", "proxy", "data"])
    @pytest.mark.parametrize("value", ["4", "[a]", "text"])
    def test_a_section_that_is_no_mapping_is_named(self, tmp_path: Path, section: str, value: str) -> None:
        with pytest.raises(InputError, match=section):
            load_config(written(tmp_path, f"{section}: {value}\n"))

    def test_a_setting_below_a_value_is_refused(self) -> None:
        with pytest.raises(InputError, match="seed is no section"):
            load_config(None, {"seed.x": "1"})
        with pytest.raises(InputError, match=r"cluster\.k\.x"):
            load_config(None, {"cluster.k": "3", "cluster.k.x": "1"})

    @pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "42\n"])
    def test_yaml_that_is_no_mapping_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(InputError, match="not a mapping of sections"):
            load_config(written(tmp_path, text))

    @pytest.mark.parametrize(
        "text", ["a: [1\n", "a: b: c\n", "\tx: 1\n", "x: !!python/object:os.system {}\n"]
    )
    def test_what_is_not_yaml_is_refused_in_one_line(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(InputError, match="is not valid YAML") as error:
            load_config(written(tmp_path, text))
        assert "\n" not in str(error.value)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="is not valid YAML"):
            load_config(tmp_path / "config.yaml")

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            load_config(tmp_path / "none.yaml")
        with pytest.raises(InputError, match="cannot be read"):
            load_config(tmp_path)

    @pytest.mark.parametrize("text", ["1: {k: 2}\n", "cluster: {1: 2}\n", "null: 3\n"])
    def test_keys_that_are_not_text_are_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(InputError, match=r"config: (a name|cluster) is .*Keys should be strings"):
            load_config(written(tmp_path, text))

    @pytest.mark.parametrize("key", ["", ".", "cluster.", ".k"])
    def test_odd_names_are_refused(self, key: str) -> None:
        with pytest.raises(InputError):
            load_config(None, {key: "1"})

    def test_an_empty_section_is_the_default_one(self, tmp_path: Path) -> None:
        assert load_config(written(tmp_path, "cluster:\n")) == load_config()
        assert load_config(written(tmp_path, "cluster:\n"), {"cluster.k": "5"}).cluster.k == 5


def test_a_worker_takes_a_fraction_of_one_gpu_or_whole_ones() -> None:
    assert load_config(None, {"embed.gpus_per_actor": 0.5}).embed.gpus_per_actor == 0.5
    with pytest.raises(
        InputError, match=r"gpus_per_actor is 1\.5: give a fraction of one GPU, or a whole number"
    ):
        load_config(None, {"embed.gpus_per_actor": 1.5})
