"""Prepares the reference: formulas as MathML, tables as Markdown, Linen fields, default values."""

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping

import griffe
from latex2mathml.converter import convert

MATH = re.compile(r"^\.\. math::(.*(?:\n(?: +.*)?$)*)", re.M)
TABLE = re.compile(r"^(=+(?: +=+)+)\n(.*)\n\1\n((?:.*\n)+?)\1$", re.M)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed, and gives Linen's layers their arguments."""

    def on_object(self, *, obj, loader, **kwargs):
        """Rewrites the docstring of a function or class."""
        if obj.docstring is not None:
            text = inspect.cleandoc(obj.docstring.value)
            text = MATH.sub(lambda m: _formula(m[1]), text)
            text = TABLE.sub(_table, text)
            # "Examples:" is Griffe's name for a section of code.
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
            text = re.sub(r"^References:\n((?:  .*\n?)+)", _references, text, flags=re.M)
            obj.docstring.value = text

    def on_class_members(self, *, node, cls, agent, **kwargs):
        """Makes a dataclass of each layer of Linen, as nn.Module does when it runs."""
        if cls.module.path == "jaxnorm.linen":
            dataclass = griffe.ExprName("dataclass", parent=DATACLASSES)
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))

    def on_package(self, *, pkg, loader, **kwargs):
        """Shows the values of defaults, where the code has the names of constants."""
        for obj in _members(pkg):
            if obj.is_function:
                for parameter in obj.parameters:
                    parameter.default = _value(parameter.default, obj.module)
            elif obj.is_attribute and obj.annotation is not None and obj.parent.is_class:
                obj.value = _value(obj.value, obj.module)  # a field of a dataclass


DATACLASSES = griffe.Module("dataclasses")
DATACLASSES.set_member("dataclass", griffe.Class("dataclass"))


def _members(obj):
    for member in obj.members.values():
        if not member.is_alias:
            yield member
            yield from _members(member)


def _value(default, module):
    """The text of a default: its value if that is plain, or else the code that makes it."""
    if not isinstance(default, griffe.Expr):  # a literal, or none
        return default
    text = str(default)
    python = importlib.import_module(module.path)
    value = eval(text, vars(python))
    if isinstance(value, dataclasses.Field):
        return default
    if isinstance(value, Mapping):
        return repr(dict(value))
    if value is None or isinstance(value, bool | int | float | str | tuple):
        return repr(value)
    return _constants(python).get(text, text)


def _constants(python):
    """The code after each NAME = of a module, and of A, B = a, b."""
    constants = {}
    for node in ast.parse(inspect.getsource(python)).body:
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(node.targets[0].elts, node.value.elts, strict=True)
            constants.update({ast.unparse(a): ast.unparse(b) for a, b in pairs})
    return constants


def _formula(tex):
    # Words are set upright: TeX takes each letter for a variable. MathML needs no script.
    words = r"(\\[A-Za-z]+(?:\{[A-Za-z]+\})?)|([A-Za-z]{3,})"
    tex = re.sub(words, lambda m: m[1] or rf"\text{{{m[2]}}}", tex)
    lines = re.split(r",\s*\\quad\s*", " ".join(tex.split()))
    math = "".join(f"<p>{convert(line, display='block')}</p>" for line in lines)
    return f'<div class="formula">{math}</div>\n\n'


def _table(found):
    """Converts a table; a row with an empty first column continues the row before it."""
    starts = [m.start() for m in re.finditer("=+", found[1])]
    ends = [*starts[1:], None]
    rows = []
    for line in [found[2], *found[3].splitlines()]:
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
    rows.insert(1, ["---"] * len(starts))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _references(found):
    lines = inspect.cleandoc(found[1]).splitlines()
    lines = [re.sub(r"(https?://\S+?)(?=[.,;]?(?:\s|$))", r"<\1>", line) for line in lines]
    return "References:\n" + "".join(f"  {line}  \n" for line in lines)
