import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ka_attention.evaluations import conversion
from ka_attention.harness.figures.statistics import mean
from ka_attention.harness.models import arms
from ka_attention.harness.run.records import from_json
from ka_attention.harness.run.study import open_store, publish, read
from ka_attention.harness.tasks.learning import Exam, Group, Learned, Score
from ka_attention.harness.text import data
from ka_attention.harness.training import trained
from ka_attention.harness.training.trainer import Epoch, Training, mean_loss
from ka_attention.hf import register
from ka_attention.studies.compare import report, study
from ka_attention.studies.compare.report import Results
from ka_attention.studies.compare.study import COMPARISON


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.documents()))
    return path


def run(recipe, out, seeds=1, work=COMPARISON.run):
    store = open_store(COMPARISON, recipe, out)
    publish(COMPARISON, recipe, store, seeds, work(recipe, store, seeds))
    stored = read(out, "results.json")
    return from_json(Results, {field.name: stored[field.name] for field in fields(Results)})


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """All four arms of the default, two seeds; conversions, the slowest evaluation, in one window and two budgets."""
    recipe = tiny.recipe(data=str(corpus), arms=("softmax", "ka", "softmax-w4", "ka-w4"), epochs=1, chain_samples=64)
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "SHARES", (conversion.SIDE, conversion.SHARES[-1]))
        patch.setattr(conversion, "WINDOWS", conversion.WINDOWS[:1])
        return recipe, out, run(recipe, out, seeds=2)


def numbers(results):
    """Every figure that does not depend on the clock."""
    arms = {}
    for name, arm in results.arms.items():
        for seed, answers in enumerate(arm.seeds):
            rows = [(row.train_ppl, row.val_ppl, row.best) for row in answers.training.epochs]
            caches = answers.caches.kinds if answers.caches else {}
            arms[name, seed] = rows, {kind: cache.ppl for kind, cache in caches.items()}
    return arms


def test_every_evaluation_has_its_field():
    assert ["training", *report.EVALUATIONS] == [field.name for field in fields(report.Answers)]


def test_the_results_hold_what_a_reader_needs(finished):
    recipe, out, results = finished
    stored = read(out, "results.json")
    assert stored["schema_version"] == 2
    assert stored["recipe"]["arms"] == list(recipe.arms)
    assert stored["environment"]["torch"]
    assert results.data.train_tokens == recipe.train_samples * recipe.sequence_length
    for name, arm in results.arms.items():
        asked = [{key for key, answer in vars(answers).items() if answer is not None} for answers in arm.seeds]
        only_first = {"decoding"} if name == "softmax" else set()
        everywhere = {"training", *report.EVALUATIONS} - only_first
        if name != "softmax":
            everywhere -= {"adapters", "heads", "conversion", "decoding"}
        assert asked == [everywhere | only_first, everywhere]
        assert arm.arm == arms.arm(name)
    for file in ("report.md", "report.html", "figures/training.svg"):
        assert (out / file).stat().st_size > 0


def test_the_weights_load_as_the_models_that_were_trained(finished):
    """From the folder alone, through the Auto classes, with the perplexity that was reported."""
    recipe, out, results = finished
    register()
    for seed in (0, 1):
        for name, arm in results.arms.items():
            folder = out / f"weights/seed{seed}/{name}"
            assert not (folder / "checkpoints").exists()
            model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            text = data.prepare(replace(recipe, tokenizer=str(folder)), recipe.vocab_size)
            assert text.description == results.data
            loss = mean_loss(model, data.Sequences(text.validation), 8, torch.device("cpu"))
            assert math.exp(loss) == pytest.approx(arm.seeds[seed].training.best_val_ppl, rel=1e-6)
            assert tokenizer.decode(model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=3)[0])


def test_the_figures_agree_with_one_another(finished):
    """The model that was trained is the one that is evaluated, in parallel and token by token."""
    _, _, results = finished
    for arm in results.arms.values():
        for answers in arm.seeds:
            best, caches = answers.training.best_val_ppl, answers.caches.kinds
            assert answers.perplexity.ppl == pytest.approx(best, rel=1e-5)
            assert caches["ka"].ppl != caches["kv"].ppl
            assert answers.caches.own == arm.arm.own_cache
            assert caches[answers.caches.own].ppl == pytest.approx(best, rel=0.5)


def test_the_report_says_the_main_numbers(finished):
    recipe, out, results = finished
    page = (out / "report.md").read_text()
    places = [page.index(text) for text in ("In short", "figures/chains.svg", "Training", "Reversal")]
    assert places == sorted(places)
    assert set(results.steps) == set(recipe.arms)
    assert "| step |" in page
    for arm in results.arms.values():
        assert f"{mean(arm.each(lambda seed: seed.training.best_val_ppl)):,.1f}" in page
        assert arm.label in page
    assert "against softmax, window 4" in page
    assert "2 seeds" in page


