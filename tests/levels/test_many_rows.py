"""Logits of many rows, whose common numbers three launches find out, against those of few rows."""

import pytest
import torch
from support import AGGREGATIONS, NAN, assert_close, make_logits, tune

import mapo_kernels as mk

N_SEQUENCES, LENGTH = 4, 3
REWARDS = torch.tensor([1.0, 0.0, 0.5, NAN])
SIGNALS = {
    "rewards": {"rewards": REWARDS, "group_size": 2},
    "ids": {"rewards": REWARDS, "group_ids": torch.tensor([7, 3, 3, 7])},
    "advantages": {"advantages": torch.tensor([1.0, 0.0, -0.5, 2.0])},
    "of tokens": {"advantages": torch.linspace(-1, 1, 12).reshape(4, 3)},
}


def run(layout, signal, spec, device, normalizer=None):
    torch.manual_seed(0)
    batch = make_logits(N_SEQUENCES, LENGTH, 40, torch.float32, mask="random")
    tensors = {"old_logprobs": batch["old"], "mask": batch["mask"], "token_ids": batch["ids"]}
    given = dict(SIGNALS[signal])
    logits = batch["logits"]
    if layout == "packed":
        # The third sequence has no token, and some tokens lie in no sequence.
        given["cu_seqlens"] = torch.tensor([1, 4, 9, 9, 11], dtype=torch.int32)
        logits = logits.flatten(0, 1)
        tensors = {name: x.flatten() for name, x in tensors.items()}
        if signal == "of tokens":
            given["advantages"] = given["advantages"].flatten()
    given = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x
        for name, x in (given | tensors).items()
    }
    logits = logits.detach().to(device).requires_grad_()
    out = mk.mapo_loss_from_logits(
        logits, given.pop("token_ids"), spec=spec, normalizer=normalizer, **given
    )
    out.loss.backward()
    return out, logits.grad


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_many_rows_equal_few(layout, signal, aggregation, device, monkeypatch):
    needs_length = layout == "packed" and aggregation == "seq-mean-token-sum-norm"
    spec = mk.LossSpec(
        aggregation=aggregation, entropy_coef=0.1, max_tokens=7 if needs_length else None
    )
    for normalizer in (None, 3.0):
        few, grad = run(layout, signal, spec, device, normalizer)
        with monkeypatch.context() as patch:
            tune(patch, "LOGITS", fused_rows=0)
            many, many_grad = run(layout, signal, spec, device, normalizer)
            if normalizer is None:
                again, grad_again = run(layout, signal, spec, device)
                assert torch.equal(again.loss, many.loss) and torch.equal(grad_again, many_grad)
        assert torch.equal(many_grad, grad)
        assert torch.equal(many.advantages, few.advantages)
        assert_close(many.loss, few.loss, 1e-6)
        assert set(many.metrics) == set(few.metrics)
        for name, value in few.metrics.items():
            assert_close(many.metrics[name], value, 1e-6)
