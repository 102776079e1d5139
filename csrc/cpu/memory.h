// Memory of results and workspaces. Fresh pages from the system cost 0.65 ns a byte in page faults, more than
// a layer's products cost on the same bytes, and a training loop asks for the same sizes again and again:
// large blocks that come back are kept for the next call.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <memory>

namespace fastlstm {

// torch.empty of like's dtype below the dispatcher, which tiny layers would wait for.
at::Tensor new_empty(at::IntArrayRef sizes, const at::Tensor& like);
at::Tensor new_zeros(at::IntArrayRef sizes, const at::Tensor& like);

// [bytes] for what is read again and again: from 4 MiB on in pages of 2 MiB, where the system gives them to
// who asks. A core knows some 2,000 pages, of 4 KiB fewer than a large weight has, and each
// page that it must look up takes as long as the products of a few rows with what stands there.
at::Tensor new_workspace(int64_t bytes);

// Memory that a thread keeps for its small workspaces: as much as the largest of them, at most
// kThreadWorkspaceMaxBytes.
class ThreadBlock {
 public:
  void grow(size_t bytes);
  uint8_t* data() const;
  bool in_use = false;

 private:
  std::unique_ptr<uint8_t[]> memory_;
  size_t bytes_ = 0;
};
// This thread's, now in use, of at least this many bytes; null where it is in use already, AddressSanitizer
// watches the bounds of each workspace, or torch fills what is allocated, to show what is read before it is
// written.
ThreadBlock* take_thread_block(int64_t bytes);

}  // namespace fastlstm
