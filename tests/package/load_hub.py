"""Two versions of the kernel of the Hub beside the installed package, in one process (test_hub.py).

python load_hub.py FOLDER_OF_VERSION_0 FOLDER_OF_VERSION_1
"""

import os
import re
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from functorch.compile import make_boxed_func
from kernels import get_loaded_kernels, get_local_kernel
from torch._dynamo.backends.common import aot_autograd

SIZES = N, T, H, V = 8, 5, 16, 50
# What torch.compile sees of a loss: the operators of the eager backend, and of Triton's launches.
OPERATORS = {"eager": {"sum_by"}, "triton": {"token_loss", "scale"}}


def inputs():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(0, V, (N, T), generator=generator)
    mask = torch.arange(T) < torch.arange(N)[:, None]
    rewards = (draw(N) > 0).float()
    return draw(N, T), draw(N, T, V), draw(N, T, H), draw(V, H), ids, mask, rewards


def numbers(mk):
    """Advantages, and the loss, metrics and gradients of each level."""
    logp, logits, hidden, weight, ids, mask, rewards = inputs()
    found = [mk.group_advantages(rewards, group_size=4)]
    given = {"rewards": rewards, "group_size": 4, "mask": mask}
    given |= {"old_logprobs": logp.detach() / 4 - 4, "spec": mk.LossSpec(eps_high=0.28)}
    for function, leaves, rest in (
        (mk.mapo_loss, (logp / 4 - 4,), ()),
        (mk.mapo_loss_from_logits, (logits,), (ids,)),
        (mk.mapo_loss_from_hidden, (hidden, weight), (ids,)),
    ):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = function(*leaves, *rest, **given)
        out.loss.backward()
        found += [out.loss, *out.metrics.values(), *(x.grad for x in leaves)]
    return found


def compiled(mk, backend):
    """A loss in a graph, its gradient, and the graph's operators of this package."""
    logp, *_, rewards = inputs()
    logp = logp.flatten().requires_grad_()  # packed, so that the eager backend has an operator, too
    names = set()

    def engine(graph, _):
        names.update(re.findall(r"torch\.ops\.(\w*mapo_kernels\w*\.\w+)", graph.code))
        return make_boxed_func(graph)

    mk.set_backend(backend)
    given = {"rewards": rewards, "group_size": 4, "cu_seqlens": torch.arange(0, N * T + 1, T)}
    given["spec"] = mk.LossSpec(importance_level="sequence")
    loss = torch.compile(
        lambda x: mk.mapo_loss(x, **given).loss,
        fullgraph=True,
        backend=aot_autograd(fw_compiler=engine, bw_compiler=engine),
    )(logp)
    loss.backward()
    mk.set_backend(None)
    return [loss, logp.grad], names


def namespace(mk):
    return import_module(f"{mk.__name__}._ops").add_op_namespace_prefix("")


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e), (a, e)


def main(folders):
    # Whatever imports the package by its name fails.
    sys.modules["mapo_kernels"] = None
    versions = [get_local_kernel(Path(folder)) for folder in folders]
    assert [x.metadata.version for x in get_loaded_kernels()] == [0, 1]
    for kernel in versions:
        for name in kernel.__all__:
            assert getattr(kernel, name) is not None
    results = [numbers(kernel) for kernel in versions]
    graphs = {b: [compiled(kernel, b) for kernel in versions] for b in OPERATORS}
    os.environ["LOCAL_KERNELS"] = f"OWNER/mapo-kernels={folders[0]}"
    card = (Path(folders[0]) / "CARD.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0], {})
    unnamed = [x for x in versions[0].__all__ if f"`{x}`" not in card and "__" not in x]
    assert not unnamed, f"hub/CARD.md says nothing about {unnamed}"
    assert not [name for name in sys.modules if name.startswith("mapo_kernels.")]
    # What older versions of `kernels` load: a module of another name that is the same kernel.
    folder = Path(versions[0].__file__).parent / "mapo_kernels"
    spec = spec_from_file_location("older", folder / "__init__.py")
    older = module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.mapo_loss is versions[0].mapo_loss

    del sys.modules["mapo_kernels"]
    installed = import_module("mapo_kernels")
    assert [x.__version__ for x in versions] == [installed.__version__, "9.9.9"]
    every = [installed, *versions]
    assert len({namespace(x) for x in every}) == len({id(x.mapo_loss) for x in every}) == 3
    for kernel, result in zip(versions, results, strict=True):
        assert_same(result, numbers(installed))
        assert namespace(kernel) == f"{kernel.__name__}::"
    for backend, names in OPERATORS.items():
        expected, _ = compiled(installed, backend)
        for kernel, (actual, found) in zip(versions, graphs[backend], strict=True):
            assert_same(actual, expected)
            assert found, "no operator in the graph"
            assert {x.split(".")[0] for x in found} == {kernel.__name__}, found
            assert {x.split(".")[1] for x in found} == names, found
    print("same numbers")


if __name__ == "__main__":
    main(sys.argv[1:])
