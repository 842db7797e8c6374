"""Runs a drawn call in the package and holds what comes back against the oracle."""

from dataclasses import dataclass

import torch
from advantage_oracle import ExactAdvantages, exact_advantages, statistics_dtype
from cases import Batch, Groups, Rows, lists_of
from oracle import Exact, exact_results
from torch import Tensor

import mapo_kernels as mk
from mapo_kernels.config import override

# Units of rounding relative to a scale of `oracle`: the errors of a sum of some dozen terms, each
# of a few operations. Nothing that cancels costs more, because scales do not cancel.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


@dataclass
class Found:
    """What a call returned, canonical, on the CPU.

    Attributes:
        loss: [].
        gradients: by name of what was differentiated.
        strays: gradients at packed tokens of no sequence, and beside a slice.
        metrics: by name, [] each.
        advantages: [B] as computed from rewards, or None.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    strays: list[Tensor]
    metrics: dict[str, Tensor]
    advantages: Tensor | None

    def every(self) -> dict[str, Tensor]:
        """All that was returned, by name."""
        named = {"loss": self.loss}
        named |= {} if self.advantages is None else {"advantages": self.advantages}
        named |= {f"gradient of {k}": v for k, v in self.gradients.items()}
        return named | {f"metric {k}": v for k, v in self.metrics.items()}


def _to(device, given):
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def token_arguments(batch: Batch, device, outside=torch.nan) -> dict:
    """Keywords of a loss about tokens, as `batch.layout` has them."""
    given = {k: batch.layout.arrange(v, outside) for k, v in batch.tensors.items()}
    return _to(device, given)


def source_arguments(batch: Batch, device) -> dict:
    """Keywords of a loss, or of a plan: what the advantages, the layout and the denominator are."""
    given = dict(batch.layout.arguments())
    if batch.normalizer is not None:
        given["normalizer"] = batch.normalizer
    if batch.groups is not None:
        given |= {"rewards": batch.groups.rewards, **batch.groups.arguments}
        given["advantage_spec"] = batch.groups.spec
    elif batch.advantages.dim() == 2:
        given["advantages"] = batch.layout.arrange(batch.advantages, torch.nan)
    else:
        given["advantages"] = batch.advantages
    given |= batch.told
    return _to(device, given | {"spec": batch.spec})


def sampling_mask(batch: Batch, device) -> dict:
    """The keyword of a call whose rows keep some columns, or of its plan."""
    if batch.rows is None or batch.rows.kept is None:
        return {}
    kept = lists_of(batch.layout.arrange(batch.rows.kept, True))
    return {"sampling_mask": mk.SamplingMask.from_lists(kept, device)}


def row_options(rows: Rows, device) -> dict:
    """Keywords of a loss about rows of logits."""
    given = {"temperature": rows.temperature, **rows.options}
    if rows.hidden is not None:
        given |= {"softcap": rows.softcap, "logit_scale": rows.logit_scale}
    return _to(device, given)


class Leaf:
    """A leaf on a device, of which a call takes all, or all but what follows along a dimension."""

    def __init__(self, x: Tensor, device, wanted: bool = True, strided: bool = False) -> None:
        self.axis, self.size = min(1, x.dim() - 1), x.shape[min(1, x.dim() - 1)]
        x = x.to(device, copy=True)
        if strided:
            more = list(x.shape)
            more[self.axis] = 1
            x = torch.cat([x, x.new_full(more, 7.0)], self.axis)
        self.tensor = x.requires_grad_(wanted)

    @property
    def passed(self) -> Tensor:
        if self.tensor.shape[self.axis] == self.size:
            return self.tensor
        return self.tensor.narrow(self.axis, 0, self.size)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient of what was passed on, and that of the rest."""
        grad = self.tensor.grad.cpu()
        rest = grad.shape[self.axis] - self.size
        return grad.narrow(self.axis, 0, self.size), grad.narrow(self.axis, self.size, rest)


def leaves_of(batch: Batch, device, outside=torch.nan) -> dict[str, Leaf]:
    """What a call differentiates by, by the name of the argument, in the layout of the call."""
    rows, arrange = batch.rows, batch.layout.arrange
    if rows is None:
        return {"logprobs": Leaf(arrange(batch.logprobs, outside), device, True, batch.strided)}
    if rows.logits is not None:
        return {"logits": Leaf(arrange(rows.logits, outside), device, True, batch.strided)}
    given = {"lm_head_weight": rows.weight, "bias": rows.bias}
    leaves = {k: Leaf(x, device, k not in rows.frozen) for k, x in given.items() if x is not None}
    hidden = arrange(rows.hidden, outside)
    return {"hidden": Leaf(hidden, device, "hidden" not in rows.frozen, batch.strided), **leaves}


def call_loss(batch: Batch, leaves: dict[str, Leaf], device, **given) -> mk.LossOutput:
    """The loss of the batch's level; `given` is everything about tokens, or a plan."""
    passed, rows = {k: x.passed for k, x in leaves.items()}, batch.rows
    if rows is None:
        return mk.mapo_loss(passed["logprobs"], **given)
    ids = batch.layout.arrange(rows.ids, -1).to(device)
    given |= row_options(rows, device) | ({} if "plan" in given else sampling_mask(batch, device))
    if rows.logits is None:
        hidden, weight = passed.pop("hidden"), passed.pop("lm_head_weight")
        return mk.mapo_loss_from_hidden(hidden, weight, ids, **passed, **given)
    logits = passed["logits"]
    # What is overwritten cannot be a leaf.
    return mk.mapo_loss_from_logits(
        logits * 1 if rows.options.get("inplace") else logits, ids, **given
    )


