// The op of a frozen layer; its schema is declared in fastlstm/ops/frozen.py.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "contract.h"

namespace fastlstm {

// y, h_n, c_n, cells
using FrozenResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using FrozenForward = FrozenResults(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                    const at::Tensor& packed, at::IntArrayRef sizes,
                                    const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                                    bool keep_cells);

const c10::TypedOperatorHandle<FrozenForward>& frozen_op();

}  // namespace fastlstm
