// The C hooks as torch calls them: what they throw when there is no memory, and that nothing else throws.
//   hooks             no account serves any device
//   hooks LIBRARY     an account over the fake driver at this path
#include <cstring>
#include <new>
#include <string>

#include "arena/arena.hpp"
#include "capi/scope.hpp"
#include "check.hpp"
#include "core/sizes.hpp"

using namespace tem;  // NOLINT

namespace {

std::string refusal(size_t bytes, int device) {
  try {
    tem_cuda_alloc(bytes, device, nullptr);
  } catch (const std::bad_alloc& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* words) { return text.find(words) != std::string::npos; }

void with_account(const std::string& library) {
  const auto arena = Arena::open(make_cuda_backend(0, library), {16 * kMiB, 0, 0});
  const AccountId account = arena->open_account("training", "training", Limits{});
  const auto allocator = Heap::make(arena, account, "training");
  set_device_default(0, allocator);
  check::property("out of memory is a std::bad_alloc that says who holds what", [&] {
    void* const held = tem_cuda_alloc(8 * kMiB, 0, nullptr);
    CHECK(held != nullptr);
    const std::string said = refusal(12 * kMiB, 0);
    CHECK(has(said, "torch_elastic_mem: out of memory: "));
    CHECK(has(said, "training holds 8 MiB"));
    CHECK(has(refusal(size_t{1} << 60, 0), "torch_elastic_mem: out of memory: "));
    CHECK(has(refusal(SIZE_MAX, 0), "torch_elastic_mem: out of memory: "));
    tem_cuda_free(held, 8 * kMiB, 0, nullptr);
    CHECK_EQ(allocator->live_bytes(), 0U);
  });
  check::property("a scope goes before the device's default, and only on its thread", [&] {
    const AccountId other_account = arena->open_account("other", "other", Limits{});
    const auto other = Heap::make(arena, other_account, "other");
    const auto before = exchange_scope(other);
    CHECK(before == nullptr);
    void* const block = tem_cuda_alloc(kMiB, 0, nullptr);
    std::thread([&] {
      void* const elsewhere = tem_cuda_alloc(kMiB, 0, nullptr);
      CHECK_EQ(allocator->live_bytes(), kMiB);
      tem_cuda_free(elsewhere, kMiB, 0, nullptr);
      tem_cuda_free(block, kMiB, 0, nullptr);
    }).join();
    CHECK(exchange_scope(nullptr) == other);
    CHECK_EQ(other->live_bytes(), 0U);
    other->retire();
    arena->close_account(other_account);
  });
  check::property("a closed account serves nobody", [&] {
    allocator->retire();
    CHECK(has(refusal(kMiB, 0), "has been closed"));
    CHECK(!has(refusal(kMiB, 0), "out of memory"));
    set_device_default(0, nullptr);
    arena->close_account(account);
    arena->close();
  });
}

}  // namespace

int main(int argc, char** argv) {
  check::property("without an account there is no memory, and the words say what to do", [] {
    CHECK(has(refusal(kMiB, 7), "no account serves device 7; pass it to torch_allocator()"));
    CHECK(tem_cuda_alloc(0, 7, nullptr) == nullptr);
    tem_cuda_free(nullptr, 0, 7, nullptr);
    tem_cuda_record_stream(nullptr, nullptr);
  });
  check::property("outside of a scope the host table passes, and frees nobody's pointer", [] {
    void* block = nullptr;
    char message[8];
    CHECK(host_api().allocate(100, &block, message, sizeof message) == TEM_NO_SCOPE);
    CHECK_EQ(host_api().release(&block), 0);
  });
  check::property("within a scope the host table allocates, and cuts its message to the room it has", [] {
    const auto arena = Arena::open(make_host_backend(8 * kMiB), {8 * kMiB, 0, 0});
    const AccountId account = arena->open_account("training", "training", Limits{});
    const auto allocator = Heap::make(arena, account, "training");
    exchange_scope(allocator);
    void* block = nullptr;
    char message[8] = "";
    CHECK(host_api().allocate(100, &block, message, sizeof message) == TEM_OK);
    std::memset(block, 1, 100);
    CHECK_EQ(host_api().release(block), 1);
    CHECK(host_api().allocate(9 * kMiB, &block, message, sizeof message) == TEM_OUT_OF_MEMORY);
    CHECK_EQ(std::strlen(message), sizeof message - 1);
    exchange_scope(nullptr);
    allocator->retire();
    arena->close_account(account);
    arena->close();
  });
  if (argc > 1) with_account(argv[1]);
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
