# SPDX-License-Identifier: Apache-2.0
"""Run an OpenAI-compatible server: `transformers serve` or `llama-server`."""

import logging
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import transformers
import typer
from transformers.utils.import_utils import is_serve_available

import cmoe_hf

from ..errors import CMoEError, RequestError, check_known, missing
from ..measure.llama_cpp import find_server, stop
from ..options import with_options
from ..source.hub import load_tokenizer
from ..source.loading import model_folder
from ..source.stored import read_json
from .gguf_file import export_gguf

ENGINES = ("transformers", "llama.cpp")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """The options of `serve`."""

    model: str | Path
    """Folder or Hub id, for llama.cpp also a GGUF file; clients name it like this."""
    options: Sequence[str] = ()
    """Further options of `transformers serve`, or of `llama-server`, for example --port 8001."""
    _: KW_ONLY
    engine: str = ENGINES[0]
    """transformers or llama.cpp."""


@with_options(ServeOptions)
def serve(asked: ServeOptions) -> None:
    """Serve a model until interrupted. It is loaded before the first request.

    Raises:
        RequestError: There is no such model, it has no tokenizer, or the extra is not installed.
        CMoEError: The Hub cannot be reached.
    """
    model, options = asked.model, asked.options
    check_known("engine", asked.engine, ENGINES)
    if asked.engine == "llama.cpp":
        return serve_llama_cpp(model, options)
    if not is_serve_available():
        raise missing("serving needs more packages", "serve")
    if "@" in str(model):
        raise RequestError(f"{model}: the server takes what follows an @ for a revision.")
    folder, name = model_folder(model)
    if load_tokenizer(folder).chat_template is None:
        logger.warning(
            "%s has no chat template: /v1/completions works, /v1/chat/completions does not.", name
        )
    from transformers.cli.serve import Serve  # they need the extra
    from transformers.cli.serving.model_manager import ModelManager

    families, model_type = [*cmoe_hf.FAMILIES], read_json(folder / "config.json")["model_type"]
    if model_type.startswith("cmoe_"):
        families.append(cmoe_hf.carved_classes(model_type))
    for *_, causal in families:  # it looks a model's class up among the library's own
        setattr(transformers, causal.__name__, causal)
    if hasattr(ModelManager, "get_gen_models"):
        # Before 5.24 it lists what is in the cache, which a local folder is not.
        listed = {"id": str(model), "object": "model", "created": int(time.time()), "owned_by": ""}
        ModelManager.get_gen_models = staticmethod(lambda *_, **__: [listed])
    server = typer.Typer()
    server.command("serve")(Serve)
    try:
        server([str(model), *options], standalone_mode=False)
    except typer.Abort:
        return  # Ctrl-C: this is how a server ends
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:  # that of a usage error
            raise
        raise RequestError(f"`transformers serve` refuses: {error}") from error


def serve_llama_cpp(model: str | Path, options: Sequence[str]) -> None:
    """Run `llama-server` on a GGUF file, which is temporary if a folder is given."""
    program = find_server()
    with tempfile.TemporaryDirectory(prefix="cmoe-") as folder:
        file = Path(model)
        if file.suffix != ".gguf":
            file = Path(export_gguf(model, Path(folder) / "model.gguf").output)
        elif not file.is_file():
            raise RequestError(f"there is no file {file}.")
        command = [program, "--model", str(file), "--alias", str(model), "--jinja", *options]
        process = subprocess.Popen(command)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            return  # Ctrl-C: this is how a server ends
        finally:
            stop(process)
        if status:
            raise CMoEError(f"llama-server ended with status {status}.")
