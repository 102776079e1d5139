// The CUDA kernels between the GEMMs of one LSTM layer. No torch header here or in any .cu file.
//
// Sizes: T steps, B rows, H units, P features of h (H without projection), D directions (1, or 2 with the
// reverse one second). Gates i, f, g, o. Every launcher runs all directions at once; an array [2] has one
// entry per direction. All pointers are device memory of the caller, contiguous and row-major in the given
// shape unless there are strides. T is the tensors' dtype: float, double, __half or __nv_bfloat16. Acc<T>,
// the dtype of accumulation and of carried state, is float, and double for double: a bfloat16 c would lose
// small updates after some 200 steps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

struct __half;         // defined in cuda_fp16.h
struct __nv_bfloat16;  // defined in cuda_bf16.h

namespace fastlstm::cuda {

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulation<T>::type;

// The steps of each row, and those at which a new sequence begins.
struct Steps {
  int64_t T, B;
  const int64_t* lengths;  // [B]     or null: every row has T steps
  const bool* reset_mask;  // [T, B]  or null
};

// A mask [D, T, B, n]. The last stride is 1; the others are 0 where the mask repeats.
struct Mask {
  const void* values;  // T, or bool if `flags`; null: no mask
  bool flags;
  int64_t strides[3];  // of D, T and B
};

// Gains and biases of a direction's layer normalization; null without.
template <class T>
struct NormWeights {
  const T *gain_x, *bias_x;  // [4H]  of W_ih x
  const T *gain_h, *bias_h;  // [4H]  of W_hh h
  const T *gain_c, *bias_c;  // [H]   of c
};

// Outputs of h_t, and the h that a row carries past steps it lacks.
template <class T>
struct HiddenState {
  int64_t P;
  const T* h0;  // [D, B, P]    read at the first step; null: zeros
  T* h;         // [D, B, P]    h_prev as the next step's GEMM reads it; not written at the last step
  T* y;         // [T, B, D*P]  out
  T* h_n;       // [D, B, P]    out at the last step, null before
  // [D, B, P]  with masks: h_prev of the next step before the recurrent mask, updated in place; null: `h`
  Acc<T>* unmasked;
  Mask recurrent_mask;  // n = P  what h_prev is multiplied by in `h`
  Mask zoneout;         // n = P  the share of h_prev in h_t
};

// One step forward: from the pre-activations to c_t and h_t.
template <class T>
struct ForwardStep {
  Steps steps;
  int64_t H;
  int D;
  bool first;
  int64_t t[2];           // the step each direction takes
  const Acc<T>* gates_x;  // [D, slots, B, 4H]  x W_ih^T for some steps; slot[d] is that of t[d]
  int64_t slots, slot[2];
  Acc<T>* gates_h;       // [D, B, 4H]     h W_hh^T, or null: h is zero; overwritten with layer normalization
  const T* bias_ih[2];   // [4H]           or null, as bias_hh
  const T* bias_hh[2];   // [4H]
  const T* c0;           // [D, B, H]      read at the first step; null: zeros
  Acc<T>* c;             // [D, B, H]      state, updated in place
  T* c_n;                // [D, B, H]      out at the last step, null before
  T* cells;              // [T, B, D*H]    out, or null
  T* gates;              // [D, T, B, 4H]  out, activated; null if no gradient is needed. With layer
                         // normalization [D, T, B, 12H]: then x W_ih^T and h W_hh^T before it
  T* hidden;             // [D, B, H]      out with projection: o * tanh(c), to be projected; else null
  HiddenState<T> state;  // read and written here without projection only
  Mask zoneout;          // n = H          the share of c_prev in c_t
  NormWeights<T> norm[2];
};
template <class T>
cudaError_t launch_cell_step_fwd(const ForwardStep<T>& step, cudaStream_t stream);

// With projection: stores h_t = W_hr (o * tanh(c)).
template <class T>
struct ProjectedStep {
  Steps steps;
  int D;
  bool first;
  int64_t t[2];
  const Acc<T>* projected;  // [D, B, P]
  HiddenState<T> state;
};
template <class T>
cudaError_t launch_projection_step_fwd(const ProjectedStep<T>& step, cudaStream_t stream);

// The terms of the gradient of h_t: from y, h_n, and the next step in scan order.
template <class T>
struct HiddenGradient {
  int64_t P;
  const T* dy;         // [T, B, D*P]  or null; the last stride is 1
  int64_t dy_t, dy_b;  // dy's strides of T and B
  const T* dh_n;       // [D, B, P]    read at the first step; null: zeros
  const Acc<T>* dh;    // [D, B, P]    dgates W_hh of the step done before
  // [D, B, P]  what passes a step to its h_prev: all of it in a row that lacks the step, otherwise zoneout's
  // share; null without lengths and zoneout
  Acc<T>* carry;
  Mask recurrent_mask, zoneout;  // as in HiddenState
};

// One step backward, in reverse scan order. first: the first one computed.
template <class T>
struct BackwardStep {
  Steps steps;
  int64_t H;
  int D;
  bool first;
  int64_t t[2];
  HiddenGradient<T> gradient;  // read without projection only
  const Acc<T>* dhidden;       // [D, B, H]      with projection: the gradient of o * tanh(c); else null
  const T* gates;              // [D, T, B, 4H]  activated; as in ForwardStep
  const T* cells;              // [T, B, D*H]    c of every step
  const T* c0;                 // [D, B, H]      null: zeros
  const T* dcells;             // [T, B, D*H]    or null; the last stride is 1
  int64_t dcells_t, dcells_b;  // dcells' strides of T and B
  const T* dc_n;               // [D, B, H]      read at the first step; null: zeros
  Acc<T>* dc;                  // [D, B, H]      gradient of c_prev, updated in place
  T* dgates;  // [D, slots, B, 4H]  out at slot[d]: gradients of the pre-activations, with layer
              // normalization those of h W_hh^T
  T* hidden;  // [D, slots, B, H]   out with projection: o * tanh(c); or null
  int64_t slots, slot[2];
  Mask zoneout;  // as in ForwardStep; c before it follows from the gates and c_prev
  // With layer normalization:
  NormWeights<T> norm[2];
  T* dgates_x;         // [D, slots, B, 4H]   out: gradients of x W_ih^T
  Acc<T>* norm_terms;  // [D, slots, B, 14H]  out: NormTerms (cell.h)
};
template <class T>
cudaError_t launch_cell_step_bwd(const BackwardStep<T>& step, cudaStream_t stream);

// With projection, before launch_cell_step_bwd: the gradient of the projected h_t.
template <class T>
struct ProjectedGradient {
  Steps steps;
  int D;
  bool first;
  int64_t t[2];
  HiddenGradient<T> gradient;
  T* dprojected;  // [D, slots, B, P]  out at slot[d]
  int64_t slots, slot[2];
};
template <class T>
cudaError_t launch_projection_step_bwd(const ProjectedGradient<T>& step, cudaStream_t stream);

// After the last step: the gradient of h0.
template <class T>
struct InitialGradient {
  Steps steps;
  int D;
  HiddenGradient<T> gradient;
  T* dh0;  // [D, B, P]  out
};
template <class T>
cudaError_t launch_initial_state_bwd(const InitialGradient<T>& step, cudaStream_t stream);

// Rows for the weight gradients of ragged batches and of layers with a recurrent mask: zero where a row lacks
// the step, whatever the padding contains.
template <class T>
struct RaggedRows {
  Steps steps;
  int64_t begin, count, n;  // for the steps begin ... begin + count - 1, n features
  int d;
  bool previous;    // out[t] is the previous state of step t in direction d; otherwise source[t]
  const T* source;  // [T, B, n]  the last stride is 1
  int64_t source_t, source_b;
  const T* initial;  // [B, n]     h0 of direction d, or null: zeros
  T* out;            // [count, B, n]
  Mask mask;         // what previous states are multiplied by
};
template <class T>
cudaError_t launch_ragged_rows(const RaggedRows<T>& rows, cudaStream_t stream);

}  // namespace fastlstm::cuda
