"""Every loss function against the oracle, over the whole space of its arguments."""

from batches import hidden_batches, logits_batches, logprob_batches
from calls import check_loss


def test_mapo_loss(device, search):
    search(lambda batch: check_loss(batch, device), logprob_batches(device), examples=60)


def test_mapo_loss_from_logits(device, search):
    search(lambda batch: check_loss(batch, device), logits_batches(device), examples=60)


def test_mapo_loss_from_hidden(device, search):
    search(lambda batch: check_loss(batch, device), hidden_batches(device), examples=60)
