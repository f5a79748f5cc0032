"""Certificates that are made for each run."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")


def make_certificates(directory: pathlib.Path, *names: str) -> pathlib.Path:
    """Self-signed ones of localhost: NAME.pem, and NAME.key. Returns: the directory."""
    for name in names:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"),
                *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            ],
            cwd=directory,
            check=True,
            capture_output=True,
            timeout=30,
        )
    return directory
