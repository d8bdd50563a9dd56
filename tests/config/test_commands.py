"""Every command with a recipe has its class, by the name that errors and `prefpipe config` print."""

import pytest

from prefpipe.config import base
from prefpipe.config.commands import CLASSES


@pytest.mark.parametrize("command", CLASSES)
def test_a_class_is_filed_under_its_command(command: str) -> None:
    assert base.command_name(CLASSES[command]) == command
    assert base.dump(CLASSES[command]())
