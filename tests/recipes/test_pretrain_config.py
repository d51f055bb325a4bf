"""The settings of a run: presets, checks, and the sizes they claim."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fp8moe import FP8Config
from recipes.pretrain.config import Config, UserError, load
from recipes.pretrain.model import LanguageModel
from recipes.pretrain.optimizer import learning_rate
from recipes.pretrain.presets import PRESETS, choose, has_hopper


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_pass_their_own_check(name: str) -> None:
    PRESETS[name].check()
    assert PRESETS[name].d_model % 128 == 0 and PRESETS[name].d_expert % 128 == 0


def test_h100_preset_has_the_promised_size() -> None:
    h100 = PRESETS["h100"]
    assert h100.parameters >= 300e6
    assert h100.steps >= 1000
    assert h100.twins == ("bf16", "fp8")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_count_is_that_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = LanguageModel(PRESETS[name], "fp8")
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameters


@pytest.mark.parametrize("pow2", [True, False])
def test_scales_of_weights_follow_the_option(pow2: bool) -> None:
    with torch.device("meta"):
        model = LanguageModel(Config(pow2_scales=pow2, save="fp8"), "fp8")
    found = {block.moe.experts.config for block in model.blocks}
    expected = FP8Config(pow2_scales=pow2, pow2_weight_scales=pow2, save="fp8")
    assert found == {expected}


def test_default_preset_suits_the_machine() -> None:
    name, _ = choose(None, {})
    assert name == ("h100" if has_hopper() else "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers: expected more than 0, got 0"),
        ({"lr": math.nan}, "--lr: expected more than 0, got nan"),
        ({"lr": math.inf}, "--lr: expected more than 0, got inf"),
        ({"weight_decay": -1.0}, "--weight-decay: expected 0 or more, got -1.0"),
        ({"model": "fp4"}, "--model: expected one of both, fp8, bf16, got fp4"),
        ({"d_model": 100, "heads": 8}, "--d-model: expected a multiple"),
        ({"d_expert": 100}, "--d-expert: expected a multiple of 16, .* got 100"),
        ({"top_k": 9, "experts": 8}, r"--top-k: expected at most --experts \(8\), got 9"),
        ({"warmup_steps": 300, "steps": 300}, "--warmup-steps: expected fewer"),
        ({"valid_fraction": 0.9}, "--valid-fraction: expected 0 to 0.5, got 0.9"),
        ({"min_lr": 2.0}, "--min-lr: expected 0 to 1"),
        ({"beta2": 1.0}, "--beta2: expected 0 to 1"),
        ({"checkpoint_every": -1}, "--checkpoint-every: expected 0 or more, got -1"),
        ({"compile": True, "ep": 2}, "--compile: expected --ep 1, got 2"),
        ({"nudge": 1e-3, "experts": 8, "ep": 2}, "--nudge: expected --ep 1, got 2"),
        ({"nudge": -1e-3}, "--nudge: expected 0 or more, got -0.001"),
    ],
)
def test_check_names_option_and_value(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose("cpu", changes)


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match="--preset: expected one of cpu, h100, got tpu"):
        choose("tpu", {})


def test_cuda_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="sees no GPU here"):
        choose("h100", {})


def test_config_survives_json_types() -> None:
    config = Config(lr=1e-3, data="x")
    assert load(dataclasses.asdict(config)) == config
    with pytest.raises(UserError, match="unknown settings nonsense"):
        load({"nonsense": 1})


def test_learning_rate_warms_up_then_falls_to_its_floor() -> None:
    config = Config(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
