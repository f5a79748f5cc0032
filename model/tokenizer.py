"""Text to token ids and back, and conversations to token ids, from the tokenizer files of a checkpoint."""

from __future__ import annotations

import codecs
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import tokenizers

from model.chat_template import ChatTemplate
from model.config import read_bytes
from octet.errors import CheckpointError, RequestError

TOKENIZER_FILE = "tokenizer.json"

_REPLACEMENT = "\ufffd"
_BYTE_FALLBACK_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_MAX_HELD_TOKENS = 64


class IncrementalDetokenizer(Protocol):
    """The text of one choice, token by token.

    The concatenation of everything returned is `Tokenizer.decode` of all ids pushed, and no piece of it ends inside a
    character.
    """

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that no later token can change, often one token's, possibly none."""
        ...

    def finish(self) -> str:
        """The text still held back. Call it once, after the last token."""
        ...


class Tokenizer:
    """The tokenizer of one checkpoint. It may be shared by threads."""

    def __init__(self, inner: tokenizers.Tokenizer, chat: ChatTemplate | None) -> None:
        """Use `Tokenizer.open`.

        Args:
            inner: with truncation and padding off.
        """
        self._inner, self._chat = inner, chat
        self._special_tokens = {t.content for t in inner.get_added_tokens_decoder().values() if t.special}
        self._byte_level = isinstance(inner.decoder, tokenizers.decoders.ByteLevel)
        self._bytes_by_id: dict[int, bytes] = {}

    @classmethod
    def open(cls, model_dir: pathlib.Path) -> Tokenizer | None:
        """Read the tokenizer of a checkpoint, or None if it has none: such a checkpoint serves token ids.

        Raises: CheckpointError naming the file that cannot be used.
        """
        file = model_dir / TOKENIZER_FILE
        if not file.exists():
            return None
        content = read_bytes(file)
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as error:  # The library raises ValueError for some faults and a bare Exception for others.
            if not _is_fault(error):
                raise
            raise CheckpointError(TOKENIZER_FILE, "", error, "a file of the tokenizers library") from error
        inner.no_truncation()
        inner.no_padding()
        return cls(inner, ChatTemplate.read(model_dir))

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str) -> list[int]:
        """The ids of a plain prompt, with whatever the tokenizer itself puts around one.

        Raises: RequestError for what is no Unicode text, or what the checkpoint's tokenizer fails on.
        """
        return self._encode(text, "text", add_special_tokens=True)

    def decode(self, ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """The text of the ids. Ids that the tokenizer does not know are skipped; what is not UTF-8 becomes U+FFFD."""
        return self._inner.decode(ids, skip_special_tokens=not keep_special_tokens)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh detokenizer for one choice; special tokens are skipped."""
        return _ByteLevelDetokenizer(self) if self._byte_level else _WindowDetokenizer(self)

    def apply_chat_template(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a conversation up to where the assistant speaks.

        Args:
            messages: (role, content) pairs.
        Raises: RequestError if the model has no chat template or its template refuses the conversation.
        """
        if self._chat is None:
            raise RequestError("chat", "a conversation", "a text or token ids", "this model has no chat template")
        if not messages:
            raise RequestError("chat", "no messages", "at least one message")
        # The template writes the special tokens that start a prompt; the tokenizer may not write them again.
        return self._encode(self._chat.render(messages), "chat", add_special_tokens=False)

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # `encode` keeps the interpreter's lock throughout, for ten seconds where a prompt has megabytes.
            (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoding.ids)
        except BaseException as error:  # The library raises bare exceptions, too.
            if not _is_fault(error):
                raise
            raise RequestError(field, f"text that the model's tokenizer fails on ({error})", "Unicode text") from error

    def visible_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, or None for a special or unknown one, which has no text."""
        token: str | None = self._inner.id_to_token(token_id)
        # By content, not by id: that is how the library skips special tokens.
        return None if token in self._special_tokens else token

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the UTF-8 text. Only for byte-level tokenizers."""
        known = self._bytes_by_id.get(token_id)
        if known is None:
            token = self.visible_token(token_id)
            known = self._bytes_by_id[token_id] = b"" if token is None else _byte_level_bytes(token)
        return known


def _is_fault(error: BaseException) -> bool:
    """Whether it is one of the library's own: what its Rust code panics at arrives as no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class _ByteLevelDetokenizer:
    """Exact: the decoder joins the tokens' bytes, so what remains is incremental UTF-8 decoding."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """For any other decoder: decodes the last few tokens with and without the newest ones, and returns the difference.

    Differs from the library's `DecodeStream` in that it waits for the end of a run of byte-fallback tokens, which
    decodes to U+FFFD as a whole if any part of it is not UTF-8, holds back at most `_MAX_HELD_TOKENS` tokens, flushes,
    and does not fail on a run longer than that.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_returned = 0

    def push(self, token_id: int) -> str:
        token = self._tokenizer.visible_token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        text = self._new_text()
        uncertain = not text or text.endswith(_REPLACEMENT) or _BYTE_FALLBACK_TOKEN.fullmatch(token)
        if uncertain and len(self._window) - self._num_returned < _MAX_HELD_TOKENS:
            return ""
        # What was returned now stays as context: decoders treat the first token of a text differently.
        self._window = self._window[self._num_returned :]
        self._num_returned = len(self._window)
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        returned = self._tokenizer.decode(self._window[: self._num_returned])
        return self._tokenizer.decode(self._window)[len(returned) :]


def _byte_alphabet() -> dict[int, int]:
    """The byte behind each character of a byte-level vocabulary: GPT-2's `bytes_to_unicode`, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[ord(character)] for character in token)
    except KeyError:  # An added token, written as it is.
        return token.encode()
