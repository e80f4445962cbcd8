"""The operator alone as a kernel of the Hub: python hub/make.py [FOLDER], build/hub by default.

FOLDER gets what `kernel-builder` takes, `build.toml`, `flake.nix`, `CARD.md` and the code in `torch-ext/ka_attention`,
and what it makes of that, `build/torch-cpu` and `build/torch-cuda`, which `kernels.get_local_kernel(FOLDER)` loads. The
code is that of `ka_attention.ops`, with relative imports and operators in a namespace of the build's own, so that
several versions can be loaded beside each other and beside the package.
"""

import json
import re
import shutil
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME, MODULE, VERSION, LICENSE, BACKENDS = "ka-attention", "ka_attention", 1, "MIT", ("cpu", "cuda")

BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[general.hub]
repo-id = "ka-attention/{NAME}"

[torch-noarch]
"""

FLAKE = """{
  description = "KA-attention";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """# KA-attention

Causal attention in which a past token contributes its attention output instead of its value, exact, forward and
backward: in Triton on a GPU, in PyTorch elsewhere. The docstring of `ka_attention` says the rest.

```python
from kernels import get_kernel

ka = get_kernel("ka-attention/ka-attention", version=1, trust_remote_code=True)
a = ka.ka_attention(q, k, v)
```
"""

# What kernel-builder puts beside the code, for one backend and one state of the sources.
OPS = """import torch

NAMESPACE = "{id}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{NAMESPACE}}::{{op_name}}"
"""


def portable(text: str, depth: int) -> str:
    """The source of a file of `ka_attention.ops`, ``depth`` folders below it, free of the package's name."""
    here = "." * (depth + 1)
    text = re.sub(r"^(\s*)from ka_attention\.ops import", rf"\1from {here} import", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from ka_attention\.ops\.", rf"\1from {here}", text, flags=re.MULTILINE)
    text, count = re.subn(r'"ka_attention::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    if count:
        text = text.replace("\nimport torch\n", f"\nimport torch\nfrom {here}_ops import add_op_namespace_prefix\n", 1)
    return text


def write_code(folder: Path) -> None:
    """The portable sources, in ``folder``."""
    source = ROOT / "src/ka_attention/ops"
    for file in sorted(source.rglob("*.py")):
        path = file.relative_to(source)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(portable(file.read_text(encoding="utf-8"), len(path.parts) - 1), encoding="utf-8")


def make(folder: Path) -> None:
    """Fill ``folder``, whose `torch-ext` and `build` are made anew."""
    for name in ("torch-ext", "build"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_code(folder / "torch-ext" / MODULE)
    for name, text in (("build.toml", BUILD), ("flake.nix", FLAKE), ("CARD.md", CARD)):
        (folder / name).write_text(text, encoding="utf-8")
    code = b"".join(file.read_bytes() for file in sorted((folder / "torch-ext").rglob("*.py")))
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(folder / "torch-ext" / MODULE, variant)
        unique = f"_{MODULE}_{backend}_{zlib.crc32(code):08x}"
        (variant / "_ops.py").write_text(OPS.format(id=unique), encoding="utf-8")
        metadata = {"id": unique, "name": NAME, "version": VERSION, "license": LICENSE, "python-depends": []}
        (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": backend}}, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/hub"))
