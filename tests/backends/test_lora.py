import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backends.base import Backend
from backends.errors import UserError
from backends.layers import BackendLinear
from backends.lora import add_lora, load_lora, lora_layers, merge_lora, trained_parameters
from backends.routing import route
from tests.backends.test_layers import Factored
from tests.backends.tiny_transformer import TinyTransformer

GRID = f"{__name__}:GridWeights"
FACTORED = "tests.backends.test_layers:Factored"


class GridWeights(Backend):
    """Rounds the weight it is given to multiples of 1/8; the gradient passes straight through."""

    gradient = "straight-through"

    def linear(self, x, weight, bias, state, *, training=False):
        rounded = (weight * 8).round() / 8
        return F.linear(x, weight + (rounded - weight).detach(), bias), state


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return TinyTransformer(depth=1).to(dtype)


def with_updates(dtype=torch.float64, rules=(), **options):
    """A model whose A and B are both random: a B of zeros hides half of every formula."""
    model = model_of(dtype)
    route(model, rules)
    add_lora(model, r=3, alpha=6.0, **options)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0.0, 0.5)
    return model


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- what is computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [(), ({"match": "*_proj", "use": GRID},)], ids=["dense", "straight-through"])
def test_gradients_are_those_of_the_updated_weight_through_the_chain_rule(rules):
    """dB = α/r · dW' Aᵀ and dA = α/r · Bᵀ dW', with dW' by plain autograd on a model that stores W'."""
    model = with_updates(rules=rules)
    whole = copy.deepcopy(model)
    merge_lora(whole)
    whole.requires_grad_(True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    loss = model(x).square().mean()
    assert loss.item() == pytest.approx(whole(x).square().mean().item(), rel=1e-12)
    loss.backward()
    whole(x).square().mean().backward()
    for name, layer in lora_layers(model).items():
        gradient = whole.get_submodule(name).weight.grad
        assert relative(layer.lora_B.grad, 2.0 * gradient @ layer.lora_A.T) < 1e-10
        assert relative(layer.lora_A.grad, 2.0 * layer.lora_B.T @ gradient) < 1e-10


def test_the_backend_rounds_the_sum_as_a_whole():
    model = with_updates(rules=({"match": "*_proj", "use": GRID},))
    layer = model.layers[0].mlp["up_proj"]
    x = torch.randn(4, 8, dtype=torch.float64)
    total = layer.weight + 6.0 / 3 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), F.linear(x, (total * 8).round() / 8, layer.bias), rtol=1e-12)


def test_the_first_forward_is_that_of_the_model_without_updates():
    model, plain = model_of(torch.float32), model_of(torch.float32)
    add_lora(model, r=2)
    x = torch.randn(2, 5, 8)
    assert torch.equal(model(x), plain(x))


def test_bfloat16_weights_are_summed_in_float32_and_rounded_once():
    torch.manual_seed(0)
    layer = BackendLinear(64, 32, bias=False, dtype=torch.bfloat16)
    add_lora(nn.Sequential(layer), r=4, alpha=1.0)
    nn.init.normal_(layer.lora_B)
    factors = layer.lora_B.double() @ layer.lora_A.double()
    exact = layer.weight.double() + factors / 4
    assert torch.equal(layer.effective_weight(), exact.float().bfloat16())
    layer.compute_dtype = torch.float32
    assert relative(layer.effective_weight().double(), exact) < 1e-6


