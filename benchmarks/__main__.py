"""`python -m benchmarks [NAME …]`: the benchmarks of that name, or those that this machine can run."""

import argparse
import importlib

import torch

from benchmarks.harness import machine

NAMES = ("cpu", "gpu", "hybrid", "models", "ranks", "serving", "traffic", "training")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    names = parser.parse_args(arguments).names
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"expected of {', '.join(NAMES)}, got {', '.join(unknown)}")
    for name in names or (["cpu", "gpu", "training"] if torch.cuda.is_available() else ["cpu"]):
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"# {name}: {module.__doc__}\n{machine()}\n")
        for text in module.run():
            print(text, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
