"""Whether a name is on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from ka_attention.errors import UserError


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
