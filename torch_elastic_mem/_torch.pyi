"""What torch_elastic_mem plugs into torch from C++; there where torch was when the package was built."""

TORCH_VERSION: str

def install_cpu_allocator(api: object, /) -> None: ...
