"""`MAPOConfig`: TRL's `GRPOConfig` with this package's options."""

from __future__ import annotations

from dataclasses import dataclass, field

from mapo_kernels.integrations import trl_options as options

try:
    import trl
    from packaging.version import Version
    from trl import GRPOConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"trl: expected TRL to be installed, got {error}; install the extra 'trl': "
        'pip install "mapo-kernels[trl]", or pip install ".[trl]" in a checkout',
        name=error.name,
    ) from error

OLDEST = "1.15.0"
if Version(trl.__version__) < Version(OLDEST):
    raise ImportError(f"trl: expected {OLDEST} or newer, got {trl.__version__}")


@dataclass
class MAPOConfig(GRPOConfig):
    """`GRPOConfig` with MAPO's options (arXiv 2509.18849); the defaults train by MAPO.

    Args:
        estimator: of advantages: `mapo`, `grpo`, `apd`, `mean` or `rloo`; see `AdvantageSpec`.
        certainty: lambda(p) of `mapo`: `quadratic`, `linear`, `entropy`, `step`, or a number in
            [0, 1].
        success_threshold: the total reward from which on a completion is a success.
        success_reward: name of the reward function whose value (unweighted) is compared with the
            threshold in place of the total.
        max_abs: symmetric clamp of the advantages.
        difficulty: `focal` or `power`, a factor of a group's advantages by its success ratio.
        difficulty_exponent: of that factor.
        pass_at_k: train for pass@k: see `AdvantageSpec`.
        group_weight_column: name of a column of the dataset, of numbers by which a prompt's
            advantages are multiplied (before `max_abs`).
        advantage_eps: added to the denominators of the advantages; TRL's own is 1e-4.
        dual_clip: another name of TRL's `delta`.
        fused: what the loss is computed from: `hidden` states and lm_head (no logits in memory),
            the model's `logits`, or TRL's own `logprobs`.
        drop_zero_signal: leave sequences without signal out of the model's forward and backward in
            training; loss and gradients are unchanged.
        score_all: compute metrics over all tokens, as TRL does, not only over those that change
            the loss.
        replay_sampling_mask: where sampling is truncated (top_p, top_k, min_p), compute all
            log-probs over the columns that each token was sampled from.

    Raises:
        ValueError: an option, or a combination, that cannot work; it names the option.
        TypeError: an option of the wrong type.
    """

    estimator: str = field(default="mapo", metadata={"help": "Estimator of advantages."})
    certainty: str = field(default="quadratic", metadata={"help": "lambda(p) of mapo."})
    success_threshold: float = field(default=1.0, metadata={"help": "Reward of a success."})
    success_reward: str | None = field(
        default=None, metadata={"help": "Reward function that defines success."}
    )
    max_abs: float | None = field(default=None, metadata={"help": "Clamp of the advantages."})
    difficulty: str | None = field(default=None, metadata={"help": "focal or power."})
    difficulty_exponent: float = field(default=0.5, metadata={"help": "Exponent of difficulty."})
    pass_at_k: int | None = field(default=None, metadata={"help": "k of pass@k, to train for it."})
    group_weight_column: str | None = field(
        default=None, metadata={"help": "Column of the dataset with weights of prompts."}
    )
    advantage_eps: float = field(default=1e-6, metadata={"help": "Added to denominators."})
    dual_clip: float | None = field(default=None, metadata={"help": "TRL's delta."})
    fused: str = field(default="hidden", metadata={"help": "hidden, logits or logprobs."})
    drop_zero_signal: bool = field(
        default=False, metadata={"help": "Leave sequences without signal out of the forward."}
    )
    score_all: bool = field(default=False, metadata={"help": "Metrics over all tokens."})
    replay_sampling_mask: bool = field(
        default=True, metadata={"help": "Log-probs over the columns that sampling kept."}
    )

    def __post_init__(self) -> None:
        """Settle TRL's options, then refuse what cannot work."""
        super().__post_init__()
        if self.dual_clip is not None:
            delta: float | None = getattr(self, "delta", None)
            if delta not in (None, self.dual_clip):
                raise ValueError(
                    f"dual_clip: expected None or TRL's delta {delta!r}, which is the same thing, "
                    f"got {self.dual_clip!r}"
                )
            self.delta = self.dual_clip
        options.check_config(self)
