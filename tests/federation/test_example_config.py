# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from fomoe.federation.config import Config, load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation.toml"


def test_the_commented_example_names_every_setting():
    shown = load_config(EXAMPLE).model_fields_set
    assert shown == set(Config.model_fields)
    config = load_config(EXAMPLE)
    for section in Config.model_fields:
        values = getattr(config, section)
        left_out = set(type(values).model_fields) - values.model_fields_set
        commented = set(re.findall(r"^# (\w+) = ", EXAMPLE.read_text(), re.MULTILINE))
        assert left_out <= {"name", "checkpoint", *commented}, section


def test_settings_that_are_commented_out_show_their_defaults(tmp_path):
    path = tmp_path / "all.toml"
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert load_config(path).to_dict() == load_config(EXAMPLE).to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        ["federation.strategy=ep", "federation.overlap=1"],
        ["federation.strategy=ddp", "federation.overlap=4"],
        ["federation.outer=average"],
        ["federation.outer=local_adamw"],
        ["federation.placement=random", "federation.shuffle_every=2"],
    ],
)
def test_the_commented_example_takes_what_the_documents_change(changes):
    load_config(EXAMPLE, changes)


def test_the_commented_example_shows_the_defaults():
    config = load_config(EXAMPLE).to_dict()
    defaults = Config.from_dict({"federation": {"strategy": "fomoe", "overlap": 2}}).to_dict()
    config["model"]["score"] = "softmax"  # the one difference, said beside it
    assert config == defaults
