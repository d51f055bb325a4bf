"""FP8Config: defaults, the BF16 twin, and values it refuses."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from fp8moe.config import FP8Config


def test_defaults_are_all_fp8_with_power_of_two_scales():
    config = FP8Config()
    assert config.all_fp8 and config.any_fp8
    assert config.pow2_scales and config.pow2_weight_scales and config.cache_weights
    assert config.save == "bf16"


def test_bf16_twin_has_no_fp8_gemm():
    config = FP8Config.bf16(save="recompute")
    assert not config.any_fp8 and not config.all_fp8
    assert config.save == "recompute"


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_one_gemm_switched_to_bf16(name):
    config = FP8Config(**{name: "bf16"})
    assert config.any_fp8 and not config.all_fp8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fprop", "fp16"),
        ("dgrad", None),
        ("wgrad", True),
        ("pow2_scales", "yes"),
        ("pow2_scales", 1),
        ("pow2_weight_scales", None),
        ("save", "x"),
        ("cache_weights", 0),
    ],
)
def test_wrong_value_names_field_choices_and_value(field, value):
    with pytest.raises(ValueError, match=rf"FP8Config\.{field}: expected .* or .*, got") as error:
        FP8Config(**{field: value})
    assert repr(value) in str(error.value)


def test_replace_checks_again_and_leaves_the_original():
    config = FP8Config()
    assert config.replace(save="fp8").save == "fp8"
    assert config.save == "bf16"
    with pytest.raises(ValueError, match=r"FP8Config\.save"):
        config.replace(save="int8")


def test_frozen_hashable_and_picklable():
    config = FP8Config(wgrad="bf16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.wgrad = "fp8"
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, FP8Config(wgrad="bf16"), FP8Config()}) == 2
