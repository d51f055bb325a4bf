"""Text that a trained model writes, byte by byte."""

from __future__ import annotations

import torch
from torch import Tensor

import fp8moe

from .config import Config
from .data import FILE_END, mixed_seed
from .twin import Twin

PROMPTS = ("def ", "import torch\n", "class ")


def readable(data: bytes) -> str:
    """Bytes as text; what is not UTF-8 becomes a replacement character."""
    return data.decode("utf-8", errors="replace")


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def write_texts(twin: Twin, config: Config) -> list[tuple[str, str]]:
    """(prompt, continuation) for each of PROMPTS, at most ``config.sample_bytes`` bytes each.

    The same random numbers for both twins. A text ends where the model ends its file. All texts go
    through the model together, padded at the end: attention is causal and every token is cast and
    routed for itself, so what follows a text does not change it.
    """
    texts = [[FILE_END, *prompt.encode()] for prompt in PROMPTS]
    generators = [
        torch.Generator().manual_seed(mixed_seed("sample", config.seed, i))
        for i in range(len(PROMPTS))
    ]
    running = set(range(len(PROMPTS)))
    twin.model.eval()
    for _ in range(config.sample_bytes):
        logits = _next_logits(twin, [text[-config.seq_len :] for text in texts])
        for i in sorted(running):
            chosen = _draw(logits[i], config.temperature, generators[i])
            if chosen == FILE_END:
                running.remove(i)
            else:
                texts[i].append(chosen)
        if not running:
            break
    twin.model.train()
    fp8moe.clear_weight_cache()
    return [
        (prompt, readable(bytes(text[1 + len(prompt) :])))
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]


def _next_logits(twin: Twin, contexts: list[list[int]]) -> Tensor:
    """float32 [len(contexts), 256] on the CPU: scores of the byte after each context."""
    longest = max(len(context) for context in contexts)
    padded = [context + [FILE_END] * (longest - len(context)) for context in contexts]
    with twin.autocast():
        logits = twin.model.logits(torch.tensor(padded, device=twin.device))
    last = torch.tensor([len(context) - 1 for context in contexts], device=twin.device)
    return logits[torch.arange(len(contexts), device=twin.device), last].float().cpu()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    probabilities = (logits / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
