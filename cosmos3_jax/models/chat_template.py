"""Chat templates of checkpoints, which are programs: rendered with a bound on what they do.

Jinja's sandbox keeps a template from the process's objects, but not from its time and memory. Here
everything that a template does costs something of one budget: each turn of a loop and each call 1,
each text and list that it makes its size; what makes more of less at once (`*` and `%` of texts) is
paid for before it is made. So no single operation is long, and the clock is looked at between them.

There is what transformers offers to templates, but for `strftime_now`: a prompt would have other
tokens on another day. It is undefined, which Llama's templates ask for.
"""

import json
import re
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from types import NoneType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_SOURCE = 2**16  # letters of a template; published ones have up to 30,000
MOST_WORK = 2**24  # turns of loops, and letters and entries of all that is made
MOST_SECONDS = 3.0
MOST_INDENT = 32  # of JSON, at each level
_BUDGET = "the budget"  # in a template's context: no name that a template can write
_FILTERS = (
    "abs", "attr", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last",
    "length", "list", "max", "min", "reverse", "sort", "unique",
)  # fmt: skip
_OF_TEXTS = ("capitalize", "lower", "safe", "string", "title", "trim", "upper")
_ONE_BY_ONE = ("map", "reject", "rejectattr", "select", "selectattr")
_METHODS = {
    str: (
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
        "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
        "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
        "swapcase", "title", "upper",
    ),
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
}  # fmt: skip


# What is written as what it is; a range and a namespace have no address in their texts.
_DATA = (str, int, float, NoneType, Undefined, range, Namespace)


class Budget:
    """What one rendering may still do.

    Raises:
        jinja2.TemplateRuntimeError: nothing more.
    """

    def __init__(self):
        self.left, self.end = MOST_WORK, time.monotonic() + MOST_SECONDS

    def take(self, work: int = 1) -> None:
        self.left -= work
        if self.left < 0:
            raise jinja2.TemplateRuntimeError(
                f"it does more than {MOST_WORK} steps, or makes as many letters"
            )
        if time.monotonic() > self.end:
            raise jinja2.TemplateRuntimeError(f"it runs for more than {MOST_SECONDS:g} seconds")

    def take_for(self, value: Any) -> Any:
        """Pay for a value, as large as it would be written: two lists in it may be one."""
        digits = value.bit_length() // 64 if isinstance(value, int) else 0
        self.take(len(value) if isinstance(value, str) else 1 + digits)
        if isinstance(value, Mapping):
            self.take_for(list(value.items()))
        elif isinstance(value, list | tuple | set | frozenset):
            for each in value:
                self.take_for(each)
        return value


def _text(value: Any) -> str:
    """A value as text. What is no data, as a function or a generator, has its address in it, which
    is another one each time.
    """
    _check_data(value)
    return str(value)


