"""Where things lie: the repository, and the real recordings and published weights that some tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SHARED = ROOT.parent / "shared"  # beside the checkout, unless the environment names another folder
ESC10 = Path(os.environ.get("SSL_C2F_ESC10") or _SHARED / "data/esc10")
FIXTURES = Path(os.environ.get("SSL_C2F_FIXTURES") or _SHARED / "fixtures")

needs_esc10 = pytest.mark.skipif(not ESC10.is_dir(), reason=f"no ESC-10 at {ESC10}: set SSL_C2F_ESC10 to its folder")
