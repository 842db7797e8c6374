"""What the ranks of `test_distributed.py` do; every function runs on all of them."""

import torch
import torch.distributed as dist


def sum_of_ranks():
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return float(x)


def fail_on_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("a message to look for")
    dist.barrier()
