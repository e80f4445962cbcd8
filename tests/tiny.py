"""A comparison small enough for a test: seconds on one core."""

from dataclasses import replace

from ka_attention.studies.compare.recipes import COMPARE

SETTINGS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 64,
    "sequence_length": 32,
    "train_samples": 64,
    "validation_samples": 16,
    "cache_samples": 4,
    "chain_samples": 0,
    "batch_size": 8,
    "epochs": 2,
    "patience": 1,
    "warmup_steps": 0,
    "arms": ("softmax", "ka"),
}


def recipe(**changes):
    return replace(COMPARE["quick"], **{**SETTINGS, **changes})


def arguments(**changes):
    """The same as ``--set`` arguments of the command."""
    settings = {**SETTINGS, **changes}
    return [
        text
        for key, value in settings.items()
        for text in ("--set", f"{key}={','.join(value) if isinstance(value, tuple) else value}")
    ]


def documents(count=40):
    """Text with something to learn, every document different."""
    return [
        "\n".join(f"def f{number}_{line}(x):\n    return x + {line * number}" for line in range(12))
        for number in range(count)
    ]
