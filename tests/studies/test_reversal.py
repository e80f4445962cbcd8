"""The experiment on the Reversal Curse: sound questions, exact scores, and words that follow the numbers."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import Arm
from ka_attention.harness.run.study import open_store
from ka_attention.harness.text import tokenizer
from ka_attention.hf import attach
from ka_attention.report.render import render
from ka_attention.studies.reversal import facts as reversal_facts
from ka_attention.studies.reversal import study as reversal_curse
from ka_attention.studies.reversal.facts import CONTEXT, IN_CONTEXT, REVERSE, SAME, TESTS, TRAIN, Row
from ka_attention.studies.reversal.recipes import RECIPES
from ka_attention.studies.reversal.report import LABELS, Answered, Asked, Data, Entry, Results
from ka_attention.studies.reversal.study import REVERSAL


@pytest.fixture(params=["built-in", "folder"])
def facts(request):
    if request.param == "built-in":
        return reversal_facts.built_in(8)
    return reversal_facts.load(str(request.getfixturevalue("shared_data") / "reversal_curse"), 0)


def test_reversed_facts_are_never_trained(facts):
    for row in [*facts.sentences(), *facts.lessons()]:
        name = next((name for name in facts.people[TRAIN[0]] if name in row.answer), None)
        assert name is None, f"{name} is an answer in training"
        name = next((name for name in facts.people[TRAIN[1]] if name in row.prompt), None)
        assert name is None, f"{name} is a prompt in training"
    groups = [set(facts.people[file]) for file in TRAIN]
    assert len(groups[0] | groups[1] | groups[2]) == sum(map(len, groups))
    trained = {row.prompt for row in facts.sentences()}
    assert not any(row.prompt in trained for key in TESTS for row, _ in facts.questions()[key])


def test_questions(facts):
    questions = facts.questions()
    assert set(questions) == {*SAME, *REVERSE, *CONTEXT, "both"}
    assert set(LABELS) == set(questions)
    for pairs in questions.values():
        for right, wrong in pairs:
            assert right.prompt == wrong.prompt
            assert right.answer != wrong.answer
            assert right.answer.startswith(" ")
    for key, reverse in IN_CONTEXT.items():
        for (right, _), (bare, _) in zip(questions[key], questions[reverse], strict=True):
            assert right.answer == bare.answer
            assert right.prompt.endswith(" " + bare.prompt)
            fact = right.prompt.removesuffix(" " + bare.prompt)
            assert fact in {row.prompt + row.answer for file in TRAIN[:2] for row in facts.files[file]}
            name = next(name for name in facts.names if name in bare.prompt + bare.answer)
            assert name in fact


def test_lessons_are_answered_by_their_context(facts):
    lessons = facts.lessons()
    assert len(lessons) == len(facts.files[TRAIN[2]])
    first, last = ({name.split()[i] for name in facts.names} for i in (0, -1))
    for lesson in lessons:
        words = (lesson.prompt + lesson.answer).split()
        aliases = {f"{a} {b.strip('.,?!')}" for a, b in pairwise(words) if a in first}
        aliases = {alias for alias in aliases if alias.split()[1].removesuffix("'s") in last}
        assert len(aliases) == 1, lesson  # one name, told and asked


@pytest.fixture(scope="module")
def tiny():
    facts = reversal_facts.built_in(2)
    texts = [row.prompt + row.answer for row in facts.sentences()]
    return facts, tokenizer.train(texts, 512)


def model(words, ka=None):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        use_cache=False,
    )
    made = GPTNeoXForCausalLM(config).eval()
    return attach(made) if ka else made


def test_scores_are_those_of_single_sentences(tiny):
    facts, words = tiny
    m = model(words)
    questions = {"same_p2d": facts.questions()["same_p2d"]}
    found = reversal_curse.evaluate(m, words, questions, "kv")["same_p2d"]

    def alone(row: Row) -> tuple[float, float]:
        prompt = [words.eos_token_id, *words(row.prompt)["input_ids"]]
        ids = torch.tensor([prompt + words(row.answer)["input_ids"]])
        with torch.no_grad():
            log_p = m(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return log_p[len(prompt) - 1 :].sum().item(), log_p.sum().item()

    for name, i in (("right", 0), ("wrong", 1)):
        scores = [alone(pair[i]) for pair in questions["same_p2d"]]
        assert getattr(found, name) == pytest.approx(sum(score[0] for score in scores) / len(scores), rel=1e-4)
        if name == "right":
            assert found.sentence_nll == pytest.approx(-sum(score[1] for score in scores), rel=1e-4)
    assert found.sentence_tokens == sum(
        len(words(row.prompt + row.answer)["input_ids"]) for row, _ in questions["same_p2d"]
    )
    swapped = reversal_curse.evaluate(m, words, questions, "ka")["same_p2d"]
    assert swapped.right == pytest.approx(
        reversal_curse.evaluate(model(words, ka=True), words, questions, "ka")["same_p2d"].right, rel=1e-4
    )
    assert abs(swapped.right - found.right) > 1e-3


@pytest.mark.parametrize("kind", ["kv", "ka"])
def test_greedy_answers(tiny, kind):
    """Answers that the model itself gives, alone, are right in a batch of ragged prompts; any other is wrong."""
    facts, words = tiny
    m = model(words)
    prompts = ["Who", *[row.prompt for row, _ in facts.questions()["both"]]]
    rows = []
    with reversal_curse.attention(m, kind), torch.no_grad():
        for prompt in prompts:
            ids = [words.eos_token_id, *words(prompt)["input_ids"]]
            start = len(ids)
            for _ in range(4):
                logits = m(torch.tensor([ids])).logits[0, -1]
                ids.append(int(logits.argmax()))
            rows.append(Row(prompt, words.decode(ids[start:], skip_special_tokens=True)))
        shouted = [Row(prompt, "  " + answer.upper().strip()) for prompt, answer in rows]
        usable = [i for i, (_, answer) in enumerate(rows) if answer.strip() and "�" not in answer]
        assert len(usable) > 2
        found = reversal_curse._begins(m, words, rows)
        assert all(found[i] for i in usable)
        assert all(reversal_curse._begins(m, words, shouted)[i] for i in usable)
        wrong = [Row(prompt, " xq" + answer) for prompt, answer in rows]
        assert not any(reversal_curse._begins(m, words, wrong)[i] for i in usable)


def test_study(tmp_path):
    small = {"hidden_size": 32, "heads": 2, "layers": 1, "intermediate_size": 32, "vocab_size": 400, "epochs": 1}
    recipe = dataclasses.replace(RECIPES["quick"], people=2, arms=("softmax", "ka-head"), **small)
    results = REVERSAL.run(recipe, open_store(REVERSAL, recipe, tmp_path), 1)
    assert list(results.arms) == ["softmax", "softmax+ka", "ka-head"]
    assert [entry.label for entry in results.arms.values()] == [
        "softmax",
        "softmax, KA cache",
        "KA, gate per head",
    ]
    assert all(len(entry.seeds) == 1 for entry in results.arms.values())
    assert REVERSAL.run(recipe, open_store(REVERSAL, recipe, tmp_path), 1) == results
    render(REVERSAL.question, REVERSAL.sections(recipe, results), {}, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**Expected:** the Reversal Curse" in report
    assert (tmp_path / "figures" / "reversal_accuracy.svg").exists()


def entry(kind, same, reverse, gain_same, gain_reverse, context=1.0):
    def asked(accuracy, gain):
        return Asked(accuracy, gain - 9.0, -9.0, 10.0, 5)

    sets = {**dict.fromkeys(SAME, asked(same, gain_same)), **dict.fromkeys(REVERSE, asked(reverse, gain_reverse))}
    sets |= {**dict.fromkeys(CONTEXT, asked(context, 9.0)), "both": asked(same, gain_same)}
    return Entry(Arm(kind, kind), "kv", (Answered(sets, None),))


def test_words_follow_the_numbers():
    entries = {
        "a": entry("cursed", 0.9, 0.0, 9.0, 0.1),
        "b": entry("lost", 0.2, 0.0, 1.0, 0.0),
        "c": entry("lifted", 0.9, 0.8, 9.0, 8.0),
        "d": entry("half", 0.9, 0.1, 9.0, 6.0, context=0.2),
    }
    data = Data("built-in", {"p2d": 1, "d2p": 1, "both": 1}, 3, 3, "")
    came = "\n".join(REVERSAL.sections(None, Results(data, entries))[0].paragraphs[2:])
    assert "**cursed** answers 90 % in the trained order and 0 % reversed" in came
    assert "by 9.0 nats in the trained order, by 0.1 reversed: **the curse**." in came
    assert "**lost** answers 20 % in the trained order and 0 % reversed: too little" in came
    assert "by 8.0 reversed: **no curse**." in came
    assert "though not in what it holds likely. Even with the fact in the context it answers only 20 %" in came
    assert "cursed from 90 to 20 % in the trained order and from 0 to 0 % in the reversed one: it does not lift" in came
    assert "loses most of what was known" in came


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="--data: no folder"):
        reversal_facts.load(str(tmp_path / "none"), 2)
    with pytest.raises(UserError, match=r"cannot read .*names\.txt"):
        reversal_facts.load(str(tmp_path), 2)
    (tmp_path / "names.txt").write_text("Ann Bell\nCid Dorn\n")
    for file in (*TRAIN, *TESTS.values()):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps({"prompt": "Ann Bell is", "completion": " tall."}) + "\n")
    broken = tmp_path / f"{TRAIN[0]}.jsonl"
    broken.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r'line 1: expected \{"prompt": …'):
        reversal_facts.load(str(tmp_path), 2)
    broken.write_text('{"prompt": "Eve is", "completion": " kind."}\n')
    with pytest.raises(UserError, match=r"none of names.txt is in 'Eve is kind\.'"):
        reversal_facts.load(str(tmp_path), 2).questions()
    broken.write_text("")
    with pytest.raises(UserError, match="is empty"):
        reversal_facts.load(str(tmp_path), 2)
    with pytest.raises(UserError, match="--set people: expected 2 to 100, got 1"):
        reversal_facts.load("built-in", 1)
