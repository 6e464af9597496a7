"""Data that several files of tests read."""

import pytest
from records import noise, write_tar


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
    """11 images for which every crop gives another result."""
    folder = tmp_path_factory.mktemp("noisy")
    write_tar(folder / "0.tar", {f"{i}.jpg": noise(i, 64 + i, 48 + 3 * i) for i in range(11)})
    return folder
