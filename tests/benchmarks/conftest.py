"""Tests of benchmarks borrow the tiny encoders of the models' tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tests.models.conftest import encoder_folders  # noqa: F401
