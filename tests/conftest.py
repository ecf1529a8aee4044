"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# a busy machine is no failure
settings.register_profile("ssl_c2f", deadline=None)
settings.load_profile("ssl_c2f")
