"""The LoRA memory benchmark at a size that a CPU can run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import lora_memory

TINY = ["--tiny", "--layers", "2", "--seq", "64", "--rank", "8", "--steps", "4"]


def test_the_model_has_the_size_it_says():
    c = lora_memory.QWEN3_30B_A3B
    experts = c["num_experts"] * 3 * c["hidden_size"] * c["moe_intermediate_size"]
    heads = 2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]
    attention = heads * c["head_dim"] * c["hidden_size"]
    router = c["num_experts"] * c["hidden_size"]
    layers = c["num_hidden_layers"] * (experts + attention + router)
    assert layers + 2 * c["vocab_size"] * c["hidden_size"] == pytest.approx(30.5e9, rel=0.01)


def test_it_trains_and_reports(capsys):
    assert lora_memory.main(TINY) == 0
    out = capsys.readouterr().out
    for name in ("tokens_per_s", "experts_GB", "trainable_M", "first_loss", "last_loss"):
        assert name in out
    assert len(out.splitlines()[-1].split()) == 1 + 4


def test_it_fails_when_nothing_is_learned(capsys):
    assert lora_memory.main([*TINY, "--learning-rate", "0"]) == 1
    assert "the loss did not fall" in capsys.readouterr().err


def test_only_updates_train_and_experts_are_bytes():
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**{**lora_memory.TINY, "num_hidden_layers": 1})
    model = lora_memory.build(config, torch.device("cpu"), 8, False)
    kinds = {p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert not any("experts" in n for n, p in model.named_parameters() if not p.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    e, h, i = config.num_experts, config.hidden_size, config.moe_intermediate_size
    assert trainable == e * 8 * (h + 2 * i + i + h)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--steps", "1"], "--steps: expected at least 2, got 1"),
        (["--tiny", "--layers", "0"], "--layers: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        lora_memory.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "needs a GPU"), (["--tiny", "--json", "x"], "there is none")],
)
def test_what_needs_a_gpu_says_so(arguments, message, capsys):
    with pytest.raises(SystemExit):
        lora_memory.main(arguments)
    assert message in capsys.readouterr().err
