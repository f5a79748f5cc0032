"""Jinja within bounds: a template comes with a checkpoint, and is a program that nobody here has written.

Every step that could take long or make something large is told to a meter: turns of loops, calls, filters, operators,
literals and what is put out. The meter counts bytes before they are made, and the thread's time, and ends the
rendering with a `TemplateLimitError`. Nothing is interrupted from outside, so nothing can be hit after the rendering.

What one step makes is bounded by what it is given, which is why methods and filters that make much of little are
estimated, and methods that are not known here are refused.
"""

from __future__ import annotations

import functools
import string
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.nodes as nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from model.template_estimates import FILTERS, STR_METHODS, format_bytes, percent_bytes
from model.template_meter import STEP_BYTES, Meter, TemplateLimitError, active_meter

MAX_TEMPLATE_CHARACTERS = 2**17
_MAX_INT_BITS = 2**16
_METHODS: dict[type, frozenset[str]] = {
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    range: frozenset({"index", "count"}),
    int: frozenset({"bit_length"}),
    float: frozenset({"is_integer"}),
    bytes: frozenset({"decode"}),
    jinja2.runtime.LoopContext: frozenset({"cycle", "changed"}),
    jinja2.utils.Cycler: frozenset({"next", "reset"}),
}
_TICK, _TURN, _MADE, _CONCAT = "octet tick", "octet turn", "octet made", "octet concat"
"""Filters that no template can name."""


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Use it within `metered`, to parse as well."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # Folding of constants takes the square of an expression's length.
        super().__init__(finalize=_finalize, optimized=False, **options)
        self.globals["namespace"] = _Namespace
        self.globals["lipsum"] = _lipsum
        self.filters |= {_TICK: _tick, _TURN: _turn, _MADE: _made, _CONCAT: _concat_filter}
        for name in ("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan"):
            self.tests[name] = _ticking(self.tests[name])
        for name in ("ge", ">=", "in"):
            self.tests[name] = _ticking(self.tests[name])
        self.concat = _concat  # type: ignore[method-assign]

    def bound_filters(self) -> None:
        """Call it when all filters are there."""
        for name, function in self.filters.items():
            if not name.startswith("octet "):
                self.filters[name] = _metered_filter(name, function)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        code: str = super()._generate(_Transformer().visit(source), *args, **options)
        return code

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        meter = active_meter()
        if type(left) is str and type(right) is str and operator == "+":
            meter.charge(len(left) + len(right) + STEP_BYTES)
            return left + right
        meter.charge(_binop_bytes(meter, operator, left, right))
        result = self.binop_table[operator](left, right)
        if operator == "+" and isinstance(result, list | tuple):
            (size, depth), (more, deeper) = meter.measure(left), meter.measure(right)
            meter.note(result, size + more, max(depth, deeper))
        return result

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = active_meter()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if owner is None:
            # Names with an underscore are Jinja's own: the variables of the frame.
            named = [value for name, value in kwargs.items() if not name.startswith("_")]
            meter.check(sum(map(meter.size, (*args, *named))))
            meter.charge(STEP_BYTES)
            return super().call(__context, __obj, *args, **kwargs)
        args, num_bytes = _method_bytes(meter, owner, __obj.__name__, args, kwargs)
        meter.charge(num_bytes + STEP_BYTES)
        result = super().call(__context, __obj, *args, **kwargs)
        return _made(result) if isinstance(result, str) else result


class _Namespace(jinja2.utils.Namespace):
    def __repr__(self) -> str:
        # Jinja's own writes what it holds, which may hold namespaces in its turn, and so on.
        return "<Namespace>"


