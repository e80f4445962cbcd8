"""The house: imports point one way, no circles, no study imports another, no room and no file is too large."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
PACKAGE = "ka_attention"
# From the top down: a file imports from its own room and from rooms further down.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"studies", "commands"},
    {"evaluations"},
    {"harness"},
    {"report", "conversion"},
    {"hf"},
    {"nn"},
    {"ops"},
    {"files"},
    {"errors"},
)
LINES = 400
FILES = {path.relative_to(SOURCES / PACKAGE).with_suffix(""): path for path in SOURCES.rglob("*.py")}


def name(path: Path) -> str:
    """ka_attention.hf for hf/__init__."""
    return ".".join((PACKAGE, *(part for part in path.parts if part != "__init__")))


MODULES = {name(path): file for path, file in FILES.items()}


def imports(file: Path, modules=MODULES):
    """The modules of the package that a file imports anywhere in it, named as it names them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in modules else node.module for each in within]
        else:
            continue
        yield from (each for each in found if each in modules)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


def floor(module: str) -> int:
    """From the top; the package's own __init__ gathers public names from everywhere, and nobody imports it."""
    floors = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert floors or module == PACKAGE, f"{module} is in no room"
    return floors[0] if floors else -1


def backward(graph):
    return [(one, other) for one, others in graph.items() for other in others if floor(other) < floor(one)]


GRAPH = {module: set(imports(file)) - {module} for module, file in MODULES.items()}


def test_imports_point_one_way():
    arrows = [(one, other) for one, other in backward(GRAPH) if other != PACKAGE]
    assert not arrows
    below = [one for one, others in GRAPH.items() if PACKAGE in others and floor(one) > floor("ka_attention.harness")]
    assert not below, "what lies below imports what it needs, not the public names of all"


def test_rooms_of_one_floor_do_not_import_one_another():
    arrows = [
        (one, other)
        for one, others in GRAPH.items()
        for other in others - {PACKAGE}
        if floor(one) == floor(other) and room(one) != room(other)
    ]
    assert not arrows


def test_no_study_imports_another():
    def study(module):
        return module.split(".")[2] if room(module) == "studies" and module.count(".") > 1 else None

    arrows = [(one, other) for one, others in GRAPH.items() for other in others if study(one) and study(other)]
    assert [arrow for arrow in arrows if study(arrow[0]) != study(arrow[1]) and study(arrow[0]) != "catalogue"] == []


def test_no_circles():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_no_room_holds_more_than_a_quarter_of_the_lines():
    lines = Counter()
    for module, file in MODULES.items():
        lines[room(module)] += len(file.read_text(encoding="utf-8").splitlines())
    largest, count = lines.most_common(1)[0]
    assert count <= lines.total() / 4, f"{largest}: {count} of {lines.total()} lines"


def test_no_file_is_too_long():
    root = SOURCES.parent
    files = [file for folder in ("src", "tests", "benchmarks") for file in (root / folder).rglob("*.py")]
    long = {str(file.relative_to(root)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {file: count for file, count in long.items() if count > LINES} == {}


def test_the_test_sees_arrows_and_circles(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from ka_attention.studies.compare import study\n    import ka_attention.cli\n")
    modules = {"ka_attention.studies.compare.study", "ka_attention.cli", "ka_attention.studies.compare"}
    assert set(imports(file, modules)) == {"ka_attention.studies.compare.study", "ka_attention.cli"}
    graph = {"ka_attention.ops.api": {"ka_attention.hf.config"}, "ka_attention.hf.config": {"ka_attention.ops.api"}}
    assert backward(graph) == [("ka_attention.ops.api", "ka_attention.hf.config")]
