"""Templates that do harm end with a typed error, in bounded time and memory; others render as in `transformers`.

`--hypothesis-profile=long` tries many more of them.
"""

import resource
import threading
import time
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.chat_template import ChatTemplate
from octet.errors import CheckpointError, RequestError

Chat = list[tuple[str, str]]
CHAT: Chat = [
    ("system", "Be\nbrief."),
    ("user", "<b>hello</b>"),
    ("assistant", "<think>hm</think> Yes?"),
    ("user", "x"),
]
GLM_LIKE = """[gMASK]<sop>
{%- macro shown(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content if part.type == 'text' -%}{{- part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1, roles=[]) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}
    {%- set ns.roles = ns.roles + [m.role] %}
{%- endfor %}
{%- for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' -%}<|assistant|>
{%- set content = shown(m.content) %}
{%- if '</think>' in content %}
    {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' ~ content.strip() }}
{%- else -%}<|{{ m.role }}|>
{{ shown(m.content) }}{{ loop.index * 2 - 1 }}{{ '/nothink' if not m.content.endswith('/nothink') }}
{%- endif -%}
{%- endfor -%}
{{- ns.roles | join(', ') }}{{ ns.roles | unique | list | length }}{{ messages | map(attribute='role') | first }}
{{- {'roles': ns.roles, 'n': 3} | tojson(indent=2) }}{{ '%s of %03d' | format(loop is defined, 7) }}
{{- '%5.1f|%-4s' % (2.5, 'x') }}{{ '{:>4}|{}'.format('y', 1) }}{{ ('-' * 30) | indent(4) | upper | replace('-', '=') }}
{{- (messages | selectattr('role', 'equalto', 'user') | list)[0].content | trim | escape }}
{%- if add_generation_prompt and (tools is none or documents) -%}<|assistant|>{%- endif -%}
"""

MEGABYTE = "{% set m = ('a' * 1000) * 1000 %}"
DOUBLED = "{% set x = ['aaaa'] %}" + "{% set x = [x, x] %}" * 40
GROWING = "{% set ns = namespace(x=START) %}{% for i in range(99999) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
]
RECURSIVE = [
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
]
LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ (10**1000)**1000 }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ [1] * 10**9 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(width=10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**10) }}",
    "{{ ('{:>1000000000}' | attr('format'))(1) }}",
    "{{ 'a' | indent(10**10, true) }}",
    "{{ lipsum(10**9) }}",
    "{{ [1] | batch(10**9, 1) | list }}",
    "{{ 1.5 | round(10**9) }}",
    "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ ('\\t' * 1000).expandtabs(10**9) }}",
    "{{ strftime_now('%c' * 10000) }}",
    "{{ ('<!--' * 100000) | striptags }}",
    "{{ range(99999) | map('center', 100000) | list }}",
    MEGABYTE + "{{ m | replace('a', m) }}",
    MEGABYTE + "{{ m.replace('a', m) }}",
    MEGABYTE + "{{ m | join(m) }}",
    MEGABYTE + "{{ m.join(m) }}",
    MEGABYTE + "{{ [m] * 1000 }}",
    MEGABYTE + "{{ m | list }}",
    MEGABYTE + "{{ m.split('a') }}",
    MEGABYTE + "{{ m | urlize }}",
    MEGABYTE + "{{ m | wordwrap(1, wrapstring=m) }}",
    MEGABYTE + "{{ ('%(a)s' * 1000) % {'a': m} }}",
    MEGABYTE + "{{ ('{0}' * 1000).format(m) }}",
    MEGABYTE + "{{ m.translate({97: m}) }}",
    MEGABYTE + "{% set ns = namespace(x=m) %}{{ ('{0.x}' * 1000).format(ns) }}",
    MEGABYTE + "{% set ns = namespace(x=m) %}{{ ([ns] * 99999) | map(attribute='x') | join }}",
    MEGABYTE + "{% set c = cycler(m) %}{{ ([c] * 99999) | sort(attribute='current') }}",
    MEGABYTE + "{% for i in range(99999) %}{{ m }}{% endfor %}",
    MEGABYTE + "{% set y %}{% for i in range(99999) %}{{ m }}{% endfor %}{% endset %}",
    MEGABYTE + "{% for i in range(99999) %}{% if m[1:] == m[:-1] %}{% endif %}{% endfor %}",
    DOUBLED + "{{ x }}",
    DOUBLED + "{{ x | tojson }}",
    DOUBLED + "{{ x == x }}",
    *(
        GROWING.replace("START", start).replace("NEXT", step)
        for start, step in (
            ("'aa'", "ns.x ~ ns.x"),
            ("'aa'", "ns.x + ns.x"),
            ("[1]", "ns.x + ns.x"),
            ("[1]", "(ns.x, ns.x)"),
            ("[1]", "{'a': ns.x, 'b': ns.x}"),
            ("[1]", "dict(a=ns.x, b=ns.x)"),
        )
    ),
    "{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{% set ns = namespace(x=1) %}"
    "{% for i in range(99) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
]
ESCAPES = [
    "''.__class__.__mro__",
    "''['__class__'].__base__",
    "(''|attr('__class__')).mro()",
    "dict.mro()",
    "lipsum.__globals__.os",
    "raise_exception['__globals__'].keys()",
    "cycler.__init__.__globals__",
    "namespace.__init__.__globals__",
    "self._TemplateReference__context.environment",
    "'{0.__class__.__mro__}'.format('')",
    "'{a.__class__.__mro__}'.format_map({'a': ''})",
    "(''|attr('join')).__self__.x",
    "messages|map(attribute='__class__.__mro__')|list|first|attr('x')|upper + 1",
    "messages.append(1)",
    "messages[0].update({})",
    "messages|map('__class__')|list",
]


