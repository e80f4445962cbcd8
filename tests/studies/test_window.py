"""The window study: recall against a plain evaluator and a hand-made solver, cache bytes, a tiny run, the report."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import ArmResults, arm
from ka_attention.harness.run.records import from_json, to_json
from ka_attention.harness.run.settings import override
from ka_attention.harness.run.store import Store
from ka_attention.harness.tasks.learning import NOT_ASKED
from ka_attention.harness.training.lengths import AtLength, Read
from ka_attention.harness.training.perplexity import Perplexity, Run
from ka_attention.ops import ka_attention
from ka_attention.studies.window import peers
from ka_attention.studies.window.recipes import RECIPES, Recall, window_arm
from ka_attention.studies.window.report import Results
from ka_attention.studies.window.study import WINDOW

TASK = Recall(keys=20, values=6, pairs=4)


def examples(count=64, length=32):
    return TASK.examples(count, length, np.random.default_rng(0))


def test_answers_are_what_a_plain_evaluator_finds():
    for statements, answers, groups in zip(*(x.tolist() for x in examples()), strict=True):
        defined = {}
        for t, (statement, answer, group) in enumerate(zip(statements, answers, groups, strict=True)):
            left, right = divmod(statement, TASK.symbols)
            if right == TASK.symbols - 1:
                value, where = defined.pop(left)
                assert answer == value
                assert group <= t - where < 2 * group
            else:
                assert answer == NOT_ASKED
                if left < TASK.keys:
                    assert t < 16
                    defined[left] = right, t
                assert TASK.keys <= right < TASK.keys + TASK.values
        assert not defined


def test_softmax_made_by_hand_recalls_all_and_a_window_only_what_it_holds():
    found = examples()
    left, right = found.statements // TASK.symbols, found.statements % TASK.symbols
    asks = right == TASK.symbols - 1
    q = 50.0 * F.one_hot(left, TASK.symbols).double()[:, None]
    k = (F.one_hot(left, TASK.symbols) * ~asks[..., None]).double()[:, None]
    v = F.one_hot(right, TASK.symbols).double()[:, None]
    for window in (None, 12):
        a = ka_attention(q, k, v, gate=0.0, scale=1.0, window=window)[:, 0]
        right_here = (a.argmax(-1) == found.answers)[asks]
        groups = found.groups[asks]
        if window is None:
            assert right_here.all()
        else:
            assert right_here[groups <= 4].all()
            assert right_here[groups >= 16].double().mean() < 0.5  # fillers carry six values at random


def test_a_mix_has_windows_in_every_other_layer():
    mix = window_arm("mix-ka-w8", 5).ka
    assert (mix.layers, mix.window, mix.gate_init) == ((0, 2, 4), 8, 1.0)
    assert window_arm("mix-softmax-w8", 2).ka.gate_init == 0.0
    assert window_arm("ka-w8", 2).ka.layers is None
    with pytest.raises(UserError, match="mix-w8"):
        window_arm("mix-w8", 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("window")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog again and again\n" * 200)
    settings = (
        f"data={text} lengths=16,32 "
        "sequence_length=16 train_samples=32 validation_samples=8 batch_size=8 vocab_size=300 "
        "hidden_size=16 heads=2 intermediate_size=32 arms=softmax,ka-w4,softmax-w4,mix-ka-w4,softmax-w16 "
        "task_arms=ka-w4 task_length=16 task_samples=32"
    )
    recipe = override(RECIPES["quick"], settings.split())
    found = WINDOW.run(recipe, Store(folder / "out", {}), 1)
    assert from_json(Results, json.loads(json.dumps(to_json(found)))) == found
    return recipe, found


def test_caches_of_windows_are_constant_and_full_ones_grow(results):
    short, long = results[1].cache_bytes.values()
    token = 2 * 2 * 16 * 4  # two layers, a key and a value, 16 float32
    assert short == {"softmax": 16 * token, "ka-w4": 3 * token, "softmax-w4": 3 * token, "mix-ka-w4": 9.5 * token}
    assert (long["softmax"], long["ka-w4"]) == (2 * short["softmax"], short["ka-w4"])
    assert long["softmax-w16"] == 15 * token  # which is full attention at 16 tokens, and left out there


def test_the_report_compares_at_the_same_window_and_at_fewer_bytes(results):
    sections = WINDOW.sections(*results)
    came = sections[0].paragraphs[-1]
    assert "KA, window 4 " in came
    assert "Best with a smaller cache than softmax is" in came
    assert [row[0] for row in sections[1].tables[0].rows][-1] == "softmax"
    assert sections[-1].tables[0].columns == ["arm", "dereference", "recall of 8 pairs", "recall of 1 pair (passkey)"]
    for figure in (figure for section in sections for figure in section.figures):
        figure.draw(Figure().subplots())


def test_the_report_sets_each_peer_beside_the_ka_cache_nearest_in_size():
    def entry(each, ppl):
        runs = tuple(Run(i, i + 15, ppl + i) for i in range(0, 64, 16))
        return ArmResults(each, (Read(None, Perplexity(0.0, ppl, 64, runs)),))

    gla = peers.Peer("gla", "GLA", mixer="gla")
    arms = {
        "softmax": entry(arm("softmax"), 10.0),
        "ka-w8": entry(arm("ka-w8"), 12.0),
        "ka-w32": entry(arm("ka-w32"), 11.0),
        "gla": entry(gla, 12.1),
    }
    kib = {"softmax": 4000, "ka-w8": 80, "ka-w32": 370, "gla": 400}
    found = Results(None, (AtLength(64, arms),), {64: {name: 1024 * size for name, size in kib.items()}}, {})
    summary, text, _ = WINDOW.sections(RECIPES["quick"], found)
    setting, _, came = summary.paragraphs
    assert "their cache is their state" in setting
    assert "GLA (400 KiB) +10.0 % (one seed) against KA, window 32 (370 KiB)" in came
    assert "Best with a smaller cache than softmax is KA, window 32: 9.2 % of the bytes" in came
    assert text.tables[0].columns[-1] == "PPL of 32–63"  # the last octave, a geometric mean
    assert text.tables[0].rows[0][-1].startswith(f"{((12 + 32) * (12 + 48)) ** 0.5:.1f}")
    axes = Figure().subplots()
    text.figures[0].draw(axes)
    drawn = {each.get_label(): each[0].get_ydata().tolist() for each in axes.containers}
    assert drawn["GLA"] == pytest.approx([12.1, 28.1, (44.1 * 60.1) ** 0.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0–15", "16–31", "32–63"]


def test_windows_do_not_read_beyond_themselves_in_one_softmax_layer_and_do_in_one_ka_layer():
    q, k, v = torch.randn(3, 1, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    changed = v.clone()
    changed[:, :, 0] += 1
    for gate, reaches in ((0.0, False), (1.0, True)):
        before, after = (ka_attention(q, k, x, gate=gate, window=4)[0, 0, -1] for x in (v, changed))
        assert (not torch.equal(before, after)) is reaches


@pytest.mark.parametrize("setting", ["lengths=512,128", "task_length=3", "hidden_size=20"])
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(UserError, match=f"--set {setting.partition('=')[0]}"):
        override(RECIPES["quick"], [setting])
