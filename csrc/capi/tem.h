/* The plain C face of the allocator: the hooks of torch's pluggable CUDA allocator, and the table through
 * which the torch extension reaches the core without sharing C++ symbols with it. Nothing here takes the GIL.
 */
#ifndef TORCH_ELASTIC_MEM_TEM_H
#define TORCH_ELASTIC_MEM_TEM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TEM_HOST_API_VERSION 1
#define TEM_HOST_API_NAME "torch_elastic_mem.host_api.v1"
/* A capsule with a tem::MallocDirectory*, of alloc/malloc.hpp. */
#define TEM_MALLOC_DIRECTORY_NAME "torch_elastic_mem.malloc_directory.v1"

enum tem_result {
  TEM_OK = 0,
  TEM_NO_SCOPE = 1,      /* no account's scope is active on this thread: use another allocator */
  TEM_OUT_OF_MEMORY = 2, /* message says who holds the memory */
  TEM_FAILED = 3
};

/* For host memory. Every function may be called from any thread. */
struct tem_host_api {
  uint32_t version;
  enum tem_result (*allocate)(size_t bytes, void** block, char* message, size_t message_bytes);
  /* 0 if `block` is not from allocate(); else 1, and it is freed. */
  int (*release)(void* block);
};

/* Hooks for torch.cuda.memory.CUDAPluggableAllocator.
 *
 * torch does not check for null: it would make a tensor at address 0. tem_cuda_alloc therefore throws a C++
 * exception derived from std::bad_alloc, which torch hands to Python with its message. The others never
 * throw.
 */
void* tem_cuda_alloc(size_t bytes, int device, void* stream);
void tem_cuda_free(void* block, size_t bytes, int device, void* stream);
void tem_cuda_record_stream(void* block, void* stream);

#ifdef __cplusplus
}
#endif

#endif
