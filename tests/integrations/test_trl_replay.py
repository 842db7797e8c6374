"""What tokens were sampled from goes with them, from TRL's generation to every log-prob."""

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from trl.generation import vllm_generation
from trl_support import (
    loss_and_gradients,
    new_config,
    new_model,
    new_tokenizer,
    new_trainer,
    norm,
    prompts,
    relative_gap,
)
from trl_support import share_of_a as reward

import mapo_kernels as mk
from mapo_kernels.integrations import trl_replay
from mapo_kernels.integrations.trl import MAPOTrainer

LEVELS = ("hidden", "logits")
FILTERS = {"top_p": 0.8, "top_k": 9, "min_p": 0.05, "temperature": 0.9}
# More than one optimizer step for a generation batch, so that there are old log-probs.
STEPS = {"steps_per_generation": 2, "gradient_accumulation_steps": 1}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    trl_replay.forget_warnings()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")  # a token that was not kept has its name


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A path, because TRL loads the reference model from where the policy came from."""
    path = tmp_path_factory.mktemp("model")
    new_model().save_pretrained(path)
    return str(path)


def new_inputs(n=8):
    return [{"prompt": "abcd"[: 1 + i // 4]} for i in range(n)]


def masked_log_probs(model, inputs, temperature):
    """[B, T], from all logits, with -inf where a completion's mask keeps nothing."""
    n_tokens = inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    logits = logits[:, -n_tokens - 1 : -1] / temperature
    kept = torch.ones_like(logits, dtype=torch.bool)
    for row, mask in enumerate(inputs["sampling_mask"]):
        for token, columns in enumerate(mask.token_ids.split(mask.counts.tolist())):
            if len(columns):
                kept[row, token] = False
                kept[row, token, columns.long()] = True
    logps = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    return logps.gather(-1, inputs["completion_ids"][..., None])[..., 0]


def test_what_generate_filters_away_is_recorded(tmp_path):
    trainer = new_trainer(tmp_path, **FILTERS)
    torch.manual_seed(0)
    texts = [row["prompt"] for row in new_inputs(6)]
    found = trainer._generate(texts)
    prompt_ids, completion_ids, logprobs = found[0], found[1], found[4]
    assert logprobs is None  # as TRL has it without vLLM
    assert len({len(ids) for ids in completion_ids}) > 1 and len(trainer._masks) == 6
    assert "_get_logits_processor" not in vars(trainer.model)
    for prompt, ids, mask in zip(prompt_ids, completion_ids, trainer._masks, strict=True):
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([prompt + ids])).logits[0]
        expected = mk.SamplingMask.from_logits(logits[len(prompt) - 1 : -1], **FILTERS)
        assert torch.equal(mask.token_ids, expected.token_ids)
        assert torch.equal(mask.counts, expected.counts)
        assert mask.counts.max() < 10
    counts = torch.cat([mask.counts for mask in trainer._masks])
    logged = trainer._metrics["train"]["mapo/kept_columns"]
    assert logged == pytest.approx([counts.float().mean().item()])


