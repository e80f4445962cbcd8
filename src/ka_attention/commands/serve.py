"""A model behind an OpenAI-compatible endpoint: transformers' own server, which knows KA models from here."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from click import ClickException
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers.utils.import_utils import is_serve_available

from ka_attention.errors import UserError
from ka_attention.files import user_path
from ka_attention.harness.run import hub
from ka_attention.hf import is_attached, register
from ka_attention.hf.batching import KABatchingManager, check_batching


def command(source: str, arguments: list[str], *, trust_remote_code: bool = False) -> None:
    """Run ``transformers serve`` for the model of a folder or Hub name, softmax or KA, until it is stopped.

    ``arguments`` are its own options, after ``--continuous-batching``, which all requests share unless they say no.
    UserError where the server's libraries are missing, the model cannot be served so or the server refuses an option.
    """
    if not is_serve_available():
        raise UserError("the server needs fastapi, uvicorn and openai; pip install 'transformers[serving]' brings them")
    register()
    make_known(source, trust_remote_code)
    honour_stop_strings()
    from transformers.cli.transformers import app

    trust = ["--trust-remote-code"] * trust_remote_code
    try:
        app(["serve", source, "--continuous-batching", *trust, *arguments], standalone_mode=False)
    except ClickException as error:
        raise UserError(f"transformers serve: {error.format_message().splitlines()[0]}") from None


def honour_stop_strings() -> None:
    """Let the server end requests to a KA model at their stop strings in batches too.

    A string stays in the text that it ends, as with `generate`. Transformers' own batches do not look at them.
    """
    from transformers.cli.serving import utils

    managers: Any = utils

    class Manager(managers.CBGenerateManager):
        def init_cb(self, model: Any, gen_config: Any) -> None:
            gen_config = copy.deepcopy(gen_config)
            gen_config.stop_strings = None  # those of the first request
            super().init_cb(model, gen_config)

        def generate_streaming(self, *args: Any, request_id: str, **kwargs: Any) -> Any:
            self._mark(args[1], args[3], request_id)
            return super().generate_streaming(*args, request_id=request_id, **kwargs)

        def generate_non_streaming(self, *args: Any, request_id: str, **kwargs: Any) -> Any:
            self._mark(args[1], args[3], request_id)
            return super().generate_non_streaming(*args, request_id=request_id, **kwargs)

        def _mark(self, processor: Any, gen_config: Any, request_id: str) -> None:
            if gen_config.stop_strings and isinstance(self._cb, KABatchingManager):
                self._cb.stop_at(request_id, getattr(processor, "tokenizer", processor), gen_config.stop_strings)

    managers.CBGenerateManager = Manager


def make_known(source: str, trust_remote_code: bool = False) -> None:
    """Check the model of a folder or Hub name and its tokenizer, and let the server find its class if it is a KA model.

    The server looks classes up by name among those of transformers itself.
    """
    hub.require("MODEL", source)
    if user_path(source).is_file():
        raise UserError(f"MODEL: {source} is a file, not the folder of a model")
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):  # no weights, a moment
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
        if is_attached(model):
            check_batching(model)
    except (OSError, ValueError) as error:
        hub.refuse_remote_code("MODEL", source, error)
        raise UserError(f"MODEL: {source} cannot be served: {hub.first_line(error)}") from None
    try:
        AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        raise UserError(
            f"MODEL: {source} has no tokenizer, which the server needs; tokenizer.save_pretrained puts one there"
        ) from None
    if is_attached(model):  # the module that imports find by now: transformers replaces its own when it is loaded
        setattr(sys.modules["transformers"], type(model).__name__, type(model))
