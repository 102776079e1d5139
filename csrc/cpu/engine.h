// What the two drivers (cpu/layer_forward.cpp, cpu/layer_backward.cpp) require of an Engine: how numbers are
// stored, packed and multiplied. cpu/engine_float.h runs the kernels of cpu/forward.h and cpu/backward.h,
// cpu/engine_bf16.h those of cpu/bf16.h; with_engine of cpu/engines.h has the one of a plan.
//
// An Engine E names
//   Number           of x, weights and results: float, double or Bf16; sums and c are Real<Number>
//   State            of h between the steps of forward
//   Operand          element type of the GEMM operands after backward's loop (y, x, dgates, dr, hidden)
//   InputGradient    of dx, as the products add it up
//   unit_block()     units are split among threads in multiples of this
//   operands(t)      t, stored as Number, as a tensor of Operand
//   input_gradient_like(x)   a tensor of the dtype of InputGradient
//   Forward, Backward, WeightGradient; Forward is all that inference requires.
//
// Forward and Backward live for one call. Both have
//   reserve(space)               takes the panels and scratch of all directions from the workspace
//   prepare(space, d, w, args)   packs the weights w of direction d; args: the driver's buffers
//   run(d, member)               the time loop of one thread
// Forward(in, sizes, ragged, plan, packed) also has; packed: weights packed before the call (cpu/packed.h),
// of which w is then empty, or null
//   state_stride(P), state_rows(B)   of a slot of h: stride of a row and number of rows
// Backward(in, sizes, plan, need_dx, need_hr) also has
//   gradient_stride(P)               of a row of dh
//   select_steps(d, span, dgates)    the chunk of steps that run() takes; dgates [., 4H]: where those of the
//                                    span may be stored, or null
//   dgates(d), dhh(d)                of the chunk's rows: gradients of W_ih x and of W_hh h, which differ
//                                    with layer normalization only
//   dr(d), hidden(d)                 of the same rows, with projection: gradients of h; h before projection
//   input_gradient(d, n, dx)         dx (+)= dgates W_ih
//   bias_gradient(d, n, accumulate, db), finish_bias(d, db)   after each chunk, and after the last
//   norm_gradient(d, k, dw)          after the last: of the k-th weight of layer normalization
//
// WeightGradient(dw, plan) has
//   add(rows, dgates, states, accumulate)   dw (+)= dgates^T states; once if plan.at_once
//   finish()                                dw is complete
#pragma once

#include "cpu/chunks.h"
#include "cpu/layer.h"
#include "cpu/packed.h"
#include "cpu/product.h"

namespace fastlstm {

// The driver's buffers of a direction. T: Number, H: State. Sorted rows unless said otherwise.
template <class T, class H>
struct ForwardBuffers {
  Rows rows;
  bool reverse;
  T* gates;             // [N, 4H]  saved gates, or null
  const Real<T>* bias;  // [4H]  bias_ih + bias_hh
  H* h;                 // two slots of state_rows(B) rows of state_stride(P) elements
  Real<T>* c;           // [B, H]
  T *y, *cells;         // the caller's rows, with these strides; cells may be null
  int64_t y_stride, cells_stride;
  RowMasks<Real<T>> masks;
  const Real<T>* h0;  // [B, P], with a zoneout of h
};

template <class T>
struct BackwardBuffers {
  Rows rows;
  bool reverse;
  const T *gates, *cells;  // saved gates [N, 4H]; c of the caller's rows
  const Real<T>* c0;       // [B, H]
  const T *dy, *dcells;    // the caller's rows, or null
  int64_t cells_stride, dy_stride, dcells_stride;
  Real<T>* dh;  // [B, gradient_stride(P)]
  Real<T>* dc;  // [B, H]
  RowMasks<Real<T>> masks;
  Real<T>* kept_h;  // [B, gradient_stride(P)], with a zoneout of h
};

// Rows of a row-major matrix.
template <class T>
struct MatrixView {
  const T* data;
  int64_t stride;
  MatrixView from(int64_t row) const { return {data + row * stride, stride}; }
};

}  // namespace fastlstm
