"""Names that are folders or on the Hugging Face Hub: whether they are there, and the models that they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM

from ka_attention.errors import UserError
from ka_attention.files import shown, user_path, write_atomically
from ka_attention.harness.run.environment import require_memory_of
from ka_attention.hf import register

PLAIN = {  # what the libraries say at length or not at all
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
    "Weights only load failed": "its pickled weights hold more than tensors; give it as safetensors (save_pretrained)",
}
CHECKSUM = "model.safetensors.sha256"  # as sha256sum writes and reads it


def require(argument: str, name: str, kind: str = "model") -> None:
    """UserError unless ``name`` is a file, a folder, or a ``kind`` of repository on the Hub or in its cache here.

    The libraries that load it would repeat a request without an answer for half a minute; this asks once.
    """
    path = user_path(name)
    if name and path.exists():
        if not (path.is_file() or path.is_dir()):  # a pipe, which would be waited for
            raise UserError(f"{argument}: {shown(path)} is no regular file and no folder")
        return
    try:
        snapshot_download(name, repo_type=kind, allow_patterns=["config.json", "README.md"])
    except (OSError, ValueError):
        raise UserError(
            f"{argument}: no file or folder {name!r}, and the Hub has no such {kind} or is out of reach"
        ) from None


def load_model(argument: str, source: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The causal language model of a folder or Hub name, softmax or KA, in ``dtype`` (None: that of its weights).

    UserError unless it has all its weights, and those that were saved where a checksum stands beside them. Code that
    comes with a model runs only with ``trust_remote_code``.
    """
    register()
    require(argument, source)
    path = user_path(source)
    if path.is_dir():
        verify(argument, path)
    name = str(path) if path.exists() else source
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        require_memory_of(config, argument)
        found: Any = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:  # of damaged files and impossible settings: the libraries' errors have no common type
        refuse_remote_code(argument, source, error)
        reason = next((plain for words, plain in PLAIN.items() if words in str(error)), first_line(error))
        raise UserError(f"{argument}: cannot load {source}: {reason}") from None
    model, loaded = found
    if loaded["missing_keys"]:
        raise UserError(f"{argument}: {source} lacks the weights {', '.join(sorted(loaded['missing_keys']))}")
    return model


def refuse_remote_code(argument: str, source: str, error: Exception) -> None:
    """UserError where ``error`` is transformers' refusal to run the code that comes with a model."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{argument}: {source} needs code of its own; read it, and give --trust-remote-code to run it"
        ) from None


def write_checksum(folder: Path) -> None:
    """Write the SHA-256 of the weights in ``folder`` beside them."""
    weights = folder / CHECKSUM.removesuffix(".sha256")
    write_atomically(folder / CHECKSUM, f"{_sha256(weights)}  {weights.name}\n")


def verify(argument: str, folder: Path) -> None:
    """UserError where the weights in ``folder`` are not those whose checksum stands beside them, if one does."""
    checksum, weights = folder / CHECKSUM, folder / CHECKSUM.removesuffix(".sha256")
    if not (checksum.exists() and weights.exists()):
        return
    if checksum.read_text(errors="replace").split(maxsplit=1)[:1] != [_sha256(weights)]:
        raise UserError(
            f"{argument}: cannot load {shown(folder)}: its weights are not those of {CHECKSUM}; "
            "if you changed them yourself, delete that file"
        )


def first_line(error: Exception) -> str:
    """What went wrong in one line: the type where the message does not say it alone."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text if len(text) < 200 else f"{text[:200]} …"
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
