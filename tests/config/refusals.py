"""What a configuration is refused for."""

import pytest

from hybridflow.config.load import load
from hybridflow.errors import ConfigError


def problems(*overrides: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as error:
        load(overrides)
    return str(error.value).split("\n  ")[1:]
