"""Ray's head, on a host without anything of Octet's, is lost and comes back, and so is the Redis in which it keeps its
state, by a password: no stream hears of it."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

from ops.chaos.cable import why_not

REASON = why_not() or ("" if shutil.which("redis-server") else "there is no redis-server here")
pytestmark = [pytest.mark.long, pytest.mark.timeout(400), pytest.mark.skipif(bool(REASON), reason=REASON)]

_RUN_S = 380.0


@pytest.mark.parametrize("who", ["head", "redis"])
def test_streams_go_on_while_the_head_is_gone_and_the_cluster_changes_again_when_it_is_back(
    who: str, tmp_path: pathlib.Path, checkpoint: pathlib.Path, answers: Mapping[tuple[int, ...], Sequence[int]]
) -> None:
    file = tmp_path / "answers.json"
    file.write_text(json.dumps([[prompt, answer] for prompt, answer in answers.items()]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.head_loss", who, str(checkpoint), str(file)],
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)},
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
