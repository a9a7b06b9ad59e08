"""A run's configuration as version 0.1 kept it is read, with settings of networks and sources that it did not use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klray.config import ConfigError, override, saved_config

KEPT = json.loads(Path(__file__).with_name("config_v0_1.json").read_text())


def test_it_is_the_run_it_was() -> None:
    config = saved_config(KEPT)
    flat = config.flat()
    assert KEPT["network"].keys() - {key.partition(".")[2] for key in flat if key.startswith("network.")} == {"width"}
    assert flat["network.channels"] == [8, 8]
    assert flat["process.schedule"] == "vp_linear" and flat["process.beta_max"] == 20.0
    assert saved_config(config.model_dump(mode="json")) == config


def test_what_a_user_writes_is_held_strictly() -> None:
    with pytest.raises(ConfigError, match="unknown key (network.width|data.download|data.path)"):
        override(KEPT, [])