class _Transformer(jinja2.visitor.NodeTransformer):
    """Puts what Jinja has no hook for under the meter: turns, literals, slices, `~` and comparisons."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node.nodes[0], _CONCAT, *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        cheap = all(_is_cheap(node.expr, operand) for operand in node.ops)
        self.generic_visit(node)
        if not cheap:
            node.expr = _filter(node.expr, _TICK)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        self.generic_visit(node)
        return node if constant else _filter(node, _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        self.generic_visit(node)
        return node if constant or node.ctx != "load" else _filter(node, _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        constant = all(isinstance(part, nodes.Const) for pair in node.items for part in (pair.key, pair.value))
        self.generic_visit(node)
        return node if constant else _filter(node, _MADE)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _MADE) if node.ctx == "load" and isinstance(node.arg, nodes.Slice) else node


def _is_cheap(left: nodes.Expr, operand: nodes.Operand) -> bool:
    """Whether the comparison takes no longer than a constant of the template is long."""
    if operand.op in ("eq", "ne"):
        return isinstance(left, nodes.Const) or isinstance(operand.expr, nodes.Const)
    return isinstance(operand.expr, nodes.List | nodes.Tuple) and all(
        isinstance(item, nodes.Const) for item in operand.expr.items
    )


def _filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _tick_statement(node: nodes.For | nodes.Macro) -> nodes.Stmt:
    # A piece of output is a reference, until all are put together.
    pieces = sum(len(output.nodes) for output in node.find_all(nodes.Output))
    cost = nodes.Const(8 * pieces, lineno=node.lineno)
    return nodes.ExprStmt(_filter(cost, _TURN), lineno=node.lineno)


@jinja2.pass_context  # So that it is not evaluated as a constant.
def _turn(context: jinja2.runtime.Context, cost: int) -> None:
    active_meter().charge(cost)


def _tick(value: Any) -> Any:
    active_meter().charge(STEP_BYTES)
    return value


def _made(value: Any) -> Any:
    """A value that has just been made: a literal, a slice, the result of a filter or a method."""
    meter = active_meter()
    if isinstance(value, str | bytes):
        meter.charge(sys.getsizeof(value))
    elif isinstance(value, list | tuple | dict | set):
        meter.measure(value)
        meter.charge(STEP_BYTES + 8 * len(value))
    return value


@jinja2.pass_eval_context
def _concat_filter(eval_ctx: nodes.EvalContext, *values: Any) -> str:
    active_meter().charge(STEP_BYTES + sum(map(active_meter().size, values)))
    joined: str = (jinja2.runtime.markup_join if eval_ctx.autoescape else jinja2.runtime.str_join)(values)
    return joined


def _concat(pieces: Iterable[str]) -> str:
    made = list(pieces)
    meter = active_meter()
    meter.charge(sum(map(len, made)) + 8 * len(made))
    return "".join(made)


def _finalize(value: Any) -> Any:
    if type(value) is str:
        return value
    text = value if isinstance(value, str) else str(value)
    active_meter().charge(sys.getsizeof(text))
    return text


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    active_meter().charge(STEP_BYTES + 256 * int(n) * int(max))
    return jinja2.utils.generate_lorem_ipsum(n, html, min, max)


def _ticking(test: Any) -> Any:
    @functools.wraps(test)
    def ticking(*args: Any) -> Any:
        active_meter().charge(STEP_BYTES)
        return test(*args)

    return ticking


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    estimate = FILTERS.get(name)
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        meter = active_meter()
        if estimate is None:
            raise TemplateLimitError(f"uses the filter '{name}', which is not known here")
        given, (value, *others) = args[:first], args[first:]
        value, others, kwargs, num_bytes = estimate(meter, value, others, kwargs)
        meter.charge(num_bytes + STEP_BYTES)
        result = function(*given, value, *others, **kwargs)
        return result if result is value else _made(result)

    return filtered


def _binop_bytes(meter: Meter, operator: str, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        bits = max(left.bit_length(), right.bit_length())
        if operator == "**" and right > 0:
            bits = left.bit_length() * right
        if bits > _MAX_INT_BITS:
            raise TemplateLimitError(f"computes with numbers of {bits} bits, of at most {_MAX_INT_BITS}")
        return STEP_BYTES
    if operator == "%" and isinstance(left, str):
        return percent_bytes(meter, left, right)
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                return meter.size(sequence) * max(times, 0) + STEP_BYTES
    if operator == "+":
        return meter.size(left) + meter.size(right) if isinstance(left, str) else _sum_bytes(meter, left, right)
    return STEP_BYTES


def _sum_bytes(meter: Meter, left: Any, right: Any) -> int:
    """Of a list, references; but what they refer to, each time, is no more than a value may be."""
    meter.check(meter.size(left) + meter.size(right))
    return STEP_BYTES + 8 * sum(len(value) for value in (left, right) if isinstance(value, list | tuple))


def _method_bytes(
    meter: Meter, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], int]:
    """The arguments to call with, and what the call makes."""
    if isinstance(owner, str):
        if name in ("format", "format_map"):
            return args, format_bytes(meter, string.Formatter(), owner, args, kwargs)
        if name in STR_METHODS:
            return STR_METHODS[name](meter, owner, args, kwargs)
    for cls, names in _METHODS.items():
        if isinstance(owner, cls) and name in names:
            return args, STEP_BYTES
    raise TemplateLimitError(f"calls {type(owner).__name__}.{name}, which is not allowed here")
