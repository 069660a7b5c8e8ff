"""Chat templates do what Jinja's do, and are stopped where they do too much."""

import json
import time

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cosmos3_jax.models import chat_template
from cosmos3_jax.models.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be <brief> & {{ kind }}. "},
    {"role": "user", "content": " a,b é\n"},
]
# What templates of published models are made of.
ORDINARY = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m['content'] | trim }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n * 2 - 1 }}",
    "{% macro one(m, end='!') %}{{ m.content.split(',')[-1].strip() ~ end }}{% endmacro %}"
    "{% for m in messages %}{{ one(m) }}{{ one(m, end='?') }}{% endfor %}",
    "{{ messages | tojson }}{{ (messages[0] | tojson) + ', ' }}{{ messages[::-1] | length }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ ','.join(['x', 'y']) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% set text %}{{ messages[1].content }}{{ missing }}{% endset %}{{ text.replace('a', 'bb') }}",
    "{% for k, v in messages[0].items() %}{{ k }}{{ v }}{{ '' if loop.last else ';' }}{% endfor %}",
    "{{ messages[0].content.startswith('Be') and 'user' in messages[1].role }}{{ none }}{{ 1.5 }}",
    "{% for i in range(3) %}{{ 'aba'.replace('b', '-', 1) }}{{ i // 2 }}{% endfor %}",
    "{{ {'a': [1, (2, 3)]} }}{{ 'x' if false else missing | default('y') }}{# no #}\n  {% if 1 %}\n"
    "  z\n  {% endif %}\n",
    "{{ messages | tojson(indent=4) }}{{ messages | tojson(true, 2, [',', ': '], true) }}"
    "{{ messages[0] | tojson(separators=('; ', '=')) }}{{ messages | tojson(indent='\t') }}",
    "{{ messages[0].content | tojson }}{{ (messages | tojson(ensure_ascii=true)) }}",
    "{{ '=' * 10 }}{{ 3 * 'ab' }}|{{ 'a' * -1 }}{{ [1, 'b'] * 2 }}{{ 2 * (1,) }}",
    "{{ '%s' % 'x' }}{{ '%5.1f%% of %-4d|' % (2.55, 3) }}"
    "{{ '%(role)s: %(content)r' % messages[0] }}"
    "{{ '%*d' % (6, 7) }}{{ '** %s **' % [messages] }}",
    "{{ 'a\nb\n\nc' | indent }}{{ 'a\nb' | indent(2, true) }}"
    "{{ 'a\n\nb' | indent('> ', blank=true) }}",
    "{% for role, found in messages | groupby('role') %}{{ role }}{{ found | length }}{% endfor %}"
    "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list[0].content }}{% endfor %}",
    "{{ namespace(a=5) | attr('a') }}{{ 'ab' | attr('upper') is defined }}",
    "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i > 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}"
    "{{ raise_exception('no') if false }}",
)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """What transformers has in place of Jinja's, which escapes what is HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_are_jinjas(source):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    expected = environment.from_string(source).render(messages=MESSAGES)
    assert ChatTemplate(source).render(messages=MESSAGES) == expected


GROW = "{% set ns = namespace(x='ab', y=[]) %}{% for i in range(90) %}GROW{% endfor %}{{ ns.x }}"
HOSTILE = {
    "text without end": "{{ 'a' * 10**10 }}",
    "number without end": "{{ 10**10**10 }}",
    "product": "{{ 9007199254740992 * 9007199254740992 * 9007199254740992 }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "text many times": "{{ 10**3 * ('a' * 1000 * 1000) }}",
    "text as often as a number says": "{{ 'ab' * 9007199254740992 }}",
    "list many times": "{{ [1] * 1000000000 }}",
    "list of a list many times": "{{ [[1] * 1000] * 1000 }}",
    "zeros": "{{ '%09999999999d' % 1 }}",
    "digits of a float": "{{ '%.999999999f' % 1 }}",
    "width of a value": "{{ '%*d' % (999999999, 1) }}",
    "digits of a value": "{{ '%.*f' % (999999999, 1) }}",
    "width after brackets": "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}",
    "one value many times": "{{ ('%(a)s' * 1000) % {'a': 'x' * 1000} }}",
    "floats many times": "{{ ('%(a)f' * 1000) % {'a': 1e308} }}",
    "number with many digits": "{{ [('9' * 4000) | int] * 3000 }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "indent of lines": "{{ ('\n' * 9999) | indent('x' * 9999, blank=true) }}",
    "indent of each": "{{ ['a\nb'] | map('indent', 1000000000) | list }}",
    "indent of JSON": "{{ [[1]] | tojson(indent=1000000000) }}",
    "text between JSON": "{{ range(9999) | list | tojson(separators=('x' * 9999, ':')) }}",
    "groups": "{{ (range(100000) | list) | groupby('x') }}",
    "attribute of Python": "{{ ('' | attr('__class__')).__mro__ }}",
    "method that is not read": "{{ ('a' | attr('ljust'))(1000000000) }}",
    "format by a filter": "{{ ('{:>1000000000}' | attr('format'))(1) }}",
    "loops that go on": "{% for i in range(100000) %}{% for j in range(100000) %}{% continue %}"
    "{% endfor %}{% endfor %}",
    "width of format": "{{ '{:>1000000000}'.format(1) }}",
    "width of a filter": "{{ 'a' | center(1000000000) }}",
    "width of a method": "{{ 'a'.ljust(1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "words": "{{ lipsum(100000) }}",
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "text in loops": "{% for i in range(100000) %}" + 500 * "x" + "{% endfor %}",
    "loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filter in a filter": "{{ range(100000) | list | select('in', range(100000) | list) | list }}",
    "doubled": GROW.replace("GROW", "{% set ns.x = ns.x + ns.x %}"),
    "concatenated": GROW.replace("GROW", "{% set ns.x = ns.x ~ ns.x %}"),
    "written": GROW.replace("GROW", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "joined": GROW.replace("GROW", "{% set ns.x = ns.x | join(ns.x) %}"),
    "joined by a method": GROW.replace("GROW", "{% set ns.x = ns.x.join(ns.x) %}"),
    "replaced": GROW.replace("GROW", "{% set ns.x = ns.x | replace('', ns.x) %}"),
    "replaced by a method": GROW.replace("GROW", "{% set ns.x = ns.x.replace('', ns.x) %}"),
    "lists of one list": GROW.replace("GROW", "{% set ns.x = [ns.x, ns.x] %}"),
    "tuples of one": GROW.replace("GROW", "{% set ns.x = (ns.x, ns.x) %}"),
    "dictionaries of one": GROW.replace("GROW", "{% set ns.x = {1: ns.x, 2: ns.x} %}"),
    "list doubled": GROW.replace("GROW", "{% set ns.y = ns.y + ns.y + [1] %}"),
    "long": 70_000 * "x",
    "nested": "{{ " + 5000 * "(" + "1" + 5000 * ")" + " }}",
    "digits": "{{ " + 5000 * "9" + " }}",
    "another file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(monkeypatch, name):
    monkeypatch.setattr(chat_template, "MOST_WORK", 2**17)
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.3)
    start = time.process_time()
    with pytest.raises(Exception) as raised:  # what `guard.parsing` makes one line of
        ChatTemplate(HOSTILE[name]).render(messages=MESSAGES)
    assert not isinstance(raised.value, MemoryError)
    assert time.process_time() - start < 3


def test_the_clock_stops_what_each_step_makes_slow(monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.05)
    loop = "{% for i in range(100000) %}{% if 'zz' in messages[0].content %}{% endif %}{% endfor %}"
    with pytest.raises(jinja2.TemplateRuntimeError, match="for more than 0.05 seconds"):
        ChatTemplate(loop).render(messages=[{"content": 20_000 * "z "}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | map(attribute='role') | upper }}", "{{ 'a'.upper }}", "{{ [['a'.upper]] }}",
        "{{ 'b' ~ 'a'.upper }}", "{{ ['a'.upper] | join }}", "{{ '%s' % 'a'.upper }}",
        "{{ {'a'.upper: 1} | string }}", "{{ 'x' | replace('x', 'a'.upper) }}",
        "{{ 'a'.upper | trim }}", "{{ dict }}", "{{ {'a': 'a'.upper}.items() }}",
        "{{ 'a'.upper | indent }}", "{{ messages | select | string | length }}",
    ],
)  # fmt: skip
def test_what_has_its_address_in_its_text_is_not_written(source):
    with pytest.raises(jinja2.TemplateRuntimeError, match="which is no text"):
        ChatTemplate(source).render(messages=MESSAGES)


def test_a_namespace_in_itself_is_written_in_short():
    source = "{% set a = namespace() %}{% set a.b = a %}{{ a }}"
    assert ChatTemplate(source).render() == "<Namespace>"


def test_what_the_assistant_says_is_written():
    source = "{% for i in range(2) %}{% generation %}\n{{ i }}!{% endgeneration %}{% endfor %}"
    assert ChatTemplate(source).render() == "0!1!"


def test_templates_refuse_in_their_own_words():
    with pytest.raises(jinja2.TemplateError, match="^roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render()
    with pytest.raises(jinja2.TemplateError, match="today's date .strftime_now., with which"):
        ChatTemplate("{% set today = strftime_now('%Y-%m-%d') %}").render()
