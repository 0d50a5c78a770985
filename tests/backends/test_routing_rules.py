import pytest
from torch import nn

from backends.errors import UserError
from backends.routing import layers_of, plan, route
from tests.backends.tiny_transformer import LINEARS_ONLY, SCALED, TinyTransformer

LAYERS = layers_of(TinyTransformer(depth=3), sequence_length=16)


# ---- what a pattern names --------------------------------------------------------------------------------------


def test_the_block_pattern_takes_the_linears_inside_attention_and_the_bare_name_its_products():
    inside = plan(LAYERS, [{"match": "*.self_attn.*", "use": SCALED}]).routes[0].layers
    products = plan(LAYERS, [{"match": "*.self_attn", "use": SCALED}]).routes[0].layers
    assert {LAYERS[name].kind for name in inside} == {"linear"}
    assert [*products] == [f"layers.{i}.self_attn" for i in range(3)]


@pytest.mark.parametrize(
    ("pattern", "taken"), [("*", False), ("*h*", False), ("lm_head", True), ("*lm_head", True), ("*lm_head*", True)]
)
def test_the_head_is_taken_only_by_a_pattern_that_spells_it_out(pattern, taken):
    layers = {"model.layers.0.half": LAYERS["layers.0.mlp.up_proj"], "lm_head": LAYERS["lm_head"]}
    planned = plan(layers, [{"match": pattern, "use": SCALED}])
    assert planned.backend_of("lm_head").name == (SCALED if taken else "dense")


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"match": "*.mpl.*", "use": "dense"}],
            "Routing rule '*.mpl.*' → dense matches no layer. Near it: layers.{0-2}.mlp.{up,down}_proj.",
        ),
        (
            [{"match": "*.mlp.*", "use": "dense"}, {"match": "*.up_proj", "use": "dense"}],
            "Routing rule '*.up_proj' → dense takes no layer: '*.mlp.*' before it took all 3 that it matches "
            "(the first match wins). Put it first, or remove it.",
        ),
        (
            [{"match": "*head", "use": "dense"}],
            "Routing rule '*head' → dense takes no layer: it matches the head only, and a rule for that must name "
            "'lm_head'.",
        ),
        (
            [{"match": "*.self_attn", "use": LINEARS_ONLY}],
            f"Routing rule '*.self_attn' → {LINEARS_ONLY} takes no layer: it matches attention layers only, which this "
            "backend does not compute.",
        ),
        ([{"match": "*", "use": "dens"}], "Unknown backend 'dens'. Did you mean 'dense'? Available: dense."),
        (
            [{"match": "*", "use": SCALED, "level": 3}],
            f"Unknown {SCALED} option 'level'. Did you mean 'levels'? Available: levels.",
        ),
        (
            [{"match": "*", "use": SCALED, "levels": "8"}],
            f"Option 'levels' of backend '{SCALED}' is '8' (str). Expected int.",
        ),
        (
            [{"mtach": "*", "use": "dense"}],
            "Routing rule {'mtach': '*', 'use': 'dense'} has no text for 'match'. Is it what you meant by 'mtach'? "
            "Expected {match: PATTERN, use: BACKEND, option: value, ...}.",
        ),
        (
            [{"match": "*", "use": 3}],
            "Routing rule {'match': '*', 'use': 3} has no text for 'use'. "
            "Expected {match: PATTERN, use: BACKEND, option: value, ...}.",
        ),
        (["*"], "A routing rule is '*'. Expected {match: PATTERN, use: BACKEND, option: value, ...}."),
    ],
)
def test_each_mistake_is_one_clear_line(rules, message):
    with pytest.raises(UserError) as error:
        plan(LAYERS, rules)
    assert str(error.value) == message


def test_a_rule_for_a_model_without_layers_says_so():
    with pytest.raises(UserError, match="the model has no linear or attention layer"):
        route(nn.Sequential(nn.ReLU()), [{"match": "*", "use": "dense"}])
