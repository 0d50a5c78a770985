import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import backends
from backends.errors import UserError
from backends.routing import layers_of, plan, route
from backends.routing_rules import OWN_KEYS
from tests.backends.tiny_transformer import LINEARS_ONLY, SCALED, TinyTransformer

AVAILABLE = f"Available: {', '.join(backends.available())}"
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


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        ({"match": r"layers\.[01]\.mlp\..*", "syntax": "regex"}, 4),
        ({"match": r"layers\.\d\.self_attn", "syntax": "regex"}, 3),
        ({"match": r"layers\.\d\.self_attn\.(q|k|v|o)_proj", "syntax": "regex"}, 12),
        ({"match": ".*", "syntax": "regex"}, 21),
        ({"match": "lm_head", "syntax": "regex"}, 1),
        ({"match": "layers.0.self_attn", "syntax": "exact"}, 1),
        ({"match": "layers.?.self_attn", "syntax": "glob"}, 3),
        ({"match": "*", "only": "attention"}, 3),
        ({"match": "*", "only": "linear"}, 18),
        ({"match": "lm_head", "only": "linear"}, 1),
    ],
)
def test_a_rule_has_a_syntax_and_may_ask_for_one_kind_of_layer(rule, taken):
    row = plan(LAYERS, [{"use": SCALED, **rule}]).routes[0]
    assert len(row.layers) == taken
    assert row.match == rule["match"] + (f" ({rule['only']})" if "only" in rule else "")


def test_a_rule_shadows_no_option_of_a_backend():
    for name in backends.available():
        assert not {field.name for field in dataclasses.fields(backends.load(name).config)} & set(OWN_KEYS)


@given(st.sampled_from(sorted(LAYERS)), st.sampled_from(["glob", "regex", "exact"]))
def test_a_layers_own_name_is_a_pattern_for_it_in_every_syntax(name, syntax):
    pattern = re.escape(name) if syntax == "regex" else name
    assert plan(LAYERS, [{"match": pattern, "syntax": syntax, "use": SCALED}]).routes[0].layers == (name,)


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
        ([{"match": "*", "use": "dens"}], f"Unknown backend 'dens'. Did you mean 'dense'? {AVAILABLE}."),
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
        (
            [{"match": r"layers\.[0-9]+\.self_atn", "syntax": "regex", "use": "dense"}],
            r"Routing rule 'layers\.[0-9]+\.self_atn' → dense matches no layer. Near it: layers.{0-2}.self_attn, "
            "layers.{0-2}.self_attn.{q,k,v,o}_proj.",
        ),
        (
            [{"match": "self_attn", "syntax": "regex", "use": "dense"}],
            "Routing rule 'self_attn' → dense matches no layer. A regular expression has to match the whole name, this "
            "one matches a part. Near it: layers.{0-2}.self_attn, layers.{0-2}.self_attn.{q,k,v,o}_proj.",
        ),
        (
            [{"match": r"layers\..\.self_attn", "syntax": "exact", "use": "dense"}],
            r"Routing rule 'layers\..\.self_attn' → dense matches no layer. It is compared as a name here, not as a "
            "pattern (use_regex: true or syntax: regex). Near it: layers.{0-2}.self_attn, "
            "layers.{0-2}.self_attn.{q,k,v,o}_proj.",
        ),
        (
            [{"match": "*.mlp.*", "syntax": "regex", "use": "dense"}],
            "Routing rule '*.mlp.*' is no regular expression: nothing to repeat at position 0. Expected one that "
            r"matches whole layer names, for example '.*\.mlp\..*'.",
        ),
        (
            [{"match": "*", "syntax": "regexp", "use": "dense"}],
            "Routing rule '*' has syntax='regexp'. Expected glob or regex or exact. Did you mean 'regex'?",
        ),
        (
            [{"match": "*", "only": "linears", "use": "dense"}],
            "Routing rule '*' has only='linears'. Expected linear or attention. Did you mean 'linear'?",
        ),
        (
            [{"match": "*.mlp.*", "only": "attention", "use": "dense"}],
            "Routing rule '*.mlp.*' → dense takes no layer: it matches linear layers only, and it asks for only: "
            "attention.",
        ),
        (
            [{"match": "*", "use": "dense", 3: 4}],
            "Routing rule {'match': '*', 'use': 'dense', 3: 4} has the option 3. "
            "Expected {match: PATTERN, use: BACKEND, option: value, ...}.",
        ),
        (
            [{"match": "*", "use": "dense", "name": 4}],
            "Unknown dense option 'name'. Available: none.",
        ),
        (
            [{"match": "*.mlp.*", "use": SCALED, "level": 3, "origin": "rules.yaml"}],
            f"Routing rule '*.mlp.*' of rules.yaml: Unknown {SCALED} option 'level'. Did you mean 'levels'? "
            "Available: levels.",
        ),
        (
            [{"match": "*.mpl.*", "use": "dense", "origin": "rules.yaml"}],
            "Routing rule '*.mpl.*' of rules.yaml → dense matches no layer. Near it: layers.{0-2}.mlp.{up,down}_proj.",
        ),
        (["*"], "A routing rule is '*'. Expected {match: PATTERN, use: BACKEND, option: value, ...}."),
    ],
)
def test_each_mistake_is_one_clear_line(rules, message):
    with pytest.raises(UserError) as error:
        plan(LAYERS, rules)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("default", "message"),
    [
        ("dens", "Unknown backend 'dens'. Did you mean 'dense'? Available: "),
        ({"use": SCALED, "level": 3}, f"Unknown {SCALED} option 'level'. Did you mean 'levels'? Available: levels."),
        (
            {"use": SCALED, "level": 3, "origin": "rules.yaml"},
            f"The default backend of rules.yaml: Unknown {SCALED} option 'level'. Did you mean 'levels'? ",
        ),
        ({"levels": 3}, "The default backend is {'levels': 3}. Expected a backend's name or {use: BACKEND, option: "),
        ({"match": "*", "use": "dense"}, "The default backend is {'match': '*', 'use': 'dense'}. Expected a backend's"),
        (3, "The default backend is 3. Expected a backend's name or {use: BACKEND, option: value, ...}."),
    ],
)
def test_a_mistake_in_the_default_is_one_clear_line(default, message):
    with pytest.raises(UserError) as error:
        plan(LAYERS, (), default)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_rule_for_a_model_without_layers_says_so():
    with pytest.raises(UserError, match="the model has no linear or attention layer"):
        route(nn.Sequential(nn.ReLU()), [{"match": "*", "use": "dense"}])
