"""The front of the command: help, version, lists; and what a user or the machine did wrong in one line."""

import errno
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from test_cli import ka, refused

from ka_attention.cli import LIBRARIES, app
from ka_attention.errors import machine_fault
from ka_attention.evaluations.adapters import METHODS
from ka_attention.harness.run import environment
from ka_attention.harness.run import study as harness
from ka_attention.studies.catalogue import STUDIES
from ka_attention.studies.compare import study as compare
from ka_attention.studies.compare.recipes import COMPARE

COMMANDS = [
    "compare",
    "train",
    "evaluate",
    "report",
    "study",
    "inspect",
    "adapt",
    "convert",
    "generate",
    "serve",
    "recipes",
]


def run(*words, missing=(), **options):
    """``python -m ka_attention`` in a process in which the libraries ``missing`` are not installed."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({list(missing)!r})); sys.argv = ['ka', *sys.argv[1:]]\n"
        "import runpy; runpy.run_module('ka_attention', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, **options)


def test_help_names_every_command_and_loads_no_heavy_library():
    shown = run("--help", missing=("torch", "transformers", "datasets", "matplotlib"))
    assert shown.returncode == 0, shown.stderr
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", shown.stdout)


def test_help_names_every_method():
    shown = ka("adapt", "--help").output
    assert all(method in shown for method in METHODS)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_has_an_example_that_the_command_understands(command):
    shown = [ka(*([command] if command else []), option).output for option in ("--help", "-h")]
    assert shown[0] == shown[1]
    example = re.search(r"Example: ka (.*?)\n\s*\n", shown[0], re.DOTALL)[1]
    name, *words = shlex.split(" ".join(example.split()))
    assert command in (None, name)
    typer.main.get_command(app).commands[name].make_context(name, words)


def test_version_and_completion():
    assert ka("--version").output == f"ka-attention {version('ka-attention')}\n"
    # Which shell asks is not looked up: under make it is one that has no completion.
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = run("--show-completion", "bash", env=named)
    assert "_KA_COMPLETE=complete_bash" in shown.stdout


def test_studies_and_recipes_are_listed_in_a_few_lines_and_one_is_shown_with_its_settings():
    listed = ka("recipes").output
    assert ka("study").output == listed
    assert len(listed.splitlines()) <= 2 * len(STUDIES) + 2
    for study in STUDIES.values():
        assert f"{study.name}: {study.question}" in listed
        assert ", ".join(study.recipes) in listed
    one = ka("recipes", "pythia-70m-training").output
    assert one.startswith(f"compare pythia-70m-training: {COMPARE['pythia-70m-training'].summary}\n")
    assert "    train_samples=10000\n" in one
    assert "    arms=softmax,ka," in one
    assert ka("recipes", "quick").output.splitlines()[0].startswith("compare quick: ")
    for title in STUDIES["window"].recipes:
        assert f"window {title}: " in ka("recipes", "window").output
    assert refused(ka("recipes", "quik"), "NAME: no study or recipe 'quik'", "quick", "window")


@pytest.mark.parametrize("library", ["typer", *LIBRARIES])
def test_a_missing_library_is_one_line_that_says_what_to_install(library, monkeypatch):
    said = f"{library} is not installed; pip install 'ka-attention[studies]' brings all that the command needs"
    if library == "typer":
        shown = run("--help", missing=("typer",))
        assert (shown.returncode, shown.stderr) == (2, f"ka: {said}\n")
    else:
        monkeypatch.setitem(sys.modules, library, None)
        assert refused(ka("recipes"), said)


def test_what_the_command_needs_is_what_the_extras_bring():
    brought = {re.match(r"[\w-]+", line)[0] for line in requires("ka-attention") if "extra" in line}
    assert {*LIBRARIES, "typer"} <= brought


def test_a_name_that_is_not_utf_8_is_refused_before_any_work(tmp_path):
    name = os.fsdecode(b"\xff.txt")
    for words in (["compare", "--out", name], ["compare", "--data", name], ["report", name]):
        assert refused(ka(*words), r"b'\xff.txt' is not UTF-8")


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--data", "~nobody-of-this-name/x"],
        ["compare", "--tokenizer", "~nobody-of-this-name/x"],
        ["compare", "--set", f"epochs={10**30}"],
        ["compare", "--set", "hidden_size=100000000"],
        ["compare", "--set", "vocab_size=1000000000"],
        ["compare", "--set", "layers=100000000"],
        ["compare", "--set", "batch_size=1000000000", "--set", "train_samples=1000000000"],
        ["compare", "--set", "report_to=wanbd"],
        ["compare", "--set", f"arms=softmax,ka-w{9 * 10**40}"],
        ["study", "dereference", "--set", "hidden_size=80000000"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_what_cannot_be_is_refused_before_any_work(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(ka(*words))
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range_are_wrong_usage():
    for option in ("--seed", "--window", "--tokens", "--length"):
        assert ka("convert", "model", "--tokens", 99, option, 10**30).exit_code == 2


def test_sizes_that_fit_are_not_refused(monkeypatch):
    monkeypatch.setattr(environment, "memory", lambda: 16 * 2**30)
    for study in STUDIES.values():
        environment.require_memory(study.recipes["quick"])
    environment.require_memory(COMPARE["pythia-70m-training"])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"x": torch.zeros(99_999)}, path),
        lambda path: torch.save(torch.zeros(99_999), path),
        lambda path: path.write_bytes(bytes(99_999)),
    ],
)
def test_a_full_disk_is_one_line_whoever_writes(write, tmp_path):
    """A limit on the size of files fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(BaseException) as caught:  # noqa: PT011 (its type is the writer's own)
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert machine_fault(caught.value) in (
        f"writing: {os.strerror(errno.EFBIG)}",
        "writing: a file could not be written to its end; is the disk full?",
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_one_line(error, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(compare, "prepare", fails)
    refused(ka("compare", "--out", tmp_path / "run"), "not enough memory")


def test_a_mistake_in_the_program_stays_a_traceback():
    assert machine_fault(RuntimeError("shapes differ")) is None
    assert machine_fault(OSError("of a library")) is None


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch):
    from ka_attention import cli

    monkeypatch.setattr(cli, "app", lambda **_: None)
    for given, policy in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "9"}, None)):
        with monkeypatch.context() as patch:
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
                patch.delenv(name, raising=False)
            for name, value in given.items():
                patch.setenv(name, value)
            cli.main()
            assert os.environ.get("OMP_WAIT_POLICY") == policy
            os.environ.pop("OMP_WAIT_POLICY", None)


def test_markup_in_a_path_is_no_markup(tmp_path, monkeypatch):
    recorded = Path(__file__).parents[1] / "docs" / "results" / "quick" / "results.json"
    out = tmp_path / "o[" / "red]"
    out.mkdir(parents=True)
    shutil.copy(recorded, out)
    monkeypatch.setattr(harness, "render", lambda *_: None)
    assert f"{out}/report.html" in ka("report", out).output
