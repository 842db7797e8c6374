"""`make hub`: mapo_kernels as a kernel of the Hugging Face Hub, in build/hub.

- `build.toml`, `flake.nix`, `CARD.md` and `torch-ext/` are what `kernel-builder` builds.
- `build/torch-BACKEND/` are what it makes of them and what `kernels.get_local_kernel` loads. They
  are written here, too, since nothing needs compiling.

The kernel is `mapo_kernels/__init__.py` and every module that is imported from there; the command
line, the demo, the benchmarks and the trainers' plugins are not. Imports become relative, because
a kernel is loaded under a name of its own. Its operators have a namespace of their own: its name
has a hash of all that the kernel is made of.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "mapo_kernels"

OPS = '''"""The namespace of this build's operators in `torch.ops`; no other build has the same."""


def add_op_namespace_prefix(name: str) -> str:
    """The name under which torch knows the operator `name`."""
    return f"{identifier}::{{name}}"
'''

# The Hub asks for it: older versions of `kernels` load the folder that has the kernel's name.
COMPATIBLE = '''"""The kernel in the folder above, for older versions of `kernels`."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if "{identifier}" not in sys.modules:
    _spec = spec_from_file_location("{identifier}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{identifier}"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{identifier}"])

_kernel = sys.modules["{identifier}"]
__all__ = _kernel.__all__
globals().update({{name: getattr(_kernel, name) for name in __all__}})
'''


def own_imports(source: str) -> Iterator[ast.ImportFrom]:
    """Where a module's `source` imports something from the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_is_own(x.name) for x in node.names):
            raise SystemExit(f"line {node.lineno}: expected `from {PACKAGE} import ...`")
        if isinstance(node, ast.ImportFrom) and not node.level and _is_own(node.module):
            yield node


def _is_own(module: str | None) -> bool:
    return (module or "").split(".")[0] == PACKAGE


def relative(source: str, depth: int) -> str:
    """`source` of a module in the `depth`-th folder of the package, its own imports relative."""
    lines = source.splitlines(keepends=True)
    for node in own_imports(source):
        start = f"from {node.module} import"
        new = "from " + "." * depth + (node.module or "")[len(PACKAGE) + 1 :] + " import"
        line = lines[node.lineno - 1]
        assert line[node.col_offset :].startswith(start), line
        lines[node.lineno - 1] = line.replace(start, new, 1)
    return "".join(lines)


def modules(package: Path) -> dict[str, str]:
    """The kernel's sources by their paths in the package: what `__init__.py` leads to."""
    found: dict[str, str] = {}
    waiting = [package / "__init__.py"]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(package).as_posix()
        if name in found or not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        found[name] = relative(source, depth=len(Path(name).parts))
        for node in own_imports(source):
            folders = (node.module or "").split(".")[1:]
            # What is imported may be a module or a name in one; its packages come first.
            for parts in (folders, *([*folders, x.name] for x in node.names)):
                for place in (package.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)):
                    waiting += [place.with_suffix(".py"), place / "__init__.py"]
    del found["_ops.py"]  # which each build has of its own
    return dict(sorted(found.items()))


def metadata(general: dict[str, Any], identifier: str, backend: str, files: dict[str, str]) -> str:
    """What `kernels` reads about a build: its name, where it runs, and a digest of each file."""
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    facts = {key: general[key] for key in ("name", "version", "license", "upstream")}
    facts |= {"id": identifier, "python-depends": [], "backend": {"type": backend}}
    return json.dumps(facts | {"digest": {"algorithm": "sha256", "files": digests}}, indent=2)


def write(root: Path, out: Path) -> None:
    """Write the kernel of the checkout `root` to the folder `out`, in place of what is there."""
    settings = (root / "hub" / "build.toml").read_text(encoding="utf-8")
    general = tomllib.loads(settings)["general"]
    sources = modules(root / PACKAGE)
    unique = hashlib.sha256(json.dumps([settings, sources]).encode()).hexdigest()[:12]
    shutil.rmtree(out, ignore_errors=True)
    files = {f"torch-ext/{PACKAGE}/{name}": text for name, text in sources.items()}
    for name in ("build.toml", "flake.nix", "CARD.md"):
        files[name] = (root / "hub" / name).read_text(encoding="utf-8")
    for backend in general["backends"]:
        identifier = f"_{PACKAGE}_{backend}_{unique}"
        built = sources | {
            "_ops.py": OPS.format(identifier=identifier),
            f"{PACKAGE}/__init__.py": COMPATIBLE.format(identifier=identifier),
        }
        built["metadata.json"] = metadata(general, identifier, backend, built)
        files |= {f"build/torch-{backend}/{name}": text for name, text in built.items()}
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    ROOT = Path(__file__).parents[1]
    write(ROOT, ROOT / "build" / "hub")
    print(f"kernel for the Hub: {ROOT / 'build' / 'hub'}")
