"""Telemetry windows in a file: written by `octet experts record`, read by the simulator. See docs/telemetry.md."""
