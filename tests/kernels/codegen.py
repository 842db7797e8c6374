"""Compiles what the public functions launch, for a GPU that is not there; run as a subprocess.

    echo CASE | python tests/kernels/codegen.py TARGET

prints, for each line that names a case, one JSON object: what it launches, and for each kernel its
variants' registers, stack, memory accesses and instruction counts.
"""

import json
import sys
from contextlib import redirect_stdout

import torch
from scalar_code import scalar_instructions

from benchmarks.machine_code import compile_launches, report


def batch(shape, packed=False):
    """Tensors for a call of the loss; their contents do not matter, their alignment does."""
    n_sequences, length = shape
    size = (n_sequences * length,) if packed else shape
    tensors = {
        "old_logprobs": torch.zeros(size),
        "ref_logprobs": torch.zeros(size),
        "mask": torch.zeros(size, dtype=torch.bool),
    }
    if packed:
        tensors["cu_seqlens"] = torch.arange(n_sequences + 1, dtype=torch.int32) * length
    return torch.zeros(size, requires_grad=True), tensors


def loss(shape, packed=False, dtype=torch.float32, reference=True, **settings):
    import mapo_kernels as mk

    logprobs, tensors = batch(shape, packed)
    if not reference:
        del tensors["ref_logprobs"]
    spec = mk.LossSpec(**{"beta": 0.1 if reference else 0.0, **settings})
    logprobs = logprobs.detach().to(dtype).requires_grad_()
    rewards = torch.zeros(shape[0])
    out = mk.mapo_loss(logprobs, rewards=rewards, group_size=4, spec=spec, **tensors)
    out.loss.backward()


def advantages(n, **grouping):
    import mapo_kernels as mk

    if grouping.pop("ids", False):
        grouping["group_ids"] = torch.zeros(n, dtype=torch.int64)
    mk.group_advantages(torch.zeros(n), return_stats="group_ids" not in grouping, **grouping)


def logits(
    shape,
    dtype=torch.bfloat16,
    inplace=True,
    view=False,
    scoring=False,
    temperature=1.0,
    reference=False,
    signal=None,
    id_dtype=torch.int64,
    **settings,
):
    """One step from logits; `view` drops the last position, as a trainer does."""
    import mapo_kernels as mk

    n_sequences, length, vocab = shape
    x = torch.zeros((n_sequences, length + view, vocab), dtype=dtype)[:, :length].requires_grad_()
    ids = torch.zeros((n_sequences, length), dtype=id_dtype)
    mask = torch.ones((n_sequences, length), dtype=torch.bool)
    old = torch.zeros(ids.shape)
    if scoring:
        with torch.no_grad():
            old = mk.token_logprobs(x, ids, mask=mask, temperature=temperature)
    out = mk.mapo_loss_from_logits(
        x,
        ids,
        **(signal or {"rewards": torch.zeros(n_sequences), "group_size": 4}),
        mask=mask,
        old_logprobs=old,
        ref_logprobs=old if reference else None,
        spec=mk.LossSpec(**settings),
        temperature=temperature,
        inplace=inplace,
    )
    out.loss.backward()


def many_rows(launch):
    """The launches of so many rows that what is the same for all of them is found out first."""
    from mapo_kernels import config

    with config.override({"LOGITS.fused_rows": 0}):
        launch()


