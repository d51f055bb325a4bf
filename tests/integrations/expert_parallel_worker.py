"""One rank of a model under transformers' own expert parallelism; rank 0 saves what came out."""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import fp8moe.integrations.huggingface  # noqa: F401


def main(model_path: str, input_path: str, output_path: str, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        experts_implementation="fp8moe",
        distributed_config=DistributedConfig(
            tp_size=dist.get_world_size(), enable_expert_parallel=True
        ),
    )
    ids = torch.load(input_path).to(device)
    experts = model.model.layers[0].mlp.experts
    seen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *args: seen.append(args[-1][2]))
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    if dist.get_rank() == 0:
        local = experts.gate_up_proj.to_local().shape[0]
        result = {"logits": output.logits.detach(), "grads": grads, "ids": seen[0], "local": local}
        torch.save(result, output_path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # The interpreter's teardown of library threads has aborted once ("terminate called without an
    # active exception"), after the work was done as far as could be told. It is not what is tested.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
