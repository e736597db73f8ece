"""What --help-config says of the fields of a configuration is what they are."""

import json
import re

import pytest

from simclr_dali.shards.errors import UserError
from simclr_dali.train.config import Config
from simclr_dali.train.config_file import load_config
from simclr_dali.train.help_config import help_config, keys
from tests.conftest import run_command


def test_every_field_says_what_it_means_and_its_default() -> None:
    found = {one.path: one for one in keys(Config)}
    assert all(len(one.about) > 5 for one in found.values())
    resolved = load_config("ds_lars.json", [], data="somewhere").model_dump(mode="json")

    def paths(block: dict[str, object], prefix: str = "") -> set[str]:
        inner = {
            path for key, value in block.items() if isinstance(value, dict) for path in paths(value, f"{prefix}{key}.")
        }
        return inner | {f"{prefix}{key}" for key, value in block.items() if not isinstance(value, dict)}

    # What describes an encoder is the encoder's own, and listed as one.
    known = {path for path in paths(resolved) if not path.startswith("simclr.encoder.")}
    assert known <= found.keys(), known - found.keys()
    assert found["simclr.seed"].default == " = 0" and found["simclr.views.strength"].default == " = 1.0"
    assert found["simclr.track"].default == ' = "auto"' and found["simclr.views.area"].values == "[number, number]"
    assert found["optimizer.params.nesterov"].about.endswith("Of SGD.")
    assert found["optimizer.params.momentum"].about.endswith("Of LARS and SGD.")
    for one in found.values():
        if one.default:
            json.loads(one.default.removeprefix(" = "))


def test_one_key_or_a_block_may_be_asked_for() -> None:
    assert help_config("simclr.temperature").startswith("simclr.temperature: number = 0.1\n    ")
    blocks = re.findall(r"^\S+?:", help_config("simclr.graph"), re.MULTILINE)
    assert blocks == ["simclr.graph.conditionals:", "simclr.graph.region:", "simclr.graph.prefetch:"]
    with pytest.raises(UserError, match=r"no key 'epochs' in a configuration; did you mean simclr\.epochs\?"):
        help_config("epochs")


def test_the_command_answers_without_a_config() -> None:
    done = run_command("pretrain", "--help-config", "simclr.track")
    assert done.returncode == 0 and done.stdout.startswith("simclr.track: "), done.stderr
    wrong = run_command("pretrain", "--help-config", "simclr.trakc")
    assert wrong.returncode == 2 and "did you mean simclr.track?" in wrong.stderr
