"""What a folder of a saved KA model holds for those who load it: a model card, and a file that finds this package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_TITLE = "## KA-attention"

_LOADER = '''"""Finds the classes of this KA-attention model in the package ka-attention."""

try:
    from ka_attention.hf.types import {classes}
except ImportError as error:
    raise ImportError("this is a KA-attention model: pip install ka-attention") from error
'''

_CARD = """{title}

A `{model_type}` model: causal attention in which a past token contributes its attention output in
the place of its value. Its cache holds keys and these outputs, so stock attention cannot run it.

```python
import ka_attention.hf  # pip install ka-attention
from transformers import AutoModelForCausalLM

ka_attention.hf.register()
model = AutoModelForCausalLM.from_pretrained("this folder or repository")
```

`AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` does the same where the package is installed.
{origin}
```json
{settings}
```
"""


def write_loader(folder: str | Path, classes: list[str]) -> None:
    """``modeling_ka.py``, which ``auto_map`` of config.json names."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "modeling_ka.py").write_text(_LOADER.format(classes=", ".join(classes)), encoding="utf-8")


def write_card(folder: str | Path, config: Any) -> None:
    """``README.md``: how to load the model, what it is; added to a card that is there and does not say so yet."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: transformers\n---\n"
    if _TITLE not in before:
        path.write_text(f"{before.rstrip()}\n\n{card(config)}", encoding="utf-8")


def card(config: Any) -> str:
    """The section of a model card that says what a KA model is, from its configuration.

    It names what the model was trained on if ``config.trained_on`` does, and the model it came from if that has a name
    on a hub (not a path of one's machine).
    """
    name = str(getattr(config, "_name_or_path", ""))
    lines = [f"Made from `{name}`."] if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else []
    lines += [f"Trained on {text}." for text in [getattr(config, "trained_on", None)] if text]
    return _CARD.format(
        title=_TITLE,
        model_type=config.model_type,
        origin="".join(f"\n{line}\n" for line in lines),
        settings=json.dumps(config.ka_config, indent=2),
    )
