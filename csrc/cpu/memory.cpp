#include "cpu/memory.h"

#include <ATen/Context.h>
#include <ATen/ops/empty_native.h>
#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "cpu/tuning.h"

namespace fastlstm {
namespace {

// A block is handed out again for a request of 4/5 to all of its size. Idle blocks go, the oldest first,
// where memory in use and idle together would exceed by an eighth the most that was ever in use at once:
// forward's workspace and backward's are never in use together, and must not drive each other out.
class Recycler final : public c10::Allocator {
 public:
  static Recycler& get() {
    static auto* recycler = new Recycler;  // never destroyed: tensors may outlive static objects
    return *recycler;
  }

  c10::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = take(bytes);
    if (!block) block = std::make_unique<Block>(Block{bytes, fresh(bytes)});
    in_use_ += block->bytes;
    void* data = block->memory.get();
    return {data, block.release(), &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  struct Block {
    size_t bytes;
    c10::DataPtr memory;
  };
  using Idle = std::map<std::pair<size_t, uint64_t>, std::unique_ptr<Block>>;  // by bytes, then turn

  // A lock held by nobody alive, after a fork, must not stop the child: it goes without, like who comes while
  // another thread has it.
  std::unique_lock<std::mutex> lock() { return {mutex_, std::try_to_lock}; }

  std::unique_ptr<Block> take(size_t bytes) {
    const auto locked = lock();
    if (!locked) return nullptr;
    const auto found = idle_.lower_bound({bytes, 0});
    if (found == idle_.end() || found->first.first > bytes + bytes / 4) {
      trim(bytes);
      return nullptr;
    }
    return remove(found);
  }

  c10::DataPtr fresh(size_t bytes) {
    try {
      return c10::GetCPUAllocator()->allocate(bytes);
    } catch (const c10::Error&) {
      {
        const auto locked = lock();
        if (!locked) throw;
        drop(0);
      }
      return c10::GetCPUAllocator()->allocate(bytes);
    }
  }

  static void give_back(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    Recycler& self = get();
    const size_t used = self.in_use_.fetch_sub(block->bytes);
    const auto locked = self.lock();
    if (!locked) return;
    self.most_in_use_ = std::max(self.most_in_use_, used);
    if (block->bytes < kCachedBlockMinBytes || block->bytes > kCachedIdleMaxBytes) return;
    const size_t bytes = block->bytes;
    const uint64_t turn = --self.turn_;
    try {
      self.sizes_.emplace(turn, bytes);
      self.idle_.emplace(std::pair(bytes, turn), std::move(block));
    } catch (const std::bad_alloc&) {  // then this one goes
      self.sizes_.erase(turn);
      return;
    }
    self.idle_bytes_ += bytes;
    self.trim(0);
  }

  // Releases what may not stay idle once `more` bytes more are in use.
  void trim(size_t more) {
    const size_t use = in_use_ + more, most = std::max(most_in_use_, use);
    drop(std::min(kCachedIdleMaxBytes, most + most / 8 - use));
  }
  void drop(size_t most_idle) {
    while (idle_bytes_ > most_idle) {
      const auto [turn, bytes] = *sizes_.rbegin();
      remove(idle_.find({bytes, turn}));
    }
  }
  std::unique_ptr<Block> remove(Idle::iterator it) {
    std::unique_ptr<Block> block = std::move(it->second);
    sizes_.erase(it->first.second);
    idle_.erase(it);
    idle_bytes_ -= block->bytes;
    return block;
  }

  std::atomic<size_t> in_use_ = 0;
  std::mutex mutex_;  // of what follows
  Idle idle_;
  std::map<uint64_t, size_t> sizes_;  // of idle blocks, by turn
  uint64_t turn_ = UINT64_MAX;        // falls, so that of equal blocks the last used, in cache, comes first
  size_t idle_bytes_ = 0, most_in_use_ = 0;
};

// Whether torch fills what it allocates (torch.utils.deterministic.fill_uninitialized_memory).
[[maybe_unused]] bool filled_by_torch() {
  return at::globalContext().deterministicAlgorithms() &&
         at::globalContext().deterministicFillUninitializedMemory();
}

at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype) {
#if !defined(__SANITIZE_ADDRESS__)  // which would not see a use after free in a kept block
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes >= kCachedBlockMinBytes && !filled_by_torch())
    return at::detail::empty_generic(sizes, &Recycler::get(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                     dtype, std::nullopt);
#endif
  return at::native::empty_cpu(sizes, dtype);
}

}  // namespace

at::Tensor new_empty(at::IntArrayRef sizes, const at::Tensor& like) {
  return allocate(sizes, like.scalar_type());
}

at::Tensor new_zeros(at::IntArrayRef sizes, const at::Tensor& like) {
  at::Tensor zeros = new_empty(sizes, like);
  if (zeros.numel() > 0) std::memset(zeros.mutable_data_ptr(), 0, zeros.nbytes());
  return zeros;
}

at::Tensor new_workspace(int64_t bytes) {
#if defined(MADV_HUGEPAGE) && !defined(__SANITIZE_ADDRESS__)  // what lies around it would hide an overrun
  constexpr int64_t kPage = int64_t{1} << 21;
  if (bytes >= kHugePagesMinBytes) {
    const at::Tensor memory = allocate({bytes + kPage}, at::kByte);
    const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    const int64_t unused = (kPage - address % kPage) % kPage;
    madvise(reinterpret_cast<void*>(address + unused), bytes, MADV_HUGEPAGE);  // in vain is no harm
    return memory.narrow(0, unused, bytes);
  }
#endif
  return allocate({bytes}, at::kByte);
}

namespace {
constexpr size_t kLine = 64;
}  // namespace

void ThreadBlock::grow(size_t bytes) {
  if (bytes <= bytes_ && memory_) return;
  memory_.reset();  // what it held is not needed
  bytes_ = 0;
  memory_ = std::make_unique<uint8_t[]>(bytes + kLine);
  bytes_ = bytes;
}

uint8_t* ThreadBlock::data() const {
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  return memory_.get() + (kLine - address % kLine) % kLine;
}

ThreadBlock* take_thread_block([[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return nullptr;
#else
  thread_local ThreadBlock block;
  if (block.in_use || filled_by_torch()) return nullptr;
  block.grow(bytes);
  block.in_use = true;
  return &block;
#endif
}

}  // namespace fastlstm
