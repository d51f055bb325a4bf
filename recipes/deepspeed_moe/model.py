"""The language model of the other recipe around `deepspeed.moe.layer.MoE`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pretrain.config import VOCABULARY, Config
from ..pretrain.model import Attention, rope_tables
from .options import Options


class Swiglu(nn.Module):
    """y = (silu(x gate^T) * (x up^T)) down^T: one expert, as DeepSpeed wants it."""

    def __init__(self, d_model: int, d_expert: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_expert, bias=False)
        self.up_proj = nn.Linear(d_model, d_expert, bias=False)
        self.down_proj = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: Config, options: Options):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.attention_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.moe = MoE(
            config.d_model,
            Swiglu(config.d_model, config.d_expert),
            num_experts=config.experts,
            ep_size=options.ep_size,
            k=config.top_k,
            capacity_factor=options.capacity_factor or 1.0,
            eval_capacity_factor=options.capacity_factor or 1.0,
            drop_tokens=options.capacity_factor > 0,
            top2_2nd_expert_sampling=False,  # no random numbers: a resumed run repeats exactly
            use_rts=False,
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, balance_loss, _ = self.moe(self.moe_norm(x))
        return x + y, balance_loss


class LanguageModel(nn.Module):
    """Next-byte model: embedding, blocks, norm, and the embedding again as output layer.

    Shapes: tokens and targets are int64 [B, S], S at most `options.seq_len`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, options: Options, rank: int):
        super().__init__()
        torch.manual_seed(config.seed)
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        blocks = [Block(config, options) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        cos, sin = rope_tables(config.seq_len, config.d_model // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Weights of 0.02 at width 1024, more for less; smaller where a block adds to the residual.
        std = 0.02 * math.sqrt(1024 / config.d_model)
        out_std = std / math.sqrt(2 * config.layers)
        for name, p in self.named_parameters():
            if p.ndim == 2 and ".deepspeed_experts." not in name:
                nn.init.normal_(p, std=out_std if name.endswith("attention.out.weight") else std)
        # Each expert from a seed of its own: the same weights for every number of processes.
        local = config.experts // options.ep_size
        for layer, block in enumerate(blocks):
            for e, expert in enumerate(block.moe.deepspeed_moe.experts.deepspeed_experts):
                expert_id = (rank % options.ep_size) * local + e
                generator = torch.Generator().manual_seed(
                    (config.seed * config.layers + layer) * config.experts + expert_id
                )
                for name, p in expert.named_parameters():
                    scale = out_std if name.startswith("down") else std
                    nn.init.normal_(p, std=scale, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy in nats per byte, sum of the balance losses), float32 scalars."""
        x = self.embedding(tokens)
        length = tokens.shape[1]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        balance_losses = []
        for block in self.blocks:
            x, balance_loss = block(x, cos, sin)
            balance_losses.append(balance_loss)
        scores = F.linear(self.norm(x), self.embedding.weight).float()
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        return loss, torch.stack(balance_losses).sum().float()
