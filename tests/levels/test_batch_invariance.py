"""Products of one shape: a row alone and the row in any batch are equal bit for bit."""

import pytest
import torch
from backends import with_two_threads_too
from hidden import make_hidden

import mapo_kernels as mk


def run(batch, rows, device, **options):
    """Loss, log-probs and d hidden of some sequences, at a denominator of its own."""
    given = {k: None if v is None else v[rows].to(device) for k, v in batch.items() if k in ROWS}
    head = {"bias": batch["bias"].to(device), "softcap": 5.0, "logit_scale": 0.7, **options}
    weight = batch["weight"].to(device)
    hidden = given["hidden"].requires_grad_()
    logp = mk.token_logprobs_from_hidden(
        hidden, weight, given["ids"], mask=given["mask"], batch_invariant=True, **head
    )
    out = mk.mapo_loss_from_hidden(
        hidden,
        weight,
        given["ids"],
        mask=given["mask"],
        advantages=given["advantages"],
        normalizer=7.0,
        batch_invariant=True,
        **head,
    )
    out.loss.backward()
    return logp, hidden.grad


ROWS = ("hidden", "ids", "mask", "advantages")


@pytest.mark.parametrize("chunk_rows", [8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@with_two_threads_too
def test_a_row_alone_equals_the_row_in_any_batch(dtype, chunk_rows, device):
    batch = make_hidden(9, 5, dtype)
    logp, grad = run(batch, slice(None), device, chunk_rows=chunk_rows)
    for rows in (slice(0, 1), slice(4, 5), slice(8, 9), slice(3, 7)):
        alone, alone_grad = run(batch, rows, device, chunk_rows=chunk_rows)
        assert torch.equal(alone, logp[rows])
        assert torch.equal(alone_grad, grad[rows])


def test_padding_changes_rounding_alone(device):
    batch = make_hidden(4, 5)
    plain, grad = (x.detach() for x in run(batch, slice(None), device, chunk_rows=64))
    again, grad_again = run(batch, slice(None), device, chunk_rows=7)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad_again, grad, rtol=0, atol=1e-5)


def test_products_by_the_weight(device, monkeypatch):
    """One for all chunks where gradients are kept, and in the weight's dtype."""
    from mapo_kernels.head import Head

    if device.type != "cuda":
        mm = torch.mm
        monkeypatch.setattr(
            torch,
            "mm",
            lambda a, b, out_dtype=None: mm(a.float(), b.float()) if out_dtype else mm(a, b),
        )
        monkeypatch.setattr("mapo_kernels.head.mixes_dtypes", lambda weight: True)
    found = []
    original = Head.weight_gradient

    def weight_gradient(self, grad, *rest):
        result = original(self, grad, *rest)
        found.append((grad.shape[0], result.dtype))
        return result

    monkeypatch.setattr(Head, "weight_gradient", weight_gradient)
    batch = make_hidden(4, 5, torch.bfloat16, mask="none")
    run(batch, slice(None), device, chunk_rows=8)
    assert found == []  # a weight that needs no gradient
    batch["weight"].requires_grad_()
    run(batch, slice(None), device, chunk_rows=8)
    assert found == [(24, torch.bfloat16)]  # 20 rows in chunks of 8
