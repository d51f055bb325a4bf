"""MoE blocks as people write them, around a ModuleList of SwiGLU experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

E, K, H, I = 4, 2, 128, 256  # noqa: E741


class MLP(nn.Module):
    """A SwiGLU expert with names of one's own choice for its gate, up and down projection."""

    def __init__(self, names, hidden=H, intermediate=I, activation=None, bias=False):
        super().__init__()
        self.names = names
        for name, (n, k) in zip(
            names, [(intermediate, hidden)] * 2 + [(hidden, intermediate)], strict=True
        ):
            setattr(self, name, nn.Linear(k, n, bias=bias))
        self.act_fn = activation or nn.SiLU()

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


LLAMA, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


def loop(experts, x, ids, weights):
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        if len(token):
            y.index_add_(0, token, (expert(x[token]) * weights[token, slot, None]).to(y.dtype))
    return y


class MixtralBlock(nn.Module):
    """Linear gate, renormalized top-k of the softmax, (y, logits)."""

    names = MIXTRAL

    def __init__(self, **expert):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(MLP(self.names, **expert) for _ in range(E))
        self.top_k = K

    def weights(self, logits):
        p, ids = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return p / p.sum(-1, keepdim=True), ids

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, H)
        logits = self.gate(x)
        p, ids = self.weights(logits)
        y = loop(self.experts, x, ids, p.to(x.dtype))
        return y.reshape(hidden_states.shape), logits


class QwenBlock(MixtralBlock):
    """Scores as they are, and a shared expert behind a sigmoid."""

    names = LLAMA

    def __init__(self, **expert):
        super().__init__(**expert)
        self.norm_topk_prob = False
        self.shared_expert = MLP(LLAMA)
        self.shared_expert_gate = nn.Linear(H, 1, bias=False)

    def weights(self, logits):
        p, ids = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return p, ids

    def forward(self, hidden_states):
        y, logits = super().forward(hidden_states)
        shared = self.shared_expert_gate(hidden_states).sigmoid() * self.shared_expert(
            hidden_states
        )
        return y + shared, logits


class SigmoidGate(nn.Module):
    """Decides ids and weights itself, and has a balance loss in training."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H) * 0.1)
        self.bias = nn.Parameter(torch.zeros(E))

    def forward(self, hidden_states):
        batch, length, hidden = hidden_states.shape
        scores = F.linear(hidden_states.reshape(-1, hidden).float(), self.weight.float()).sigmoid()
        ids = (scores.detach() + self.bias).topk(K, dim=-1).indices
        weights = scores.gather(1, ids)
        loss = scores.square().sum() if self.training else None
        return ids, 2.5 * weights / weights.sum(-1, keepdim=True), loss


class WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, loss):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, torch.ones(())


class DeepSeekBlock(nn.Module):
    """A gate module with an auxiliary loss, and shared experts for every token; returns y."""

    def __init__(self, **expert):
        super().__init__()
        self.experts = nn.ModuleList(MLP(LLAMA, **expert) for _ in range(E))
        self.gate = SigmoidGate()
        self.shared_experts = MLP(LLAMA)

    def forward(self, hidden_states):
        ids, weights, loss = self.gate(hidden_states)
        x = hidden_states.reshape(-1, H)
        y = loop(self.experts, x, ids, weights.to(x.dtype))
        if loss is not None:
            y = WithLoss.apply(y, loss)
        return y.reshape(hidden_states.shape) + self.shared_experts(hidden_states)


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


BLOCKS = [MixtralBlock, QwenBlock, DeepSeekBlock]


def hidden(device="cpu", dtype=torch.float32):
    return torch.randn(2, 24, H, device=device, dtype=dtype, requires_grad=True)
