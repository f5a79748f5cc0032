"""Texts with labels: a directory of `LABEL.txt` files, or a file of JSON lines.

In a `.txt` file, a line that is `%%` ends one document and begins the next. A JSON line is `{"label": …, "text": …}`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

from octet.errors import ConfigError

SHIPPED = pathlib.Path(__file__).parent / "corpus"
_BETWEEN = re.compile(r"^%%\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    label: str
    text: str


def read_corpus(source: pathlib.Path) -> list[Document]:
    """Documents in order of their labels. Raises: ConfigError if there are fewer than two, or one cannot be read."""
    if source.is_dir():
        documents = [document for file in sorted(source.glob("*.txt")) for document in _read_text(file)]
    else:
        documents = sorted(_read_lines(source), key=lambda document: document.label)
    labels = sorted({document.label for document in documents})
    if len(labels) < 2:
        found = f"{len(documents)} documents of {len(labels)} labels in {source}"
        raise ConfigError("--corpus", found, "two labels at least", "a directory of LABEL.txt files, or a .jsonl file")
    return documents


def _read_text(file: pathlib.Path) -> list[Document]:
    texts = [text.strip() for text in _BETWEEN.split(_text(file))]
    return [Document(label=file.stem, text=text) for text in texts if text]


def _read_lines(file: pathlib.Path) -> list[Document]:
    documents = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
            label, text = tree["label"], tree["text"]
        except (ValueError, KeyError, TypeError):
            label = text = None
        if not (isinstance(label, str) and isinstance(text, str) and label and text.strip()):
            raise ConfigError("--corpus", f"{line[:40]!r} in line {number} of {file}", '{"label": …, "text": …}')
        documents.append(Document(label=label, text=text))
    return documents


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--corpus", f"{file} ({error})", "UTF-8 text") from error
