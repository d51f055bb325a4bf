"""LoRA fine-tuning of a Qwen3-30B-A3B-sized model on one GPU: peak memory, tokens/s, loss.

    python -m benchmarks.lora_memory                 # the whole model; about a minute on an H100
    python -m benchmarks.lora_memory --layers 4      # a twelfth of it
    python -m benchmarks.lora_memory --tiny --layers 1 --seq 64   # a CPU will do

The model has the published configuration and random weights, made on the device. Experts go to FP8
one layer at a time, so the 58 GB of BF16 experts never exist. Trained are low-rank updates of all
experts, by AdamW; attention, embeddings and routers are frozen in BF16. Layers are checkpointed.
All steps see the same random tokens, so the loss must fall. Exit status 1 if it does not, or if
more than --limit-gb (10^9 bytes) of memory were reserved.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import torch
from torch import nn

import fp8moe
from benchmarks.harness import append_json, table

QWEN3_30B_A3B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": False,
}
TINY: dict[str, Any] = {
    **QWEN3_30B_A3B,
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
STD = 0.02


def frozen_experts(config: Any, device: torch.device, keep_transpose: bool) -> nn.Module:
    """One layer's experts with random weights; their BF16 originals are gone on return."""
    e, h, i = config.num_experts, config.hidden_size, config.moe_intermediate_size
    w13 = torch.randn(e, 2 * i, h, device=device, dtype=torch.bfloat16).mul_(STD)
    w2 = torch.randn(e, h, i, device=device, dtype=torch.bfloat16).mul_(STD)
    return fp8moe.FrozenExperts.from_weights(w13, w2, keep_transpose=keep_transpose)


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Random values for what is still on the meta device: normal matrices, norms of ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                if parameter.dim() > 1:
                    value.normal_(std=STD)
                setattr(module, name, nn.Parameter(value, requires_grad=False))


def build(config: Any, device: torch.device, rank: int, keep_transpose: bool) -> Any:
    """The model on `device`, in training mode; its low-rank updates are trainable."""
    from transformers import Qwen3MoeForCausalLM

    with torch.device("meta"):
        model: Any = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.experts = frozen_experts(config, device, keep_transpose)
    _materialise(model, device)
    with device:  # its frequencies are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    fp8moe.freeze_experts(model, lora_rank=rank, lora_alpha=2.0 * rank)
    fp8moe.train_only_adapters(model)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"still on the meta device: {left}")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    model: Any, tokens: torch.Tensor, steps: int, learning_rate: float
) -> tuple[list[float], float]:
    """Losses of all steps, and seconds a step after the first, which also compiles."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, fused=tokens.is_cuda)
    losses, start = [], 0.0
    for step in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0:
            _synchronize(tokens.device)
            start = time.perf_counter()
    _synchronize(tokens.device)
    seconds = (time.perf_counter() - start) / max(1, steps - 1)
    return [float(loss) for loss in losses], seconds


def count(tensors: Any) -> float:
    """10^9 bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lora_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tiny", action="store_true", help="a small model of the same shape")
    parser.add_argument("--seq", type=int, default=4096, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--keep-transpose", action="store_true", help="of FP8 weights")
    parser.add_argument("--limit-gb", type=float, default=72.0)
    parser.add_argument("--json", help="append the result to this file (GPU only)")
    args = parser.parse_args(argv)
    for name, least in (("layers", 1), ("seq", 2), ("batch", 1), ("steps", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if not torch.cuda.is_available():
        if args.json:
            parser.error("--json describes a GPU, and there is none")
        if not args.tiny:
            parser.error("the whole model needs a GPU; --tiny runs on a CPU")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from transformers import Qwen3MoeConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = TINY if args.tiny else QWEN3_30B_A3B
    config = Qwen3MoeConfig(**{**sizes, "num_hidden_layers": args.layers})
    begin = time.perf_counter()
    model = build(config, device, args.rank, args.keep_transpose)
    _synchronize(device)
    row: dict[str, object] = {
        "layers": args.layers,
        "tokens": args.batch * args.seq,
        "rank": args.rank,
        "build_s": time.perf_counter() - begin,
    }
    parameters = list(model.parameters())
    row["trainable_M"] = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    row["experts_GB"] = count(
        t for m in model.modules() if isinstance(m, fp8moe.FrozenExperts) for t in m.buffers()
    )
    row["bf16_GB"] = count(p for p in parameters if not p.requires_grad)

    tokens = torch.randint(config.vocab_size, (args.batch, args.seq), device=device)
    losses, seconds = train(model, tokens, args.steps, args.learning_rate)
    row |= {"step_s": seconds, "tokens_per_s": tokens.numel() / seconds}
    row |= {"first_loss": losses[0], "last_loss": losses[-1]}
    reserved = 0.0
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved() / 1e9
        row["peak_allocated_GB"] = torch.cuda.max_memory_allocated() / 1e9
        row["peak_reserved_GB"] = reserved
    print(table([{"": name, "value": value} for name, value in row.items()], ["", "value"]))
    print("losses:", " ".join(f"{loss:.4f}" for loss in losses))
    append_json(args.json, [row])
    if not (losses[-1] < losses[0] and all(map(math.isfinite, losses))):
        print("the loss did not fall", file=sys.stderr)
        return 1
    if reserved > args.limit_gb:
        print(f"reserved {reserved:.1f} GB, more than {args.limit_gb:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
