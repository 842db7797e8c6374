"""Plants one fault at a time in a copy of the package and runs tests against it.

    python tests/mutants.py [--jobs N] [--only TEXT] [--whole]

A fault that no test notices is a missing test. Each is run against the tests of its layer: first on
the backend that runs its module, then on both, then (with `--whole`) against the whole quick suite.
Prints a line per fault; the exit code is the number of survivors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_COPIED = ("mapo_kernels", "reference", "benchmarks", "tests", "docs", "examples")
_COPIED += ("README.md", "ARCHITECTURE.md", "Makefile", "pyproject.toml", "constraints.txt")


class Mutant(NamedTuple):
    """A fault: which text of the package becomes which, and which tests should notice."""

    old: str
    new: str
    tests: str


def tests_of(*names: str) -> str:
    """The paths, below tests/, of these test modules."""
    return " ".join(f"tests/{name}.py" for name in names)


_EXTREME, _EVERYWHERE = "levels/test_extreme_inputs", "levels/test_same_numbers_everywhere"
_FORMULA, _LINEAR, _TOKENS = "levels/test_formula", "levels/test_linear", "levels/test_tokens"
ADVANTAGES = tests_of("levels/test_advantages", _EXTREME, _FORMULA)
TOKENS = tests_of(_FORMULA, _TOKENS, _EXTREME)
LOGITS = tests_of("levels/test_logits", "levels/test_logits_memory", _EXTREME, _LINEAR)
PLANS = tests_of("levels/test_plan", _EVERYWHERE, _LINEAR)
RANKS = tests_of("distributed/test_distributed")
VOCABULARY = tests_of("distributed/test_vocab_parallel")
CHECKS = tests_of("errors/test_checks", _EVERYWHERE, _EXTREME)

MUTANTS = (
    # formula: advantages
    Mutant("tl.fma(-4.0 * p, 1.0 - p, 1.0)", "tl.fma(-3.0 * p, 1.0 - p, 1.0)", ADVANTAGES),
    Mutant("(p >= 0.25) & (p <= 0.75)", "(p > 0.25) & (p <= 0.75)", ADVANTAGES),
    Mutant("divisor = count - numbers.std_correction", "divisor = count", ADVANTAGES),
    Mutant("(highest > lowest) & (count > 1)", "(count > 1)", ADVANTAGES),
    Mutant("eps = numbers.eps * unit", "eps = numbers.eps", ADVANTAGES),
    Mutant("std / unit, success_ratio", "std, success_ratio", ADVANTAGES),
    Mutant("factor = count / others / unit", "factor = 1.0 / unit", ADVANTAGES),
    Mutant(
        "tl.where(tl.abs(mean) > farthest, tl.abs(mean), farthest)",
        "tl.where(mean > farthest, mean, farthest)",
        ADVANTAGES,
    ),
    # formula: tokens
    Mutant("tl.where(tl.abs(log_ratio) > 20.0, 0.0, ratio)", "ratio", TOKENS),
    Mutant(
        "(ratio < 1.0 - numbers.eps_low) & (advantage < 0)",
        "(ratio < 1.0 - numbers.eps_low)",
        TOKENS,
    ),
    Mutant("ratio > numbers.eps_high_cispo", "ratio >= 1.0", TOKENS),
    Mutant("d_logp = -(kl + d)", "d_logp = -kl", TOKENS),
    Mutant("numbers.beta * (ratio_slope * kl)", "0.0 * kl", TOKENS),
    Mutant("d_logp = weight * d_logp", "d_logp = d_logp", TOKENS),
    Mutant("loss - numbers.entropy_coef * entropy", "loss", TOKENS + " " + LOGITS),
    Mutant("tl.where(active > 0, float", "tl.where(active > 1, float", TOKENS),
    Mutant("log1p(tail + target)", "log1p(tail)", LOGITS),
    Mutant("rest = others / total", "rest = 1.0 - target / total", LOGITS),
    # kernels
    Mutant(
        "success = finite & (reward >= threshold)",
        "success = finite & (reward > threshold)",
        ADVANTAGES,
    ),
    Mutant(
        "member = member & (ids == span.own_id[:, None])",
        "member = member",
        ADVANTAGES,
    ),
    Mutant(
        "speaks * (m.members - m.count)",
        "speaks * m.members",
        ADVANTAGES + " " + tests_of(_TOKENS),
    ),
    Mutant(
        "advantage = tl.where(scored, advantage, 0.0)",
        "advantage = advantage",
        TOKENS,
    ),
    Mutant(
        "valid = inside & (offs >= begin) & (offs < end)",
        "valid = inside & (offs < end)",
        TOKENS,
    ),
    Mutant(
        "write_end = tl.where(sequence == n_sequences - 1, length, end)",
        "write_end = end",
        TOKENS,
    ),
    Mutant("tl.maximum(s.metrics[i], tl.max(x.metrics[i], 1))", "tl.max(x.metrics[i], 1)", TOKENS),
    Mutant(
        "tl.store(Grad + row + offs, grad * scale,",
        "tl.store(Grad + row + offs, grad,",
        TOKENS,
    ),
    Mutant(
        "tl.sum(slopes, 0) / n_valid * scale",
        "tl.sum(slopes, 0) * scale",
        TOKENS,
    ),
    Mutant(
        "tl.fma(total, fade, tl.sum(powers, 1))",
        "tl.fma(total, 1.0, tl.sum(powers, 1))",
        LOGITS,
    ),
    Mutant("at_target = slope * rest", "at_target = slope", LOGITS),
    Mutant(
        "start = (i + tl.where(i >= own, 1, 0)) * TILE.step",
        "start = (i + tl.where(i > own, 1, 0)) * TILE.step",
        LOGITS,
    ),
    Mutant(
        "return tl.minimum(tl.sum(ended, 0), n_sequences - 1)",
        "return tl.minimum(tl.sum(ended, 0) + 1, n_sequences - 1)",
        LOGITS,
    ),
    # eager
    Mutant("success = finite & _successes(", "success = _successes(", ADVANTAGES),
    Mutant("(lowest.amin() >= -large) & (highest", "(highest", ADVANTAGES),
    Mutant("ids[1:] != ids[:-1]", "ids[1:] > ids[:-1] + 1", ADVANTAGES),
    Mutant(
        "(positions >= bounds[0]) & (positions < bounds[-1])",
        "positions < bounds[-1]",
        TOKENS,
    ),
    Mutant("with_signal & (weight != 0)", "with_signal", TOKENS),
    Mutant("(ids >= 0) & (ids < self._vocab)", "ids < self._vocab", LOGITS),
    Mutant(
        "flat = (bonus * (entropy - total.log()) - g) / total",
        "flat = (bonus * entropy - g) / total",
        LOGITS,
    ),
    Mutant(
        "temperature = temperature / head.logit_scale",
        "temperature = temperature / 1.0",
        LOGITS,
    ),
    Mutant("square_().neg_().add_(1.0)", "neg_().add_(1.0)", LOGITS),
    Mutant("r = r * (1.0 - r)", "r = 1.0 - r", LOGITS),
    # plan, ranks, checks
    Mutant("cu_seqlens=cu_seqlens - cu_seqlens[0]", "cu_seqlens=cu_seqlens", PLANS),
    Mutant("tokens if self.per_token else rows", "rows", PLANS),
    Mutant("start = sum(header[2] for header in headers[:rank])", "start = 0", RANKS),
    Mutant("total.double() / table.shape[0]", "total.double()", RANKS),
    Mutant("return sum(self.sizes[: self.rank])", "return 0", VOCABULARY),
    Mutant("(gaps + distance).amax(0)", "gaps.amax(0)", VOCABULARY),
    Mutant("value = values.sum()", "value = values.amax()", RANKS),
    Mutant("0 < normalizer < float", "0 <= normalizer < float", CHECKS),
    Mutant("advantages.shape[0] != cu_seqlens.shape[0] - 1", "True", PLANS),
    Mutant("n_rows % group_size", "n_rows % (group_size + 1)", CHECKS),
)


def copy_package(folder: Path) -> None:
    """What the tests need, without what git ignores."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def notices(folder: Path, tests: str, chosen: str = "") -> bool:
    """Whether a test of the copy in `folder` fails; `chosen` is for pytest's -k."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )
    # 1: tests failed, 2: they could not be imported. Else: a fault of this script, or no test.
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode != 0


def survives(mutant: Mutant, whole: bool) -> bool:
    """Plant a fault in a fresh copy, run its tests, and the whole suite if it survived them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_package(folder)
        (name,) = places(mutant)
        path = folder / name
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        # Only the interpreter runs kernels; the eager backend runs the rest, in less time.
        triton = re.search("kernels/|_kernel|_device", name.removeprefix("mapo_kernels/"))
        chosen = "interpreter" if triton else "not interpreter"
        found = notices(folder, mutant.tests, chosen) or notices(folder, mutant.tests)
        return not (found or (whole and notices(folder, "tests")))


def places(mutant: Mutant) -> list[str]:
    """The files that have the text that a fault replaces, each as often as it stands there."""
    paths = sorted((ROOT / "mapo_kernels").rglob("*.py"))
    counts = {str(path.relative_to(ROOT)): path.read_text().count(mutant.old) for path in paths}
    return [name for name, count in counts.items() for _ in range(count)]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose file or text contains this")
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if given.only in f"{places(m)}: {m.old}"]
    survivors = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        found = pool.map(lambda m: survives(m, given.whole), chosen)
        for mutant, alive in zip(chosen, found, strict=True):
            survivors += alive
            word = "SURVIVED" if alive else "noticed "
            print(f"{word} {places(mutant)[0]}: {mutant.old!r} -> {mutant.new!r}", flush=True)
    print(f"{survivors} of {len(chosen)} survived")
    return survivors


if __name__ == "__main__":
    raise SystemExit(main())
