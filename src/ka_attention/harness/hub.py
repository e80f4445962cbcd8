"""Names that are folders or on the Hugging Face Hub: whether they are there, and the models that they hold."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from ka_attention.errors import UserError
from ka_attention.hf import register


def require(argument: str, name: str, kind: str = "model") -> None:
    """UserError unless ``name`` is a path, or a ``kind`` of repository on the Hub or in its cache on this machine.

    The libraries that load it would repeat a request without an answer for half a minute; this asks once.
    """
    if name and Path(name).expanduser().exists():
        return
    try:
        snapshot_download(name, repo_type=kind, allow_patterns=["config.json", "README.md"])
    except (OSError, ValueError):
        raise UserError(
            f"{argument}: no file or folder {name!r}, and the Hub has no such {kind} or is out of reach"
        ) from None


def load_model(argument: str, source: str) -> Any:
    """The causal language model of a folder or Hub name, softmax or KA; UserError unless it has all its weights."""
    register()
    require(argument, source)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # RuntimeError: weights of other shapes
        raise UserError(f"{argument}: cannot load {source}: {str(error).splitlines()[0]}") from None
    model, loaded = found
    if loaded["missing_keys"]:
        raise UserError(f"{argument}: {source} lacks the weights {', '.join(sorted(loaded['missing_keys']))}")
    return model
