"""Block-FP8 files: stable casts, whole-or-nothing folders, shards, and readers that check."""

from __future__ import annotations

import json

import pytest
import torch

from fp8moe import quant
from fp8moe.quant import checkpoint
from fp8moe.quant.checkpoint import CheckpointReader, CheckpointWriter, staged_directory

pytest.importorskip("safetensors")


def weight(n: int = 256, k: int = 384, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def same(a: quant.FP8Tensor, b: quant.FP8Tensor) -> bool:
    data = torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    return data and torch.equal(a.scale, b.scale)


# ------------------------------------------------------------------------------------------- casts


def at_the_half() -> torch.Tensor:
    """A block whose maximum is rounded down to 224 = 448 / 2."""
    w = torch.full((128, 128), 0.5)
    w[0, 0] = 225.0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [weight, at_the_half, lambda: torch.zeros(128, 256)])
def test_stable_cast_survives_a_copy(make, dtype):
    w = make()
    first = checkpoint.stable_per_block(w)
    values = quant.dequantize(first)
    assert torch.equal(values, quant.dequantize(quant.per_block(w)))
    assert same(checkpoint.stable_per_block(values.to(dtype)), first)


def test_a_plain_cast_does_not_survive_it():
    """Why stable_per_block is there."""
    first = quant.per_block(at_the_half())
    assert not same(quant.per_block(quant.dequantize(first)), first)


def test_experts_are_cast_like_matrices():
    w = torch.stack([weight(seed=s) for s in range(3)])
    together = checkpoint.stable_per_block(w)
    for e in range(3):
        one = quant.FP8Tensor(together.data[e], together.scale[e])
        assert same(one, checkpoint.stable_per_block(w[e]))


# ------------------------------------------------------------------------------------------- config


def test_config_round_trip():
    config = checkpoint.quantization_config(["lm_head", "a.b"])
    assert config["modules_to_not_convert"] == ["a.b", "lm_head"]
    checkpoint.check_quantization_config(json.loads(json.dumps(config)))
    checkpoint.check_quantization_config({"quant_method": "fp8", "weight_block_size": (128, 128)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: expected 'fp8', got 'awq'"),
        (
            {"weight_block_size": [64, 128]},
            r"weight_block_size: expected \[128, 128\], got \[64, 128\]",
        ),
        ({"weight_block_size": None}, "weight_block_size: expected"),
        ({"activation_scheme": "static"}, "activation_scheme: expected 'dynamic'"),
        ({"fmt": "e5m2"}, "fmt: expected 'e4m3'"),
    ],
)
def test_other_formats_are_refused(change, message):
    config = {**checkpoint.quantization_config([]), **change}
    with pytest.raises(ValueError, match=message):
        checkpoint.check_quantization_config(config)
    with pytest.raises(ValueError, match="without one"):
        checkpoint.check_quantization_config(None)


# -------------------------------------------------------------------------------------------- files


def write(directory, limit: int = 2**30) -> dict[str, torch.Tensor]:
    tensors = {
        "norm.weight": torch.randn(64, dtype=torch.bfloat16),
        "bias": torch.randn(3),
        "steps": torch.tensor(7),
    }
    with staged_directory(directory) as partial:
        writer = CheckpointWriter(partial, limit)
        for e in range(4):
            w = quant.per_block(weight(seed=e))
            writer.add_fp8(f"experts.{e}.weight", w)
            tensors[f"experts.{e}.weight"] = w.data
            tensors[f"experts.{e}.weight_scale_inv"] = w.scale
        for name in ("norm.weight", "bias", "steps"):
            writer.add(name, tensors[name])
        writer.close()
    return tensors


@pytest.mark.parametrize(("limit", "files"), [(2**30, 1), (250_000, 2), (1, 11)])
def test_shards_hold_what_was_written(tmp_path, limit, files):
    tensors = write(tmp_path / "out", limit)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    shards = {n for n in names if n.endswith(".safetensors")}
    assert len(shards) == files
    if files == 1:
        assert names == {"model.safetensors"}
    else:
        assert f"model-00001-of-{files:05d}.safetensors" in shards
        index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
        assert set(index["weight_map"]) == set(tensors)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        assert index["metadata"]["total_size"] == total
        sizes = [(tmp_path / "out" / s).stat().st_size for s in shards]
        assert max(sizes) <= max(limit, 256 * 384) + 4096
    reader = CheckpointReader(tmp_path / "out")
    assert set(reader.entries) == set(tensors)
    for name, tensor in tensors.items():
        bits = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
        assert torch.equal(reader.read(name).view(bits), tensor.view(bits))
    assert reader.fp8_problem("experts.0.weight", (256, 384)) is None
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path):
    whole = torch.randn(1000, 64)
    with staged_directory(tmp_path / "out") as partial:
        writer = CheckpointWriter(partial, 2**30)
        writer.add("row", whole[3])
        writer.close()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 1000


def test_a_name_is_written_once(tmp_path):
    writer = CheckpointWriter(tmp_path, 2**30)
    writer.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="a: written twice"):
        writer.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="max_shard_bytes: expected a positive integer, got 0"):
        CheckpointWriter(tmp_path, 0)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="midway"):
        with staged_directory(tmp_path / "deep" / "out") as partial:
            (partial / "half").write_text("x")
            raise RuntimeError("midway")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "empty folder", "checkpoint"])
def test_nothing_is_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "empty folder":
        out.mkdir()
    else:
        write(out)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="where nothing is yet"):
        write(out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_folders_that_are_not_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        CheckpointReader(tmp_path)
    write(tmp_path / "out", 250_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{files[1].name}: not a whole safetensors file"):
        CheckpointReader(tmp_path / "out")
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {files[1].name}"):
        CheckpointReader(tmp_path / "out")
    files[1].write_bytes(whole)
    index = tmp_path / "out" / checkpoint.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["norm.weight"] = files[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"norm\.weight is said to be in .*00001.*, but is in"):
        CheckpointReader(tmp_path / "out")


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({}, "w: missing"),
        ({"w": torch.zeros(256, 384)}, "w: expected dtype F8_E4M3, got F32"),
        ({"w": quant.per_block(weight(128)).data}, r"w: expected shape \(256, 384\)"),
        ({"w": quant.per_block(weight()).data}, "w_scale_inv: missing"),
        (
            {"w": quant.per_block(weight()).data, "w_scale_inv": torch.ones(2, 3).double()},
            "w_scale_inv: expected dtype F32 or BF16 or F16, got F64",
        ),
        (
            {"w": quant.per_block(weight()).data, "w_scale_inv": torch.ones(4, 6)},
            r"w_scale_inv: expected shape \(2, 3\) for 128 x 128 blocks",
        ),
        (
            {"w": quant.per_block(weight()).data, "w_scale_inv": torch.full((2, 3), torch.nan)},
            "w_scale_inv: expected finite scales",
        ),
    ],
)
def test_what_is_wrong_with_a_weight(tmp_path, entries, problem):
    writer = CheckpointWriter(tmp_path, 2**30)
    writer.add("other", torch.zeros(1))
    for name, tensor in entries.items():
        writer.add(name, tensor)
    writer.close()
    found = CheckpointReader(tmp_path).fp8_problem("w", (256, 384))
    assert found is not None
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(found)
