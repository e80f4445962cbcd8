import dataclasses

import pytest
import torch
from transformers import GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import arm, build
from ka_attention.harness.run.settings import override
from ka_attention.studies.catalogue import STUDIES
from ka_attention.studies.compare.recipes import COMPARE, CompareRecipe

QUICK = COMPARE["quick"]


@pytest.mark.parametrize("name", ["pythia-70m-training", "pythia-70m-cache"])
def test_the_reports_recipes_build_the_reports_model(name):
    recipe = COMPARE[name]
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(recipe.config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 70_426_624
    assert not model.config.tie_word_embeddings
    assert model.gpt_neox.rotary_emb.inv_freq.numel() * 2 == 512 // 8 // 4


def test_the_rotary_settings_reach_the_model():
    recipe = override(QUICK, ["rotary_share=0.5", "rotary_base=81"])
    frequencies = build(arm("ka"), recipe, seed=0).gpt_neox.rotary_emb.inv_freq
    turned = recipe.hidden_size // recipe.heads // 2
    torch.testing.assert_close(frequencies, 81.0 ** -(torch.arange(0, turned, 2) / turned))


def test_locality_makes_scores_fall_with_distance_in_every_arm_and_draws_nothing():
    """Scores from the biases alone, rotated by transformers, against the docstring's sum in float64."""
    recipe = override(QUICK, ["locality=2"])
    plain, model = (build(arm("ka"), each, seed=0) for each in (override(QUICK, ["locality=0"]), recipe))
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)) != name.endswith("query_key_value.bias")
    rotary, distance = model.gpt_neox.rotary_emb, torch.arange(50.0)
    for layer in model.gpt_neox.layers:
        q, k, _ = layer.attention.query_key_value.bias.view(1, recipe.heads, 1, -1).expand(-1, -1, 50, -1).chunk(3, -1)
        q, k = apply_rotary_pos_emb(q, k, *rotary(q, distance[None]))
        found = (q[:, :, -1:] * k).sum(-1)[0].flip(-1)
        strength = 2 * torch.arange(recipe.heads, dtype=torch.float64) / (recipe.heads - 1)
        angles = distance.double()[:, None] * rotary.inv_freq
        expected = strength[:, None] ** 2 * angles.cos().sum(-1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_reports_settings():
    first, second = COMPARE["pythia-70m-training"], COMPARE["pythia-70m-cache"]
    assert (first.train_samples, first.batch_size) == (10_000, 32)
    assert (second.train_samples, second.batch_size) == (5_000, 8)
    # The second report decodes 1,264.9 tokens/s × 50.60 s = 500 sequences of 128 tokens.
    assert second.cache_samples * second.sequence_length == round(1264.9 * 50.60, -3)
    for recipe in (first, second):
        assert (recipe.learning_rate, recipe.epochs, recipe.patience, recipe.sequence_length) == (1e-4, 10, 3, 128)


def test_every_recipe_is_reachable_by_its_name_and_has_arms():
    for name, recipe in COMPARE.items():
        assert recipe.name == name
        assert [arm(each).name for each in recipe.arms] == list(recipe.arms)


def test_override_parses_every_type_of_setting():
    changed = override(QUICK, ["epochs=7", "learning_rate=3e-4", "data=a=b.txt", "arms=ka, softmax-w8"])
    assert (changed.epochs, changed.learning_rate, changed.data) == (7, 3e-4, "a=b.txt")
    assert changed.arms == ("ka", "softmax-w8")
    assert override(QUICK, []) == QUICK


def test_override_parses_optional_and_boolean_settings_of_other_studies():
    @dataclasses.dataclass(frozen=True)
    class Recipe:
        window: "int | None" = 3
        shuffled: bool = False
        windows: "tuple[int, ...]" = ()

    assert override(Recipe(), ["window=none", "shuffled=true", "windows=4,8"]) == Recipe(None, True, (4, 8))
    with pytest.raises(UserError, match=r"--set window: expected an integer or none, got 'x'"):
        override(Recipe(), ["window=x"])
    with pytest.raises(UserError, match=r"--set shuffled: expected true or false, got 'maybe'"):
        override(Recipe(), ["shuffled=maybe"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", "expected key=value"),
        ("epoch=3", "no setting 'epoch'; the settings are"),
        ("name=x", "no setting 'name'"),
        ("epochs=many", "--set epochs: expected an integer, got 'many'"),
        ("epochs=0", "--set epochs: expected an integer >= 1, got 0"),
        (f"train_samples={10**30}", f"--set train_samples: expected an integer <= 2147483647, got {10**30}"),
        ("report_to=wanbd", "--set report_to: expected none, tensorboard, wandb, trackio, got 'wanbd'"),
        ("learning_rate=nan", "--set learning_rate: expected a positive number, got nan"),
        ("learning_rate=-1", "--set learning_rate: expected a positive number"),
        ("weight_decay=-1", "--set weight_decay: expected a number >= 0, got -1"),
        ("hidden_size=100", "--set hidden_size"),
        ("rotary_share=2", "--set rotary_share: expected at most 1"),
        ("rotary_share=0.2", "--set rotary_share: expected at most 1 and an even number of a head's 16 dimensions"),
        ("sequence_length=1", "--set sequence_length"),
        ("schedule=step", "--set schedule: expected constant, linear, cosine"),
        ("batch_size=100000", "--set batch_size"),
        ("cache_samples=100000", "--set cache_samples"),
        ("arms=", "--set arms"),
        ("arms=ka,ka", "--set arms"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_setting(assignment, message):
    with pytest.raises(UserError) as error:
        override(QUICK, [assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_settings_of_every_study_are_checked():
    for study in STUDIES.values():
        for recipe in study.recipes.values():
            for assignment in ("epochs=0", "learning_rate=0", "schedule=step", "train_tokens=0"):
                if not hasattr(recipe, assignment.partition("=")[0]):
                    continue
                with pytest.raises(UserError, match=f"--set {assignment.partition('=')[0]}: expected"):
                    override(recipe, [assignment])
    position = STUDIES["position"].recipes["quick"]
    with pytest.raises(UserError, match="--set lengths: expected an integer >= 1, got 0"):
        override(position, ["lengths=0,128"])
    with pytest.raises(UserError, match="--set hidden_size: expected heads"):
        override(position, ["hidden_size=20"])


@pytest.mark.parametrize("name", ["", "KA", "ka-w0", "softmax-head", "ka-w", "mamba"])
def test_an_unknown_arm_is_refused(name):
    with pytest.raises(UserError, match="--set arms: no arm"):
        arm(name)


def test_the_mean_learning_rate_of_a_schedule_that_falls_to_zero_is_half_its_peak():
    rates = {
        kind: dataclasses.replace(QUICK, schedule=kind).mean_learning_rate for kind in ("constant", "linear", "cosine")
    }
    assert rates == {"constant": QUICK.learning_rate} | dict.fromkeys(("linear", "cosine"), QUICK.learning_rate / 2)


def test_arms_are_attention_configurations():
    assert arm("softmax").ka is None
    assert (arm("softmax-w16").ka.window, arm("softmax-w16").ka.gate_init) == (16, 0.0)
    assert (arm("ka-w16").ka.window, arm("ka-w16").ka.gate_init) == (16, 1.0)
    assert (arm("ka-head-w4").ka.gate, arm("ka-head-w4").ka.window) == ("head", 4)
    assert arm("ka-token").ka.gate == "token"


def test_arms_start_from_the_same_weights_and_attend_differently():
    settings = CompareRecipe(**{**dataclasses.asdict(QUICK), "layers": 2, "hidden_size": 32, "vocab_size": 50})
    models = {name: build(arm(name), settings, seed=3) for name in ("softmax", "ka", "softmax-w4", "ka-head")}
    plain = models["softmax"].state_dict()
    for model in models.values():
        state = model.state_dict()
        assert all(torch.equal(state[name], plain[name]) for name in plain)
    tokens = torch.randint(50, (1, 12))
    logits = {name: model(tokens).logits for name, model in models.items()}
    torch.testing.assert_close(logits["softmax"][:, :4], logits["softmax-w4"][:, :4])
    for name in ("ka", "softmax-w4", "ka-head"):
        assert (logits[name] - logits["softmax"])[:, 4:].abs().max() > 1e-4
    other = build(arm("softmax"), settings, seed=4)
    assert not torch.equal(other.get_output_embeddings().weight, models["softmax"].get_output_embeddings().weight)
