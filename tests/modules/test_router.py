"""Router: the choice and the weights against plain loops, the losses, the bias, precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fp8moe.modules import Router

T, H, E, K = 60, 32, 8, 3


def make(device, **options) -> Router:
    options = {"top_k": K, **options}
    router = Router(H, E, **options).to(device)
    with torch.no_grad():
        router.gate.weight.normal_(std=0.5)
    return router


def tokens(device, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(T, H, device=device).to(dtype)


def plain(router: Router, x: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """ids and weights token by token, in Python."""
    scores = x.double() @ router.gate.weight.double().t()
    scores = scores.softmax(1) if router.score_func == "softmax" else scores.sigmoid()
    bias = [0.0] * E if router.expert_bias is None else router.expert_bias.tolist()
    size = E // router.num_groups
    all_ids, all_weights = [], []
    for row in scores.tolist():
        choice = {e: row[e] + bias[e] for e in range(E)}
        best = 2 if router.score_func == "sigmoid" else 1

        def group_score(g, choice=choice, best=best):
            members = sorted((choice[e] for e in range(g * size, (g + 1) * size)), reverse=True)
            return sum(members[:best])

        groups = sorted(range(router.num_groups), key=group_score, reverse=True)
        open_groups = groups[: router.topk_groups]
        eligible = [e for e in choice if e // size in open_groups]
        ids = sorted(eligible, key=lambda e, choice=choice: choice[e], reverse=True)[: router.top_k]
        weights = [row[e] for e in ids]
        if router.renormalize:
            weights = [w / sum(weights) for w in weights]
        all_ids.append(ids)
        all_weights.append([w * router.routed_scaling_factor for w in weights])
    return all_ids, all_weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_choice_and_weights(device, score_func, renormalize, groups, bias):
    router = make(
        device,
        score_func=score_func,
        renormalize=renormalize,
        num_groups=groups[0],
        topk_groups=groups[1],
        routed_scaling_factor=2.5,
        bias_update_speed=0.0 if bias else None,
    )
    if bias:
        router.expert_bias.copy_(torch.linspace(-0.4, 0.4, E))
    x = tokens(device)
    out = router(x)
    ids, weights = plain(router, x)
    assert out.topk_ids.tolist() == ids
    torch.testing.assert_close(out.topk_weights.cpu(), torch.tensor(weights), rtol=1e-5, atol=1e-6)
    assert out.topk_weights.dtype == torch.float32
    counts = torch.bincount(out.topk_ids.flatten(), minlength=E)
    assert torch.equal(out.num_tokens_per_expert, counts)
    if renormalize:
        torch.testing.assert_close(out.topk_weights.sum(1), torch.full((T,), 2.5, device=device))


def test_the_plain_formulas_would_see_a_wrong_rule(device):
    """Negative controls: groups ignored, bias in the weights, no renormalisation."""
    router = make(device, score_func="sigmoid", num_groups=4, topk_groups=2, bias_update_speed=0.0)
    router.expert_bias.copy_(torch.linspace(-0.4, 0.4, E))
    x = tokens(device)
    ids, weights = plain(router, x)
    ungrouped = copy.deepcopy(router)
    ungrouped.num_groups = ungrouped.topk_groups = 1
    assert ungrouped(x).topk_ids.tolist() != ids
    unbiased = copy.deepcopy(router)
    unbiased.expert_bias.zero_()
    assert unbiased(x).topk_ids.tolist() != ids
    raw = copy.deepcopy(router)
    raw.renormalize = False
    assert not torch.allclose(raw(x).topk_weights.cpu(), torch.tensor(weights))


def test_bias_has_no_part_in_weights_or_gradients(device):
    router = make(device, score_func="sigmoid", renormalize=False, bias_update_speed=1e-3)
    x = tokens(device)
    router.expert_bias.fill_(5.0)  # the same for all: no other choice, no other weights
    out = router(x)
    scores = torch.sigmoid(x @ router.gate.weight.t())
    torch.testing.assert_close(out.topk_weights, scores.gather(1, out.topk_ids))
    out.topk_weights.sum().backward()
    assert router.gate.weight.grad.any() and not router.expert_bias.requires_grad


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_gradients(device, score_func):
    """Through the gate and to x, against autograd on the written-out formula."""
    router = make(device, score_func=score_func, balance_loss_coeff=0.1, z_loss_coeff=0.01)
    x = tokens(device).requires_grad_()
    out = router(x)
    upstream = torch.randn_like(out.topk_weights)
    ((out.topk_weights * upstream).sum() + out.aux_loss).backward()

    x2 = x.detach().double().requires_grad_()
    w2 = router.gate.weight.detach().double().requires_grad_()
    logits = x2 @ w2.t()
    scores = logits.softmax(1) if score_func == "softmax" else logits.sigmoid()
    weights = scores.gather(1, out.topk_ids)
    weights = weights / weights.sum(1, keepdim=True)
    shares = torch.bincount(out.topk_ids.flatten(), minlength=E) / (T * K)
    means = (scores / scores.sum(1, keepdim=True)).mean(0)
    balance, z = 0.1 * E * (shares * means).sum(), 0.01 * logits.logsumexp(1).square().mean()
    torch.testing.assert_close(out.balance_loss.double(), balance)
    torch.testing.assert_close(out.z_loss.double(), z)
    ((weights * upstream.double()).sum() + balance + z).backward()
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(router.gate.weight.grad.double(), w2.grad, rtol=1e-4, atol=1e-5)


def test_balance_loss_is_its_coefficient_when_balanced_and_more_when_not(device):
    router = make(device, balance_loss_coeff=0.5)
    with torch.no_grad():
        router.gate.weight.zero_()
    assert float(router(tokens(device)).balance_loss.detach()) == pytest.approx(0.5)
    with torch.no_grad():
        router.gate.weight[0] = 3.0
    skewed = router(tokens(device).abs())
    assert float(skewed.balance_loss.detach()) > 0.5 * E / K * 0.9


def test_losses_are_zero_without_coefficients(device):
    out = make(device)(tokens(device))
    assert float(out.aux_loss) == 0 and out.balance_loss.shape == out.z_loss.shape == ()


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp32_whatever_autocast_says(device, dtype):
    router = make(device, z_loss_coeff=1.0, balance_loss_coeff=1.0)
    x = tokens(device, dtype).requires_grad_()
    plain_out = router(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = router(x)
        (out.topk_weights.square().sum() + out.aux_loss).backward()
    for a, b in zip(out, plain_out, strict=True):
        assert torch.equal(a, b)
    assert out.topk_weights.dtype == out.z_loss.dtype == torch.float32
    assert x.grad.dtype == dtype and router.gate.weight.grad.dtype == torch.float32
    exact = x.detach().double() @ router.gate.weight.detach().double().t()
    exact = exact.softmax(1).topk(K).values
    exact = exact / exact.sum(1, keepdim=True)
    torch.testing.assert_close(out.topk_weights.double(), exact, rtol=1e-5, atol=1e-6)


def test_input_is_kept_in_its_own_dtype(device):
    """The FP32 logits do not keep an FP32 copy of a BF16 input for backward."""
    router, x = make(device), tokens(device, torch.bfloat16).requires_grad_()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        router(x)
    assert [t.dtype for t in saved if t.shape == (T, H)] == [torch.bfloat16]


def test_bias_stays_fp32_when_the_model_is_converted(device):
    router = make(device, score_func="sigmoid", bias_update_speed=1e-3)
    router.expert_bias.copy_(torch.linspace(0, 1e-3, E))
    before = router.expert_bias.clone()
    converted = router.to(torch.bfloat16)
    assert converted.gate.weight.dtype == torch.bfloat16
    assert torch.equal(converted.expert_bias, before)
    moved = copy.deepcopy(router).to("meta").to_empty(device=device)
    assert moved.expert_bias.dtype == torch.float32 and moved.expert_bias.device == before.device


# --------------------------------------------------------------------------------------------- bias


def test_update_bias_moves_against_the_load(device):
    router = make(device, score_func="sigmoid", top_k=2, bias_update_speed=0.1)
    x = tokens(device)
    load = torch.zeros(E)
    for _ in range(3):
        load += router(x).num_tokens_per_expert.cpu()
    assert torch.equal(router.accumulated_load.cpu(), load.long())
    router.update_bias()
    assert torch.equal(router.expert_bias.cpu(), 0.1 * (load.mean() - load).sign())
    assert not router.accumulated_load.any()


def test_bias_balances_a_skewed_router(device):
    router = make(device, score_func="sigmoid", top_k=2, bias_update_speed=0.02)
    x = tokens(device)
    with torch.no_grad():
        router.gate.weight[0] = x.mean(0) * 20
    first = router(x).num_tokens_per_expert
    router.update_bias()
    for _ in range(200):
        last = router(x).num_tokens_per_expert
        router.update_bias()
    assert int(last.max()) < 0.7 * int(first.max())
    assert int(last.max()) <= math.ceil(1.4 * T * 2 / E)


def test_load_counts_in_training_with_gradients_only(device):
    router = make(device, bias_update_speed=0.1)
    x = tokens(device)
    with torch.no_grad():
        router(x)
    router.eval()
    router(x)
    assert not router.accumulated_load.any()
    router.train()
    router(x)
    assert int(router.accumulated_load.sum()) == T * K


def test_update_bias_needs_a_bias(device):
    with pytest.raises(RuntimeError, match="bias_update_speed"):
        make(device).update_bias()


def test_state_dict(device):
    assert set(make(device).state_dict()) == {"gate.weight"}
    router = make(device, bias_update_speed=0.1)
    assert set(router.state_dict()) == {"gate.weight", "expert_bias"}
    router.expert_bias.normal_()
    other = make(device, bias_update_speed=0.1)
    other.load_state_dict(router.state_dict())
    x = tokens(device)
    assert torch.equal(other(x).topk_ids, router(x).topk_ids)


# ------------------------------------------------------------------------------------ jitter, edges


def test_jitter_in_training_only(device):
    router, x = make(device, jitter=0.3), tokens(device)
    assert not torch.equal(router(x).topk_weights, router(x).topk_weights)
    router.eval()
    assert torch.equal(router(x).topk_weights, router(x).topk_weights)
    still = make(device, jitter=0.0)
    assert torch.equal(still(x).topk_weights, still(x).topk_weights)


def test_no_tokens(device):
    router = make(device, balance_loss_coeff=1.0, z_loss_coeff=1.0, bias_update_speed=0.1)
    out = router(tokens(device)[:0].requires_grad_())
    assert out.topk_ids.shape == out.topk_weights.shape == (0, K)
    assert float(out.aux_loss.detach()) == 0
    out.aux_loss.backward()
    assert not router.gate.weight.grad.any()


def test_nan_is_visible(device):
    router, x = make(device, z_loss_coeff=1.0), tokens(device)
    x[3, 0] = float("nan")
    out = router(x)
    assert out.topk_weights[3].isnan().all() and out.z_loss.isnan()
    assert int(out.topk_weights.isnan().any(1).sum()) == 1
    assert ((out.topk_ids >= 0) & (out.topk_ids < E)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_func": "tanh"}, "score_func: expected 'softmax' or 'sigmoid', got 'tanh'"),
        ({"top_k": 9}, "top_k: expected 1 to 8 .*, got 9"),
        ({"top_k": 0}, "top_k: expected 1 to 8 .*, got 0"),
        ({"num_groups": 3}, "num_groups: expected a divisor of 8, got 3"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups: expected 1 to 4, got 5"),
        ({"num_groups": 4, "topk_groups": 1}, "top_k: expected 1 to 2 .*, got 3"),
        ({"jitter": 1.0}, "jitter: expected 0 to 1 .excluded., got 1.0"),
        ({"z_loss_coeff": -1.0}, "z_loss_coeff: expected at least 0, got -1.0"),
        ({"bias_update_speed": -1e-3}, "bias_update_speed: expected at least 0, got -0.001"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(torch.device("cpu"), **options)


def test_bad_input_is_named(device):
    with pytest.raises(ValueError, match=r"x_TH: expected \(T, 32\), got \(2, 30, 32\)"):
        make(device)(tokens(device).view(2, 30, 32))
    with pytest.raises(ValueError, match="x_TH: expected a floating dtype, got torch.int64"):
        make(device)(tokens(device).long())


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 8, 2), "hidden_size"), ((32, 0, 2), "num_experts")]
)
def test_bad_sizes_are_named(sizes, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        Router(*sizes)
