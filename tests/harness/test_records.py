"""Typed results go to JSON and come back equal; what does not fit the types is refused by the name of its field."""

import json
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import pytest

from ka_attention.harness.models.arms import ArmResults, arm
from ka_attention.harness.run.records import from_json, to_json
from ka_attention.harness.run.settings import restore
from ka_attention.harness.run.store import Store
from ka_attention.studies.catalogue import STUDIES

X = TypeVar("X")


@dataclass(frozen=True)
class Point:
    at: int
    ppl: float
    kind: Literal["kv", "ka"] = "kv"


@dataclass(frozen=True)
class Held(Generic[X]):
    found: tuple[X, ...]
    by_length: dict[int, X]
    pair: tuple[int, str] | None = None
    window: int | tuple[int, ...] | None = None
    rest: Any = None


HELD = Held((Point(1, 2.0), Point(2, 3.5, "ka")), {128: Point(3, 4.0)}, (1, "a"), (4, 8), {"x": [1]})


def through_json(value):
    return json.loads(json.dumps(to_json(value)))


@pytest.mark.parametrize("value", [HELD, Held((), {}), Held((Point(0, 1),), {}, window=4)])
def test_there_and_back(value):
    assert from_json(Held[Point], through_json(value)) == value


@pytest.mark.parametrize("name", ["softmax", "ka", "ka-token-w8", "softmax-w4"])
def test_an_arm_comes_back_with_its_facts(name):
    found = ArmResults(arm(name), (Point(1, 2.0),))
    back = from_json(ArmResults[Point], through_json(found))
    assert back == found
    assert (back.arm.window, back.arm.is_ka) == (found.arm.window, found.arm.is_ka)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_recipe_is_restored(study):
    for recipe in study.recipes.values():
        assert restore(type(recipe), through_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"at": 1}, "point: without ppl"),
        ({"at": 1, "ppl": 1, "color": "red"}, "point: unknown color"),
        ({"at": "1", "ppl": 1}, r"point\.at: expected int, got '1'"),
        ({"at": True, "ppl": 1}, r"point\.at: expected int, got True"),
        ({"at": 1, "ppl": "x"}, r"point\.ppl: expected float, got 'x'"),
        ({"at": 1, "ppl": 1, "kind": "kq"}, r"point\.kind: expected .*Literal.*, got 'kq'"),
        ([1], r"point: expected Point, got \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(stored, message):
    with pytest.raises(ValueError, match=message):
        from_json(Point, stored, "point")


def test_a_part_comes_back_as_its_type(tmp_path):
    calls = []

    def work(at: int, ppl: float) -> Point:
        calls.append(at)
        return Point(at, ppl)

    store = Store(tmp_path, {})
    assert store.part("a", work, 3, 2.0) == Point(3, 2.0)
    assert Store(tmp_path, {}).part("a", work, 3, 2.0) == Point(3, 2.0)
    assert calls == [3]
