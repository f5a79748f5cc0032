from __future__ import annotations

import json
import pathlib

import pytest

from octet.errors import ConfigError
from ops.specialise.corpus import SHIPPED, Document, read_corpus


def test_a_directory_has_a_file_for_each_label(tmp_path: pathlib.Path) -> None:
    (tmp_path / "prose.txt").write_text("Once.\n%%\nTwice,\n\nand 50%% more.\n%%\n\n")
    (tmp_path / "code.txt").write_text("x = 1\n")
    (tmp_path / "notes.md").write_text("not a part of it")
    assert read_corpus(tmp_path) == [
        Document(label="code", text="x = 1"),
        Document(label="prose", text="Once."),
        Document(label="prose", text="Twice,\n\nand 50%% more."),
    ]


def test_a_file_has_a_document_in_each_line(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "corpus.jsonl"
    lines = [{"label": "b", "text": "zwei"}, {"label": "a", "text": "one"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_corpus(file) == [Document(label="a", text="one"), Document(label="b", text="zwei")]


@pytest.mark.parametrize(
    "line", ["no json", "[1]", '{"label": "a"}', '{"label": 1, "text": "x"}', '{"label": "a", "text": "  "}']
)
def test_a_line_that_is_no_document_is_named(tmp_path: pathlib.Path, line: str) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"label": "a", "text": "x"}\n' + line)
    with pytest.raises(ConfigError, match=r"--corpus.*in line 2 of"):
        read_corpus(file)


def test_one_label_cannot_be_told_from_others(tmp_path: pathlib.Path) -> None:
    (tmp_path / "prose.txt").write_text("Once.\n%%\nTwice.")
    with pytest.raises(ConfigError, match=r"2 documents of 1 labels.*expected two labels at least"):
        read_corpus(tmp_path)


def test_a_corpus_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl"):
        read_corpus(tmp_path / "nothing.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.txt"):
        read_corpus(tmp_path)


def test_octet_ships_several_documents_of_several_kinds() -> None:
    labels = [document.label for document in read_corpus(SHIPPED)]
    assert len(set(labels)) == 6
    assert all(labels.count(label) >= 5 for label in labels)
