import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from ka_attention.cli import app
from ka_attention.evaluations import conversion
from ka_attention.harness.training import trained as harness
from ka_attention.studies.compare import study as compare
from ka_attention.studies.hybrid import study as hybrid


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.documents()))
    return str(path)


def ka(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result, *parts):
    """A user's mistake: one line on stderr that holds ``parts``, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("ka: ")
    for part in parts:
        assert part in result.stderr
    return True


def test_train_evaluate_and_report_are_the_parts_of_compare(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARES", (conversion.SIDE,))  # the slowest evaluation, not what is asked here
    monkeypatch.setattr(conversion, "WINDOWS", conversion.WINDOWS[:1])
    out = tmp_path / "run"
    options = ["--data", corpus, *tiny.arguments(epochs=1)]
    assert ka("train", *options, "--out", out).exit_code == 0
    half = json.loads((out / "results.json").read_text())
    answers = half["arms"]["ka"]["seeds"][0]
    assert [name for name, answer in answers.items() if answer] == ["training"]
    said = ka("evaluate", out)
    assert said.exit_code == 0
    summary = said.output[: said.output.index("\nReport: ")]
    assert "Validation PPL, lower is better" in summary
    assert re.search(r"KA +\d+\.\d", summary)
    whole = json.loads((out / "results.json").read_text())
    answers = whole["arms"]["ka"]["seeds"][0]
    assert {"training", "caches", "perplexity", "memory", "reversal"} <= {name for name in answers if answers[name]}
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert ka("report", out).exit_code == 0
    assert (out / "report.html").read_text() == page
    # `study compare` is the same run: nothing is left to do, and the same report comes.
    again = ka("study", "compare", *options, "--out", out)
    assert again.exit_code == 0
    assert "Epoch" not in again.output


def test_the_default_folder_is_named_after_the_recipe(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.Comparison, "run", lambda self, recipe, store, seeds: pytest.fail(str(store.out)))
    with pytest.raises(pytest.fail.Exception, match="runs/pythia-70m-cache"):
        CliRunner().invoke(app, ["compare", "pythia-70m-cache"], catch_exceptions=False)


def test_gpus_are_a_setting_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(hybrid.HybridStudy, "run", lambda self, recipe, store, seeds: pytest.fail(f"{recipe.gpus}"))
    with pytest.raises(pytest.fail.Exception, match=r"^3$"):
        CliRunner().invoke(app, ["study", "hybrid", "--gpus", "3", "--out", str(tmp_path)], catch_exceptions=False)


def test_a_users_mistake_is_one_line_and_nothing_is_written(corpus, tmp_path):
    out = tmp_path / "run"
    good = [*tiny.arguments(), "--out", out]
    assert refused(ka("compare", "quik", "--out", out), "RECIPE: no recipe 'quik'", "quick")
    assert refused(ka("compare", *good, "--set", "epoch=1"), "--set: no setting 'epoch'")
    assert refused(ka("compare", *good, "--data", tmp_path / "absent.txt"), "--data: no file or folder")
    assert refused(ka("compare", *good, "--data", corpus, "--set", "train_samples=99999"), "--set train_samples=")
    assert refused(ka("compare", *good, "--data", corpus, "--set", "arms=mamba"), "--set arms: no arm 'mamba'")
    assert refused(ka("compare", *good, "--data", corpus, "--tokenizer", corpus), "--tokenizer")
    assert refused(ka("compare", *good[:-1], corpus, "--data", corpus), "--out", "is a file")
    assert refused(ka("study", "nothing"), "NAME: no study 'nothing'", "compare")
    assert refused(ka("evaluate", out), "OUT:", "holds no identity.json")
    assert refused(ka("report", out), "OUT:", "holds no results.json")
    assert refused(ka("study", "dereference", "--data", corpus), "--data: dereference has no such setting")
    assert refused(ka("study", "state", "--tokenizer", corpus), "--tokenizer: state has no such setting")
    assert refused(ka("study", "state", "--gpus", "2"), "--gpus: state has no such setting")
    assert refused(ka("compare", *good, "--data", ""), "--data: no file or folder ''")
    assert refused(
        ka("convert", out, "--tokens", "99", "--learning-rate", "nan"), "--learning-rate: expected a positive"
    )
    assert refused(ka("convert", out, "--tokens", "99", "--learning-rate", "1e300"), "--learning-rate: expected a")
    assert not out.exists()


@pytest.mark.parametrize("command", [("compare",), ("train",), ("study", "dereference"), ("study", "window")])
def test_a_folder_of_the_users_is_not_written_to(command, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.html").write_text("precious")
    assert refused(ka(*command, "--out", out), "--out:", "no run of ka")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("report.html", "precious")]


def test_wrong_usage_exits_with_2():
    for arguments in (["compare", "--seeds", "0"], ["compare", "--sed", "1"], ["nothing"], ["evaluate"]):
        assert ka(*arguments).exit_code == 2


def test_another_setting_in_the_same_folder_is_refused(corpus, tmp_path):
    out = tmp_path / "run"
    options = ["--data", corpus, "--out", out]
    assert ka("train", *options, *tiny.arguments(epochs=1, arms=("softmax",))).exit_code == 0
    before = (out / "results.json").read_text()
    assert refused(ka("train", *options, *tiny.arguments(epochs=2, arms=("softmax",))), "another recipe.epochs")
    Path(corpus).write_text(Path(corpus).read_text().replace("return", "yield"))
    assert refused(ka("train", *options, *tiny.arguments(epochs=1, arms=("softmax",))), "another data.fingerprint")
    assert refused(ka("evaluate", out), "another data.fingerprint")
    assert (out / "results.json").read_text() == before


def test_what_cannot_be_written_is_one_line(tmp_path):
    recorded = Path(__file__).parents[1] / "docs" / "results" / "quick" / "results.json"
    shutil.copy(recorded, tmp_path)
    (tmp_path / "report.html").mkdir()
    refused(ka("report", tmp_path), "report.html", "directory")


def test_a_report_of_another_schema_is_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 0}')
    assert refused(ka("report", tmp_path), "has schema 0")


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: [],
        lambda _: {"schema_version": 2},
        lambda results: results | {"study": "nothing"},
        lambda results: results | {"study": ["compare"]},
        lambda results: {key: value for key, value in results.items() if key != "recipe"},
        lambda results: results | {"arms": []},
        lambda results: results | {"arms": {}},
        lambda results: results | {"environment": None},
        lambda results: results | {"note": 5},
        lambda results: results | {"arms": {"softmax": results["arms"]["softmax"] | {"seeds": [{"training": 1}]}}},
        lambda results: json.loads(json.dumps(results).replace('"best_val_ppl": ', '"best_val_ppl": "x", "was": ')),
    ],
)
def test_damaged_results_are_one_line_and_the_report_stays(damage, tmp_path):
    recorded = Path(__file__).parents[1] / "docs" / "results" / "quick" / "results.json"
    (tmp_path / "report.md").write_text("before")
    (tmp_path / "results.json").write_text(json.dumps(damage(json.loads(recorded.read_text()))))
    assert refused(ka("report", tmp_path), "OUT:", "results.json is damaged")
    assert (tmp_path / "report.md").read_text() == "before"
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ["{", "", "\0", '{"schema_version": 1'])
def test_a_file_that_is_no_json_is_one_line(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    assert refused(ka("report", tmp_path), "OUT:", "results.json is damaged")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose one arm is trained, and how it began."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.documents()))
    options = ["--data", text, *tiny.arguments(epochs=1, arms=("ka",))]
    assert ka("train", *options, "--out", folder / "run").exit_code == 0
    return folder / "run", options


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", '{"result": {}, "sha256": ""}', "\udcff"])
def test_a_damaged_part_is_one_line(content, trained, tmp_path):
    source, options = trained
    out = shutil.copytree(source, tmp_path / "run")
    part = out / "parts" / "training" / "seed0" / "ka.json"
    part.write_bytes(content.encode(errors="surrogateescape"))
    for command in (["train", *options, "--out", out], ["evaluate", out]):
        assert refused(ka(*command), f"{part} is damaged: delete it")


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: [],
        lambda stored: stored | {"recipe": []},
        lambda stored: stored | {"recipe": stored["recipe"] | {"epochs": "three"}},
        lambda stored: stored | {"recipe": stored["recipe"] | {"arms": 5}},
        lambda stored: stored | {"recipe": stored["recipe"] | {"colour": "red"}},
        lambda stored: {key: value for key, value in stored.items() if key != "recipe"},
        lambda stored: {key: value for key, value in stored.items() if key != "study"},
    ],
)
def test_a_damaged_identity_is_one_line(damage, trained, tmp_path):
    source, options = trained
    out = shutil.copytree(source, tmp_path / "run")
    identity = out / "parts" / "identity.json"
    identity.write_text(json.dumps(damage(json.loads(identity.read_text()))))
    for command in (["train", *options, "--out", out], ["evaluate", out]):
        assert refused(ka(*command), str(out))


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
        ),
    ],
)
def test_damaged_weights_are_one_line(damage, trained, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "run")
    damage(out / "weights" / "seed0" / "ka")
    assert refused(ka("evaluate", out), "--out: cannot load", "delete its file in parts/training")


def test_a_full_disk_is_one_line(corpus, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(harness, "train", full)
    refused(ka("compare", "--data", corpus, *tiny.arguments(), "--out", tmp_path / "run"), "No space left")


def test_ctrl_c_says_that_the_same_command_continues(corpus, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "train", interrupted)
    result = ka("compare", "--data", corpus, *tiny.arguments(), "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr == "ka: stopped; the same command continues where it was\n"
