# SPDX-License-Identifier: Apache-2.0
"""Options, written once: the fields of a dataclass with a docstring below each.

They are the signature and the documentation of a function here, and the arguments and options of
a command in `cli`.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Options = TypeVar("Options")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: str | None = None
    """Precision to compute in: float32, bfloat16, float16; default the checkpoint's."""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps; default the fastest available."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""


@functools.cache
def option_texts(options: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass on one line.

    Positional fields come first, those of bases last.
    """
    texts = {field.name: "" for field in fields(options) if not field.kw_only}
    for kind in filter(is_dataclass, options.__mro__):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name, said = ast.unparse(field.target), ast.literal_eval(text.value)
                texts[name] = texts.get(name) or " ".join(said.split())
    return texts


def with_options(
    options: Callable[Parameters, Options],
) -> Callable[[Callable[[Options], Result]], Callable[Parameters, Result]]:
    """Make a function of a dataclass a function of the dataclass's fields.

    `inspect.signature` shows them, and `help` what they mean.
    """

    def decorate(function: Callable[[Options], Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return function(options(*args, **kwargs))

        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(options).replace(return_annotation=returned)
        vars(call)["__signature__"] = signature
        assert isinstance(options, type)
        texts = [f"{name}: {text}" for name, text in option_texts(options).items()]
        arguments = textwrap.indent("\n".join(texts), "    ")
        about, raises, errors = (inspect.getdoc(function) or "").partition("Raises:\n")
        call.__doc__ = f"{about.rstrip()}\n\nArgs:\n{arguments}\n\n{raises}{errors}"
        return call

    return decorate


def narrowed(options: Any, base: Callable[..., Options], **changes: Any) -> Options:
    """Return those options that a base class of theirs has, some of them changed."""
    assert isinstance(base, type)
    own = {field.name: getattr(options, field.name) for field in fields(base)}
    return base(**own | changes)
