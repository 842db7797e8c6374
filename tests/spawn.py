"""Ranks for tests: processes joined by torch.distributed, started once and given many jobs.

`run_ranks(2, function, *args)` calls `function(*args)` in each of two processes, where
`torch.distributed` is initialised, and returns what they returned, by rank. The function must be
importable (a module beside the tests), its arguments and result picklable. A rank that fails, or
does not answer in time, fails the call with its traceback and ends the processes; the next call
starts new ones.
"""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

# Of ranks that wait for each other for ever; a busy machine needs a minute at times.
TIMEOUT = 240.0
# What ranks that wait for a failed one still get to fail, too, and say where they were.
GRACE = 2.0


def _serve(rank, world_size, backend, rendezvous, jobs):
    """Join the others, then do the jobs that arrive until there are no more."""
    import interpreted  # noqa: F401
    import torch
    import torch.distributed as dist

    import mapo_kernels as mk

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        # A file: no port that another process could take between choosing and binding it.
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            function, args = jobs.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        mk.set_backend(None)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            jobs.send(answer)
        except BrokenPipeError:  # nobody waits any more
            return
        if answer[0]:
            leave_groups()


def leave_groups():
    """End the groups that a job made: each has threads that wake up a hundred times a second."""
    import torch.distributed as dist

    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


class _Ranks:
    def __init__(self, world_size, backend):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self._folder.name) / "rendezvous"
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            given = (rank, world_size, backend, str(rendezvous), there)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function, args, timeout):
        answers: dict[int, tuple[bool, object]] = {}
        deadline = time.monotonic() + timeout
        for pipe in self._pipes:
            pipe.send((function, args))
        while len(answers) < len(self._pipes):
            silent = [p for rank, p in enumerate(self._pipes) if rank not in answers]
            ready = wait(silent, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    answer = False, "the process ended"
                answers[self._pipes.index(pipe)] = answer
                if not answer[0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


_started: dict[tuple[int, str], _Ranks] = {}


def _close_all():
    while _started:
        _started.popitem()[1].close()


atexit.register(_close_all)


def run_ranks(world_size, function, *args, backend="gloo", timeout=TIMEOUT):
    """What `function(*args)` returns on each rank, as a list; AssertionError if a rank fails."""
    key = (world_size, backend)
    if key not in _started:
        _started[key] = _Ranks(world_size, backend)
    answers = _started[key].run(function, args, timeout)
    failed = [f"rank {rank}:\n{text}" for rank, (well, text) in sorted(answers.items()) if not well]
    silent = sorted(set(range(world_size)) - set(answers))
    if failed or silent:
        _started.pop(key).close()
        failed += [f"rank {rank}: no answer" for rank in silent]
        raise AssertionError(f"{function.__name__}, {world_size} ranks\n" + "\n".join(failed))
    return [answers[rank][1] for rank in range(world_size)]
