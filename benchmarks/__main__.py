"""`python -m benchmarks [NAME …]`: the benchmarks of that name, or those that this machine can run."""

import importlib
import sys

import torch

from benchmarks.harness import machine


def main(names: list[str]) -> None:
    for name in names or (["cpu", "gpu", "training"] if torch.cuda.is_available() else ["cpu"]):
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"# {name}: {module.__doc__}\n{machine()}\n")
        for text in module.run():
            print(text, end="\n\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
