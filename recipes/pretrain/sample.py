"""Text that a trained model writes, byte by byte."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Config
from .data import FILE_END, mixed_seed
from .twin import Twin

PROMPTS = ("def ", "import torch\n", "class ")


def readable(data: bytes) -> str:
    """Bytes as text; what is not UTF-8 becomes a replacement character."""
    return data.decode("utf-8", errors="replace")


@torch.no_grad()
def write_texts(twin: Twin, config: Config) -> list[tuple[str, str]]:
    """(prompt, continuation) for each of PROMPTS, at most ``config.sample_bytes`` bytes each.

    The same seed for both twins: where their texts part, their probabilities do. A text ends where
    the model ends its file.
    """
    twin.model.eval()
    texts = []
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(mixed_seed("sample", config.seed, i))
        texts.append((prompt, _continue(twin, prompt, config, generator)))
    twin.model.train()
    return texts


def _continue(twin: Twin, prompt: str, config: Config, generator: torch.Generator) -> str:
    ids = [FILE_END, *prompt.encode()]
    first = len(ids)
    for _ in range(config.sample_bytes):
        context = torch.tensor([ids[-config.seq_len :]], device=twin.device)
        with twin.autocast():
            logits = twin.model.logits(context)[0, -1]
        chosen = _draw(logits.float().cpu(), config.temperature, generator)
        if chosen == FILE_END:
            break
        ids.append(chosen)
    return readable(bytes(ids[first:]))


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    probabilities = (logits / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
