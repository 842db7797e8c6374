"""Records of an ablation that nobody ran: what the study's page makes of known numbers."""

import json
import random

from mapo_kernels.study.settings import FORMAT, REGIMES, STEP_LISTS

STEPS = (0, 20, 40)


def record(
    estimator, seed, final, *, stage="main", regime="mixed", reward="binary", rate=1e-3, area=None
):
    """One that rises in a line to `final`, or lies at `area` in between."""
    start = REGIMES[regime]
    middle = (start + final) / 2 if area is None else area
    heights = dict(zip(STEPS, (start, middle, final), strict=True))
    evals = [
        {"step": step, "success_sampled": x, "success_greedy": x} for step, x in heights.items()
    ]
    steps = {name: [0.5, None] for name in STEP_LISTS}
    steps |= {"step": [20, 40], "groups": [16.0, 16.0], "groups_without_signal": [4.0, 8.0]}
    return {
        "format": FORMAT,
        "stage": stage,
        "estimator": estimator,
        "regime": regime,
        "reward": reward,
        "seed": seed,
        "learning_rate": rate,
        "settings": {"task": "number_sorting", "steps": 40, "prompts": 16, "group_size": 16},
        "warmup": {"updates": 10, "success": start},
        "evals": evals,
        "steps": steps,
        "seconds": 1.5,
        "commit": "0123456789abcdef+",
        "versions": {"torch": "2.13.0"},
        "machine": "x86_64 CPU, one thread a run",
    }


def noisy(names, seeds, *, base=0.5, effects=None, spread=0.02, **cell):
    """Records whose estimators share each seed's luck, and differ by `effects`."""
    found = []
    for seed in range(seeds):
        luck = random.Random(seed).gauss(0, spread)
        for name in names:
            own = random.Random(f"{name}{seed}").gauss(0, spread / 4)
            final = base + luck + own + (effects or {}).get(name, 0)
            found.append(record(name, seed, final, **cell))
    return found


def write(folder, records):
    """As `study ablation` leaves them."""
    lines = "".join(json.dumps(x) + "\n" for x in records)
    (folder / "ablation.jsonl").write_text(lines)
