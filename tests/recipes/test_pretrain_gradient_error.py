"""What a rounding does to the gradient: the estimates, and what each rounding may touch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fp8moe import quant
from recipes.pretrain import cli
from recipes.pretrain.config import Config, UserError
from recipes.pretrain.data import Batch
from recipes.pretrain.gradient_error import PARTS, build, gradients, main, measure
from recipes.pretrain.model import LanguageModel

TINY = {
    "layers": 2, "d_model": 128, "heads": 2, "experts": 4, "d_expert": 128, "seq_len": 32,
    "batch_size": 2, "valid_fraction": 0.1,
}  # fmt: skip
CONFIG = Config(**TINY)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LanguageModel(CONFIG, "bf16").state_dict()


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (4, 2, 33), generator=generator)
    return [Batch(t[:, :-1], t[:, 1:].contiguous()) for t in tokens]


def numbered(count: int) -> list[Batch]:
    return [Batch(torch.tensor(i), torch.tensor(i)) for i in range(count)]


def planted(bias: float, along: float, noise: float, size: int = 4096):
    """Two sources of gradients: a mean of 1 with noise of 2, and an error of these parts."""
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(size, generator=generator)
    across = torch.randn(size, generator=generator)
    across -= (across @ mean) / (mean @ mean) * mean
    across *= mean.norm() / across.norm() * math.sqrt(bias**2 - along**2)

    def reference(batch: Batch):
        own = torch.Generator().manual_seed(int(batch.tokens))
        return {"layer.w13": mean + 2 * torch.randn(size, generator=own)}

    def other(batch: Batch):
        own = torch.Generator().manual_seed(10_000 + int(batch.tokens))
        error = along * mean + across + 2 * noise * torch.randn(size, generator=own)
        return {"layer.w13": reference(batch)["layer.w13"] + error}

    return reference, other


@pytest.mark.parametrize(
    ("bias", "along", "noise"), [(0.1, 0.0, 0.05), (0.2, -0.2, 0.0), (0.05, 0.03, 0.2)]
)
def test_planted_errors_are_told_apart(bias: float, along: float, noise: float) -> None:
    found = measure(*planted(bias, along, noise), numbered(64))
    assert list(found) == ["w13"]
    assert found["w13"].bias == pytest.approx(bias, abs=0.012)
    assert found["w13"].along == pytest.approx(along, abs=0.012)
    assert found["w13"].noise == pytest.approx(noise, abs=0.005)


def test_noise_alone_is_no_bias() -> None:
    """The plain norm of a mean over 64 batches would show 2 * 0.2 / 8 = 0.05."""
    error = measure(*planted(0.0, 0.0, 0.2), numbered(64))["w13"]
    assert error.bias < 0.02 and error.noise == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_number_of_batches(count: int) -> None:
    with pytest.raises(UserError, match=f"--batches: expected an even number from 4, got {count}"):
        measure(*planted(0.1, 0.0, 0.1), numbered(count))


@pytest.mark.parametrize(
    ("rounding", "touched"),
    [
        (None, set()),
        ("wgrad", {"w13", "w2"}),
        ("dgrad", set(PARTS)),
        ("x", set(PARTS)),
        ("w2", set(PARTS)),
        ("fp8", set(PARTS)),
    ],
)
def test_parts_that_a_rounding_touches(
    rounding: str | None,
    touched: set[str],
    weights: dict[str, torch.Tensor],
    batches: list[Batch],
) -> None:
    reference, other = build(None, CONFIG, weights), build(rounding, CONFIG, weights)
    found = measure(lambda b: gradients(reference, b), lambda b: gradients(other, b), batches)
    assert tuple(found) == PARTS
    for part, error in found.items():
        if part in touched:
            assert 1e-4 < error.noise < 0.5, part
        else:
            assert error.noise == 0, part


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_a_rounded_weight_is_the_one_of_fp8(name: str, weights: dict[str, torch.Tensor]) -> None:
    rounded = build(name, CONFIG, weights).state_dict()
    for key, value in rounded.items():
        if key.endswith(f".{name}"):
            expected = quant.dequantize(quant.per_block(weights[key].bfloat16()))
            assert torch.equal(value, expected) and not torch.equal(value, weights[key])
        else:
            assert torch.equal(value, weights[key]), key


def test_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    more = ["--steps=2", "--warmup-steps=1", "--sample-bytes=0", "--eval-batches=1"]
    where = ["--runs-dir", str(tmp_path), "--data", str(text), "--preset", "cpu"]
    for name, every in (("whole", "2"), ("bare", "0")):
        run = [*where, "--name", name, "--model", "bf16", f"--checkpoint-every={every}"]
        assert cli.main([*run, *words, *more]) == 0
    capsys.readouterr()

    out = tmp_path / "errors.jsonl"
    few = ["--batches", "4", "--roundings", "fp8", "w13"]
    assert main([str(tmp_path / "whole"), *few, "--json", str(out)]) == 0
    table = capsys.readouterr().out
    assert "fp8" in table and "attention" in table
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["batches"] == 4 and 0 < row["fp8"]["w2"]["noise"] < 0.5
    assert row.keys() == {"run", "batches", "fp8", "w13"}

    for folder, arguments, message in (
        ("bare", few, "expected a checkpoint (--checkpoint-every), found none"),
        ("missing", few, "expected the folder of a run, found no config.json in it"),
        ("whole", ["--batches", "3"], "--batches: expected an even number from 4, got 3"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / folder), *arguments])
        assert message in capsys.readouterr().err
