// The op of a frozen layer; its schema is declared in fastlstm/ops/frozen.py.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "contract.h"
#include "cpu/layer.h"

namespace fastlstm {

// y, h_n, c_n, cells
using FrozenResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using FrozenForward = FrozenResults(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                    const at::Tensor& packed, at::IntArrayRef sizes,
                                    const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                                    bool keep_cells);

const c10::TypedOperatorHandle<FrozenForward>& frozen_op();

// The layer below the dispatcher, for weights packed for this machine's kernels.
LayerResults run_frozen(const LayerInputs& in, const PackedView& packed, bool keep_cells,
                        const GivenResults& given);

}  // namespace fastlstm
