"""The whole expert layer: how long it takes, where the time goes, what it holds in memory.

    python -m benchmarks.layer
    python -m benchmarks.layer --shape qwen3 --parts time kernels --json results/layer.jsonl
    python -m benchmarks.layer --quick --plot layer.png

fp8moe (each way of saving the hidden activation) and a torch BF16 layer (`grouped_mm`) are timed
alternately in one run, with the same routing, weights and gradient. README.md in this folder says
what each figure means.
"""
