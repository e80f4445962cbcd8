"""``python -m ka_attention`` is the command ``ka``."""

from ka_attention.cli import main

main()
