"""All studies by name. Adding one is adding a file and a line here."""

from __future__ import annotations

from ka_attention.errors import UserError
from ka_attention.studies.compare import COMPARISON
from ka_attention.studies.dereference import DEREFERENCE
from ka_attention.studies.hops import HOPS
from ka_attention.studies.position import POSITION
from ka_attention.studies.reversal_curse import REVERSAL
from ka_attention.studies.state import STATE
from ka_attention.studies.study import Study
from ka_attention.studies.window import WINDOW

_ALL: tuple[Study, ...] = (COMPARISON, REVERSAL, HOPS, POSITION, DEREFERENCE, STATE, WINDOW)
STUDIES = {study.name: study for study in _ALL}


def study(name: str) -> Study:
    """The study called ``name``."""
    if name not in STUDIES:
        raise UserError(f"NAME: no study {name!r}; allowed are {', '.join(STUDIES)}")
    return STUDIES[name]
