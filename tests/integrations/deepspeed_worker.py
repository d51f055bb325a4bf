"""One of two processes: every check that needs DeepSpeed engines, results written as JSON.

python deepspeed_worker.py FOLDER cpu|cuda, with what torchrun sets in the environment. Run by
test_deepspeed_engine.py; starting DeepSpeed takes longer than the checks.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from fp8moe.config import FP8Config
from fp8moe.functional import clear_weight_cache, weight_cache, weight_cache_info
from fp8moe.integrations.deepspeed import replace_deepspeed_experts
from fp8moe.integrations.deepspeed_checkpoint import check_deepspeed_checkpoint
from fp8moe.testing import sqnr_db

sys.path.insert(0, str(Path(__file__).parent))
from deepspeed_models import Model, batches, initialize, train  # noqa: E402

BF16 = {
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_accumulation_steps": 2,
}


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in engine.module.state_dict().items()}


def step_of(engine: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step: with SGD and a rate of 1 they are what it subtracts."""
    before = weights(engine)
    (loss,) = train(engine, batches(1, torch.distributed.get_rank(), torch.float32))
    after = weights(engine)
    return loss, {key: before[key] - after[key] for key in before}


def worst_sqnr(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    return min(sqnr_db(got[key], expected[key]) for key in got)


def gradients(stage: int, ep_size: int) -> dict[str, float]:
    """SQNR of the reduced gradients, by parameter the worst, against DeepSpeed's own experts."""

    def run(config: FP8Config | None, spoil: Callable[[Any], None] | None = None) -> Any:
        model = Model(ep_size=ep_size)
        if config is not None:
            replace_deepspeed_experts(model, config=config)
        if spoil is not None:
            spoil(model.moe.deepspeed_moe.experts)
        return step_of(initialize(model, stage))

    def reduced_everywhere(experts: Any) -> None:
        for p in experts.parameters():
            p.allreduce = True

    def other_experts(experts: Any) -> None:
        experts.w2.data = experts.w2.data.flip(0)

    loss, grads = run(None)
    bf16_loss, bf16 = run(FP8Config.bf16())
    fp8_loss, fp8 = run(FP8Config())
    result = {
        "bf16_db": worst_sqnr(bf16, grads),
        "fp8_db": worst_sqnr(fp8, grads),
        "bf16_loss": abs(bf16_loss / loss - 1),
        "fp8_loss": abs(fp8_loss / loss - 1),
        "swapped_db": worst_sqnr(run(FP8Config.bf16(), other_experts)[1], grads),
    }
    if ep_size == 2 and stage == 0:
        result["misflagged_db"] = worst_sqnr(run(FP8Config.bf16(), reduced_everywhere)[1], grads)
    return result


def engine_of(config: FP8Config | None, stage: int = 1, **settings: Any) -> Any:
    model = Model(ep_size=2)
    if config is not None:
        replace_deepspeed_experts(model, config=config)
    return initialize(model, stage, **(BF16 | settings))


def staleness(stage: int) -> dict[str, Any]:
    """Losses of two steps of two micro-batches: cached, uncached, and with a cache gone blind."""
    data = batches(6, torch.distributed.get_rank(), torch.bfloat16)
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}
    info = weight_cache_info()
    cached = train(engine_of(FP8Config(), stage, **fp32), data)
    after = weight_cache_info()
    uncached = train(engine_of(FP8Config(cache_weights=False), stage, **fp32), data)
    counting, weight_cache._hook = weight_cache._hook, object()
    counting.remove()
    blind = train(engine_of(FP8Config(), stage, **fp32), data)
    weight_cache._hook = None
    clear_weight_cache()
    casts = after.misses - info.misses, after.hits - info.hits
    return {"cached": cached, "uncached": uncached, "blind": blind, "casts": casts}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def checkpoints(folder: Path, stage: int) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    data = batches(8, rank, torch.bfloat16)
    ours, theirs = str(folder / f"ours{stage}"), str(folder / f"theirs{stage}")
    result: dict[str, Any] = {}

    engine = engine_of(FP8Config(), stage)
    train(engine, data[:4])
    engine.save_checkpoint(ours, tag="step2")
    saved = weights(engine)
    result["keys"] = sorted(key for key in saved if "experts" in key)
    straight = train(engine, data[4:])

    engine = engine_of(FP8Config(), stage)
    train(engine, data[6:])  # so that stale FP8 copies are there to be found
    check_deepspeed_checkpoint(engine, ours)
    engine.load_checkpoint(ours)
    result["restored"] = same(weights(engine), saved)
    result["resumed"] = [straight, train(engine, data[4:])]

    plain = engine_of(None, stage)
    train(plain, data[:2])
    plain.save_checkpoint(theirs, tag="step1")
    engine = engine_of(FP8Config(), stage)
    before = weights(engine)
    result["refused"] = refusal(lambda: check_deepspeed_checkpoint(engine, theirs))
    result["untouched"] = same(weights(engine), before)
    engine.load_checkpoint(theirs, load_optimizer_states=False)
    result["from_plain"] = same(weights(engine), weights(plain))

    plain.load_checkpoint(ours, load_optimizer_states=False)
    result["to_plain"] = same(weights(plain), saved)
    result["refused_plain"] = refusal(lambda: check_deepspeed_checkpoint(plain, ours))

    torch.distributed.barrier()
    copy = folder / f"world{stage}"
    if rank == 0:
        shutil.copytree(ours, copy)
        file = copy / "step2" / "mp_rank_00_model_states.pt"
        state = torch.load(file, weights_only=False)
        torch.save(state | {"dp_world_size": 4}, file)
    torch.distributed.barrier()
    result["world"] = refusal(lambda: check_deepspeed_checkpoint(engine, copy))
    result["absent"] = refusal(lambda: check_deepspeed_checkpoint(engine, folder / "nowhere"))
    result["no_tag"] = refusal(lambda: check_deepspeed_checkpoint(engine, ours, tag="step9"))
    result["late"] = refusal(lambda: replace_deepspeed_experts(plain))
    return result


