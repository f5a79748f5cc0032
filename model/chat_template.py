"""A conversation as text, by the Jinja template of a checkpoint, rendered as `transformers` renders it."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from model.config import read_json, read_text
from model.template_limits import MAX_TEMPLATE_CHARACTERS, BoundedEnvironment
from model.template_meter import TemplateLimitError, metered
from octet.errors import CheckpointError, RequestError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_SPECIAL_TOKEN_FIELDS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MAX_TIME_CHARACTERS = 1000


class ChatTemplate:
    """It may be shared by threads. Bounded in time and memory: see `model.template_limits`."""

    def __init__(self, file: str, source: str, special_tokens: dict[str, str]) -> None:
        """Use `read`."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            found, expected = f"{len(source)} characters", f"at most {MAX_TEMPLATE_CHARACTERS}"
            raise CheckpointError(file, "chat_template", found, expected)
        try:
            with metered(input_bytes=0):
                self._template = _jinja_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            found = f"a template that does not parse (line {error.lineno}: {error.message})"
            raise CheckpointError(file, "chat_template", found, "a Jinja template") from error
        except TemplateLimitError as error:
            found = f"a template that {error}"
            raise CheckpointError(file, "chat_template", found, "one that is compiled within its bounds") from error
        except Exception as error:  # Of Python's compiler: nesting that is too deep, numbers that are too long.
            found = f"a template that cannot be compiled ({type(error).__name__}: {error})"
            raise CheckpointError(file, "chat_template", found, "a Jinja template") from error
        self._special_tokens = special_tokens

    @classmethod
    def read(cls, model_dir: pathlib.Path) -> ChatTemplate | None:
        """From `chat_template.jinja`, else from `tokenizer_config.json`; None if neither has one.

        Raises: CheckpointError.
        """
        config_file = model_dir / TOKENIZER_CONFIG_FILE
        config = read_json(config_file) if config_file.exists() else {}
        if (model_dir / CHAT_TEMPLATE_FILE).exists():
            file, source = CHAT_TEMPLATE_FILE, read_text(model_dir / CHAT_TEMPLATE_FILE)
        elif config.get("chat_template") is not None:
            file, source = TOKENIZER_CONFIG_FILE, _default_template(config["chat_template"])
        else:
            return None
        return cls(file, source, _special_tokens(config))

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Raises: RequestError if the template refuses the conversation, or takes too much for it."""
        input_bytes = sum(len(role) + len(content) for role, content in messages)
        try:
            with metered(input_bytes):
                return self._template.render(
                    messages=[{"role": role, "content": content} for role, content in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **self._special_tokens,
                )
        except TemplateLimitError as error:
            found = f"messages for which the model's chat template {error}"
            raise RequestError("chat", found, "a template that keeps its bounds", "mend the checkpoint's") from error
        except Exception as error:  # A template is a program: it may fail on a conversation in any way it likes.
            found = f"messages that the model's chat template refuses ({error})"
            raise RequestError("chat", found, "a conversation in the roles and the order that it knows") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; serving renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _jinja_environment() -> jinja2.Environment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.bound_filters()
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_TIME_CHARACTERS:
        raise TemplateLimitError(f"writes the time by {len(form)} characters, of at most {_MAX_TIME_CHARACTERS}")
    return datetime.datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _default_template(value: object) -> str:
    """A template, or the one called "default" of a list of named ones."""
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
            return str(entry["template"])
    expected = "a template, or a list of {name, template} with one named 'default'"
    raise CheckpointError(TOKENIZER_CONFIG_FILE, "chat_template", f"a {type(value).__name__} without one", expected)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, which a config writes as a string or as an object with its `content`."""
    values = {name: config.get(name) for name in _SPECIAL_TOKEN_FIELDS}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
