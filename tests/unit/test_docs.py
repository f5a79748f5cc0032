"""What the documentation points at is there."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest
import typer.main

from ops.cli import app

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`|^ {4,}(.+)$|^(octet .+)$", re.MULTILINE)
_MODULE = re.compile(r"`((?:octet|model|experts|router|prefill|decode|cluster|ops|tests)/[\w/]+\.\w+)")


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: pathlib.Path) -> set[str]:
    headings = (line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: pathlib.Path) -> None:
    for link in _LINK.findall(page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = pathlib.Path(os.path.normpath(page.parent / file)) if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_exists(page: pathlib.Path) -> None:
    assert [file for file in _MODULE.findall(page.read_text()) if not (ROOT / file).exists()] == []


def commands(text: str) -> Iterator[list[str]]:
    """The words of every call of `octet`, without what follows it in a shell."""
    for groups in _CODE.findall(text.replace("\\\n", " ")):
        code = re.split(r"\s(?:#|&&?|\||>)", next(filter(None, groups)))[0]
        found = re.search(r"(?<![\w./-])octet (.*)", code)
        if found is not None and not found[1].startswith("import "):
            try:
                words = shlex.split(found[1].rstrip("'"))
            except ValueError:
                continue
            yield words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_exists_with_its_options(page: pathlib.Path) -> None:
    for words in commands(page.read_text()):
        command = typer.main.get_command(app)
        within = getattr(command, "commands", {})
        while words and words[0] in within:
            command = within[words.pop(0)]
            within = getattr(command, "commands", {})
        assert not within or not words or words[0].startswith("-"), f"octet … {words}"
        options = {option for parameter in command.params for option in parameter.opts} | {"--help", "--version"}
        options |= {option for parameter in command.params for option in parameter.secondary_opts}
        used = {word.strip("[]").partition("=")[0] for word in words if re.match(r"\[?--?[a-z]", word)}
        assert used <= options, f"octet {command.name}: {used - options}"


def test_commands_are_found() -> None:
    assert sum(1 for page in PAGES for _ in commands(page.read_text())) > 80
