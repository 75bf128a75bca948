# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from fomoe.federation.config import Config, load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation.toml"


def test_the_commented_example_names_every_setting():
    shown = load_config(EXAMPLE).model_fields_set
    assert shown == set(Config.model_fields)
    config = load_config(EXAMPLE)
    for section in Config.model_fields:
        values = getattr(config, section)
        assert set(type(values).model_fields) - values.model_fields_set <= {"name", "checkpoint"}, (
            section
        )


def test_the_commented_example_shows_the_defaults():
    config = load_config(EXAMPLE).to_dict()
    defaults = Config.from_dict({"federation": {"strategy": "fomoe", "overlap": 2}}).to_dict()
    config["model"]["score"] = "softmax"  # the one difference, said beside it
    assert config == defaults
