"""verl 0.9.1's fused-kernel switch with `impl_backend: mapo`: its contract, and training by it."""

import copy

import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed")
hydra = pytest.importorskip("hydra", reason="hydra is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402
from verl.workers.config import FSDPActorConfig, HFModelConfig  # noqa: E402

from mapo_kernels.integrations.verl_head import BACKEND  # noqa: E402

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
# What verl's engine calls a forward with, padded and packed.
LAYOUTS = ("padded", "packed")


@pytest.fixture(autouse=True)
def untouched():
    """verl patches classes."""
    kept = transformers.LlamaForCausalLM.forward, torch_functional.FusedLinearForPPO
    yield
    transformers.LlamaForCausalLM.forward, torch_functional.FusedLinearForPPO = kept


def model():
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS))


def patched(model, backend):
    """As `apply_monkey_patch` ends, with the settings of verl's engine."""
    monkey_patch.patch_forward_with_backends(
        model, use_fused_kernels=backend is not None, fused_kernels_backend=backend
    )
    return model


def test_the_module_equals_verls_own():
    patched(model(), BACKEND)
    theirs = torch_functional.FusedLinearForPPO(impl_backend="torch")
    ours = torch_functional.FusedLinearForPPO(impl_backend=BACKEND)
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        torch_functional.FusedLinearForPPO(impl_backend="other")
    for shape in ((3, 5), (1, 15), (15,)):
        ids = torch.randint(0, 60, shape)
        given = torch.randn(*shape, 16), torch.randn(60, 16)
        found = []
        for head in (theirs, ours):
            leaves = [x.clone().requires_grad_() for x in given]
            logp, entropy = head(*leaves, ids, temperature=0.8)
            loss = logp.square().sum() - 0.1 * entropy.sum()
            found.append((logp, entropy, *torch.autograd.grad(loss, leaves)))
        for theirs_x, ours_x in zip(*found, strict=True):
            assert theirs_x.dtype == ours_x.dtype
            torch.testing.assert_close(ours_x, theirs_x, rtol=1e-5, atol=2e-5)


def outputs(policy, ids, layout, temperature):
    """Log-probs and entropies [B, T - 1], from the arguments that verl's engine passes."""
    fused = hasattr(policy, "_verl_fused_kernels_backend")
    given = {"input_ids": ids, "use_cache": False}
    if layout == "packed":
        n, length = ids.shape
        given["input_ids"] = ids.view(1, -1)
        given["position_ids"] = torch.arange(length).repeat(n)[None]
        # One sequence per block of the attention's mask.
        block = torch.arange(n).repeat_interleave(length)
        seen = (block[:, None] == block).tril()
        given["attention_mask"] = torch.zeros(n * length, n * length).masked_fill(~seen, -1e30)[
            None, None
        ]
        if fused:
            given["shift_labels"] = ids.view(-1).roll(-1)[None]
    if fused:
        out = policy(**given, temperature=temperature, return_dict=True)
        found = out.log_probs, out.entropy
    else:
        logits = policy(**given).logits / temperature
        logs = logits.log_softmax(-1)
        rolled = given["input_ids"].roll(-1, -1)[..., None]
        found = logs.gather(-1, rolled).squeeze(-1), -(logs.exp() * logs).sum(-1)
    return [x.view_as(ids)[:, :-1] for x in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_trained_by_it_equals_verls_own_paths(layout):
    """Its own torch backend, and no fused kernel at all."""
    config = FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=3.0)
    ids = torch.randint(0, 60, (6, 7))
    mask = torch.rand(6, 6) < 0.8
    advantages = torch.randn(6, 1).expand(-1, 6)
    start, results = model(), {}
    before = copy.deepcopy(start.state_dict())
    for backend in (None, "torch", BACKEND):
        policy = patched(copy.deepcopy(start), backend)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        with torch.no_grad():
            # verl's own head says that its outputs require grad, even here.
            old = outputs(policy, ids, layout, 0.9)[0].detach()
        for _ in range(4):
            logp, entropy = outputs(policy, ids, layout, 0.9)
            loss, _ = core_algos.get_policy_loss_fn("mapo_fused")(
                old, logp, advantages, mask, "token-mean", config
            )
            loss = loss - 0.05 * core_algos.agg_loss(entropy, mask, "token-mean")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results[backend] = {k: v.detach() for k, v in policy.named_parameters()}
        # The next one takes the forward of verl's own model again.
        transformers.LlamaForCausalLM.forward = FORWARD
    for backend in (None, "torch"):
        for name, expected in results[backend].items():
            actual = results[BACKEND][name]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert any((results[BACKEND][k] - v).abs().max() > 1e-3 for k, v in before.items())


FORWARD = transformers.LlamaForCausalLM.forward


def test_the_switch_of_the_configuration():
    overrides = [
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=mapo",
    ]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides=overrides).actor_rollout_ref.model
    assert config.fused_kernel_options.impl_backend == BACKEND
    assert {"use_fused_kernels", "fused_kernel_options"} <= set(HFModelConfig.__dataclass_fields__)
    policy = patched(model(), "triton")
    assert policy._verl_fused_kernels_backend == "triton"
    transformers.LlamaForCausalLM.forward = FORWARD
    policy = patched(model(), None)
    assert not hasattr(policy, "_verl_fused_kernels_backend")
