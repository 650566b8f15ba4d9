"""Shared by all tests: one thread for torch (the machines have two cores), real data where it can be found."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples every time, as slowly as the machine likes; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fixed")
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("INFLUENCESPACE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "flickr8k").is_dir():
        pytest.skip(f"no real data in {folder}; set INFLUENCESPACE_DATA")
    return folder
