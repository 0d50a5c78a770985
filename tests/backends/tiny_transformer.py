"""A model with every kind of layer that routing knows, and a backend without attention; for tests only."""

from torch import nn

from backends.base import Backend
from backends.layers import BackendAttention, BackendLinear

SCALED = "tests.backends.stateful_backend:ScaledBackend"
LINEARS_ONLY = f"{__name__}:LinearsOnly"


class LinearsOnly(Backend):
    def linear(self, x, weight, bias, state, *, training=False):
        return x @ weight.T if bias is None else x @ weight.T + bias, state


class Attention(BackendAttention):
    def __init__(self):
        super().__init__(num_heads=2, head_dim=4)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q, k, v, mask=None, scale=0.5).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": BackendLinear(16, 8)})

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp["down_proj"](self.mlp["up_proj"](x).relu())


class TinyTransformer(nn.Module):
    """Plain linears, one BackendLinear a block, BackendAttention, and a head."""

    def __init__(self, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)
