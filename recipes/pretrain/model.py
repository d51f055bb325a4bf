"""A decoder-only transformer whose every MLP is a mixture of experts."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fp8moe

from .config import VOCABULARY, Config

ROPE_BASE = 10_000.0


def rope_tables(seq_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/D), float32 [seq_len, head_dim / 2]."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel pairs (i, i + D/2) of x [..., S, D] by the angle of their position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(
        self,
        config: Config,
        precision: fp8moe.FP8Config,
        ep_group: dist.ProcessGroup | None,
    ):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.moe = fp8moe.MoE(
            fp8moe.Router(
                config.d_model,
                config.experts,
                config.top_k,
                balance_loss_coeff=config.balance_loss,
                z_loss_coeff=config.z_loss,
            ),
            fp8moe.Experts(
                config.experts,
                config.d_model,
                config.d_expert,
                config=precision,
                ep_group=ep_group,
            ),
        )

    def reset_parameters(self, std: float, out_std: float) -> None:
        """Normal weights; ``out_std`` is for those whose product is added to the residual."""
        nn.init.normal_(self.attention.qkv.weight, std=std)
        nn.init.normal_(self.attention.out.weight, std=out_std)
        self.moe.router.reset_parameters(std)
        self.moe.experts.reset_parameters(std, out_std)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x + attention(norm(x)), and the norm of that for the experts."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x, self.moe_norm(x)

    def compile_parts(self, backend: str) -> None:
        """Has torch.compile fuse what is made of torch's own operators.

        Part by part, so that hooks around the experts still run. FP8 experts are left out: their
        kernels are fused already, and compiled they could not be observed.
        """
        parts = [(self, "attend"), (self.moe.router, "forward")]
        if not self.moe.experts.config.any_fp8:
            parts.append((self.moe.experts, "forward"))
        for module, name in parts:
            compiled = torch.compile(
                getattr(module, name), fullgraph=True, dynamic=False, backend=backend
            )
            setattr(module, name, compiled)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x, normed = self.attend(x, cos, sin)
        y, router_loss = self.moe(normed)
        return x + y, router_loss


class LanguageModel(nn.Module):
    """Next-byte model: embedding, blocks, norm, and the embedding again as output layer.

    The residual stream is FP32; under autocast attention runs in BF16 and the experts in
    ``precision``: "fp8" for all three GEMMs in FP8 (or the one of ``config.fp8_gemms``), "bf16" for
    none.

    With ``ep_group`` its ranks share the experts of each layer.

    Shapes: tokens and targets are int64 [B, S], S at most ``config.seq_len``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, precision: str, ep_group: dist.ProcessGroup | None = None):
        super().__init__()
        experts = fp8moe.FP8Config.bf16()
        if precision == "fp8":
            pow2 = config.pow2_scales
            experts = fp8moe.FP8Config(pow2_scales=pow2, pow2_weight_scales=pow2, save=config.save)
            if config.fp8_gemms != "all":
                others = {"fprop", "dgrad", "wgrad"} - {config.fp8_gemms}
                experts = experts.replace(**dict.fromkeys(others, "bf16"))
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        blocks = [Block(config, experts, ep_group) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        cos, sin = rope_tables(config.seq_len, config.d_model // config.heads)
        self.register_buffer("cos", cos.to(self.norm.weight.device), persistent=False)
        self.register_buffer("sin", sin.to(self.norm.weight.device), persistent=False)
        # Weights of 0.02 at width 1024, more for less; smaller where a block adds to the residual.
        std = 0.02 * math.sqrt(1024 / config.d_model)
        nn.init.normal_(self.embedding.weight, std=std)
        for block in blocks:
            block.reset_parameters(std, std / math.sqrt(2 * config.layers))

    @torch.no_grad()
    def nudge(self, share: float) -> None:
        """w (1 + share n) for every weight w, n normal: the same training, another run."""
        for weight in self.parameters():
            weight.mul_(1 + share * torch.randn_like(weight))

    def compile_parts(self, backend: str = "inductor") -> None:
        """Has torch.compile fuse what the blocks make of torch's own operators."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_parts(backend)

    def _hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        length = tokens.shape[1]
        # Rotating in the dtype of q and k: half the bytes of FP32, and positions stay exact enough.
        dtype = torch.get_autocast_dtype(x.device.type)
        if not torch.is_autocast_enabled(x.device.type):
            dtype = x.dtype
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        router_losses = []
        for block in self.blocks:
            x, router_loss = block(x, cos, sin)
            router_losses.append(router_loss)
        return self.norm(x), torch.stack(router_losses).sum()

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, S, 256] scores of the next byte at each position."""
        return F.linear(self._hidden(tokens)[0], self.embedding.weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy in nats per byte, the routers' own losses), float32 scalars."""
        hidden, router_loss = self._hidden(tokens)
        scores = F.linear(hidden, self.embedding.weight).float()
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten()), router_loss

    def expert_load(self) -> Tensor:
        """Tokens of each expert in the last forward, int64 [layers, experts] on the device."""
        return torch.stack([b.moe.last_load for b in self.blocks if isinstance(b, Block)])
