"""The fine-tuning recipe: the runs of its README, what they leave, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers  # noqa: E402

from recipes.finetune_hf import finetune, output, training  # noqa: E402
from recipes.finetune_hf.cli import main  # noqa: E402
from recipes.finetune_hf.settings import QWEN3_MOE, choose  # noqa: E402
from recipes.pretrain.config import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]
README = ROOT / "recipes" / "finetune_hf" / "README.md"
QUICK = ["--preset", "cpu", "--steps", "4", "--warmup-steps", "1", "--log-every", "2",
         "--seq-len", "32", "--batch-size", "4", "--eval-sequences", "4",
         "--valid-fraction", "0.2"]  # fmt: skip


@pytest.fixture
def arguments(text, tmp_path):
    return [*QUICK, "--data", str(text), "--output", str(tmp_path / "run")]


# ------------------------------------------------------------------------------ the README's runs


def readme_runs():
    """name -> (command, expected lines) of the blocks marked for running."""
    pattern = r"<!-- run: (\w+) -->\n```\n\$ (.*)\n((?s:.*?))```"
    found = re.findall(pattern, README.read_text(encoding="utf-8"))
    return {name: (command, expected.splitlines()) for name, command, expected in found}


def masked(line):
    """A line without what differs from machine to machine: numbers, versions, column widths."""
    line = re.sub(r"torch \S+", "torch #", line)
    return " ".join(re.sub(r"\d[\d.,]*", "#", line).split())


def losses(lines):
    values = [re.search(r"held-out loss (before|after) ([\d.]+)", line) for line in lines]
    return {found[1]: float(found[2]) for found in values if found}


def differences(got, expected):
    """What of a run's output is not what the README shows."""
    got = [line for line in got if not re.match(r"\[\d{4}-", line)]  # a library's log
    found = [
        f"expected {e!r}, got {g!r}"
        for e, g in zip(expected, got, strict=False)
        if masked(e) != masked(g)
    ]
    if len(got) != len(expected):
        found.append(f"expected {len(expected)} lines, got {len(got)}")
    ours, theirs = losses(got), losses(expected)
    for name, tolerance in (("before", 0.02), ("after", 0.05)):
        if not abs(ours.get(name, 0) - theirs[name]) <= tolerance * theirs[name]:
            found.append(f"loss {name}: expected about {theirs[name]}, got {ours.get(name)}")
    return found


