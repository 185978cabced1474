"""Configuration: files, overrides, refusals. The expectations are the contract of the command line."""

import dataclasses
from pathlib import Path

import pytest

from scalecryo.config import (
    RECIPES,
    RENAMED,
    SETTINGS,
    Config,
    config_from_dict,
    config_to_toml,
    load_config,
    settings_of,
)
from scalecryo.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


def test_written_toml_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(
        None,
        {
            "encoder.channels": "8,16",
            "run.out": 'a "quoted" \\ path',
            "pose.heads": "4",
            "pose.source": "encoder",
            "encoder.network": "cnn",
        },
    )
    (tmp_path / "c.toml").write_text(config_to_toml(config))
    assert load_config(str(tmp_path / "c.toml"), {}) == config


def test_override_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\nbatch_size = 16\n[optim]\nencoder_rate = 1\n")
    config = load_config(
        str(tmp_path / "c.toml"),
        {"train.steps": "9", "pose.source": "encoder", "encoder.network": "cnn", "pose.copies": "2"},
    )
    assert (config.train.steps, config.train.batch_size, config.pose.copies) == (9, 16, 2)
    assert config.optim.encoder_rate == 1.0
    assert type(config.optim.encoder_rate) is float
    assert config.volume == Config().volume


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"pose.heds": "3"}, ["pose.heds", "pose.heads"]),
        ({"pos.heads": "3"}, ["[pos]", "pose"]),
        ({"train.steps": "many"}, ["train.steps", "many", "int"]),
        ({"train.steps": "0"}, ["train.steps", "at least 1"]),
        ({"pose.source": "magic"}, ["pose.source", "encoder", "table"]),
        ({"pose.centred": "maybe"}, ["true or false"]),
        ({"pose.copies": "3"}, ["pose.copies", "power of 2"]),
        ({"pose.source": "encoder", "encoder.network": "cnn", "pose.copies": "16"}, ["pose.copies", "90 degrees"]),
        ({"pose.symmetric_loss": "true"}, ["pose.symmetric_loss", "pose.copies"]),
        ({"guided.starts": "0"}, ["guided.starts", "at least 1"]),
        ({"pose.source": "known", "pose.heads": "2"}, ["pose.heads", "known"]),
        ({"run.workers": "two"}, ["run.workers", "MIN:MAX"]),
        ({"run.workers": "3:2"}, ["run.workers", "MIN <= MAX"]),
        ({"run.workers": "40"}, ["stream.lanes", "40"]),
        ({"train.box": "33"}, ["train.box", "even"]),
        ({"train.box": "32", "encoder.input_box": "64"}, ["encoder.input_box", "32"]),
        ({"optim.encoder_rate": "-1"}, ["optim.encoder_rate"]),
        ({"encoder.channels": "a,b"}, ["encoder.channels", "whole numbers"]),
    ],
)
def test_refusals_name_the_key_and_the_repair(overrides: dict[str, str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[train]\nsteps = 'x'\n", "train.steps"),
        ("[optim]\nencoder_rate = '1e-4'\n", "optim.encoder_rate"),
        ("[train\n", "TOML"),
        ("train = 3\n", "section"),
        ("[trian]\nsteps = 3\n", "did you mean train"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, fragment: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=fragment):
        load_config(str(tmp_path / "c.toml"), {})


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("nowhere.toml", {})


def test_every_setting_is_described() -> None:
    for section, table in dataclasses.asdict(Config()).items():
        for key in table:
            found = SETTINGS[f"{section}.{key}"].metadata
            assert found["help"]
            assert set(found["recipes"]) <= set(RECIPES)


CHOICES = {
    "guided": {},
    "poses": {"guided.start": "poses"},
    "autoencoder": {"pose.source": "encoder"},
    "paper": {"pose.source": "encoder", "encoder.network": "cnn"},
    "known": {"pose.source": "known"},
    "table": {"pose.source": "table"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_what_it_reads_and_refuses_the_rest(recipe: str, tmp_path: Path) -> None:
    config = load_config(None, CHOICES[recipe])
    assert config.recipe == recipe
    read = settings_of(config)
    for name, setting in SETTINGS.items():
        given = {name: setting.default} | CHOICES[recipe]
        if name in read:
            assert load_config(None, given) == config
        else:
            with pytest.raises(ConfigError, match=rf"config: {name} is not read by the recipe {recipe} .*leave it out"):
                load_config(None, given)
    (tmp_path / "c.toml").write_text(config_to_toml(config))
    assert load_config(str(tmp_path / "c.toml"), {}) == config
    # What a run has kept is no longer somebody's wish.
    assert load_config(None, CHOICES[recipe], base=dataclasses.asdict(Config())) == config


def test_keys_of_a_file_that_the_recipe_does_not_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\n")
    with pytest.raises(ConfigError, match=r"train\.steps is not read by the recipe guided"):
        load_config(str(tmp_path / "c.toml"), {})
    assert load_config(str(tmp_path / "c.toml"), {"pose.source": "known"}).train.steps == 7


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_are_answered_with_the_new_ones(old: str) -> None:
    section, key = old.split(".")
    assert RENAMED[old] in SETTINGS
    for attempt in (lambda: load_config(None, {old: "3"}), lambda: config_from_dict({section: {key: 3}})):
        with pytest.raises(ConfigError, match=f"{old} was renamed to {RENAMED[old]}"):
            attempt()


def test_unusual_values_are_written_as_toml(tmp_path: Path) -> None:
    config = load_config(None, {"stream.retry_seconds": "inf", "train.query": "half == 1\nand\t\u00e4 > '\"'"})
    (tmp_path / "c.toml").write_text(config_to_toml(config))
    assert load_config(str(tmp_path / "c.toml"), {}) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load(path: Path) -> None:
    load_config(str(path), {})


def test_nested_mappings_round_trip() -> None:
    assert config_from_dict(dataclasses.asdict(Config())) == Config()
