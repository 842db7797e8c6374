"""Names on the command line of `mapo-kernels bench`; needs no torch, so that its help is quick."""

SUITES = ("quick", "gpu", "full")
# What is measured: the levels of the package.
MAPO, GRPO = "advantages-mapo", "advantages-grpo"
LOGPROBS, LOGITS, SCORING, HIDDEN = "log-probs", "logits", "scoring-logits", "hidden-states"
KEPT = "kept-columns"
LEVELS = (MAPO, GRPO, LOGPROBS, LOGITS, SCORING, HIDDEN, KEPT)
# What `bench tune` tries, and what `bench warm` and `codegen` compile for.
FAMILIES: tuple[str, ...]
FAMILIES = ("rows", "scoring", "statistics and entropy", "advantages given", "final sum")
FAMILIES += ("log-probs", "unaligned log-probs", "hidden", "rows of 128256", "rows of float32")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