def type_in(command, folder):
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_runs_of_the_readme(tmp_path):
    pytest.importorskip("peft")
    runs = readme_runs()
    assert list(runs) == ["full", "lora"]
    for command, expected in runs.values():
        assert differences(type_in(command, tmp_path), expected) == []

    full = json.loads((tmp_path / "runs/finetune_hf/report.json").read_text())["runs"]["fp8"]
    lora = json.loads((tmp_path / "runs/lora/report.json").read_text())["runs"]["fp8"]
    assert full["loss_after"] < 0.6 * full["loss_before"]
    assert lora["loss_after"] < lora["loss_before"] - 0.02
    # The second run began where the first ended, but for the rounding of frozen experts to FP8.
    assert lora["loss_before"] == pytest.approx(full["loss_after"], abs=5e-3)
    assert full["tokens_per_s"] > 100 and full["peak_memory_bytes"] > 1e8
    assert lora["trainable"] < 0.3 * lora["parameters"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/finetune_hf/model")


def test_the_comparison_with_the_readme_can_fail():
    _, expected = readme_runs()["full"]
    assert differences(expected, expected) == []
    assert differences(["[2026-01-01 00:00:00,000] [WARNING] a library", *expected], expected) == []
    assert differences(expected[:-1], expected)
    assert differences([expected[0].replace("files", "folders"), *expected[1:]], expected)
    at = next(i for i, line in enumerate(expected) if "loss after" in line)
    for loss in ("3.1600", "nan"):
        line = re.sub(r"[\d.]+$", loss, expected[at])
        assert differences([*expected[:at], line, *expected[at + 1 :]], expected)


# ------------------------------------------------------------------------------- what a run leaves


def test_both_precisions_and_the_fp8_export(arguments, tmp_path, capsys):
    assert main([*arguments, "--experts", "both", "--export-fp8"]) == 0
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["fp8", "model", "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    report = json.loads((folder / "report.json").read_text())
    assert list(report["runs"]) == ["bf16", "fp8"]
    assert report["settings"]["experts"] == "both" and len(report["data"]["sha256"]) == 64
    bf16, fp8 = report["runs"].values()
    # The same weights and batches: different only by precision, but different.
    assert fp8["loss_before"] == pytest.approx(bf16["loss_before"], rel=1e-3)
    assert fp8["losses"][0][0] == 2 and fp8["losses"][0][1] != bf16["losses"][0][1]
    assert fp8["losses"][0][1] == pytest.approx(bf16["losses"][0][1], rel=2e-2)
    for run in (bf16, fp8):
        assert run["loss_after"] < run["loss_before"]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    config = json.loads((folder / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    dequantized = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "fp8", quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    ids = torch.arange(64)[None]
    logits = model(ids).logits, dequantized(ids).logits
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.05
    assert "loss after" in capsys.readouterr().out


def test_training_goes_on_from_what_a_run_left(arguments, tmp_path):
    pytest.importorskip("peft")
    assert main([*arguments, "--full", "--export-fp8"]) == 0
    first = json.loads((tmp_path / "run" / "report.json").read_text())["runs"]["fp8"]
    for source, mode, made in (
        ("model", "--lora", ["adapters", "fp8", "report.json"]),
        ("fp8", "--lora", ["adapters", "fp8", "report.json"]),
        ("fp8", "--full", ["model", "report.json"]),
    ):
        folder = tmp_path / f"{source}{mode}"
        more = ["--model", str(tmp_path / "run" / source), mode, "--output", str(folder)]
        more += ["--dtype", "float32", "--grad-accumulation", "1"]
        assert main([*arguments, *more]) == 0
        assert sorted(path.name for path in folder.iterdir()) == made
        run = json.loads((folder / "report.json").read_text())["runs"]["fp8"]
        assert run["loss_before"] == pytest.approx(first["loss_after"], abs=0.02)
        assert run["parameters"] == first["parameters"]  # frozen FP8 weights count too
        if mode == "--lora":
            experts = folder / "adapters" / "experts" / "adapter_model.safetensors"
            attention = folder / "adapters" / "attention" / "adapter_model.safetensors"
            assert experts.stat().st_size > 1e4 and attention.stat().st_size > 1e4


def test_lora_trains_attention_and_experts_and_nothing_else():
    pytest.importorskip("peft")
    from recipes.finetune_hf.models import load_model, use_fp8_experts

    settings = choose("cpu", {"mode": "lora"})
    model = load_model(settings)
    use_fp8_experts(model)
    model = finetune._attach_adapters(model, settings)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1 if "experts" in name else -3] for name in trained} == {
        "lora_A", "lora_B"
    }  # fmt: skip
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "experts.w13_lora", "experts.w2_lora"):  # fmt: skip
        assert sum(part in name for name in trained) == 2 * 2  # A and B in two layers
    assert len(trained) == 2 * 2 * 6


def test_a_model_with_a_tokenizer(arguments, tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    model_folder = tmp_path / "words"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train([str(file) for file in text.glob("*.py")], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    ).save_pretrained(model_folder)
    config = transformers.Qwen3MoeConfig(**{**QWEN3_MOE["cpu"], "vocab_size": 400})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model_folder)
    assert main([*arguments, "--model", str(model_folder), "--full", "--lr", "1e-3"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["tokens"] != "bytes"
    assert report["runs"]["fp8"]["loss_after"] < report["runs"]["fp8"]["loss_before"] < 6.5
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


# -------------------------------------------------------------------------------- what is refused


def refused(arguments, capsys):
    """The message of a run that ends with 2."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    return error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps: expected more than 0, got 0"),
        (["--lr", "nan"], "--lr: expected more than 0, got nan"),
        (["--warmup-steps", "9"], r"--warmup-steps: expected 0 to 3 \(--steps 4\), got 9"),
        (["--lora", "--experts", "bf16"], "--experts bf16: with --lora the experts are frozen"),
        (["--experts", "bf16", "--export-fp8"], "--export-fp8: expected --experts fp8 or both"),
        (["--model", "no/such/folder"], "--model: cannot load no/such/folder"),
        (["--data", "no/such/text"], "--data: no such file or folder"),
        (["--seq-len", "1000000"], "--data: too little text"),
        (["--lora", "--lora-rank", "12"], "--lora-rank: expected a multiple of 8, got 12"),
    ],
)
def test_impossible_requests_write_nothing(arguments, tmp_path, capsys, more, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.search(message, refused([*arguments, *more], capsys))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    message = refused([*arguments, "--output", str(tmp_path / "file" / "run")], capsys)
    assert f"--output: cannot write to {tmp_path / 'file'}" in message


def test_short_runs_warm_up_shorter_unless_told_otherwise():
    assert choose("cpu", {}).warmup_steps == 5
    assert choose("cpu", {"steps": 3}).warmup_steps == 2
    with pytest.raises(UserError, match="--warmup-steps: expected 0 to 2"):
        choose("cpu", {"steps": 3, "warmup_steps": 3})


def test_experts_that_fp8moe_does_not_support(arguments, tmp_path, capsys):
    config = transformers.GptOssConfig(
        num_hidden_layers=1, num_local_experts=4, hidden_size=128, intermediate_size=128,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, vocab_size=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt")
    message = refused([*arguments, "--model", str(tmp_path / "gpt"), "--full"], capsys)
    assert "expert layers that fp8moe cannot replace" in message
    assert not (tmp_path / "run").exists()


def test_missing_packages(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    message = refused([*arguments, "--lora"], capsys)
    assert "this needs peft: pip install 'fp8moe[hf,train]'" in message
    assert main(arguments) == 0  # without adapters there is no need of it


def test_runs_are_not_overwritten_unasked(arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "holds no report.json" in refused([*arguments, "--overwrite"], capsys)
    assert (folder / "thesis.txt").read_text() == "mine"
    (folder / "thesis.txt").unlink()
    assert main(arguments) == 0
    before = (folder / "report.json").read_text()
    assert "holds a run already" in refused(arguments, capsys)
    assert (folder / "report.json").read_text() == before
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert json.loads((folder / "report.json").read_text())["settings"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_fails_leaves_the_old_one(arguments, tmp_path, monkeypatch):
    assert main(arguments) == 0
    before = (tmp_path / "run" / "report.json").read_text()

    def fails(*_):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(training.Trainer, "train", fails)
    with pytest.raises(RuntimeError, match="on fire"):
        main([*arguments, "--overwrite"])
    assert (tmp_path / "run" / "report.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="holds no report.json"):
        with output.new_folder(tmp_path / "run", overwrite=False):
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()


def test_one_process_with_one_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="expected one GPU, found 2; set CUDA_VISIBLE_DEVICES"):
        choose("h100", {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="expected one process"):
        choose("cpu", {})


def test_defaults():
    assert choose("cpu", {}).precisions == ("fp8",) and not choose("cpu", {}).lora
    assert choose("cpu", {"model": "x"}).lora and choose("cpu", {"model": "x"}).lr == 2e-4
    full = choose("cpu", {"model": "x", "mode": "full"})
    assert not full.lora and full.lr == 1e-5 and full.dtype == "float32"
    assert choose("cpu", {"model": "x", "lr": 1e-3}).lr == 1e-3
    assert choose("cpu", {"mode": "lora"}).lr == choose("cpu", {}).lr


@pytest.mark.gpu
def test_both_precisions_on_the_gpu(arguments, tmp_path):
    more = ["--device", "cuda", "--dtype", "bfloat16", "--experts", "both"]
    assert main([*arguments, *more]) == 0
    runs = json.loads((tmp_path / "run" / "report.json").read_text())["runs"]
    assert runs["fp8"]["loss_after"] < runs["fp8"]["loss_before"]
    assert runs["fp8"]["loss_before"] == pytest.approx(runs["bf16"]["loss_before"], rel=1e-2)
