"""Names on the command line of `mapo-kernels bench`; needs no torch, so that its help is quick."""

SUITES = ("quick", "gpu", "full")
# What is measured: the levels of the package. Earlier result files write some of them with spaces.
MAPO, GRPO = "advantages-mapo", "advantages-grpo"
LOGPROBS, LOGITS, SCORING, HIDDEN = "log-probs", "logits", "scoring-logits", "hidden-states"
KEPT = "kept-columns"
LEVELS = (MAPO, GRPO, LOGPROBS, LOGITS, SCORING, HIDDEN, KEPT)
