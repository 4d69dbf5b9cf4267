# SPDX-License-Identifier: Apache-2.0
"""What makes a command of dataclasses of options."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
import yaml
from rich.markup import escape

from cmoe_cli import SUMMARIES, application

from ..errors import CMoEError, RequestError
from ..folder.json_utils import to_json
from ..options import option_texts
from .printing import Printed, show

app = application()
NAMES = {"compiled": "compile", "licence": "license", "pull_request": "pr"}
"""Fields whose options have another name."""


def read_config(context: typer.Context, path: Path | None) -> None:
    """Take the file's entries as defaults of what the command line leaves open."""
    if path is None:
        return
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(entries, dict):
        raise typer.BadParameter(f"{path} must map option names to values.")
    entries = {str(key).replace("-", "_"): value for key, value in entries.items()}
    known = {each.name: getattr(each, "multiple", False) for each in context.command.params}
    if unknown := sorted(entries.keys() - known.keys()):
        raise typer.BadParameter(f"{path} has unknown options: {', '.join(unknown)}.")
    for name, value in entries.items():
        if isinstance(value, list) and not known[name]:
            entries[name] = ",".join(map(str, value))
    context.default_map = {**(context.default_map or {}), **entries}


def parameter(name: str, kind: Any, default: Any, about: Any) -> inspect.Parameter:
    """Return a parameter as typer takes it."""
    by_name, annotation = inspect.Parameter.KEYWORD_ONLY, Annotated[kind, about]
    return inspect.Parameter(name, by_name, default=default, annotation=annotation)


CONFIG_HELP = "YAML or JSON file with options; the command line wins."
JSON_HELP = "Print one JSON object on standard output."
CONFIG = typer.Option(is_eager=True, callback=read_config, help=CONFIG_HELP)
COMMON = (
    parameter("config", Path | None, None, CONFIG),
    parameter("json", bool, False, typer.Option("--json", help=JSON_HELP)),
    parameter("debug", bool, False, typer.Option("--debug", help="Show an error's traceback.")),
)


def command_line_types(options: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; of a union, the first one."""
    hints = get_type_hints(options).items()
    return {key: get_args(it)[0] if get_origin(it) is UnionType else it for key, it in hints}


def parameter_of(field: Field[Any], kind: Any, text: str, optional: bool) -> inspect.Parameter:
    """Return the argument of a positional field, or the option of another.

    Commas separate the elements of an option.
    """
    default = None if field.default is MISSING else field.default
    is_list, flags = get_origin(kind) is Sequence, []
    if not field.kw_only:
        kind = list[str] if is_list else kind
        if field.default is MISSING and not optional:
            default = inspect.Parameter.empty
    elif is_list:
        kind, default = str, default and ",".join(map(str, default))
    elif kind is bool:
        on = flag(field.name)
        flags = [f"{on}/--no-{on[2:]}" if default else on]
    about: Any = typer.Option if field.kw_only else typer.Argument
    name = NAMES.get(field.name, field.name)
    name = "out" if name == "output" and not field.kw_only else name
    kind = kind | None if default is None else kind
    return parameter(name, kind, default, about(*flags, help=escape(text)))


def value_of(key: str, kind: Any, value: Any) -> Any:
    """Return a value of the command line as its field takes it. Raises `RequestError`."""
    if not isinstance(value, str) or get_origin(kind) is not Sequence:
        return value
    [item] = get_args(kind)
    try:
        return [item(each.strip()) for each in value.split(",") if each.strip()]
    except ValueError as error:
        raise RequestError(
            f"{flag(key)} {value} is not a list of numbers such as 1,8,64."
        ) from error


def flag(name: str) -> str:
    """Return the option of a field."""
    return f"--{NAMES.get(name, name).replace('_', '-')}"


Command = Callable[..., Printed | None]


def command(
    name: str, *options: type, optional: Collection[str] = (), passes_on: bool = False
) -> Callable[[Command], Command]:
    """Make a command whose arguments and options are the fields of dataclasses.

    The function gets those that were given, on the command line or in the --config file, as
    keywords. Positional fields without a default are required unless they are named `optional`.
    With `passes_on`, the last argument takes the options of another program.
    """
    inputs: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for kind in options:
        own, hints = {field.name: field for field in fields(kind)}, command_line_types(kind) | hints
        for key, text in option_texts(kind).items():
            if key not in inputs and hints[key] not in options:
                inputs[key] = parameter_of(own[key], hints[key], text, key in optional)
    by_name, common = inspect.Parameter.KEYWORD_ONLY, COMMON[-1:] if passes_on else COMMON
    context = inspect.Parameter("typer_context", by_name, annotation=typer.Context)
    parameters = [context, *inputs.values(), *common]

    def decorate(function: Command) -> Command:
        def run(typer_context: typer.Context, **values: Any) -> None:
            with reporting(values["debug"]):
                given = {
                    key: value_of(key, hints[key], values[each.name])
                    for key, each in inputs.items()
                    if is_given(typer_context, each.name)
                }
                result, shown, status = function(**given) or Printed(None, [])
                if result is not None and values["json"]:
                    shown = [to_json(asdict(result))]
            show(*shown)
            raise typer.Exit(status)

        run.__annotations__ = {each.name: each.annotation for each in parameters}
        vars(run)["__signature__"] = inspect.Signature(parameters)
        settings = {"ignore_unknown_options": passes_on}
        app.command(name, help=SUMMARIES[name], context_settings=settings)(run)
        return function

    return decorate


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether the user gave an option: its value is not the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def check_only(given: Collection[str], options: type, reason: str) -> None:
    """Refuse an option that is not among these. Raises `RequestError`."""
    for name in given:
        if name not in option_texts(options):
            raise RequestError(f"{flag(name)} {reason}")


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