def test_torchs_own_encoder_layer_has_its_updates_in_evaluation_too():
    """Its fused evaluation path would read the weights past the linears."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)
    add_lora(layer, 4, match=["linear1", "linear2"])
    with torch.no_grad():
        for part in lora_layers(layer).values():
            part.lora_B.normal_()
        torch.testing.assert_close(layer.eval()(x), layer.train()(x))


# ---- what is trained -------------------------------------------------------------------------------------------


def test_only_a_and_b_are_trained_and_the_head_has_none():
    model = model_of()
    lora = add_lora(model, r=2)
    assert len(lora.layers) == 6
    assert trained_parameters(model).keys() == {
        f"{name}.{factor}" for name in lora.layers for factor in ("lora_A", "lora_B")
    }
    assert not isinstance(model.lm_head, BackendLinear)


def test_norms_are_trained_where_that_is_asked_for():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    add_lora(model, r=2, train_norms=True)
    assert trained_parameters(model).keys() == {"0.lora_A", "0.lora_B", "1.weight", "1.bias"}


def test_a_is_uniform_in_one_over_root_in_and_depends_on_seed_and_name_alone():
    model, other = (
        nn.ModuleDict({"a": nn.Linear(400, 300)}),
        nn.ModuleDict({"b": nn.Linear(400, 300), "a": nn.Linear(400, 300)}),
    )
    add_lora(model, r=200, seed=7)
    torch.manual_seed(99)
    add_lora(other, r=200, seed=7)
    values = model["a"].lora_A
    assert values.abs().max() <= 0.05
    assert values.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.01)
    assert torch.equal(values, other["a"].lora_A)
    assert not torch.equal(values, other["b"].lora_A)
    assert not model["a"].lora_B.any()
    narrow = nn.ModuleDict({"a": nn.Linear(400, 300, dtype=torch.bfloat16)})
    add_lora(narrow, r=200, seed=7)
    assert torch.equal(narrow["a"].lora_A, values.bfloat16())


@pytest.mark.parametrize(
    ("match", "count"),
    [
        ("*.mlp.*", 2),
        (["q_proj", "v_proj"], 2),
        ("layers.0.self_attn.k_proj", 1),
        ("lm_head", 1),
        (["*_proj", "q_proj"], 6),
    ],
)
def test_patterns_are_globs_and_ends_of_names(match, count):
    assert len(add_lora(model_of(), 2, match=match).layers) == count


def test_meta_models_get_updates_without_values():
    with torch.device("meta"):
        model = TinyTransformer(depth=1)
    add_lora(model, r=2)
    assert all(parameter.is_meta for parameter in model.parameters())


# ---- merging ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_gives_the_same_bits_and_is_a_plain_one(dtype):
    model = with_updates(dtype)
    names = model_of().state_dict().keys()
    x = torch.randn(2, 5, 8, dtype=dtype)
    before = model(x)
    assert len(merge_lora(model)) == 6
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == names
    assert merge_lora(model) == ()


def test_an_updated_layer_moves_to_another_backend():
    model = with_updates()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = model(x)
    route(model, [{"match": "*_proj", "use": GRID}])
    assert not torch.allclose(model(x), before)
    route(model)
    assert torch.equal(model(x), before)


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 9}, r"r=9, more than the smaller side of layer 'layers\.0\.self_attn\.q_proj' \(8 × 8\)"),
        ({"r": 0}, "Expected r at least 1"),
        ({"r": 2, "alpha": float("nan")}, "finite alpha"),
        ({"r": 2, "match": "*.mpl.*"}, r"pattern '\*\.mpl\.\*' names no linear layer"),
        ({"r": 2, "match": "*head*"}, "names no linear layer"),
        ({"r": 2, "match": []}, "empty list"),
        ({"r": 2, "train_norms": True}, "no norm"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(options, message):
    model = model_of()
    with pytest.raises(UserError, match=message) as raised:
        add_lora(model, **options)
    assert "\n" not in str(raised.value)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not lora_layers(model)


def test_layers_that_store_no_weight_are_refused():
    model = model_of()
    route(model, [{"match": "*.mlp.*", "use": FACTORED}])
    with pytest.raises(UserError, match=r"layer 'layers\.0\.mlp\.up_proj' stores first, second, shift"):
        add_lora(model, r=2)
    add_lora(model, r=2, match="*.self_attn.*")
    with pytest.raises(UserError, match="Merge the update first"):
        model.layers[0].self_attn.q_proj.set_backend(Factored())


def test_a_second_update_and_a_shared_weight_are_refused():
    model = model_of()
    add_lora(model, r=2, match="q_proj")
    with pytest.raises(UserError, match="has a low-rank update already"):
        add_lora(model, r=2)
    tied = nn.ModuleDict({"embedding": nn.Embedding(11, 8), "lm_head": nn.Linear(8, 11, bias=False)})
    tied["lm_head"].weight = tied["embedding"].weight
    with pytest.raises(UserError, match="'lm_head' shares its weight with 'embedding'"):
        add_lora(tied, r=2, match="lm_head")


def test_values_that_do_not_fit_are_refused():
    model = with_updates()
    with pytest.raises(UserError, match="does not train"):
        load_lora(model, {"lm_head.weight": torch.zeros(11, 8)})
    with pytest.raises(UserError, match=r"shape \[2, 8\], the model's \[3, 8\]"):
        load_lora(model, {"layers.0.self_attn.q_proj.lora_A": torch.zeros(2, 8)})
