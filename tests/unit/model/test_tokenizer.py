import json
import pathlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from model.tokenizer import Tokenizer
from octet.errors import CheckpointError, RequestError

EMBEDDED = pathlib.Path(__file__).parents[3] / "model" / "embedded"
VOCAB_SIZE = 1024
FIRST_SPECIAL_ID = 1016
GLM4_STYLE_TEMPLATE = """[gMASK]<sop>
{%- if tools -%}<|system|>
{{ tools | tojson }}{%- endif -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
  {%- if m.role == 'user' %}
    {%- set ns.last = loop.index0 -%}
  {%- endif %}
{%- endfor %}
{% for m in messages %}
  {%- if m.role == 'user' -%}<|user|>
{{ m.content }}{{ '/nothink' if loop.index0 == ns.last and m.content is string }}
  {%- elif m.role == 'assistant' -%}
<|assistant|>
{% generation %}{{ m.content.split('</think>')[-1].strip() }}{% endgeneration %}
  {%- elif m.role == 'system' -%}
<|system|>
{{ m.content | tojson }}
  {%- else -%}
    {% continue %}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{ eos_token }}{{ bos_token is defined }}{{ documents is none }}
{% endif -%}
"""
SAMPLES = (
    "plain words",
    "🦀👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪",
    "漢字かな交じり文 한국어",
    "e\u0301a\u0308\u0323 combining, and é composed",
    "\ttabs\r\nand  spaces \x00",
    "mixed 语言 with ünïcödé 𝕏",
)

Ids = list[int]
messages = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "observation"]), st.text() | st.sampled_from(SAMPLES)),
    min_size=1,
    max_size=5,
)


def open_tokenizer(model_dir: pathlib.Path) -> Tokenizer:
    tokenizer = Tokenizer.open(model_dir)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return open_tokenizer(EMBEDDED)