def _check_data(value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
        for each in value:
            _check_data(each)
    elif not isinstance(value, _DATA):
        raise jinja2.TemplateRuntimeError(f"it writes a {type(value).__name__}, which is no text")


def _budget(context: Context) -> Budget:
    return context.resolve(_BUDGET)


@jinja2.pass_context
def _paid(context: Context, value: Any) -> Any:
    return _budget(context).take_for(value)


@jinja2.pass_context
def _written(context: Context, value: Any) -> str:
    """A value as it is written into the output."""
    return _budget(context).take_for(_text(_budget(context).take_for(value)))


@jinja2.pass_context
def _turns(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget(context)
    for value in values:
        budget.take()
        yield value


def _one_by_one(name: str) -> Callable[..., Iterator[Any]]:
    """A filter of Jinja's that does something for each of some values."""

    @jinja2.pass_context
    def filtered(context: Context, values: Iterable[Any], *args: Any, **kwargs: Any):
        return DEFAULT_FILTERS[name](context, _turns(context, values or ()), *args, **kwargs)

    return filtered


def _of_text(name: str) -> Callable[..., Any]:
    """A filter of Jinja's that takes anything as text."""

    def filtered(value: Any, *args: Any, **kwargs: Any) -> Any:
        return DEFAULT_FILTERS[name](_text(value), *args, **kwargs)

    return filtered


@jinja2.pass_context
def _join(context: Context, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = context.environment.call_filter("map", values, [], {"attribute": attribute})
    d, budget = _text(d), _budget(context)
    texts = []
    for value in values:
        budget.take(len(d))
        texts.append(_text(budget.take_for(value)))
    return d.join(texts)


@jinja2.pass_context
def _replace(context: Context, text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = map(_text, (text, old, new))
    found = text.count(old)
    _budget(context).take(len(text) + found * len(new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_context
def _indent(
    context: Context, s: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    s = _text(s)
    each = len(width) if isinstance(width, str) else max(0, int(width))
    _budget(context).take(len(s) + (1 + len(s.splitlines())) * each)
    return DEFAULT_FILTERS["indent"](s, width, first, blank)


@jinja2.pass_context
def _group_by(context: Context, values: Iterable[Any], *args: Any, **kwargs: Any) -> list[Any]:
    turns = _turns(context, values)
    return DEFAULT_FILTERS["groupby"](context.environment, turns, *args, **kwargs)


@jinja2.pass_context
def _to_json(
    context: Context,
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers gives it to templates: Jinja's own makes `\\u003c` of `<`."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MOST_INDENT:
        raise jinja2.TemplateRuntimeError(f"JSON is indented by {MOST_INDENT} at most")
    budget, parts = _budget(context), []
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    for part in encoder.iterencode(budget.take_for(x)):
        budget.take(len(part))
        parts.append(part)
    return "".join(parts)


def _formatted(budget: Budget, text: str, values: Any) -> str:
    """`text % values`: each conversion may write all values, as wide as any number in the text or,
    with `*`, in the values, says. A float has up to 310 digits.
    """
    before = budget.left
    _check_data(budget.take_for(values))
    conversions, size = text.count("%"), before - budget.left
    widths = [int(digits) for digits in re.findall("[0-9]+", text)]
    if "*" in text and isinstance(values, tuple):
        widths += [abs(value) for value in values if isinstance(value, int)]
    budget.take(len(text) + conversions * (320 + size) + sum(widths))
    return budget.take_for(text % values)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Namespace(Namespace):
    """Which is not written with what is in it: a namespace may be in itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}`, around what the assistant says: transformers makes masks for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Scope:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self):
        # The whitespace rules and tags that transformers gives templates.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        self.filters = {name: DEFAULT_FILTERS[name] for name in _FILTERS}
        self.filters |= {name: _one_by_one(name) for name in _ONE_BY_ONE}
        self.filters |= {name: _of_text(name) for name in _OF_TEXTS}
        self.filters |= {"join": _join, "replace": _replace, "tojson": _to_json}
        self.filters |= {"indent": _indent, "groupby": _group_by}
        self.filters |= {"paid": _paid, "written": _written, "turns": _turns}
        self.globals = {"range": self.globals["range"], "namespace": _Namespace, "dict": dict}
        self.globals["raise_exception"] = _raise_exception

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kinds = [names for kind, names in _METHODS.items() if isinstance(obj, kind)]
        if callable(value) and not isinstance(value, Macro) and kinds and attr not in kinds[0]:
            return False
        return super().is_safe_attribute(obj, attr, value) and not isinstance(obj, int | float)

    def wrap_str_format(self, value: Any) -> None:
        """`format` is a method like others, which are not read."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, Undefined) and __obj._undefined_name == "strftime_now":
            raise jinja2.TemplateRuntimeError(
                "it asks for today's date (strftime_now), with which a prompt would have other "
                "tokens each day"
            )
        budget, name = _budget(__context), getattr(__obj, "__name__", "")
        text = getattr(__obj, "__self__", None)
        budget.take(1 + (len(text) if isinstance(text, str) else 0))
        if isinstance(text, str) and name in ("join", "replace"):
            named = {key: x for key, x in kwargs.items() if not key.startswith("_")}  # not Jinja's
            if name == "join":
                return _join(__context, *args, d=text, **named)
            return _replace(__context, text, *args, **named)
        for arg in (*args, *kwargs.values()):
            budget.take_for(arg)
        return budget.take_for(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.take()
        for kind in (str, list, tuple):
            if operator == "+" and isinstance(left, kind) and isinstance(right, kind):
                return budget.take_for(left + right)
        if operator == "%" and isinstance(left, str):
            return _formatted(budget, left, right)
        if operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(count, int):
                    budget.take(len(many) * max(0, count))
                    return budget.take_for(many * count)
        for number in (left, right):
            if not isinstance(number, int | float) or abs(number) > 2**53:
                raise jinja2.TemplateRuntimeError(
                    f"{operator} of {type(left).__name__} and {type(right).__name__} is for "
                    "numbers up to 2^53"
                )
        if operator == "**":
            raise jinja2.TemplateRuntimeError("** is not read in chat templates")
        return super().call_binop(context, operator, left, right)


class _Pay(NodeTransformer):
    """Puts the budget's filters around all that loops, or makes a value."""

    def _filtered(self, node: nodes.Expr | None, name: str) -> nodes.Filter:
        lineno = 1 if node is None else node.lineno
        return nodes.Filter(node, name, [], [], None, None, lineno=lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not read", node.lineno)
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "turns")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [self._filtered(each, "written") for each in node.nodes]
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        joined = self._filtered(nodes.List(node.nodes, lineno=node.lineno), "join")
        return self._filtered(joined, "paid")

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        self.generic_visit(node)
        return self._filtered(node, "paid")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._filtered(node, "paid") if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"  # what is assigned to
        return node if stored else self._filtered(node, "paid")

    visit_List = visit_Tuple = visit_Dict = _literal


class ChatTemplate:
    """A template, compiled.

    Raises:
        jinja2.TemplateError, or what else a compiler raises: it is malformed, or uses what is
            not read.
    """

    def __init__(self, source: str):
        if len(source) > MOST_SOURCE:
            raise ValueError(f"it has {len(source)} letters, and at most {MOST_SOURCE} are read")
        environment = _Environment()
        self._template = environment.from_string(_Pay().visit(environment.parse(source)))

    def render(self, **values: Any) -> str:
        """The text. Raises jinja2.TemplateError, or what else a program raises."""
        return "".join(self._template.generate({_BUDGET: Budget(), **values}))
