import copy
import pickle
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backends import collect_state
from backends.errors import UserError
from backends.routing import LayerInfo, Rule, layers_of, plan, route
from tests.backends.tiny_transformer import LINEARS_ONLY, SCALED, TinyTransformer

LAYERS = layers_of(TinyTransformer(depth=3), sequence_length=16)


def backend_names(planned) -> dict[str, str]:
    return {name: planned.backend_of(name).name for name in planned.layers}


# ---- plan: a pure function -------------------------------------------------------------------------------------

PATTERNS = st.sampled_from(
    "* *.mlp.* *.self_attn *.self_attn.* *_proj *.[qk]_proj layers.?.mlp.up_proj layers.0.* layers.[12].* "
    "layers.1.mlp.down_proj lm_head *lm_head *head".split()
)
RULES = st.lists(
    st.builds(lambda match, levels: Rule(match, SCALED, {"levels": levels}), PATTERNS, st.integers(2, 9)), max_size=4
)


def first_match(name: str, rules: list[Rule]) -> int | None:
    """Which rule takes a layer, by the definition in words."""
    for number, rule in enumerate(rules):
        if fnmatchcase(name, rule.match) and (name != "lm_head" or "lm_head" in rule.match):
            return number
    return None


@given(RULES)
def test_the_first_rule_that_matches_takes_the_layer_and_a_rule_without_layers_is_an_error(rules):
    takers = {name: first_match(name, rules) for name in LAYERS}
    if set(range(len(rules))) - set(takers.values()):
        with pytest.raises(UserError, match="takes no layer|matches no layer"):
            plan(LAYERS, rules)
        return
    planned = plan(LAYERS, rules)
    for name, taker in takers.items():
        if taker is None:
            assert planned.backend_of(name).name == "dense"
        else:
            assert planned.backend_of(name).config.levels == rules[taker].options["levels"]
    routed = [name for row in planned.routes for name in row.layers]
    assert sorted(routed) == sorted(LAYERS), "every layer in exactly one route"


@given(RULES, st.sampled_from(["dense", SCALED]))
def test_plan_is_pure(rules, default):
    def outcome() -> object:
        try:
            planned = plan(LAYERS, rules, default)
        except UserError as error:
            return str(error)
        return planned, planned.to_json(), planned.table()

    before = copy.deepcopy((LAYERS, rules))
    assert outcome() == outcome()
    assert before == (LAYERS, rules)


def test_without_rules_everything_is_dense():
    assert set(backend_names(plan(LAYERS)).values()) == {"dense"}


def test_the_default_leaves_the_head_dense():
    planned = plan(LAYERS, default=SCALED)
    assert backend_names(planned) == {name: "dense" if name == "lm_head" else SCALED for name in LAYERS}
    assert [row.match for row in planned.routes] == ["(default)", "(head, left alone)"]


def test_a_backend_without_attention_leaves_attention_to_later_rules_and_to_dense():
    rules = [{"match": "layers.[01].*", "use": LINEARS_ONLY}, {"match": "layers.1.self_attn", "use": SCALED}]
    planned = plan(LAYERS, rules, default=LINEARS_ONLY)
    names = backend_names(planned)
    assert names["layers.0.mlp.up_proj"] == names["layers.2.mlp.up_proj"] == LINEARS_ONLY
    assert names["layers.1.self_attn"] == SCALED
    assert names["layers.0.self_attn"] == names["layers.2.self_attn"] == "dense"


# ---- what a plan tells -----------------------------------------------------------------------------------------


def test_the_table():
    rules = [{"match": "*.mlp.*", "use": SCALED, "levels": 8}, {"match": "*.self_attn", "use": "dense"}]
    lines = plan(LAYERS, rules).table().splitlines()
    assert lines[0].split() == ["pattern", "backend", "count", "layers", "parameters", "FLOPs"]
    assert lines[1].split() == [
        "*.mlp.*", f"{SCALED}(levels=8)", "6", "layers.{0-2}.mlp.{up,down}_proj", "840", "38.2%",
    ]  # fmt: skip
    assert lines[2].split() == ["*.self_attn", "dense", "3", "layers.{0-2}.self_attn", "0", "19.1%"]
    assert lines[3].split() == ["(default)", "dense", "12", "layers.{0-2}.self_attn.{q,k,v,o}_proj", "768", "38.2%"]
    assert lines[4].split("  ")[0] == "(head, left alone)"
    assert lines[4].split()[3:] == ["dense", "1", "lm_head", "88", "4.4%"]
    assert lines[5] == "Routed to other backends than dense: 6 of 22 layers."


def test_the_table_names_the_options_that_are_not_the_defaults():
    def shown(**options):
        return plan(LAYERS, [{"match": "*.mlp.*", "use": SCALED, **options}]).table().splitlines()[1].split()[1]

    assert (shown(), shown(levels=256), shown(levels=8)) == (SCALED, SCALED, f"{SCALED}(levels=8)")


def test_the_default_may_have_options():
    planned = plan(LAYERS, [{"match": "*.mlp.*", "use": "dense"}], {"use": SCALED, "levels": 8})
    assert planned.backend_of("layers.0.self_attn").config.levels == 8
    assert planned.backend_of("layers.0.mlp.up_proj").name == planned.backend_of("lm_head").name == "dense"


def test_the_json_holds_backend_options_fingerprint_and_layers():
    rows = plan(LAYERS, [{"match": "*.mlp.up_proj", "use": SCALED, "levels": 8}]).to_json()
    assert rows[0]["match"] == "*.mlp.up_proj"
    assert rows[0]["use"] == SCALED
    assert rows[0]["options"] == {"levels": 8}
    assert len(rows[0]["fingerprint"]) == 64
    assert rows[0]["layers"] == [f"layers.{i}.mlp.up_proj" for i in range(3)]