@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_the_ratio_is_exactly_one(level, saved_model, tmp_path):
    trainer = new_trainer(
        tmp_path, model=saved_model, fused=level, beta=0.04, rewards=reward, **FILTERS, **STEPS
    )
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(new_inputs())
    assert trainer._masks is None
    with torch.no_grad():
        expected = masked_log_probs(trainer.model, batch, FILTERS["temperature"])
    live = batch["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(batch[name][live], expected[live], rtol=1e-5, atol=1e-6)
    loss_and_gradients(trainer, trainer._compute_loss, batch)
    metrics = trainer._metrics["train"]
    assert metrics["mapo/approx_kl"] == [0.0] and metrics["kl"] == [0.0]
    # Over the whole vocabulary the same tokens are less probable.
    del batch["sampling_mask"]
    loss_and_gradients(trainer, trainer._compute_loss, batch)
    assert metrics["mapo/approx_kl"][1] > 0.01


def test_weights_by_entropy_are_of_the_kept_columns(saved_model, tmp_path):
    grads = []
    for level in LEVELS:
        options = {"fused": level, "top_entropy_quantile": 0.4, **STEPS}
        trainer = new_trainer(tmp_path, model=saved_model, rewards=reward, top_k=2, **options)
        trainer.current_gradient_accumulation_steps = 1
        seen = []
        trainer.get_high_entropy_mask = lambda x, mask, q: seen.append(x * mask) or mask  # noqa: B023
        torch.manual_seed(0)
        batch = trainer._generate_and_score_completions(new_inputs())
        batch["advantages"] = torch.linspace(-1, 2, 8)
        grads.append(loss_and_gradients(trainer, trainer._compute_loss, batch)[1])
        assert 0 < seen[0].max() < torch.tensor(2.0).log() + 1e-6
    assert relative_gap(*grads) < 1e-5 and norm(grads[0]) > 0


class CheckedTrainer(MAPOTrainer):
    """Computes the loss from all logits beside its own, on every micro-batch."""

    n_checked = 0

    def _compute_loss(self, model, inputs):
        weight = 1.0 / inputs["completion_ids"].shape[0]
        logps = masked_log_probs(self.model, inputs, self.temperature)
        theirs = mk.mapo_loss(
            logps,
            advantages=inputs["advantages"],
            mask=inputs["completion_mask"],
            old_logprobs=inputs["old_per_token_logps"],
            ref_logprobs=inputs.get("ref_per_token_logps"),
            normalizer=1.0 / weight,
            spec=self._loss_spec,
        ).loss
        ours = super()._compute_loss(model, inputs)
        named = [p for p in self.model.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(x, named) for x in (ours, theirs)]
        grads = [dict(enumerate(x)) for x in grads]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert relative_gap(*grads) < 1e-4
        self.n_checked += 1
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    "options",
    (
        {"fused": "hidden", "beta": 0.04},
        {"fused": "logits", "beta": 0.04},
        {"fused": "hidden", "drop_zero_signal": True},
        {"fused": "hidden", "beta": 0.04, "peft_config": True},
    ),
    ids=str,
)
def test_masks_stay_with_their_tokens_through_a_run(options, saved_model, tmp_path):
    options = dict(options)
    if options.pop("peft_config", False):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        targets = ["q_proj", "v_proj"]
        options["peft_config"] = peft.LoraConfig(
            r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
        )
    trainer = new_trainer(
        tmp_path,
        model=saved_model,
        trainer=CheckedTrainer,
        rewards=reward,
        loss_type="grpo",
        num_iterations=2,
        max_steps=8,
        learning_rate=0.01,
        **options,
        **FILTERS,
        **STEPS,
    )
    trainer.train()
    assert trainer.n_checked == 8
    logged = [row for row in trainer.state.log_history if "mapo/kept_columns" in row]
    assert logged and all(1 <= row["mapo/kept_columns"] <= 9 for row in logged)


def test_evaluation_replays_too(tmp_path):
    options = {"eval_dataset": prompts(8), "per_device_eval_batch_size": 4}
    trainer = new_trainer(tmp_path, num_generations_eval=2, **options, **FILTERS)
    result = trainer.evaluate()
    assert result["eval_mapo/kept_columns"] <= 9
    assert 0 < result["eval_entropy"] < torch.tensor(9.0).log()  # of at most 9 columns


class Engine:
    """Answers as `vllm.LLM` does: a request for each prompt, of which each has completions."""

    def __init__(self, masks):
        self.masks = masks

    def generate(self, prompts, sampling_params=None, use_tqdm=False):
        outputs = []
        for prompt, mask in zip(prompts, self.masks, strict=True):
            tokens = [3 + n for n in range(3)]
            entry = [{i: SimpleNamespace(rank=1, logprob=-0.5)} for i in tokens]
            completion = SimpleNamespace(token_ids=tokens, logprobs=entry, sampling_mask=mask)
            outputs.append(
                SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[completion])
            )
        return outputs


def with_vllm(trainer, masks, monkeypatch):
    """The trainer with TRL's own client of an engine in the same process."""
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    engine = object.__new__(vllm_generation.VLLMGeneration)
    engine.__dict__.update(
        mode="colocate",
        llm=Engine(masks),
        model=trainer.model,
        accelerator=trainer.accelerator,
        tensor_parallel_size=1,
        enable_sleep_mode=False,
        structured_outputs_regex=None,
        generation_kwargs={},
        logprobs=0,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=0.8,
        top_k=9,
        min_p=None,
        max_completion_length=6,
        _llm_weights_sleeping=False,
    )
    trainer.use_vllm, trainer.vllm_generation = True, engine
    trainer._last_loaded_step = trainer.state.global_step
    return trainer


LISTS = [[[3, 9], [4], []], [[3], [4, 5, 6], [5, 7]]]


