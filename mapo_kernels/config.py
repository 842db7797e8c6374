"""Every constant that tunes something, in a frozen record per kernel or step.

None of them changes a number but by the order of sums, and none depends on how much memory is free.
Read them through this module (`config.LOGITS.max_threads`), so that `override` reaches everyone,
and so does a file (`load`) that the environment variable MAPO_KERNELS_TUNING may name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Advantages:
    """The kernel of the advantage level.

    Attributes:
        tile_elements: rewards a program takes at once, of contiguous groups.
        match_limit: rows above which scanning every id for every row costs more than sorting.
        match_block: ids per step of that scan.
        sorted_tile: groups a program takes at once, where rows were sorted.
        sorted_block: rewards per step of each of them.
        registers: per thread. Up to 512 threads have them; Triton 3.6 spills for an A100 at fewer.
        summary_block: groups per step of the one program that makes the metrics of all of them.
        summary_limit: groups above which the metrics are left to torch, which has more programs.
    """

    tile_elements: int = 1024
    match_limit: int = 4096
    match_block: int = 1024
    sorted_tile: int = 16
    sorted_block: int = 64
    registers: int = 128
    summary_block: int = 1024
    summary_limit: int = 1 << 15


@dataclass(frozen=True)
class Logprobs:
    """The kernels of the log-prob level.

    Attributes:
        threads: per program.
        short_threads: the same where sequences have at most `short_length` tokens on average.
        short_length: see there.
        tokens_per_thread: 16 bytes of float32.
        multiprocessors: that share the sequences, each with as many programs as it can hold; an
            H200 has so many.
        partials_per_thread: sums of other programs that a thread of the last one adds per step.
        registers: per thread; left to itself the compiler takes a third more.
        unaligned_registers: the same where tokens are read one by one: in packed sequences, and in
            padded ones of a length that is no multiple of 16. Without a reference policy 20 to 80
            accesses then go to spilled numbers; 160 spill none, and half as many programs fit.
        unaligned_tokens_per_thread: tokens of a thread there.
        scale_block: tokens per program of the backward launch.
    """

    threads: int = 256
    short_threads: int = 64
    short_length: int = 256
    tokens_per_thread: int = 4
    multiprocessors: int = 132
    partials_per_thread: int = 16
    registers: int = 80
    unaligned_registers: int = 128
    unaligned_tokens_per_thread: int = 4
    scale_block: int = 1024


@dataclass(frozen=True)
class Logits:
    """The kernels of the logits level.

    Attributes:
        max_threads: per program.
        min_threads: see there.
        tiles: of 16 bytes a thread, which a step reads before it uses or writes any of them.
        steps: that a row takes, about, where that leaves more than `min_threads`.
        programs: that a multiprocessor should hold at once: each has a row in the cache between
            its first and its second reading.
        registers: per thread at the most, if `programs` leave as many.
        first_hint: eviction policy of the first reading of a row that is read twice.
        second_hint: the same of the second, and of the gradient.
        score_hint: the same of a row that is read once.
        backwards: whether the second reading begins at the end of the row, which was read last.
        partials_per_thread: sums of other programs that a thread of the last one adds per step.
        block_tokens: tokens per step of counting a mask, or of finding a packed row's sequence.
        fused_rows: rows up to which every program finds out by itself what is the same for all of
            them, and the last one adds their sums. Beyond, a launch before and one after do that,
            which saves some 6 ns a row (predicted) and takes 4 us of a GPU and 20 us of the host.
        finish_threads: of the latter.
        match_limit: rows above which finding a row's group among all ids takes more than one step.
        rescale_programs: programs of the launch that multiplies a gradient.
        large_copy: bytes of logits from which on a copy is worth a warning.
        given: fields that `override` or a file has set, which no measured one replaces.
    """

    max_threads: int = 512
    min_threads: int = 64
    tiles: int = 4
    steps: int = 4
    programs: int = 1
    registers: int = 128
    first_hint: str = "evict_last"
    second_hint: str = "evict_first"
    score_hint: str = "evict_first"
    backwards: bool = True
    partials_per_thread: int = 8
    block_tokens: int = 1024
    fused_rows: int = 2048
    finish_threads: int = 1024
    match_limit: int = 1024
    rescale_programs: int = 1024
    large_copy: int = 1 << 26
    given: frozenset[str] = frozenset()

    def tuned(self, architecture: str, itemsize: int, vocab: int) -> Logits:
        """The record for logits of `itemsize` bytes in rows of V: with what `TUNED` has for them.

        What is written does not enter, nor the number of rows: a score and a loss of the same
        logits take the same record, and so add in the same order.
        """
        found = TUNED.get((architecture, itemsize, vocab.bit_length()), {})
        return replace(self, **{k: x for k, x in found.items() if k not in self.given})


@dataclass(frozen=True)
class Hidden:
    """Chunks of hidden states.

    Every chunk also reads and writes the weight's gradient: on a GPU it takes some 2000 rows to
    keep the matrix units busy; on a CPU a chunk should stay near the caches.

    Attributes:
        gpu_chunk: bytes of logits, hidden states and their gradients that a chunk may take.
        cpu_chunk: the same on a CPU.
        multiple: of rows per chunk.
        invariant_chunk: rows of every chunk at the most where their number must not depend on the
            batch.
        one_product: whether chunks of a narrow dtype wait for one product by the weight, as long as
            their gradients take no more room than one of the weight in float32.
    """

    gpu_chunk: int = 1 << 31
    cpu_chunk: int = 1 << 26
    multiple: int = 128
    invariant_chunk: int = 1024
    one_product: bool = True


@dataclass(frozen=True)
class Kept:
    """Rows of which a sampling mask keeps few columns, at the hidden level.

    A kept column is one row of the weight, which is read for itself: on an H200 that takes as long
    as the products of a 750th of a row of 150k (counted: 2 H bytes at 4 TB/s, 2 V H operations at
    800 TFLOP/s). Rows that keep more than their share of V go through products of whole rows.

    Attributes:
        gpu_share: of V; a row that keeps more than V over this goes through whole products.
        cpu_share: the same on a CPU, whose products are slower.
        columns: that a program takes at once.
        width: of a hidden state that it takes at once.
        threads: per program.
        unroll: rows that a sum reads before it adds any of them.
        piece: entries of a column's gradient that one program adds; more are added in two steps.
    """

    gpu_share: int = 200
    cpu_share: int = 16
    columns: int = 4
    width: int = 1024
    threads: int = 128
    unroll: int = 4
    piece: int = 64


@dataclass(frozen=True)
class Eager:
    """The eager backend on a CPU, where chunks that stay in the cache are twice as fast.

    Attributes:
        chunk_rewards: rewards at once, of contiguous groups.
        chunk_tokens: tokens at once; some hundred elementwise operations touch each.
        chunk_logits: logits at once.
    """

    chunk_rewards: int = 1 << 17
    chunk_tokens: int = 1 << 16
    chunk_logits: int = 1 << 20


ADVANTAGES, LOGPROBS, LOGITS = Advantages(), Logprobs(), Logits()
HIDDEN, KEPT, EAGER = Hidden(), Kept(), Eager()
# How the names of fields end that may be 0.
_LIMITS = ("limit", "rows", "length", "copy")
RECORDS = ("ADVANTAGES", "LOGPROBS", "LOGITS", "HIDDEN", "KEPT", "EAGER")
# What GPUs were measured to want of the fields of LOGITS that say how a row is read, in place of
# the defaults: by architecture, bytes of a logit, and bits of V. None has been measured yet.
TUNED: dict[tuple[str, int, int], dict[str, Any]] = {}


def changed() -> dict[str, Any]:
    """What differs from the defaults, as `override` takes it."""
    return {
        f"{name}.{field.name}": getattr(globals()[name], field.name)
        for name in RECORDS
        for field in fields(globals()[name])
        if field.name != "given" and getattr(globals()[name], field.name) != field.default
    }


def _set(values: Mapping[str, Any]) -> None:
    """Set values by record and field, all or none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name, _, field = key.partition(".")
        if name not in RECORDS:
            raise ValueError(f"{key}: expected a record among {list(RECORDS)}, got {name!r}")
        record = found.get(name, globals()[name])
        known: dict[str, Any] = {x.name: x.default for x in fields(record)}
        known.pop("given", None)
        if field not in known:
            raise ValueError(f"{key}: expected a field among {list(known)}, got {field!r}")
        wanted = type(known[field])
        if type(value) is not wanted:
            raise TypeError(f"{key}: expected {wanted.__name__}, got {value!r}")
        # Beyond a limit of 0 is everything.
        least = 0 if field.endswith(_LIMITS) else 1
        if wanted is int and value < least:
            raise ValueError(f"{key}: expected at least {least}, got {value}")
        found[name] = replace(record, **{field: value})
        if isinstance(record, Logits):
            found[name] = replace(found[name], given=record.given | {field})
    globals().update(found)


@contextmanager
def override(values: Mapping[str, Any]) -> Iterator[None]:
    """With other values, by record and field: `override({"LOGITS.tiles": 2})`.

    Raises:
        ValueError: a record or a field that there is not, or a number that makes no sense.
        TypeError: a value of another type than the field's.
    """
    before = {name: globals()[name] for name in RECORDS}
    try:
        _set(values)
        yield
    finally:
        globals().update(before)


def load(path: str | Path) -> None:
    """Other values for this process from a JSON file, such as {"LOGITS": {"tiles": 2}}.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or what `override` does not take.
        TypeError: a value of another type than the field's.
    """
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or not all(isinstance(x, dict) for x in content.values()):
            raise ValueError(f'expected {{"RECORD": {{"field": value}}}}, got {content!r:.100}')
        _set({f"{name}.{key}": x for name, some in content.items() for key, x in some.items()})
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


if os.environ.get("MAPO_KERNELS_TUNING"):
    load(os.environ["MAPO_KERNELS_TUNING"])