def run(batch: Batch, device, outside=torch.nan, **instead) -> Found:
    """The call's results; `instead` (a plan) stands for what `source_arguments` gives."""
    leaves = leaves_of(batch, device, outside)
    given = token_arguments(batch, device, outside) | (instead or source_arguments(batch, device))
    with override(batch.constants):
        out = call_loss(batch, leaves, device, **given)
        wanted = any(x.tensor.requires_grad for x in leaves.values())
        if wanted:
            out.loss.backward(torch.full_like(out.loss, batch.upstream))
    gradients, strays = {}, []
    for name, x in leaves.items():
        if not x.tensor.requires_grad:
            assert x.tensor.grad is None
            continue
        grad, rest = x.gradient()
        strays.append(rest)
        if name not in ("lm_head_weight", "bias"):
            strays.append(batch.layout.strays(grad))
            grad = batch.layout.restore(grad)
        gradients[name] = grad
    metrics = {k: v.cpu() for k, v in out.metrics.items()}
    advantages = None if batch.groups is None else out.advantages.cpu()
    return Found(out.loss.detach().cpu(), gradients, strays, metrics, advantages)


def assert_within(name, actual, exact, scale, tolerance, upstream=None):
    """`actual` is `exact` to `tolerance` of `scale`.

    A gradient in bfloat16 or float16 is rounded before and after it is multiplied by the `upstream`
    gradient: it may be off by these roundings, and what it cannot hold before is not judged.
    """
    allowed = tolerance * scale
    if actual.dtype != torch.float64:
        allowed = allowed + torch.finfo(torch.float32).tiny
    if actual.element_size() < 4:
        info = torch.finfo(actual.dtype)
        factor = abs(upstream)
        smallest = info.smallest_normal * info.eps * (1 + factor)
        allowed = allowed + exact.abs() * info.eps * (1 if factor == 1 else 2) / 2 + smallest
        largest = info.max * 0.99 * min(1.0, factor)
        allowed = torch.where(exact.abs() + allowed < largest, allowed, torch.inf)
    wrong = ~((actual.double() - exact).abs() <= allowed) & torch.as_tensor(allowed < torch.inf)
    wrong &= ~(actual.isnan() & exact.isnan()) & (actual != exact)
    assert not wrong.any(), (
        f"{name}: at {wrong.nonzero()[:5].tolist()} expected {exact[wrong][:5].tolist()} up to "
        f"{allowed.expand_as(exact)[wrong][:5].tolist()}, got {actual[wrong][:5].tolist()}"
    )


def check_loss(batch: Batch, device) -> None:
    """Hold one loss call against the oracle."""
    check_found(batch, run(batch, device))


def check_found(batch: Batch, found: Found) -> None:
    """Hold what a loss call returned against the oracle."""
    dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
    exact = exact_of(batch, found.advantages)
    tolerance = TOLERANCES[dtype]
    assert found.loss.dtype == dtype and found.loss.dim() == 0
    if batch.groups is not None and is_clamped(found.advantages):
        check_advantages(batch.groups, found.advantages, batch.dtype)
        return
    assert_within("loss", found.loss, exact.loss, exact.loss_scale, tolerance)
    for name, grad in found.gradients.items():
        assert grad.dtype == batch.dtype, name
        wanted, scale = exact.gradients[name], exact.gradient_scales[name]
        assert_within(f"{name}.grad", grad, wanted, scale, tolerance, batch.upstream)
    assert all((x == 0).all() for x in found.strays)
    group_metrics = {}
    if batch.groups is not None:
        group_metrics = check_advantages(batch.groups, found.advantages, batch.dtype).metrics
    assert set(found.metrics) == set(exact.metrics) | set(group_metrics)
    for name, value in exact.metrics.items():
        scale = exact.metric_scales.get(name, torch.ones(())) + value.abs()
        assert found.metrics[name].dtype == dtype and found.metrics[name].dim() == 0, name
        assert_within(f"metric {name}", found.metrics[name], value, scale, 2 * tolerance)
    for name, value in group_metrics.items():
        own = TOLERANCES[found.advantages.dtype]
        assert found.metrics[name].dim() == 0, name
        assert_within(f"metric {name}", found.metrics[name], value, 1 + value.abs(), 4 * own)


def exact_of(batch: Batch, advantages: Tensor | None) -> Exact:
    """What the oracle says of a call; which rewards were made into these `advantages` [B].

    They are held against the oracle by themselves: which side of 0 a rounding error of an advantage
    lies on decides whether a token is scored, and that is not the question of the loss.
    """
    return exact_results(batch, batch.advantages if batch.groups is None else advantages)


def representable(exact: Tensor, dtype) -> Tensor:
    """Which of some exact numbers a dtype can hold."""
    return exact.abs() < 0.999 * torch.finfo(dtype).max


def is_clamped(advantages: Tensor) -> bool:
    """Whether one of them is beyond its dtype, and so the largest number of that: mean = -eps.

    Of such a batch the advantages alone are judged: the loss is a sum of products with that number,
    which overflows, to NaN where there is one of either sign.
    """
    return bool((advantages.abs() == torch.finfo(advantages.dtype).max).any())


def check_advantages(groups: Groups, found: Tensor, dtype=None) -> ExactAdvantages:
    """Hold advantages [B] of a loss whose input has `dtype` (None: of none) against the oracle."""
    own = statistics_dtype(groups.rewards, dtype)
    exact = exact_advantages(groups, own)
    assert found.shape == exact.advantages.shape and not found.requires_grad
    assert found.dtype == own
    fits = representable(exact.advantages, own)
    scale = exact.scale[fits]
    assert_within("advantages", found[fits], exact.advantages[fits], scale, TOLERANCES[own])
    # No signal is exactly 0, not noise.
    assert (found[exact.scale == 0] == 0).all()
    return exact
