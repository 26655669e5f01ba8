"""Banks of classifiers: gradients, steps of SGD, and attention, each against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from mocov3_ds.evaluation.probe_banks import (
    AttentiveBank,
    HeadBank,
    attentive_logits,
    count_attention_heads,
)

RATES = (0.1, 3.0, 40.0)


def test_gradients_equal_autograd() -> None:
    torch.manual_seed(0)
    bank = HeadBank(*(torch.randn(s, dtype=torch.float64) for s in [(2, 5, 7), (2, 5)] * 2))
    x, labels = torch.randn(9, 7, dtype=torch.float64), torch.randint(5, (9,))
    weight = bank.weight_LCD.clone().requires_grad_()
    bias = bank.bias_LC.clone().requires_grad_()
    losses = [F.cross_entropy(x @ weight[i].T + bias[i], labels, reduction="sum") for i in range(2)]
    sum(losses).backward()
    grads = torch.zeros_like(bank.weight_LCD), torch.zeros_like(bank.bias_LC)
    for part in (slice(0, 4), slice(4, 9)):  # micro-batches add up
        bank.add_gradient(x[part], labels[part], *grads)
    torch.testing.assert_close(grads[0], weight.grad)
    torch.testing.assert_close(grads[1], bias.grad)
    again = bank.add_gradient(x, labels, *grads)
    torch.testing.assert_close(again, torch.stack(losses).detach())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_head_equals_torchs_sgd(decay: float) -> None:
    bank = HeadBank.start(len(RATES), 4, 6, seed=1)
    rate_L = torch.tensor(RATES)
    layers = []
    for rate in RATES:
        layer = torch.nn.Linear(6, 4)
        layer.weight.data, layer.bias.data = bank.weight_LCD[0].clone(), bank.bias_LC[0].clone()
        layers.append((layer, torch.optim.SGD(layer.parameters(), rate, 0.9, weight_decay=decay)))
    torch.manual_seed(2)
    for _ in range(6):
        x, labels = torch.randn(8, 6), torch.randint(4, (8,))
        grads = torch.zeros_like(bank.weight_LCD), torch.zeros_like(bank.bias_LC)
        bank.add_gradient(x, labels, *grads)
        bank.step(grads[0] / 8, grads[1] / 8, rate_L=rate_L, momentum=0.9, weight_decay=decay)
        for layer, sgd in layers:
            sgd.zero_grad()
            F.cross_entropy(layer(x), labels).backward()
            sgd.step()
    for head, (layer, _) in enumerate(layers):
        torch.testing.assert_close(bank.weight_LCD[head], layer.weight, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(bank.bias_LC[head], layer.bias, atol=2e-5, rtol=1e-4)


def random_attentive_bank(rates: int, classes: int, dim: int) -> AttentiveBank:
    torch.manual_seed(3)
    bank = AttentiveBank.start(rates, classes, dim, seed=0)
    return AttentiveBank(*(torch.randn_like(x, dtype=torch.float64) for x in vars(bank).values()))


def test_attention_is_that_of_one_query_with_a_key_and_a_value_projection() -> None:
    bank = random_attentive_bank(2, 5, 128)
    assert bank.query_LHD.shape == (2, 2, 128)
    x_BND = torch.randn(3, 7, 128, dtype=torch.float64)
    x = F.layer_norm(x_BND, (128,))
    for rate in range(2):
        # a query and a key projection whose product is the vector that the bank learns
        q, key, value = torch.ones(1, 1, 128).double(), torch.zeros(128, 128).double(), []
        for head in range(2):
            rows = slice(64 * head, 64 * (head + 1))
            key[rows] = bank.query_LHD[rate, head] / 64 * 64**0.5 * 128**-0.5
            value.append(bank.value_LHED[rate, head])
        k, v = x @ key.T, x @ torch.cat(value).T
        heads = [t.view(t.shape[0], -1, 2, 64).transpose(1, 2) for t in (q.expand(3, 1, 128), k, v)]
        pooled = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 128)
        expected = pooled @ bank.weight_LCD[rate].T + bank.bias_LC[rate]
        torch.testing.assert_close(bank.logits(x_BND)[rate], expected)


def test_attentive_gradients_are_summed_over_images_and_apart_for_each_rate() -> None:
    bank = random_attentive_bank(2, 5, 8)
    x, labels = torch.randn(9, 4, 8, dtype=torch.float64), torch.randint(5, (9,))
    grads = [torch.zeros_like(weight) for weight in bank.weights]
    losses = sum(bank.add_gradient(x[p], labels[p], *grads) for p in (slice(0, 4), slice(4, 9)))
    for rate in range(2):
        alone = [w[rate : rate + 1].clone().requires_grad_() for w in bank.weights]
        loss = F.cross_entropy(attentive_logits(alone, x)[0], labels, reduction="sum")
        torch.testing.assert_close(losses[rate], loss.detach())
        for total, expected in zip(grads, torch.autograd.grad(loss, alone), strict=True):
            torch.testing.assert_close(total[rate : rate + 1], expected)
    assert not any(weight.requires_grad for weight in bank.weights)
    before = [w.clone() for w in bank.weights]
    rate_L = torch.tensor([0.0, 0.5]).double()
    bank.step(*grads, rate_L=rate_L, momentum=0.0, weight_decay=0.0)
    for weight, old, gradient in zip(bank.weights, before, grads, strict=True):
        assert torch.equal(weight[0], old[0])
        torch.testing.assert_close(weight[1], old[1] - 0.5 * gradient[1])


def test_an_attentive_classifier_starts_as_a_linear_one_of_the_mean() -> None:
    bank = AttentiveBank.start(3, 4, 32, seed=0)
    x_BND = torch.randn(5, 6, 32)
    mean_BD = F.layer_norm(x_BND, (32,)).mean(1)
    expected = HeadBank.start(3, 4, 32, seed=0).logits(mean_BD)
    torch.testing.assert_close(bank.logits(x_BND), expected)


@pytest.mark.parametrize(
    ("dim", "heads"), [(8, 1), (192, 3), (384, 6), (768, 12), (2048, 8), (97, 1)]
)
def test_heads_divide_the_width(dim: int, heads: int) -> None:
    assert count_attention_heads(dim) == heads
