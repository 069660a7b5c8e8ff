"""Chat templates do what Jinja's do, and are stopped where they do too much."""

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
)


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_are_jinjas(source):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(source).render(messages=MESSAGES)
    assert ChatTemplate(source).render(messages=MESSAGES) == expected


GROW = "{% set ns = namespace(x='ab', y=[]) %}{% for i in range(90) %}GROW{% endfor %}{{ ns.x }}"
HOSTILE = {
    "text without end": "{{ 'a' * 10**10 }}",
    "number without end": "{{ 10**10**10 }}",
    "product": "{{ 9007199254740992 * 9007199254740992 * 9007199254740992 }}",
    "width": "{{ '%1000000000d' % 1 }}",
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
    start = time.monotonic()
    with pytest.raises(Exception) as raised:  # what `guard.parsing` makes one line of
        ChatTemplate(HOSTILE[name]).render(messages=MESSAGES)
    assert not isinstance(raised.value, MemoryError)
    assert time.monotonic() - start < 3


def test_the_clock_stops_what_each_step_makes_slow(monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.05)
    loop = "{% for i in range(100000) %}{% if 'zz' in messages[0].content %}{% endif %}{% endfor %}"
    with pytest.raises(jinja2.TemplateRuntimeError, match="for more than 0.05 seconds"):
        ChatTemplate(loop).render(messages=[{"content": 20_000 * "z "}])


def test_a_namespace_in_itself_is_written_in_short():
    source = "{% set a = namespace() %}{% set a.b = a %}{{ a }}"
    assert ChatTemplate(source).render() == "<Namespace>"
