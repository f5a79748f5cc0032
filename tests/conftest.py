"""Settings of every test."""

from __future__ import annotations

import hypothesis

# Speed is measured by benchmarks; a loaded machine must fail no test.
hypothesis.settings.register_profile("octet", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=6000)
hypothesis.settings.load_profile("octet")

# One Ray for every test that needs one, whatever folder it is in.
pytest_plugins = ("tests.clusters",)
