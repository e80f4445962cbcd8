"""A model behind an OpenAI-compatible endpoint: transformers' own server, which knows KA models from here."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from ka_attention.errors import UserError
from ka_attention.harness import hub
from ka_attention.hf import is_attached, register
from ka_attention.hf.batching import check_batching


def command(source: str, arguments: list[str], *, trust_remote_code: bool = False) -> None:
    """Run ``transformers serve`` for the model of a folder or Hub name, softmax or KA, until it is stopped.

    ``arguments`` are its own options, after ``--continuous-batching``, which all requests share unless they say no.
    UserError where the server's libraries are missing or the model cannot be served so.
    """
    if not is_serve_available():
        raise UserError("the server needs fastapi, uvicorn and openai; pip install 'transformers[serving]' brings them")
    register()
    make_known(source, trust_remote_code)
    from transformers.cli.transformers import app

    trust = ["--trust-remote-code"] * trust_remote_code
    app(["serve", source, "--continuous-batching", *trust, *arguments], standalone_mode=False)


def make_known(source: str, trust_remote_code: bool = False) -> None:
    """Check the model of a folder or Hub name, and let the server find its class if it is a KA model.

    The server looks classes up by name among those of transformers itself.
    """
    hub.require("MODEL", source)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):  # no weights, a moment
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
        if not is_attached(model):
            return
        check_batching(model)
    except (OSError, ValueError) as error:
        hub.refuse_remote_code("MODEL", source, error)
        raise UserError(f"MODEL: {source} cannot be served: {hub.first_line(error)}") from None
    # The module that imports find by now: transformers replaces its own when it is loaded.
    setattr(sys.modules["transformers"], type(model).__name__, type(model))