def qwen_engine(stage: int, **config: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    parallel = {"enabled": True, "autoep_size": 2, "use_grouped_mm": False}
    return initialize(Qwen3MoeForCausalLM(settings), stage, expert_parallel=parallel, **config)


def qwen_train(engine: Any, steps: int) -> list[float]:
    torch.manual_seed(50 + torch.distributed.get_rank() + engine.global_steps)
    losses = []
    for _ in range(steps):
        ids = torch.randint(256, (2, 48)).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def autoep(stage: int) -> dict[str, Any]:
    """SQNR of a Qwen3-MoE's reduced gradients under AutoEP, ours against DeepSpeed's experts."""
    result: dict[str, Any] = {}

    def gathered(engine: Any) -> dict[str, torch.Tensor]:
        parameters = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            return {n: p.detach().clone() for n, p in engine.module.named_parameters()}

    def run(config: FP8Config | None, spoil: bool = False) -> dict[str, torch.Tensor]:
        engine = qwen_engine(stage)
        if config is not None:
            parameters = [id(p) for p in engine.module.parameters()]
            (replaced,) = replace_deepspeed_experts(engine, config=config)
            assert replaced[1:] == ("AutoEP", 2, 128, 128), replaced
            assert parameters == [id(p) for p in engine.module.parameters()]
            if stage == 3:
                cached = FP8Config()
                result["refused"] = refusal(
                    lambda: replace_deepspeed_experts(engine, config=cached)
                )
        before = gathered(engine)
        if spoil:
            experts = engine.module.model.layers[0].mlp.experts
            experts.w1, experts.w3 = experts.w3, experts.w1
        qwen_train(engine, 1)
        if spoil:
            experts.w1, experts.w3 = experts.w3, experts.w1
        after = gathered(engine)
        return {name: before[name] - after[name] for name in before}

    expected = run(None)
    for name, make in (("bf16", FP8Config.bf16), ("fp8", FP8Config)):
        got = run(make(cache_weights=stage < 3))
        result[f"{name}_db"] = worst_sqnr(got, expected)
    swapped = run(FP8Config.bf16(cache_weights=stage < 3), spoil=True)
    result["swapped_db"] = worst_sqnr(swapped, expected)
    return result


def autoep_checkpoint(folder: Path, stage: int) -> list[list[float]]:
    """Losses after a checkpoint: going on, resumed, and resumed with DeepSpeed's own experts."""
    config = FP8Config(cache_weights=stage < 3)
    path = str(folder / f"autoep{stage}")
    settings = BF16 | {"gradient_accumulation_steps": 1}
    losses = []
    for experts in ("going on", "resumed", "plain"):
        engine = qwen_engine(stage, **settings)
        if experts != "plain":
            replace_deepspeed_experts(engine, config=config)
        if experts == "going on":
            qwen_train(engine, 2)
            engine.save_checkpoint(path, tag="step2")
        else:
            check_deepspeed_checkpoint(engine, path)
            engine.load_checkpoint(path)
        losses.append(qwen_train(engine, 2))
    return losses


def main(folder: Path, device: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler then
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Runs are compared bit for bit, and DeepSpeed adds up rows with atomic operations.
        torch.use_deterministic_algorithms(True, warn_only=True)
    limit = datetime.timedelta(seconds=60)
    backend = "nccl" if device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=limit)
    results: dict[str, Any] = {}
    for ep_size in (1, 2):
        for stage in (0, 1, 2):
            results[f"gradients-{stage}-{ep_size}"] = gradients(stage, ep_size)
    for stage in (0, 1, 2):
        results[f"staleness-{stage}"] = staleness(stage)
    for stage in (0, 1, 2):
        results[f"checkpoints-{stage}"] = checkpoints(folder, stage)
    for stage in (0, 1, 2, 3):
        results[f"autoep-{stage}"] = autoep(stage)
        results[f"autoep-checkpoint-{stage}"] = autoep_checkpoint(folder, stage)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
