"""The namespace of this package's operators in `torch.ops`, in one place.

A build for the Hugging Face Hub (`make hub`) has another file here: versions of a kernel may be
loaded side by side in one process, and each registers its operators in a namespace of its own.
"""


def add_op_namespace_prefix(name: str) -> str:
    """The name under which torch knows the operator `name`."""
    return f"mapo_kernels::{name}"