def test_layer_infos_count_parameters_and_the_flops_of_the_products():
    up = LAYERS["layers.0.mlp.up_proj"]
    assert up == LayerInfo(
        kind="linear", in_features=8, out_features=16, parameters=8 * 16 + 16, flops_per_token=2 * 8 * 16, bias=True
    )
    attention = LAYERS["layers.0.self_attn"]
    # A token attends 8 of 16 tokens on average; two products of 2 heads × 4, two operations a multiply-add.
    assert attention.flops_per_token == 2 * 2 * 8 * (2 * 4)


@pytest.mark.parametrize(
    ("config", "length"),
    [({"max_seq_length": 16, "max_position_embeddings": 64}, 16), ({"max_position_embeddings": 64}, 64), ({}, 0)],
)
def test_route_weighs_attention_by_the_length_the_models_config_gives(config, length):
    model = TinyTransformer()
    model.config = SimpleNamespace(**config)
    assert route(model).layers["layers.0.self_attn"].flops_per_token == 2 * length * 8


# ---- route: in place -------------------------------------------------------------------------------------------


def test_a_dense_route_changes_no_bit_no_name_and_no_hook():
    torch.manual_seed(0)
    model, x = TinyTransformer(), torch.randn(2, 5, 8)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(True))
    weights, expected = dict(model.named_parameters()), model(x)
    route(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in weights.items()}
    assert list(model.state_dict()) == list(weights)
    assert torch.equal(model(x), expected)
    assert len(seen) == 2


def test_the_routed_layers_compute_with_their_backend():
    model = TinyTransformer()
    route(model, [{"match": "*.mlp.*", "use": SCALED, "levels": 8}, {"match": "*.self_attn", "use": SCALED}])
    with collect_state() as collected:
        model(torch.randn(2, 5, 8))
    touched = {name.rpartition(".")[0] for name in collected.named(model)}
    assert touched == {f"layers.{i}.{part}" for i in range(2) for part in ("mlp.up_proj", "mlp.down_proj", "self_attn")}


def test_a_routed_model_copies_pickles_and_can_be_routed_again():
    model, x = TinyTransformer(), torch.randn(2, 5, 8)
    route(model, [{"match": "*", "use": SCALED}])
    model(x)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    route(model)
    assert not list(model.buffers())


def test_a_model_on_meta_is_routed_without_memory():
    with torch.device("meta"):
        model = TinyTransformer()
    route(model, [{"match": "*", "use": SCALED}])
    assert all(buffer.is_meta for buffer in model.buffers())
    model.to_empty(device="cpu")
    assert all(buffer == 0 for buffer in model.buffers())


def test_tied_weights_stay_tied():
    model = TinyTransformer()
    embedding = nn.Embedding(11, 8)
    model.lm_head.weight = embedding.weight
    route(model, [{"match": "lm_head", "use": SCALED}])
    assert model.lm_head.weight is embedding.weight


def test_a_shared_layer_is_routed_once():
    model = TinyTransformer()
    model.layers[1].mlp["up_proj"] = model.layers[0].mlp["up_proj"]
    planned = route(model, [{"match": "*.up_proj", "use": SCALED}])
    assert planned.routes[0].layers == ("layers.0.mlp.up_proj",)


def test_a_subclass_of_linear_that_computes_something_else_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    assert list(route(model).layers) == ["1"]
    assert type(model[0]) is Doubled


def test_a_layer_whose_forward_was_replaced_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    with pytest.raises(UserError, match="Layer '0' has had its forward replaced"):
        route(model)


def test_torchs_own_encoder_layer_computes_with_the_backend_in_evaluation_too():
    """Its fused evaluation path would read the weights past the linears."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        dense = layer(x)
        planned = route(layer, [{"match": "linear?", "use": SCALED}])
        assert list(planned.layers) == ["linear1", "linear2"]
        assert not torch.equal(layer(x), dense), "the uncalibrated backend was not asked"


def test_torchs_own_encoder_takes_padding_in_evaluation():
    """Its nested tensors are made for fused layers only."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1), torch.randn(2, 5, 8)
    route(model, [{"match": "*.linear1", "use": "lowrank", "rank": 3}])
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
        trained = model.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated, trained)


def test_a_mistake_leaves_the_model_as_it_was():
    model = TinyTransformer()
    with pytest.raises(UserError):
        route(model, [{"match": "*.mlp.*", "use": SCALED}, {"match": "*.nothing", "use": "dense"}])
    assert type(model.lm_head) is nn.Linear
    assert {type(module.backend).__name__ for module in model.modules() if hasattr(module, "backend")} == {"Dense"}


def test_a_layer_that_cannot_store_what_a_rule_asks_for_is_named_before_any_other_has_lost_its_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    weight = model[0].weight
    with pytest.raises(UserError, match=r"^Routing rule '\*', layer '1': Backend lowrank has rank=4 for a layer"):
        route(model, [{"match": "*", "use": "lowrank", "rank": 4}])
    with pytest.raises(UserError, match=r"^The default backend, layer '1': Backend lowrank has rank=4"):
        route(model, default={"use": "lowrank", "rank": 4})
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert model[0].weight is weight


def test_a_layer_that_stores_for_another_backend_is_named_before_any_other_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    route(model, [{"match": "1", "use": "lowrank", "rank": 4}])
    with pytest.raises(UserError, match=r"^Routing rule '\*', layer '1': This layer already stores weight_in"):
        route(model, [{"match": "*", "use": SCALED}])
    assert model[0].backend.name == "dense"