def rendered(source: str, chat: Chat = CHAT) -> str:
    return ChatTemplate("chat_template.jinja", source, {}).render(chat)


def plainly(source: str, chat: Chat = CHAT) -> str:
    """By Jinja alone."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    turns = [{"role": role, "content": content} for role, content in chat]
    return environment.from_string(source).render(
        messages=turns, tools=None, documents=None, add_generation_prompt=True
    )


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_are_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.template_meter._MAX_SECONDS", 0.3)
    started_s = time.thread_time()
    with pytest.raises(RequestError, match=r"field 'chat'.*chat template takes more than"):
        rendered(source)
    assert time.thread_time() - started_s < 1


@pytest.mark.parametrize("source", RECURSIVE)
def test_recursion_without_end_is_ended(source: str) -> None:
    with pytest.raises(RequestError, match="recursion"):
        rendered(source)


@pytest.mark.parametrize("source", LARGE)
def test_what_would_be_large_is_never_made(source: str) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match="field 'chat': found messages for which the model's chat template"):
        rendered(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 500 * 1024


@pytest.mark.parametrize("expression", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(expression: str) -> None:
    with pytest.raises(RequestError, match="field 'chat'"):
        rendered("{{ %s }}" % expression)  # noqa: UP031


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{% for i in x %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "-" * 10000 + "1 }}",
        "x" * 2**20,
    ],
)
def test_templates_that_cannot_be_compiled_stop_the_start(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: 'chat_template'"):
        rendered(source)


def test_a_long_expression_is_compiled_soon() -> None:
    started_s = time.thread_time()
    assert rendered("{{ " + "1 + " * 150 + "1 }}") == "151"
    assert time.thread_time() - started_s < 2


def test_templates_are_rendered_as_by_jinja_alone() -> None:
    assert rendered(GLM_LIKE) == plainly(GLM_LIKE)
    assert "hello" in rendered(GLM_LIKE)


def test_a_long_conversation_is_no_harm() -> None:
    chat = CHAT * 100 + [("user", "word " * 500_000)]
    assert rendered(GLM_LIKE, chat) == plainly(GLM_LIKE, chat)


def test_threads_render_beside_one_that_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    # With 0.3, a rendering that does no harm was refused once, beside other work on all cores.
    monkeypatch.setattr("model.template_meter._MAX_SECONDS", 1.0)
    failed: list[Exception] = []

    def harm() -> None:
        try:
            rendered(ENDLESS[0])
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=harm)
    thread.start()
    expected, template = plainly(GLM_LIKE), ChatTemplate("chat_template.jinja", GLM_LIKE, {})
    while thread.is_alive():
        assert template.render(CHAT) == expected
    thread.join()
    assert [type(error) for error in failed] == [RequestError]
    assert template.render(CHAT) == expected


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb"])
def test_text_that_is_not_unicode_never_leaves_as_an_objection(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        rendered("{{ raise_exception('%s') }}" % text)  # noqa: UP031
    str(raised.value).encode()


# --- any template ---

ATOMS = ["1", "-1", "10**9", "2.5", "true", "none", "'ab'", "'%999999999s'", "'{:>999999999}'", "[]", "{}", "messages"]
ATOMS += ["ns", "ns.x", "loop", "missing", "range(99999)", "dict", "cycler", "joiner", "lipsum", "self", "'__class__'"]
NAMES = ["x", "role", "content", "__class__", "mro", "format", "join", "items", "split", "replace", "center", "count"]
FILTERS = sorted(jinja2.Environment().filters)
TESTS = ["string", "eq(1)", "in([1])", "iterable", "none", "divisibleby(2)", "mapping", "sameas(1)", "filter"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or"]


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("({}|{})".format, inner, st.sampled_from(FILTERS)),
        st.builds("({}|{}({}))".format, inner, st.sampled_from(FILTERS), inner),
        st.builds("({}|map('{}', {}))".format, inner, st.sampled_from(FILTERS), inner),
        st.builds("({} is {})".format, inner, st.sampled_from(TESTS)),
        st.builds("{}.{}".format, inner, st.sampled_from(NAMES)),
        st.builds("{}.{}({})".format, inner, st.sampled_from(NAMES), inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}[{}:]".format, inner, inner),
        st.builds("{}({})".format, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
    )


EXPRESSIONS = st.recursive(st.sampled_from(ATOMS), _larger, max_leaves=6)


def _bodies(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% for x in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% for x in {} recursive %}}{}{{{{ loop(x) }}}}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% set x %}}{}{{% endset %}}".format, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), inner),
        st.builds("{{% macro f(x) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, EXPRESSIONS),
        st.builds("{{% autoescape true %}}{}{{% endautoescape %}}".format, inner),
    )


STATEMENTS = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% set x = {} %}}".format, EXPRESSIONS),
    st.builds("{{% set ns.x = {} %}}".format, EXPRESSIONS),
    st.text(max_size=5),
)
TEMPLATES = st.builds("{{% set ns = namespace(x='a') %}}{}".format, st.recursive(STATEMENTS, _bodies, max_leaves=5))


@given(source=TEMPLATES | st.text(alphabet="{}%#'a b|.()[]\n", max_size=30))
def test_any_template_renders_or_is_a_typed_error(source: str) -> None:
    started_s = time.thread_time()
    try:
        template = ChatTemplate("chat_template.jinja", source, {})
    except CheckpointError:
        return
    try:
        found: Any = template.render([("user", "hello"), ("assistant", "<b>")])
    except RequestError as error:
        found = str(error)
    assert isinstance(found, str)
    assert len(found) < 2**23
    assert time.thread_time() - started_s < 10
