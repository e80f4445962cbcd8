"""All studies by name. Adding one is adding a folder and a line here (CONTRIBUTING.md)."""

from __future__ import annotations

from ka_attention.errors import UserError
from ka_attention.harness.run.study import Study
from ka_attention.studies.compare.study import COMPARISON
from ka_attention.studies.dereference.study import DEREFERENCE
from ka_attention.studies.hops.study import HOPS
from ka_attention.studies.hybrid.study import HYBRID
from ka_attention.studies.position.study import POSITION
from ka_attention.studies.reversal.study import REVERSAL
from ka_attention.studies.state.study import STATE
from ka_attention.studies.window.study import WINDOW

_ALL: tuple[Study, ...] = (COMPARISON, REVERSAL, HOPS, POSITION, DEREFERENCE, STATE, WINDOW, HYBRID)
STUDIES = {study.name: study for study in _ALL}


def study(name: str) -> Study:
    """The study called ``name``."""
    if name not in STUDIES:
        raise UserError(f"NAME: no study {name!r}; allowed are {', '.join(STUDIES)}")
    return STUDIES[name]
