"""The code of docs/sampling_masks.md runs, and gives what it says."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_model import TinyModel, batch_for

import mapo_kernels as mk

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sampling_masks.md").read_text()
SCOPES = []
for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
    SCOPES.append({})
    exec(block, SCOPES[-1])
LOOP, ENGINES, TRL = SCOPES

# Two completions of 3 and 2 tokens.
KEPT = [[[3, 1], [4], [5, 2, 9]], [[6], [7, 0]]]
IDS, COUNTS = [3, 1, 4, 5, 2, 9, 6, 7, 0], [2, 1, 3, 1, 2]


def masked_log_probs(model, batch, kept):
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, -6:-1]
    outside = torch.ones_like(logits, dtype=torch.bool)
    for row, tokens in enumerate(kept):
        outside[row, len(tokens) :] = False
        for n, columns in enumerate(tokens):
            outside[row, n, columns] = False
    logps = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
    return logps.gather(-1, batch["completion_ids"][..., None])[..., 0]


def test_the_loop_of_the_page_is_that_of_dense_logits():
    torch.manual_seed(0)
    model, batch = TinyModel(), batch_for()
    batch["rewards"][:8:2], batch["rewards"][1::2] = 1.0, 0.0
    kept = [
        [[int(y), *((int(y) + k) % 11 for k in range(1, n % 3 + 1))] for n, y in enumerate(row)]
        for row in batch["completion_ids"]
    ]
    kept = [row[: int(n)] for row, n in zip(kept, batch["mask"].sum(1), strict=True)]
    batch["sampling_mask"] = LOOP["sampling_mask_of"](kept, 5)
    live = batch["mask"]
    expected = masked_log_probs(model, batch, kept)
    batch["old_logprobs"] = LOOP["score"](model, batch)
    torch.testing.assert_close(batch["old_logprobs"][live], expected.detach()[live])
    metrics = LOOP["training_step"](model, batch)
    assert metrics["approx_kl"] == 0.0  # the ratio is exactly 1
    found = model.lm_head.weight.grad
    arguments = {"rewards": batch["rewards"], "group_size": 8, "mask": live}
    arguments |= {"old_logprobs": batch["old_logprobs"], "spec": LOOP["spec"]}
    loss = mk.mapo_loss(expected.where(live, 0.0), **arguments).loss
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-7)


def test_what_engines_return_is_one_mask():
    expected = mk.SamplingMask.from_counts(torch.tensor(IDS).int(), torch.tensor(COUNTS))
    outputs = [
        SimpleNamespace(outputs=[SimpleNamespace(sampling_mask=SimpleNamespace(token_ids=rows))])
        for rows in KEPT
    ]
    answers = [{"meta_info": {"output_token_sampling_mask": rows}} for rows in KEPT]
    samples = [
        SimpleNamespace(rollout_top_p_token_ids=ids, rollout_top_p_token_offsets=offsets)
        for ids, offsets in ((IDS[:6], [0, 2, 3, 6]), (IDS[6:], torch.tensor([0, 1, 3]).int()))
    ]
    as_bytes = [np.array(x, np.int32).tobytes() for x in (IDS, COUNTS)]
    sent = SimpleNamespace(ids=as_bytes[0], counts=as_bytes[1])
    scores = torch.full((3, 1, 10), -torch.inf)  # of three steps
    for step, columns in enumerate(KEPT[0]):
        scores[step, 0, columns] = torch.randn(len(columns))
    assert ENGINES["kept_by_vllm"](outputs) == ENGINES["kept_by_sglang"](answers) == KEPT
    padded = LOOP["sampling_mask_of"](KEPT, 3)
    assert padded.counts.tolist() == [*COUNTS, 0] and padded.token_ids.tolist() == IDS
    micro_batch = SimpleNamespace(sampling_mask=sent)
    for mask in (ENGINES["mask_of_slime"](samples), ENGINES["mask_of_prime_rl"](micro_batch)):
        assert all(torch.equal(x, y) for x, y in zip(mask, expected, strict=True))
    mask = ENGINES["mask_of_transformers"](SimpleNamespace(scores=tuple(scores)))
    rows = [x.tolist() for x in mask.token_ids.split(mask.counts.tolist())]
    assert rows == [sorted(columns) for columns in KEPT[0]]


def test_vllm_is_asked_for_masks():
    module = SimpleNamespace(LLM=dict)
    TRL["ask_vllm_for_masks"](module)
    assert module.LLM(model="m") == {"model": "m", "return_sampling_mask": True}


def test_the_page_is_linked_and_shows_the_picture_there_is():
    assert "(docs/sampling_masks.md)" in (ROOT / "README.md").read_text()
    assert "(sampling_masks.md)" in (ROOT / "docs/integrations.md").read_text()
    name = "benchmarks/results/cpu_kept_time_against_kept.png"
    assert f"(../{name})" in PAGE and (ROOT / name).exists()


@pytest.mark.parametrize("case", ("itself", "lost"))
def test_the_table_of_cases(case, monkeypatch):
    logits = torch.randn(1, 2, 11)
    ids = torch.tensor([[4, 5]])
    mask = mk.SamplingMask.from_lists([[4] if case == "itself" else [3, 2], []])
    if case == "itself":
        found, entropy = mk.token_logprobs(logits, ids, sampling_mask=mask, return_entropy=True)
        assert found[0, 0] == entropy[0, 0] == 0.0
        torch.testing.assert_close(found[0, 1], logits[0, 1].log_softmax(-1)[5])
        return
    out = mk.mapo_loss_from_logits(logits, ids, advantages=torch.ones(1), sampling_mask=mask)
    assert out.loss.isnan()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match="got none of 4 for token 0"):
        mk.token_logprobs(logits, ids, sampling_mask=mask)
