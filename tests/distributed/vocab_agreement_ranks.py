"""What the ranks of `test_vocab_agreement.py` do: calls with a `vocab_group` that differ."""

import torch
import torch.distributed as dist
from agreement_ranks import is_odd, outcome

import mapo_kernels as mk

WIDTH = 4


class Calls:
    """The calls that take rows split over ranks, each with some of its arguments changed."""

    def __init__(self, backend):
        mk.set_backend(backend)
        self.group = dist.new_group()

    def given(self, rows=6, ids=(), masked=(), temperature=1.0, spec=None, advantages=(1.0, -1.0),
              **rest):  # fmt: skip
        """Arguments that all three calls take, those of the losses, and tensors."""
        torch.manual_seed(0)
        token_ids = torch.zeros(2, rows, dtype=torch.long)
        token_ids[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask = torch.ones(2, rows)
        for where in masked:
            mask[where] = 0
        columns = 5 + dist.get_rank()
        self.hidden_states = torch.randn(2, rows, WIDTH)
        self.weight, self.columns = torch.randn(columns, WIDTH), torch.randn(2, rows, columns)
        if isinstance(temperature, tuple):
            temperature = torch.tensor(temperature)
        common = {"mask": mask, "temperature": temperature, "vocab_group": self.group}
        losses = {"spec": spec or mk.LossSpec(), "advantages": torch.tensor(advantages), **rest}
        return token_ids, common, losses

    def hidden(self, hidden_grad=True, weight_grad=True, chunk_rows=5, logit_scale=1.0, **changes):
        """Loss and gradients from hidden states."""
        ids, common, losses = self.given(**changes)
        hidden = self.hidden_states.requires_grad_(hidden_grad)
        weight = self.weight.requires_grad_(weight_grad)
        options = {"chunk_rows": chunk_rows, "logit_scale": logit_scale}
        out = mk.mapo_loss_from_hidden(hidden, weight, ids, **common, **losses, **options)
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        return out.loss.detach(), *(torch.autograd.grad(out.loss, leaves) if leaves else ())

    def logits(self, logits_grad=True, **changes):
        """Loss and gradient from logits."""
        ids, common, losses = self.given(**changes)
        logits = self.columns.requires_grad_(logits_grad)
        out = mk.mapo_loss_from_logits(logits, ids, **common, **losses)
        return out.loss.detach(), *(torch.autograd.grad(out.loss, [logits]) if logits_grad else ())

    def scores(self, return_entropy=False, **changes):
        """Log-probs from logits."""
        ids, common, _ = self.given(**changes)
        found = mk.token_logprobs(self.columns, ids, return_entropy=return_entropy, **common)
        return ((found[0] if return_entropy else found).sum(),)

    def hidden_scores(self, chunk_rows=5, return_entropy=False, **changes):
        """Log-probs from hidden states."""
        ids, common, _ = self.given(**changes)
        options = {"chunk_rows": chunk_rows, "return_entropy": return_entropy}
        found = mk.token_logprobs_from_hidden(
            self.hidden_states, self.weight, ids, **common, **options
        )
        return ((found[0] if return_entropy else found).sum(),)


def told_later(backend, function, changes, other):
    """What this rank is told when the last one calls otherwise, both calls having been agreed on.

    `other` is the function that the last rank calls instead, or None.
    """
    calls = Calls(backend)
    base = getattr(calls, function)
    changed = getattr(calls, other or function)
    for _ in range(2):
        expected = base()[0]
        assert expected.isfinite() and changed(**changes)[0].isfinite()
    told = outcome(lambda: changed(**changes) if is_odd() else base())
    # And every rank is where the others are.
    assert base()[0] == expected
    return told


def told_first(backend, function, one, other):
    """What this rank is told by its first call with a group."""
    calls = Calls(backend)
    return outcome(lambda: getattr(calls, function)(**(other if is_odd() else one)))


def two_vocabularies(backend):
    """Two splits over the same ranks, of which some ranks have equal shares, by one group."""
    calls, ids, mask = Calls(backend), torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    for extra in (0, 3, 0):
        columns = 2 + extra * is_odd()
        logp = mk.token_logprobs(
            torch.zeros(1, 3, columns), ids, mask=mask, vocab_group=calls.group
        )
        vocab = 2 * dist.get_world_size() + extra
        assert torch.allclose(logp, -torch.tensor(float(vocab)).log())
