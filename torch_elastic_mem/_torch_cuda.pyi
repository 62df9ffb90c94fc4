"""torch's CUDA allocator over accounts; there where a CUDA build of torch was when the package was built."""

TORCH_VERSION: str

def make_allocator(directory: object, /) -> object:
    """A `torch._C._cuda_CUDAAllocator`, the same at every call."""
