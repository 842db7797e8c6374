"""The loss of `MAPOTrainer` against TRL's own `_compute_loss`, and its advantages against TRL's."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from trl import GRPOTrainer
from trl_support import (
    loss_and_gradients,
    new_batch,
    new_model,
    new_trainer,
    norm,
    relative_gap,
    share_of_a,
    starts_with_a,
)

from mapo_kernels.integrations.trl import MAPOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("hidden", "logits", "logprobs")
TOLERANCE = 1e-6
# Narrow enough that both sides of the clipped losses are reached. No ratio of these runs falls on a
# bound itself, where rounding alone would decide which side of the kink the gradient is of.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CLIP = {"epsilon": 0.05, "epsilon_high": 0.085}


def compare(trainer, batch):
    expected, expected_grads = loss_and_gradients(
        trainer, lambda model, inputs: GRPOTrainer._compute_loss(trainer, model, inputs), batch
    )
    loss, grads = loss_and_gradients(trainer, trainer._compute_loss, batch)
    assert abs(loss - expected) <= TOLERANCE * max(1.0, abs(expected))
    assert relative_gap(grads, expected_grads) <= TOLERANCE
    return expected_grads


class ComparedTrainer(MAPOTrainer):
    """Trains by its own loss, and computes TRL's beside it on every micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compared = []

    def _compute_loss(self, model, inputs):
        theirs = GRPOTrainer._compute_loss(self, model, inputs)
        ours = super()._compute_loss(model, inputs)
        named = dict(self.model.named_parameters())
        grads = [
            dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
            for loss in (ours, theirs)
        ]
        moved = "old_per_token_logps" in inputs and self.state.global_step > 0
        self.compared.append((float((ours - theirs).detach()), *grads, moved))
        # A fresh graph: autograd.grad has used up the first one.
        return super()._compute_loss(model, inputs)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A path, because TRL loads the reference model from where the policy came from."""
    path = tmp_path_factory.mktemp("model")
    new_model().save_pretrained(path)
    return str(path)


@pytest.fixture
def trl_advantages(monkeypatch):
    """The advantages that TRL computed, one tensor per generation batch."""
    seen, original = [], GRPOTrainer._generate_and_score_completions

    def recorded(self, inputs):
        batch = original(self, inputs)
        seen.append(batch["advantages"].clone())
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", recorded)
    return seen


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("num_iterations", (1, 3))
@pytest.mark.parametrize("beta", (0.0, 0.04))
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_step_of_a_run_has_the_loss_and_gradients_of_trl(
    loss_type, beta, num_iterations, level, saved_model, tmp_path
):
    trainer = new_trainer(
        tmp_path,
        model=saved_model,
        trainer=ComparedTrainer,
        rewards=share_of_a,
        estimator="grpo",
        advantage_eps=1e-4,
        loss_type=loss_type,
        beta=beta,
        num_iterations=num_iterations,
        fused=level,
        gradient_accumulation_steps=2,
        max_steps=2 * num_iterations,
        learning_rate=0.02,
        **CLIP,
    )
    trainer.train()
    assert len(trainer.compared) == 4 * num_iterations
    assert any(moved for *_, moved in trainer.compared) == (num_iterations > 1)
    largest = max(norm(expected) for _, _, expected, _ in trainer.compared)
    assert largest > 0
    for difference, grads, expected, _ in trainer.compared:
        assert abs(difference) <= TOLERANCE
        # TRL's kernel computes in float32 whatever the model's dtype, and where a micro-batch's
        # gradient nearly cancels nothing but rounding is left: the run's largest is the measure.
        gap = relative_gap(grads, expected)
        assert gap * norm(expected) <= TOLERANCE * largest
        assert gap <= 1e-5 or norm(expected) < 0.01 * largest


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beta", (0.0, 0.04))
@pytest.mark.parametrize("loss_type", LOSS_TYPES[:-1])  # VESPO has a level of its own
def test_importance_of_whole_sequences(loss_type, beta, level, saved_model, tmp_path):
    trainer = new_trainer(
        tmp_path,
        model=saved_model,
        importance_sampling_level="sequence",
        loss_type=loss_type,
        beta=beta,
        fused=level,
        **CLIP,
    )
    trainer.current_gradient_accumulation_steps = 1
    assert compare(trainer, new_batch(trainer, old=True, ref=beta > 0))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "changes",
    (
        {"delta": 1.2, "loss_type": "grpo"},
        {"temperature": 0.7},
        {"beta": 0.04, "use_bias_correction_kl": False},
        {"off_policy_mask_threshold": 0.02},
        {"top_entropy_quantile": 0.4},
        {"cast_lm_head_to_fp32": True},
        {"score_all": True},
    ),
    ids=str,
)
def test_options_of_trl(changes, level, saved_model, tmp_path):
    trainer = new_trainer(tmp_path, model=saved_model, fused=level, **{**CLIP, **changes})
    trainer.current_gradient_accumulation_steps = 2
    batch = new_batch(trainer, old=True, ref="beta" in changes)
    before = compare(trainer, batch)
    plain = new_trainer(tmp_path, model=saved_model, fused=level, **CLIP)
    plain.current_gradient_accumulation_steps = 2
    if not {"cast_lm_head_to_fp32", "score_all"} & changes.keys():
        _, grads = loss_and_gradients(plain, plain._compute_loss, batch)
        assert relative_gap(grads, before) > 1e-3, "the option changes nothing here"


@pytest.mark.parametrize("level", LEVELS)
def test_masks_and_weights_that_come_with_the_batch(level, saved_model, tmp_path):
    trainer = new_trainer(tmp_path, model=saved_model, fused=level, beta=0.04, **CLIP)
    trainer.current_gradient_accumulation_steps = 1
    batch = new_batch(trainer, old=True, ref=True)
    batch["tool_mask"] = (torch.rand(batch["completion_mask"].shape) < 0.6).long()
    compare(trainer, batch)
    trainer.use_vllm = True
    batch["importance_sampling_ratio"] = torch.rand(8, 1) * 2  # sequence modes
    compare(trainer, batch)
    batch["importance_sampling_ratio"] = torch.rand(batch["completion_mask"].shape) * 2
    compare(trainer, batch)
    batch["completion_mask"][2] = 0  # a truncated completion
    compare(trainer, batch)


@pytest.mark.parametrize("level", LEVELS)
def test_vespo_takes_vllms_ratios_into_its_own(level, saved_model, tmp_path):
    trainer = new_trainer(tmp_path, model=saved_model, fused=level, loss_type="vespo")
    trainer.current_gradient_accumulation_steps = 1
    batch = new_batch(trainer, old=True)
    before = compare(trainer, batch)
    trainer.use_vllm = True
    ratio = torch.rand(batch["completion_mask"].shape) + 0.5
    batch["importance_sampling_ratio"] = ratio.where(batch["completion_mask"] != 0, 1.0)
    assert relative_gap(compare(trainer, batch), before) > 1e-3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "family, changes",
    (
        ("Gemma2", {"final_logit_softcapping": 3.0}),
        ("Cohere", {"logit_scale": 0.4}),
        ("Granite", {"logits_scaling": 1.7}),
        ("Llama", {"tie_word_embeddings": True}),
        ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, **NO_DROPOUT}),
        ("Mixtral", {"num_local_experts": 4, "output_router_logits": True}),
        (
            "Qwen3Moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "router_aux_loss_coef": 0.1,
            },
        ),
    ),
)
def test_model_families(family, changes, level, tmp_path):
    trainer = new_trainer(tmp_path, model=new_model(family, **changes), fused=level, **CLIP)
    trainer.current_gradient_accumulation_steps = 2
    compare(trainer, new_batch(trainer, old=True))
    assert trainer.aux_loss_enabled == (family in ("Mixtral", "Qwen3Moe"))


def failing(function):
    """The reward function, with no reward for every fifth completion."""

    def flaky(completions, **_):
        return [None if i % 5 == 2 else reward for i, reward in enumerate(function(completions))]

    return flaky


@pytest.mark.parametrize("functions", ("sound", "flaky"))
@pytest.mark.parametrize("scale", ("group", "batch", "none", "normalize_then_sum"))
def test_advantages_are_those_of_trl(functions, scale, trl_advantages, tmp_path):
    first = scale == "normalize_then_sum"
    rewards = [share_of_a, starts_with_a]
    trainer = new_trainer(
        tmp_path,
        rewards=rewards if functions == "sound" else [failing(reward) for reward in rewards],
        reward_weights=[1.0, 0.3],
        per_device_train_batch_size=16,
        estimator="grpo",
        advantage_eps=1e-4,
        scale_rewards="group" if first else scale,
        multi_objective_aggregation=scale if first else "sum_then_normalize",
    )
    ours = []
    original = trainer._generate_and_score_completions

    def recorded(inputs):
        ours.append(original(inputs))
        return ours[-1]

    trainer._generate_and_score_completions = recorded
    trainer.train()
    assert len(ours) == len(trl_advantages) == 2
    assert sum(float(a.abs().sum()) for a in trl_advantages) > 0
    for batch, expected in zip(ours, trl_advantages, strict=True):
        torch.testing.assert_close(batch["advantages"], expected, rtol=1e-5, atol=1e-6)
    logged = torch.tensor(list(trainer._logs["advantages"]))
    torch.testing.assert_close(logged, ours[-1]["advantages"])


@pytest.mark.parametrize("loss_type", ("dapo", "cispo", "sapo"))
@pytest.mark.parametrize("level", LEVELS)
def test_metrics_over_all_tokens_are_those_of_trl(loss_type, level, saved_model, tmp_path):
    options = {"loss_type": loss_type, "fused": level, "score_all": True}
    trainer = new_trainer(tmp_path, model=saved_model, **{**CLIP, **options})
    trainer.current_gradient_accumulation_steps = 1
    compare(trainer, new_batch(trainer, old=True))
    names = {"dapo": ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]}
    names["dapo"] += ["clip_ratio/high_max"]
    names |= {"cispo": ["cispo_clip_ratio"]}
    if loss_type == "dapo":
        theirs, ours = trainer._metrics["train"]["clip_ratio/low_min"]
        assert abs(ours - theirs) < 1e-6
    for name in ["entropy", *names.get(loss_type, [])]:
        theirs, ours = trainer._metrics["train"][name]
        assert theirs > 0 and abs(ours - theirs) < 1e-5, name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("importance", ("token", "sequence"))
def test_the_most_and_least_clipped_sequences_are_trls(importance, level, saved_model, tmp_path):
    options = {"importance_sampling_level": importance, "fused": level, "loss_type": "grpo"}
    trainer = new_trainer(tmp_path, model=saved_model, **CLIP, **options)
    trainer.current_gradient_accumulation_steps = 1
    for seed in range(3):
        batch = new_batch(trainer, old=True, seed=seed)
        batch["advantages"] = -batch["advantages"].abs() - 0.1
        if seed == 1:
            batch["old_per_token_logps"] += 1.0
        if seed == 2:
            batch["advantages"] = -batch["advantages"]
            batch["completion_mask"][3] = 0
        compare(trainer, batch)
    del batch["old_per_token_logps"]
    compare(trainer, batch)
    logged = trainer._metrics["train"]
    for name in ("clip_ratio/low_min", "clip_ratio/high_max"):
        theirs, ours = logged[name][::2], logged[name][1::2]
        assert len(ours) == 4 and max(theirs) > 0
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_entropy_bonus_is_trls(loss_type, level, saved_model, tmp_path):
    options = {"fused": level, "loss_type": loss_type, "entropy_coef": 0.3}
    beta = 0.0 if loss_type in ("grpo", "sapo") and level != "logprobs" else 0.04
    trainer = new_trainer(tmp_path, model=saved_model, beta=beta, **CLIP, **options)
    trainer.current_gradient_accumulation_steps = 2
    batch = new_batch(trainer, old=True, ref=beta > 0)
    grads = compare(trainer, batch)
    theirs, ours = trainer._metrics["train"]["policy_loss"]
    assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs))
    assert trainer._metrics["train"]["entropy_coef"] == [0.3, 0.3]
    trainer.entropy_coef, trainer._entropy_bonus_enabled = 0.0, False
    _, plain = loss_and_gradients(trainer, trainer._compute_loss, batch)
    assert relative_gap(grads, plain) > 0.01
    trainer.model.eval()


def test_old_log_probs_make_the_ratio_exactly_one(saved_model, tmp_path):
    trainer = new_trainer(tmp_path, model=saved_model)
    trainer.current_gradient_accumulation_steps = 1
    batch = new_batch(trainer, old=True, drift=0.0)
    loss_and_gradients(trainer, trainer._compute_loss, batch)
    assert trainer._metrics["train"]["mapo/approx_kl"] == [0.0]
