# SPDX-License-Identifier: Apache-2.0
"""The verb `serve`: an OpenAI-compatible server, which is `transformers serve`.

By itself that command looks a model's class up among the library's own and finds none of ours.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
import typer
from transformers.utils.import_utils import is_serve_available

import cmoe_hf

from ..errors import RequestError, missing
from ..source.checkpoint import load_tokenizer
from ..source.loading import model_folder

logger = logging.getLogger(__name__)


def serve(model: str | Path, options: Sequence[str] = ()) -> None:
    """Serve a model until interrupted. It is loaded before the first request.

    Args:
        model: Folder or Hub id, of a carved or any other causal model. Clients have to name it as
            it is given here.
        options: Further options of `transformers serve`, for example `["--port", "8001"]`.

    Raises:
        RequestError: There is no such model, it has no tokenizer, or the extra is not installed.
        CMoEError: The Hub cannot be reached.
    """
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

    for *_, causal in cmoe_hf.FAMILIES:
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
