import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backends
from backends.errors import UserError
from backends.fp8 import Fp8
from backends.layers import BackendLinear
from backends.rules_file import read_rules
from tests.backends.test_optical import kernel_modules_used
from tests.backends.tiny_transformer import TinyTransformer


def fp8(**options) -> Fp8:
    return backends.load("fp8", **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"scaling": "column"},
            "Option 'scaling' of backend 'fp8' is 'column' (str). Expected one of 'row', 'tensor'.",
        ),
        (
            {"grad_format": "e3m4"},
            "Option 'grad_format' of backend 'fp8' is 'e3m4' (str). Expected one of 'e5m2', 'e4m3'.",
        ),
        (
            {"grad_weight": True},
            "Option 'grad_weight' of backend 'fp8' is True (bool). Expected one of 'fp8', 'compute'.",
        ),
        ({"scale": "row"}, "Unknown fp8 option 'scale'. Did you mean 'scaling'?"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(options, expected):
    with pytest.raises(UserError) as error:
        fp8(**options)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_options_reach_the_products():
    assert fp8().recipe == (torch.float8_e5m2, True, True, True, False)
    chosen = fp8(scaling="tensor", grad_format="e4m3", grad_weight="compute", fast_accumulation="all")
    assert chosen.recipe == (torch.float8_e4m3fn, False, False, True, True)
    assert fp8(fast_accumulation="none").recipe[3:] == (False, False)


def test_the_fingerprint_covers_every_kernel_module_it_computes_with():
    reached, new = set(), kernel_modules_used("backends.fp8")
    while new:
        reached |= new
        new = set().union(*(kernel_modules_used(module) for module in new)) - reached
    assert reached == set(Fp8.source_modules)


def test_the_shipped_rules_route_linears_and_leave_attention_and_the_head():
    model = TinyTransformer()
    file = read_rules("fp8")
    plan = backends.route(model, file.rules, file.default or "dense")
    routed = {name: route.backend.name for route in plan.routes for name in route.layers}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, backend in routed.items() if backend == "fp8"} == linears - {"lm_head"}
    assert set(routed.values()) == {"fp8", "dense"}


def test_a_rule_for_attention_alone_is_refused():
    with pytest.raises(UserError, match="it matches attention layers only, which this backend does not compute"):
        backends.route(TinyTransformer(), [{"match": "*.self_attn", "use": "fp8"}])


@pytest.mark.parametrize("sizes", [(1, 1), (50, 10), (30, 50257 % 100)])
def test_layers_of_any_size_run_and_a_bias_is_added_as_it_is(sizes):
    layer = BackendLinear(*sizes)
    layer.set_backend(fp8())
    x = torch.randn(3, sizes[0])
    y, bias = layer(x), layer.bias.detach().clone()
    layer.bias.data.zero_()
    torch.testing.assert_close(y, layer(x) + bias)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((sizes[1],), 3.0))


def test_no_rows_give_no_rows():
    layer = BackendLinear(8, 4)
    layer.set_backend(fp8())
    y = layer(torch.empty(0, 8))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert bool((layer.weight.grad == 0).all())


def test_a_product_moves_its_operands_as_fp8_too():
    dense, rounded = backends.load("dense").cost(64, 32, 16, itemsize=2), fp8().cost(64, 32, 16, itemsize=2)
    assert rounded.flops == dense.flops
    assert rounded.bytes == dense.bytes + 2 * (64 * 32 + 32 * 16)


@pytest.mark.parametrize("options", [{}, {"scaling": "tensor"}, {"grad_weight": "compute"}])
def test_a_network_learns_as_well_as_its_dense_twin(options):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    x = torch.randn(512, 16)
    target = teacher(x).detach()

    def loss_after_training(use: str, **options: str) -> float:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
        backends.route(model, [{"match": "*", "use": use, **options}])
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
        return loss.item()

    before = target.var().item()
    dense, rounded = loss_after_training("dense"), loss_after_training("fp8", **options)
    assert dense < before / 20
    assert rounded < before / 20 + 2 * dense


def test_layers_of_one_input_have_the_same_outputs_as_one_product():
    """And nearly the same gradients: rows of a joint gradient share a scale, a power of two."""
    torch.manual_seed(0)
    x, weights = torch.randn(48, 32, dtype=torch.float64), torch.randn(2, 64, 32, dtype=torch.float64)
    upstream = torch.randn(48, 128, dtype=torch.float64)
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    joint = fp8().linear(x, weights.flatten(0, 1), None, {})[0]
    alone = torch.cat([fp8().linear(x, weight, None, {})[0] for weight in weights], 1)
    assert torch.equal(joint, alone)
    for one, other in zip(
        torch.autograd.grad(joint, leaves, upstream), torch.autograd.grad(alone, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-4 * float(other.abs().max()))
