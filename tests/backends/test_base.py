import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import backends
from backends.base import Backend, parameter_count
from backends.errors import UserError
from tests.backends.stateful_backend import ScaledBackend


class PlainProducts(Backend):
    """Overrides matmul only, so that attention is the composed one of the base class."""

    def matmul(self, a, b, state, *, training=False):
        return a @ b, state


def compose(q, k, v, mask=None, is_causal=True):
    scale = q.shape[-1] ** -0.5
    return PlainProducts().attention(q, k, v, mask=mask, scale=scale, is_causal=is_causal, state={})[0]


def reference(q, k, v, allowed):
    """Softmax attention written out in float64 with k and v repeated; `allowed` bool [B, 1, S, S_kv]."""
    q, k, v = q.double(), k.double(), v.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * allowed
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", weights / torch.where(total == 0, 1.0, total), v)


@given(
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_composed_attention_with_any_mask_equals_the_formula(groups, repeats, queries, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, groups * repeats, queries, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, keys, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.7  # some queries may see nothing at all
    torch.testing.assert_close(compose(q, k, v, mask), reference(q, k, v, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [5, 7])
def test_composed_causal_attention_equals_sdpa(keys):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(compose(q, k, v), expected)


def test_a_single_query_sees_every_key():
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    torch.testing.assert_close(compose(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_bidirectional_attention_sees_every_key():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    torch.testing.assert_close(compose(q, k, v, is_causal=False), F.scaled_dot_product_attention(q, k, v))


def test_the_softmax_of_bfloat16_scores_is_taken_in_float32():
    q, k, v = torch.randn(3, 1, 2, 64, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).unbind()
    allowed = torch.ones(64, 64).tril().bool()
    scores = (q @ k.mT).float() * 0.25
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(compose(q, k, v), weights.bfloat16() @ v, rtol=0, atol=0)


def test_each_product_of_attention_has_its_own_state():
    backend = ScaledBackend()
    specs = backend.attention_state(4, 8)
    assert set(specs) == {"scores_max_abs", "scores_step", "values_max_abs", "values_step"}
    state = {name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}
    q, k, v = 3.0 * torch.ones(1, 4, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8)
    _, new = backend.attention(q, k, v, mask=None, scale=1.0, is_causal=True, state=state, training=True)
    assert new["scores_max_abs"] == 3.0
    assert new["values_max_abs"] == 1.0  # probabilities of the first query: it sees one key


def test_computes_tells_what_a_backend_overrides():
    assert not PlainProducts().computes("linear")
    assert PlainProducts().computes("attention")
    assert ScaledBackend().computes("linear")
    assert not Backend().computes("attention")


def test_what_is_not_overridden_is_not_implemented():
    with pytest.raises(NotImplementedError):
        Backend().linear(torch.ones(1), torch.ones(1), None, {})
    with pytest.raises(NotImplementedError):
        Backend().matmul(torch.ones(1, 1), torch.ones(1, 1), {})
    with pytest.raises(NotImplementedError):
        Backend().initial_parameters(torch.ones(1, 1), None)


def test_dense_cost_counts_two_operations_a_multiply_add_and_each_operand_once():
    cost = backends.load("dense").cost(2, 3, 5, itemsize=2)
    assert cost.flops == 2 * 2 * 3 * 5
    assert cost.bytes == 2 * (2 * 3 + 3 * 5 + 2 * 5)
    assert cost.joules is None


def test_backends_differ_by_class_and_by_config():
    assert ScaledBackend() == ScaledBackend(ScaledBackend.Config(levels=256))
    assert ScaledBackend() != ScaledBackend(ScaledBackend.Config(levels=16))
    assert ScaledBackend() != PlainProducts()
    assert len({ScaledBackend(), ScaledBackend(), PlainProducts()}) == 2


def test_the_text_of_a_backend_is_its_name_and_options():
    assert str(backends.load("dense")) == "dense"
    assert str(ScaledBackend()) == "tests.backends.stateful_backend:ScaledBackend(levels=256)"


def test_parameter_count():
    assert parameter_count({"first": (2, 3), "second": (4, 2), "bias": (4,)}) == 6 + 8 + 4


LAB = """
from backends.base import Backend
import lab_kernel

class Lab(Backend):
    source_modules = ("lab_kernel",)
    def linear(self, x, weight, bias, state, *, training=False):
        return lab_kernel.product(x, weight), state
"""


def test_the_fingerprint_changes_with_the_source_of_the_backend_or_of_its_kernels_only(tmp_path, monkeypatch):
    sources = [
        (LAB, "def product(x, w): return x @ w.T"),
        (LAB, "def product(x, w): return x @ w.T"),
        (LAB, "def product(x, w): return w @ x.T"),
        (LAB + "# changed", "def product(x, w): return x @ w.T"),
    ]
    prints = []
    for number, (lab, kernel) in enumerate(sources):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "lab.py").write_text(lab)
        (folder / "lab_kernel.py").write_text(kernel)
        monkeypatch.syspath_prepend(folder)
        for module in ("lab", "lab_kernel"):
            sys.modules.pop(module, None)
        prints.append(backends.load("lab:Lab").fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_another_process_finds_the_same_fingerprint():
    code = "import backends; print(backends.load('dense').fingerprint())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == backends.load("dense").fingerprint()


def test_the_fingerprint_changes_with_the_config():
    assert ScaledBackend().fingerprint() != ScaledBackend(ScaledBackend.Config(levels=16)).fingerprint()


def test_a_backend_without_a_source_file_cannot_be_fingerprinted():
    namespace = {"__name__": "typed_by_hand"}
    sys.modules["typed_by_hand"] = type(sys)("typed_by_hand")
    try:
        exec("from backends.base import Backend\nclass Lab(Backend): pass", namespace)
        with pytest.raises(UserError, match=r"Define the backend in a \.py file"):
            namespace["Lab"]().fingerprint()
    finally:
        del sys.modules["typed_by_hand"]
