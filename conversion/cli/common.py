# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, how failures end, how results are printed."""

import ast
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
import yaml
from rich.console import Console
from rich.table import Table

from ..carve.recipe import RECIPES
from ..errors import CMoEError
from ..folder.json_utils import to_json

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model at OUT.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default the fastest.")]
Shared = Annotated[int, typer.Option(help="Shared experts, always on (S).")]
Active = Annotated[int, typer.Option(help="Routed experts run per token (A).")]
Experts = Annotated[int, typer.Option(help="Experts in all (E); must divide the FFN width.")]
RecipeName = Annotated[str, typer.Option(help=f"Method: {', '.join(RECIPES)}.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")
]
SequenceLength = Annotated[
    int | None, typer.Option(help="Tokens per window; default 2,048 or the model's context.")
]
MaxShardSize = Annotated[
    str, typer.Option(help="Of a file of weights, for example 500MB or 2GiB; one file up to it.")
]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the file's entries as defaults of the options that the command line leaves open."""
    if path is None:
        return None
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(entries, dict):
        raise typer.BadParameter(f"{path} must map option names to values.")
    entries = {str(key).replace("-", "_"): value for key, value in entries.items()}
    known = {parameter.name for parameter in context.command.params}
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise typer.BadParameter(f"{path} has unknown options: {', '.join(unknown)}.")
    context.default_map = {**(context.default_map or {}), **entries}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read_config,
        help="YAML or JSON file with options; the command line wins.",
    ),
]


def field_texts(options: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    [tree] = ast.parse(inspect.getsource(options)).body
    assert isinstance(tree, ast.ClassDef)
    texts, name = {}, ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts[name] = " ".join(str(node.value.value).split())
    return texts


def with_options(
    options: type, *, only: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass, or for some only.

    Of a union, the first type is what the command line takes. The command gets those that were
    given, by the command line or its --config file, as the dictionary `options`.
    """
    texts, hints = field_texts(options), get_type_hints(options)
    own = {field.name: field for field in fields(options) if only is None or field.name in only}

    def option(field: Field[Any]) -> inspect.Parameter:
        [kind, *_] = get_args(hints[field.name]) or [hints[field.name]]
        flag = f"--{field.name.replace('_', '-')}"
        flags = [flag if not field.default else f"{flag}/--no-{flag[2:]}"] if kind is bool else []
        default = None if field.default is MISSING else field.default
        taken: Any = kind | None if default is None else kind
        annotation: Any = Annotated[taken, typer.Option(*flags, help=texts[field.name])]
        return inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(context: typer.Context, **arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in own}
            given = {name: value for name, value in values.items() if is_given(context, name)}
            command(context, options=given, **arguments)

        signature = inspect.signature(command)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            parameters += map(option, own.values()) if name == "options" else [parameter]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        vars(called)["__signature__"] = signature.replace(parameters=parameters)
        return called

    return decorate


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user said so: the value of an option is not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn any failure into one line on standard error and an exit status."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        status = 1
        if isinstance(error, CMoEError):
            message, status = f"error: {' '.join(str(error).split())}", error.exit_status
        elif isinstance(error, KeyboardInterrupt):
            message = "interrupted: nothing is half-written."
        else:
            reason = " ".join(str(error).split())
            message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
        message = " ".join([message, *getattr(error, "__notes__", [])])
        typer.echo(message, err=True)
        raise typer.Exit(status) from None


def print_result(result: Any, as_json: bool, table: Callable[[], Table | str]) -> None:
    """A result, as one JSON object or as a table or a line for people."""
    if as_json:
        with reporting(debug=False):
            print(to_json(asdict(result)))
    else:
        is_line = isinstance(shown := table(), str)
        Console(soft_wrap=is_line).print(shown, markup=not is_line, highlight=not is_line)


def table_of(title: str, rows: Mapping[str, str]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def agreement_in_words(own: float | None, chance: float | None) -> str:
    """How often a router agrees with the oracle, in words."""
    return "does not route" if own is None else f"{own:.1%} of tokens (chance {chance:.1%})"
