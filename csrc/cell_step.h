// LSTMCell's call for plain CPU tensors (autograd.cpp), and what calls below the dispatcher ask first.
#pragma once

#include "cpu/one_step.h"

namespace fastlstm {

// h and c, with their autograd node where one is wanted; false, and nothing done, where the tensors do not
// fit together or are not plain float32 or float64 CPU tensors.
bool cell_step(const StepInputs& in, at::Tensor& h, at::Tensor& c);

// Returns true if t has no dispatch of its own: subclasses, wrappers of transforms, lazy negation, other
// layouts.
bool is_plain_tensor(const at::Tensor& t);

// Returns true if a mode that sees ops, or a tracer, is active: neither sees what is done without ops.
bool dispatch_mode_active();

}  // namespace fastlstm