def packed_logits():
    import mapo_kernels as mk

    x = torch.zeros((40, 1024), dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.arange(0, 41, 10, dtype=torch.int32)
    ids = torch.zeros(40, dtype=torch.int64)
    spec = mk.LossSpec(aggregation="seq-mean-token-mean")
    given = {"advantages": torch.ones(4), "cu_seqlens": bounds, "spec": spec}
    mk.mapo_loss_from_logits(x, ids, **given).loss.backward()


def hidden_chunk(softcap=None, **settings):
    """What the hidden level launches on a chunk of float32 logits from bfloat16 products."""
    import mapo_kernels as mk
    from mapo_kernels import operators
    from mapo_kernels.batch import Batch, RowInputs, empty_results

    x, ones = torch.zeros((16, 1, V)), torch.ones(16, 1)
    place = empty_results(ones, Batch(), mk.LossSpec(), mk.AdvantageSpec(), False)
    operators.logits_loss(
        x,
        RowInputs(torch.zeros((16, 1), dtype=torch.int64), softcap=softcap),
        Batch(ones, loss_weights=ones, advantages=ones[:, 0], normalizer=ones[0, 0]),
        mk.LossSpec(**settings),
        mk.AdvantageSpec(),
        True,
        place._replace(grad=torch.empty_like(x, dtype=torch.bfloat16)),
    )


def split_rows():
    """What a rank launches on its share of the columns."""
    from mapo_kernels import operators
    from mapo_kernels.batch import RowInputs

    x = torch.zeros((16, V // 8), dtype=torch.bfloat16)
    operators._shares(x, RowInputs(torch.zeros(16, dtype=torch.int64)), None, 4)


def kept_columns(dtype=torch.bfloat16, width=4096):
    """What rows of which few columns are kept take of a head, and the head of them."""
    from mapo_kernels import operators

    hidden, weight = torch.zeros((16, width), dtype=dtype), torch.zeros((64, width), dtype=dtype)
    ids, bounds = torch.zeros(16, dtype=torch.int64), torch.arange(17)
    factor = torch.zeros(16)
    operators.gather_products(hidden, weight, ids, ids, ids, bounds, out=factor)
    operators.gather_sums(weight, ids, factor, bounds, None, False, out=hidden)
    operators.gather_sums(hidden, ids, factor, bounds, ids, False, out=weight)
    parts = torch.zeros((16, width))
    operators.gather_sums(hidden, ids, factor, bounds, None, False, out=parts)
    operators.gather_sums(parts, None, None, bounds, ids, True, out=torch.zeros((64, width)))


V = 152064
CASES = {
    "kept columns": kept_columns,
    "kept columns, float32": lambda: kept_columns(torch.float32),
    "kept columns, odd width": lambda: kept_columns(width=1001),
    "split rows": split_rows,
    "hidden chunk": hidden_chunk,
    "hidden chunk, entropy bonus": lambda: hidden_chunk(entropy_coef=0.01),
    "hidden chunk, softcap": lambda: hidden_chunk(softcap=30.0),
    "many rows": lambda: many_rows(lambda: logits((8, 2, V))),
    "many packed rows": lambda: many_rows(packed_logits),
    "logits": lambda: logits((8, 2, V), scoring=True),
    "logits, ids of a byte": lambda: logits((8, 2, V), scoring=True, id_dtype=torch.uint8),
    "logits view": lambda: logits((8, 2, V), view=True, inplace=False),
    "logits, given advantages": lambda: logits((8, 2, V), signal={"advantages": torch.ones(8)}),
    "float32 logits": lambda: logits((8, 2, V), dtype=torch.float32),
    "float16 logits": lambda: logits((8, 2, V), dtype=torch.float16),
    "odd vocabulary": lambda: logits((8, 2, 50257)),
    "entropy bonus": lambda: logits((8, 2, V), entropy_coef=0.01),
    "packed logits": packed_logits,
    "logits, sequence level": lambda: logits((8, 2, V), importance_level="sequence"),
    "clip": lambda: loss((16, 1024)),
    "no reference": lambda: loss((16, 1024), reference=False),
    "bfloat16": lambda: loss((16, 1024), dtype=torch.bfloat16),
    "odd length": lambda: loss((16, 1001)),
    "odd length, no reference": lambda: loss((16, 1001), reference=False),
    "packed": lambda: loss((16, 1000), packed=True),
    "packed, no reference": lambda: loss((16, 1000), packed=True, reference=False),
    "sequence level": lambda: loss((16, 1024), importance_level="sequence"),
    "sapo": lambda: loss((16, 1024), objective="sapo", kl_importance_correction=True),
    "cispo": lambda: loss((16, 1024), objective="cispo", aggregation="seq-mean-token-mean"),
    "cispo, both bounds": lambda: loss((16, 1024), objective="cispo", eps_low_cispo=0.8),
    "gmpo": lambda: loss((16, 1024), objective="gmpo", importance_level="sequence"),
    "vespo": lambda: loss(
        (16, 1024), objective="vespo", importance_level="sequence", kl_importance_correction=True
    ),
    "groups of 16": lambda: advantages(1 << 20, group_size=16),
    "groups of 4096": lambda: advantages(1 << 14, group_size=4096),
    "ids": lambda: advantages(1000, ids=True),
    "many ids": lambda: advantages(10000, ids=True),
}


# Whose instructions outside the main loops are counted.
SCALAR = ("many rows", "logits")


def ten_lengths():
    """Lengths, batches and hyper-parameters change; nothing should be compiled again for it."""
    for i, length in enumerate((1001, 513, 700, 999, 1500, 4095, 2047, 777, 3333, 5001)):
        loss(
            (4 * (i + 3), length), eps_low=0.1 + i / 50, eps_high=0.2 + i / 50, beta=0.01 * (i + 1)
        )


def ten_shapes_of_logits():
    """The same for the logits level, in one vocabulary; views keep the model's row stride."""
    for i, length in enumerate((3, 5, 7, 8, 9, 16, 11, 13, 17, 2)):
        logits(
            (4 * (i % 3 + 1), length, 1024),
            scoring=True,
            reference=True,
            inplace=i % 2 == 0,
            beta=0.01 * (i + 1),
            eps_low=0.1 + i / 50,
            temperature=0.5 + i / 10,
        )


CASES["ten lengths"] = ten_lengths
CASES["ten shapes of logits"] = ten_shapes_of_logits


def main(target):
    compiled, reports = compile_launches(target), {}
    for case in map(str.rstrip, sys.stdin):
        compiled.clear()
        with redirect_stdout(sys.stderr):
            CASES[case]()
        variants = {}
        for name, kernel in compiled:
            if kernel.hash not in reports:
                reports[kernel.hash] = report(kernel)
            variants.setdefault(name, {})[kernel.hash] = reports[kernel.hash]
        found = {
            "scalar": [
                scalar_instructions(kernel, tiles=4)
                for name, kernel in compiled
                if case in SCALAR and name == "logits_loss_kernel" and "cubin" in kernel.asm
            ],
            "launches": [name for name, _ in compiled],
            "kernels": {name: list(reported.values()) for name, reported in variants.items()},
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