def test_running_again_redoes_nothing(finished, monkeypatch):
    recipe, out, results = finished
    monkeypatch.setattr(trained, "train", None)
    monkeypatch.setattr(trained, "build", None)
    assert numbers(run(recipe, out, seeds=2)) == numbers(results)


def test_a_run_without_evaluations_still_reports(corpus, tmp_path):
    recipe = tiny.recipe(data=str(corpus), epochs=1)
    store = open_store(COMPARISON, recipe, tmp_path)
    assert COMPARISON.trained_seeds(recipe, store) == 0
    publish(COMPARISON, recipe, store, 1, COMPARISON.train(recipe, store, 1))
    assert COMPARISON.trained_seeds(recipe, store) == 1
    assert "In short" in (tmp_path / "report.md").read_text()


def test_a_killed_process_is_continued_to_the_numbers_of_an_unbroken_run(corpus, tmp_path):
    recipe = tiny.recipe(data=str(corpus), epochs=4, patience=4, train_samples=128)
    unbroken = run(recipe, tmp_path / "unbroken", work=COMPARISON.train)
    script = (
        "import sys; sys.path[:0] = sys.argv[1], sys.argv[1] + '/..'\n"
        "import tiny, pathlib, test_compare\n"
        "recipe = tiny.recipe(data=sys.argv[2], epochs=4, patience=4, train_samples=128)\n"
        "test_compare.run(recipe, pathlib.Path(sys.argv[3]), work=test_compare.COMPARISON.train)\n"
    )
    out = tmp_path / "killed"
    here = os.path.dirname(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", script, here, str(corpus), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Cut it off in the training of the second arm, as soon as that has a checkpoint.
        while not list(out.glob("weights/seed0/ka/checkpoints/*/trainer_state.json")):
            assert process.poll() is None, "the process ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "results.json").exists()
    first = out / "parts" / "training" / "seed0" / "softmax.json"
    finished_at = first.stat().st_mtime_ns
    continued = run(recipe, out, work=COMPARISON.train)
    assert first.stat().st_mtime_ns == finished_at
    assert numbers(continued) == numbers(unbroken)


def learned(name, layers, accuracies):
    groups = tuple(Group(depth, right, 100) for depth, right in enumerate(accuracies))
    exam = Exam(10, 1.0, (Score(32, sum(accuracies) / len(accuracies), groups),))
    return Learned("chains", arms.arm(name), layers, (exam,))


def test_the_verdict_follows_the_numbers(finished):
    recipe, _, results = finished
    chains = {"a": learned("ka", 1, (1.0, 1.0, 1.0, 1.0)), "b": learned("softmax", 1, (1.0, 1.0, 0.2, 0.2))}
    summary, explained, *_ = report.sections(recipe, replace(results, chains=chains))
    verdict = summary.paragraphs[0]
    assert "one layer of KA-attention answers **100 %** of the questions right (chains of every length)" in verdict
    assert "softmax attention answers 60 % with one layer (up to 1 reference)." in verdict
    assert summary.figures[0].name == "chains"
    assert explained.tables[0].rows[1] == ["softmax, 1 layer", "60.0", "up to 1 reference", "10"]
    failed = report.sections(recipe, replace(results, chains={**chains, "a": learned("ka", 1, (0.5, 0.5))}))
    assert "answers **50 %** of the questions right (up to 0 references)" in failed[0].paragraphs[0]
    assert "over 2 seeds" in verdict


@pytest.mark.parametrize(
    ("ka", "said"),
    [
        ((110.0, 111.0, 112.0), "KA is **worse** than softmax"),
        ((90.0, 91.0, 92.0), "KA is **better** than softmax"),
        ((90.0, 111.0, 99.0), "KA is neither better nor worse than softmax"),
        ((90.0,), "**one seed cannot tell** which is better"),
    ],
)
def test_what_the_seeds_can_say_of_the_text(finished, ka, said):
    recipe, _, results = finished

    def ending(name, ppl):
        epochs = (Epoch(1, 1.0, ppl, 1.0, True),)
        return report.Answers(Training(epochs, 1, ppl, 1.0, 10))

    found = {
        name: arms.ArmResults(arms.arm(name), tuple(ending(name, ppl) for ppl in ppls))
        for name, ppls in (("softmax", (100.0, 101.0, 102.0)[: len(ka)]), ("ka", ka))
    }
    summary, *_ = report.sections(recipe, Results(results.data, found))
    assert said in summary.paragraphs[0]
    assert summary.figures[0].name == "training"


def test_the_bar_of_a_run_counts_its_parts(finished, monkeypatch):
    recipe, out, _ = finished
    counted = []

    @contextmanager
    def bar(_, total):
        counted.append(total)
        yield lambda steps: counted.append(-steps)

    monkeypatch.setattr(study, "bar", bar)
    for work in (COMPARISON.run, COMPARISON.train):
        counted.clear()
        work(recipe, open_store(COMPARISON, recipe, out), 2)
        assert len(counted) > 8
        assert sum(counted) == 0
