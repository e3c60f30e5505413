"""The engine is imported from this checkout, whatever else is installed; a base for all that need no trained one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of an untrained toy base; not to be changed."""
    from untrained_toy import write_untrained

    return write_untrained(tmp_path_factory.mktemp("weights"))
