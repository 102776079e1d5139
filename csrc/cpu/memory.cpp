#include "cpu/memory.h"

#include <ATen/Context.h>
#include <ATen/ops/empty_native.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>

namespace fastlstm {
namespace {

constexpr size_t kLeast = size_t{1} << 20;  // smaller ones malloc itself keeps
constexpr size_t kMost = size_t{1} << 29;   // bytes kept idle

// A block is handed out again for a request of 4/5 to all of its size. What finds no block takes the place of
// idle ones, the oldest first, where memory in use and idle together would exceed by an eighth the most that
// was in use at once: forward's workspace and backward's never are, and must not drive each other out.
class Recycler final : public c10::Allocator {
 public:
  static Recycler& get() {
    static auto* recycler = new Recycler;  // never destroyed: tensors may outlive static objects
    return *recycler;
  }

  c10::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = take(bytes);
    if (!block) {
      block = std::make_unique<Block>();
      block->bytes = bytes;
      block->counted = count(bytes);
      block->memory = c10::GetCPUAllocator()->allocate(bytes);
    }
    void* data = block->memory.get();
    return {data, block.release(), &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  struct Block {
    size_t bytes;
    bool counted;  // in in_use_
    c10::DataPtr memory;
  };

  std::unique_ptr<Block> take(size_t bytes) {
    // A lock held by nobody alive, after a fork, must not stop the child: it goes without.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if ((*it)->bytes >= bytes && (*it)->bytes <= bytes + bytes / 4 &&
          (best == idle_.end() || (*it)->bytes < (*best)->bytes))
        best = it;
    if (best == idle_.end()) return nullptr;
    std::unique_ptr<Block> found = std::move(*best);
    idle_bytes_ -= found->bytes;
    in_use_ += found->bytes;
    found->counted = true;
    idle_.erase(best);
    return found;
  }

  // Makes room for a new block.
  bool count(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    in_use_ += bytes;
    most_in_use_ = std::max(most_in_use_, in_use_);
    while (in_use_ + idle_bytes_ > most_in_use_ + most_in_use_ / 8 && !idle_.empty()) drop_oldest();
    return true;
  }

  static void give_back(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    Recycler& self = get();
    const std::unique_lock<std::mutex> lock(self.mutex_, std::try_to_lock);
    if (!lock) return;
    if (block->counted) self.in_use_ -= block->bytes;
    if (block->bytes < kLeast || block->bytes > kMost) return;
    self.idle_bytes_ += block->bytes;
    self.idle_.push_back(std::move(block));
    while (self.idle_bytes_ > kMost) self.drop_oldest();
  }

  void drop_oldest() {
    idle_bytes_ -= idle_.front()->bytes;
    idle_.pop_front();
  }

  std::mutex mutex_;
  std::list<std::unique_ptr<Block>> idle_;
  size_t idle_bytes_ = 0, in_use_ = 0, most_in_use_ = 0;
};

// Whether torch fills what it allocates (torch.utils.deterministic.fill_uninitialized_memory).
[[maybe_unused]] bool filled_by_torch() {
  return at::globalContext().deterministicAlgorithms() &&
         at::globalContext().deterministicFillUninitializedMemory();
}

}  // namespace

at::Tensor new_empty(at::IntArrayRef sizes, const at::Tensor& like) {
#if !defined(__SANITIZE_ADDRESS__)  // which would not see a use after free in a kept block
  const size_t bytes = c10::multiply_integers(sizes) * like.element_size();
  if (bytes >= kLeast && !filled_by_torch())
    return at::detail::empty_generic(sizes, &Recycler::get(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                     like.scalar_type(), std::nullopt);
#endif
  return at::native::empty_cpu(sizes, like.scalar_type());
}

at::Tensor new_zeros(at::IntArrayRef sizes, const at::Tensor& like) {
  at::Tensor zeros = new_empty(sizes, like);
  if (zeros.numel() > 0) std::memset(zeros.mutable_data_ptr(), 0, zeros.nbytes());
  return zeros;
}

}  // namespace fastlstm