@pytest.fixture
def model_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """Only the tokenizer, without any chat template."""
    shutil.copy(EMBEDDED / "tokenizer.json", tmp_path)
    return tmp_path


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each single byte; the first 256 ids of a byte-level vocabulary."""
    ids = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    return {byte: ids[bytes([byte])] for byte in range(256)}


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def write_config(model_dir: pathlib.Path, **fields: object) -> None:
    (model_dir / "tokenizer_config.json").write_text(json.dumps(fields))


# --- text and ids ---


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path: pathlib.Path) -> None:
    assert Tokenizer.open(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff\xfe", b"[]"])
def test_a_corrupt_tokenizer_file_is_named(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_the_round_trip(embedded: Tokenizer, text: str) -> None:
    assert embedded.decode(embedded.encode(text)) == text


def test_other_threads_go_on_while_a_long_text_is_encoded(embedded: Tokenizer) -> None:
    text = " ".join(random.choices(["bread", "kitchen", "a", "river", "7", "octet"], k=200_000))
    longest_s, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest_s
        before_s = time.perf_counter()
        while not ended.wait(0.001):
            now_s = time.perf_counter()
            longest_s, before_s = max(longest_s, now_s - before_s), now_s

    watching = threading.Thread(target=watch)
    watching.start()
    begun_s = time.perf_counter()
    ids = embedded.encode(text)
    took_s = time.perf_counter() - begun_s
    ended.set()
    watching.join()
    assert embedded.decode(ids) == text
    assert longest_s < took_s / 2


def test_special_tokens_are_dropped_unless_kept(embedded: Tokenizer) -> None:
    ids = embedded.encode("a<|user|>b")
    assert 1021 in ids
    assert (embedded.decode(ids), embedded.decode(ids, keep_special_tokens=True)) == ("ab", "a<|user|>b")


def test_truncation_and_padding_set_in_the_file_do_not_change_prompts(model_dir: pathlib.Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    inner.save(str(model_dir / "tokenizer.json"))
    assert open_tokenizer(model_dir).decode(open_tokenizer(model_dir).encode(SAMPLES[0])) == SAMPLES[0]


# --- text as it comes ---


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 100), max_size=60))
@example(ids=[])
def test_streamed_text_equals_the_librarys_for_any_ids(embedded: Tokenizer, ids: Ids) -> None:
    assert "".join(stream(embedded, ids)) == embedded.decode(ids)


@settings(deadline=None)
@given(data=st.binary(max_size=40), special_at=st.sets(st.integers(0, 40)))
def test_streamed_text_equals_the_librarys_for_any_bytes_with_special_tokens_between(
    embedded: Tokenizer, data: bytes, special_at: set[int]
) -> None:
    ids: Ids = []
    for position, byte in enumerate(data):
        ids += [FIRST_SPECIAL_ID + position % 8] if position in special_at else []
        ids.append(byte_ids(embedded)[byte])
    assert "".join(stream(embedded, ids)) == embedded.decode(ids) == data.decode(errors="replace")


@settings(deadline=None)
@given(text=st.text() | st.sampled_from(SAMPLES), split=st.booleans())
def test_no_chunk_of_valid_text_holds_part_of_a_character(embedded: Tokenizer, text: str, split: bool) -> None:
    ids = [byte_ids(embedded)[byte] for byte in text.encode()] if split else embedded.encode(text)
    chunks = stream(embedded, ids)
    assert "".join(chunks) == embedded.decode(ids)
    assert sum(chunk.count("\ufffd") for chunk in chunks) == embedded.decode(ids).count("\ufffd")
    assert chunks[-1] == ""


def test_invalid_bytes_are_never_held_back_for_long(embedded: Tokenizer) -> None:
    lead = byte_ids(embedded)[0xF0]
    *chunks, rest = stream(embedded, [lead] * 1000)
    assert chunks == ["", *["\ufffd"] * 999]
    assert rest == "\ufffd"


def test_added_tokens_outside_the_byte_alphabet_are_streamed_as_written(model_dir: pathlib.Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    inner.add_tokens(["<think>", "two words", "深い思考", "é", "é漢"])
    inner.add_special_tokens([tokenizers.AddedToken("<|hidden|>", special=True)])
    inner.save(str(model_dir / "tokenizer.json"))
    tokenizer, draw = open_tokenizer(model_dir), random.Random()
    for _ in range(300):
        ids = [draw.choice([draw.randrange(VOCAB_SIZE), draw.randrange(VOCAB_SIZE, VOCAB_SIZE + 8)]) for _ in range(20)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_detokenizers_of_two_choices_are_independent(embedded: Tokenizer) -> None:
    one, other = embedded.detokenizer(), embedded.detokenizer()
    crab = [byte_ids(embedded)[byte] for byte in "🦀".encode()]
    assert [one.push(crab[0]), other.push(crab[0])] == ["", ""]
    assert [one.push(token_id) for token_id in crab[1:]] == ["", "", "🦀"]
    assert [other.finish(), one.finish()] == ["\ufffd", ""]


def sentencepiece_like() -> tokenizers.Tokenizer:
    words = ["▁", "▁the", "▁cat", "s", "a", "漢", "▁漢字", "!"]
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    d = tokenizers.decoders
    inner.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


def word_piece() -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(["[UNK]", "cat", "##s", "the", ".", "n't", "do", "##\ufffd", "[SEP]"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.add_special_tokens(["[SEP]"])
    return inner


def no_decoder() -> tokenizers.Tokenizer:
    inner = word_piece()
    inner.decoder = None
    return inner


@pytest.mark.parametrize("make", [sentencepiece_like, word_piece, no_decoder])
def test_streamed_text_equals_the_librarys_for_other_decoders(
    tmp_path: pathlib.Path, make: Callable[[], tokenizers.Tokenizer]
) -> None:
    inner = make()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer, draw = open_tokenizer(tmp_path), random.Random()
    for _ in range(1000):
        ids = [draw.randrange(inner.get_vocab_size()) for _ in range(draw.randrange(40))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_other_decoders_hold_back_a_bounded_number_of_tokens(tmp_path: pathlib.Path) -> None:
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    chunks = stream(tokenizer, [0xFF] * 1000)
    assert max(map(len, chunks)) <= 64
    assert "".join(chunks) == "\ufffd" * 1000


# --- conversations ---


def reference_ids(model_dir: pathlib.Path, chat: Sequence[tuple[str, str]], **fields: str) -> Ids:
    make: Any = PreTrainedTokenizerFast  # Untyped.
    reference = make(tokenizer_file=str(model_dir / "tokenizer.json"), **fields)
    turns = [{"role": role, "content": content} for role, content in chat]
    ids: Ids = reference.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return ids


@settings(deadline=None)
@given(chat=messages)
def test_the_embedded_template_renders_as_in_transformers(embedded: Tokenizer, chat: list[tuple[str, str]]) -> None:
    template = (EMBEDDED / "chat_template.jinja").read_text()
    assert embedded.apply_chat_template(chat) == reference_ids(EMBEDDED, chat, chat_template=template)


def test_a_glm_4_style_template_renders_as_in_transformers(model_dir: pathlib.Path) -> None:
    (model_dir / "chat_template.jinja").write_text(GLM4_STYLE_TEMPLATE)
    write_config(model_dir, eos_token={"content": "<|endoftext|>"}, bos_token=None)
    chat = [
        ("system", 'be "brief" <b>'),
        ("user", SAMPLES[1]),
        ("tool", "skipped"),
        ("assistant", "<think>x</think> yes "),
        ("user", ""),
    ]
    ids = open_tokenizer(model_dir).apply_chat_template(chat)
    expected = reference_ids(model_dir, chat, chat_template=GLM4_STYLE_TEMPLATE, eos_token="<|endoftext|>")
    assert ids == expected
    assert (
        open_tokenizer(model_dir)
        .decode(ids, keep_special_tokens=True)
        .endswith("<|assistant|><|endoftext|>FalseTrue\n")
    )


def test_the_template_may_read_the_time(model_dir: pathlib.Path) -> None:
    write_config(model_dir, chat_template="{{ strftime_now('%Y') | length }}")
    assert open_tokenizer(model_dir).decode(open_tokenizer(model_dir).apply_chat_template([("user", "x")])) == "4"


@pytest.mark.parametrize(
    "template",
    [
        "config {{ messages[0].content }}",
        [{"name": "rag", "template": "no"}, {"name": "default", "template": "config x"}],
    ],
)
def test_the_template_may_stand_in_the_tokenizer_config(model_dir: pathlib.Path, template: object) -> None:
    write_config(model_dir, chat_template=template)
    tokenizer = open_tokenizer(model_dir)
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.apply_chat_template([("user", "x")])) == "config x"


def test_the_template_file_wins_over_the_tokenizer_config(model_dir: pathlib.Path) -> None:
    write_config(model_dir, chat_template="config")
    (model_dir / "chat_template.jinja").write_text("file")
    tokenizer = open_tokenizer(model_dir)
    assert tokenizer.decode(tokenizer.apply_chat_template([("user", "x")])) == "file"


def test_special_tokens_are_not_added_to_a_rendered_conversation(model_dir: pathlib.Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<sop> $A", special_tokens=[("<sop>", 1018)])
    inner.save(str(model_dir / "tokenizer.json"))
    write_config(model_dir, chat_template="<sop>a")
    tokenizer = open_tokenizer(model_dir)
    assert tokenizer.apply_chat_template([("user", "x")]).count(1018) == 1
    assert tokenizer.encode("a").count(1018) == 1


def test_a_model_without_a_template_refuses_conversations(model_dir: pathlib.Path) -> None:
    tokenizer = open_tokenizer(model_dir)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([("user", "x")])


def test_the_templates_own_objection_reaches_the_client(embedded: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"field 'chat'.*role 'pirate'"):
        embedded.apply_chat_template([("pirate", "arr")])


def test_an_empty_conversation_is_refused(embedded: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no messages"):
        embedded.apply_chat_template([])


@pytest.mark.parametrize(
    "template",
    ["{{ messages[7].content }}", "{{ messages[0].content + 1 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"],
)
def test_a_template_that_fails_on_a_conversation_refuses_it(model_dir: pathlib.Path, template: str) -> None:
    write_config(model_dir, chat_template=template)
    with pytest.raises(RequestError, match="field 'chat'"):
        open_tokenizer(model_dir).apply_chat_template([("user", "x")])


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages | no_such_filter }}", 7, [{"name": "rag", "template": "x"}]]
)
def test_a_template_that_cannot_be_used_stops_the_start(model_dir: pathlib.Path, template: object) -> None:
    write_config(model_dir, chat_template=template)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 'chat_template'"):
        open_tokenizer(model_dir)


@pytest.mark.parametrize(("name", "content"), [("chat_template.jinja", b"{{"), ("chat_template.jinja", b"\xff")])
def test_a_template_file_that_cannot_be_used_is_named(model_dir: pathlib.Path, name: str, content: bytes) -> None:
    (model_dir / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        open_tokenizer(model_dir)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_corrupt_tokenizer_config_is_named(model_dir: pathlib.Path, content: str) -> None:
    (model_dir / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        open_tokenizer(model_dir)