@pytest.mark.parametrize("form", ("lists", "offsets"))
def test_masks_come_from_vllms_outputs(form, monkeypatch, tmp_path):
    masks = [SimpleNamespace(token_ids=rows) for rows in LISTS]
    if form == "offsets":
        masks = [mk.SamplingMask.from_lists(rows) for rows in LISTS]
        masks = [SimpleNamespace(token_ids=m[0].numpy(), offsets=m[1].tolist()) for m in masks]
    trainer = with_vllm(new_trainer(tmp_path, **FILTERS), masks, monkeypatch)
    found = trainer._generate(["ab", "abc"])
    assert found[1] == [[3, 4, 5]] * 2 and found[4] == [[-0.5] * 3] * 2
    for mask, rows in zip(trainer._masks, LISTS, strict=True):
        assert [x.tolist() for x in mask.token_ids.split(mask.counts.tolist())] == rows
    short = [SimpleNamespace(token_ids=LISTS[0]), SimpleNamespace(token_ids=LISTS[1][:2])]
    trainer.vllm_generation.llm = Engine(short)
    with pytest.raises(ValueError, match="each of the 3 tokens of completion 1, got those of 2"):
        trainer._generate(["ab", "abc"])


def test_engines_without_masks_are_warned_of(monkeypatch, tmp_path):
    trainer = with_vllm(new_trainer(tmp_path, **FILTERS), [None, None], monkeypatch)
    with pytest.warns(UserWarning, match="brought no sampling masks.*ratio .* is biased"):
        found = trainer._generate(["ab", "abc"])
    assert trainer._masks is None and found[4] == [[-0.5] * 3] * 2


def test_beams_are_warned_of(tmp_path):
    trainer = new_trainer(tmp_path, generation_kwargs={"num_beams": 2}, **FILTERS)
    with pytest.warns(UserWarning, match="brought no sampling masks"):
        found = trainer._generate(["ab", "abc"])
    assert trainer._masks is None and len(found[1]) == 2


def test_a_rollout_function_may_bring_masks(tmp_path):
    def roll_out(texts, trainer):
        n = len(texts)
        tokens, kept = [[4, 5]] * n, [[[4, 6], []]] * n
        ids = [trainer._tokenizer(text)["input_ids"] for text in texts]
        logprobs = [[-1.0, -1.0]] * n
        given = {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logprobs}
        return {**given, "sampling_mask": kept}

    trainer = MAPOTrainer(
        new_model(),
        reward,
        new_config(tmp_path),
        processing_class=new_tokenizer(),
        rollout_func=roll_out,
        train_dataset=prompts(),
    )
    batch = trainer._generate_and_score_completions(new_inputs())
    assert [mask.counts.tolist() for mask in batch["sampling_mask"]] == [[2, 0]] * 8
    assert batch["sampling_per_token_logps"].shape == (8, 2)


def test_what_cuts_and_joins_log_probs_does_so_with_masks():
    masks = [mk.SamplingMask.from_lists(rows) for rows in LISTS]
    first, second = trl_replay.attach([[3, 4, 5]] * 2, [[-0.1, None, -0.3]] * 2, masks)
    assert torch.isnan(torch.tensor(first)).tolist() == [False, True, False]
    joined = first[:2] + [0.0, 0.0] + second[1:]  # two tokens of a tool between two turns
    (mask,) = trl_replay.collect([joined])
    kept = [x.tolist() for x in mask.token_ids.split(mask.counts.tolist())]
    assert kept == [[3, 9], [4], [], [], [4, 5, 6], [5, 7]]
    assert trl_replay.collect([[0.0]]) is None
    wide = trl_replay.padded(masks, 4)
    assert wide.counts.tolist() == [2, 1, 0, 0, 1, 3, 2, 0]


def test_without_replay_a_warning_comes_once(tmp_path):
    trainer = new_trainer(tmp_path, replay_sampling_mask=False, **FILTERS)
    with pytest.warns(UserWarning, match="because replay_sampling_mask is False"):
        batch = trainer._generate_and_score_completions(new_inputs())
    assert "sampling_mask" not in batch
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="replay_sampling_mask")
        trainer._generate(["ab"])
        trl_replay.forget_warnings()
        whole = new_trainer(tmp_path)
        batch = whole._generate_and_score_completions(new_inputs())
    assert "sampling_mask" not in batch
    assert "mapo/kept_columns" not in whole._metrics["train"]
