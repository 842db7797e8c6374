"""Run by installed.sh with the Python of an environment that has the wheel and what it depends on.

python installed.py CHECKOUT
"""

import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import torch

import mapo_kernels as mk

checkout = Path(sys.argv[1])
folder = Path(mk.__file__).parent
assert Path(sys.prefix) in folder.parents, f"expected the installed package, got {folder}"

# A loss and its gradient, on-policy: -A / (number of tokens) for each of them.
logp = torch.zeros(4, 3, requires_grad=True)
out = mk.mapo_loss(logp, rewards=torch.tensor([1.0, 0, 0, 1]), group_size=2)
out.loss.backward()
advantages = mk.group_advantages(torch.tensor([1.0, 0, 0, 1]), group_size=2)
torch.testing.assert_close(logp.grad, -advantages[:, None].expand(4, 3) / 12)

for file in ("py.typed", "bench/stub_cuda.c"):
    assert (folder / file).is_file(), f"{file} is not in the wheel"
assert not list(folder.glob("bench/**/*.png")), "results of benchmarks are in the wheel"

facts = metadata.metadata("mapo-kernels")
assert facts["Version"] == mk.__version__
assert facts["Author"] == "mapo_kernels developers"
labels = {url.split(",")[0] for url in facts.get_all("Project-URL")}
assert labels == {"Homepage", "Documentation", "Changelog", "Issues"}, labels

# Whoever has the source distribution can do what the repository's Makefile can.
(sdist,) = checkout.glob("dist/*.tar.gz")
with tarfile.open(sdist) as archive:
    shipped = {name.partition("/")[2] for name in archive.getnames()}
if (checkout / ".git").exists():
    command = ["git", "-C", str(checkout), "ls-files"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    left_out = sorted(set(tracked) - shipped)
    assert not left_out, f"not in the source distribution: {left_out}"
print(f"installed.py: mapo-kernels {mk.__version__} in {folder}")
