"""Torch's CUDA allocator; there where a torch with CUDA was when the package was built."""

TORCH_VERSION: str

def make_allocator(directory: object, /) -> object: ...
