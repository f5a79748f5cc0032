"""What a frontend writes down, where there is no room for it."""

from __future__ import annotations

import logging
import os
import pathlib

import pytest

from cluster.frontend.audit import Audit
from octet.ids import RequestId, WorkerId


def test_a_full_disk_ends_the_file_and_nothing_else(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(str(tmp_path), WorkerId("frontend-0"))
    audit.end(RequestId("a"), "finished")
    (file,) = tmp_path.iterdir()
    (number,) = [int(fd.name) for fd in pathlib.Path("/proc/self/fd").iterdir() if fd.resolve() == file]
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        os.dup2(full.fileno(), number)
    with caplog.at_level(logging.ERROR):
        audit.end(RequestId("b"), "finished")
        audit.end(RequestId("c"), "finished")
    assert file.read_text().count("\n") == 1
    assert [record.getMessage() for record in caplog.records] == [
        "what is committed is not written down any more (chaos.audit_dir): No space left on device"
    ]
    audit.close()
