// What the two drivers (cpu/layer_forward.cpp, cpu/layer_backward.cpp) ask of an Engine: how numbers are
// stored, packed and multiplied. cpu/engine_float.h runs the kernels of cpu/forward.h and cpu/backward.h,
// cpu/engine_bf16.h those of cpu/bf16.h.
//
// An Engine E names
//   E::Number    of x, weights and results: float, double or Bf16; sums and c are Real<Number>
//   E::State     of h between the steps of forward
//   E::Operand   of the factors of the products after backward's loop: y, x, dgates, and of dx
//   E::unit_block(), E::saved_block()   units that threads split, units of a block of the saved gates
//   E::Forward, E::Backward, E::WeightGradient
// Forward and Backward exist for the time of a call:
//   reserve(space)               takes panels and scratch of all directions from the workspace
//   prepare(space, d, w, args)   packs the weights w of direction d, given the driver's buffers
//   run(d, member)               the time loop on one thread
// and Backward also
//   select_steps(d, span)        before run: the chunk of steps
//   dgates(d)                    after it: the gradients of the pre-activations of the chunk's rows
//   input_gradient(d, n, dx)     dx (+)= dgates W_ih
//   bias_gradient(d, n, add, last, db)   db (+)= the sum of dgates' rows; complete after the last chunk
//   projection_states(d)         dr and the h before the projection, for dW_hr
#pragma once

#include "cpu/chunks.h"
#include "cpu/layer.h"
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
};

// Rows of a row-major matrix.
template <class T>
struct MatrixView {
  const T* data;
  int64_t stride;
  MatrixView from(int64_t row) const { return {data + row * stride, stride}; }
};

}  // namespace fastlstm
