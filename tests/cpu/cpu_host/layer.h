// Layers on the kernels of csrc/cpu, which include no torch header, compared with reference.h. The arguments
// are those of csrc/cpu/sequence.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/partition.h"
#include "cpu/sequence.h"
#include "reference.h"

namespace host {

using fastlstm::BackwardArgs;
using fastlstm::ForwardArgs;
using fastlstm::Kernels;
using fastlstm::Member;
using fastlstm::Members;
using fastlstm::ThreadPartition;

inline constexpr const char* kNames[] = {"prepacked", "packed on use", "unpacked"};  // by WeightMode

template <class T>
Array<T> small_product(int64_t m, int64_t n, int64_t k, const Array<T>& a, bool transposed,
                       const Array<T>& b) {
  const Kernels<T>& kernel = fastlstm::kernels<T>();
  Array<T> c = fresh<T>(m * n), scratch = fresh<T>(kernel.small_product_scratch(k));
  kernel.small_product(
      {m, n, k, a.data(), transposed ? m : k, transposed, b.data(), n, false, c.data(), n, scratch.data()});
  return c;
}

// The arguments of one direction for the kernels, and the buffers that these point to.
template <class T>
struct Direction {
  const Kernels<T>& kernel = fastlstm::kernels<T>();
  Array<T> ih, hh, hr, gates, hidden, state, c, columns, hr_columns, dgates, dr, all_hidden, dh, scratch;
  ForwardArgs<T> forward{};
  BackwardArgs<T> backward{};
};

// Elements of a copy of packed weights, and the copy that a member reads.
template <class T>
T* copy_of(Array<T>& packed, const ThreadPartition& threads, const Member& me) {
  return packed.data() + threads.copy(me.index) * (packed.size() / threads.copies);
}

// The directions of a layer on the kernels, as cpu/layer_forward.cpp and cpu/layer_backward.cpp run them on
// the threads of a plan. launch(members, body) calls body(direction, member) for every member.
template <class T, class Launch>
void run(const Case& k, const ThreadPartition& threads, Array<Layer<T>>& layers, Launch&& launch) {
  const Kernels<T>& kernel = fastlstm::kernels<T>();
  const PackedRows packed_rows(k);
  const int64_t B = k.B, I = k.I, H = k.H, P = k.P, G = 4 * H, N = packed_rows.N(), D = threads.D;
  const std::vector<Rows> rows(D, packed_rows.rows());
  const bool packed = k.weights == WeightMode::prepacked, unpacked = k.weights == WeightMode::unpacked;
  const bool private_weights = threads.private_weights();
  Array<Direction<T>> directions(D);
  Array<T> y = fresh<T>(N * D * P), cells = fresh<T>(N * D * H);  // the directions of a row side by side
  const auto pack_forward = [&](Layer<T>& a, T* ih, T* hh, int64_t begin, int64_t end) {
    kernel.pack_forward(a.w_ih.data(), H, I, begin, end, ih);
    kernel.pack_forward(a.w_hh.data(), H, P, begin, end, hh);
  };

  for (int64_t d = 0; d < D; ++d) {
    Layer<T>& a = layers[d];
    Direction<T>& of = directions[d];
    of.ih = fresh<T>(threads.copies * kernel.forward_packed_size(H, I));
    of.hh = fresh<T>(threads.copies * kernel.forward_packed_size(H, P));
    if (!private_weights) pack_forward(a, of.ih.data(), of.hh.data(), 0, H);
    of.hr = fresh<T>(kernel.columns_packed_size(H, P));
    if (k.projected()) kernel.pack_columns(a.w_hr.data(), H, 1, H, 0, P, of.hr.data());
    of.gates = fresh<T>(N * G);
    of.hidden = fresh<T>(B * H);
    of.state = a.h0;
    if (k.lengths.empty())
      of.state.resize(2 * B * P, std::numeric_limits<T>::quiet_NaN());
    else  // a reverse row may begin at an odd step
      of.state.insert(of.state.end(), a.h0.begin(), a.h0.end());
    of.c = a.c0;
    of.scratch = fresh<T>(threads.threads() * kernel.forward_scratch(N, I, H, P));
    ForwardArgs<T>& forward = of.forward;
    forward.rows = rows[d];
    forward.I = I;
    forward.H = H;
    forward.P = P;
    forward.reverse = k.reverse_at(d);
    forward.x = a.x.data();
    forward.gates = of.gates.data();
    forward.bias = a.bias.data();
    forward.ih = {a.w_ih.data(), nullptr, k.weights};
    forward.hh = {a.w_hh.data(), nullptr, k.weights};
    if (k.projected())
      forward.hr = {a.w_hr.data(), unpacked ? nullptr : of.hr.data(),
                    unpacked ? WeightMode::unpacked : WeightMode::prepacked};
    forward.hidden = k.projected() ? of.hidden.data() : nullptr;
    forward.h[0] = of.state.data();
    forward.h[1] = of.state.data() + B * P;
    forward.c0 = of.c.data();
    forward.c = of.c.data();
    forward.y = y.data() + d * P;
    forward.cells = cells.data() + d * H;
    forward.y_stride = D * P;
    forward.cells_stride = D * H;
    forward.scratch = of.scratch.data();
  }
  {
    Members members(threads, rows, H, P, kernel.unit_block);
    launch(members, [&](int64_t d, const Member& me) {
      ForwardArgs<T> mine = directions[d].forward;
      if (packed) {
        mine.ih.packed = copy_of(directions[d].ih, threads, me);
        mine.hh.packed = copy_of(directions[d].hh, threads, me);
        if (private_weights)
          pack_forward(layers[d], mine.ih.packed, mine.hh.packed, me.unit_begin, me.unit_end);
      }
      kernel.forward(mine, me);
    });
  }

  const int64_t ld = kernel.padded_columns(P);
  const auto pack_hh = [&](Layer<T>& a, T* to, int64_t begin, int64_t end) {
    kernel.pack_columns(a.w_hh.data(), G, P, 1, begin, end, to);
  };
  for (int64_t d = 0; d < D; ++d) {
    Layer<T>& a = layers[d];
    Direction<T>& of = directions[d];
    a.c_n = of.c;
    a.y = fresh<T>(N * P);
    for (int64_t row = 0; row < N; ++row) std::copy_n(&y[(row * D + d) * P], P, &a.y[row * P]);
    a.h_n =
        fresh<T>(B * P);  // where the last step of a row wrote it; reverse rows all end with the last step
    for (int64_t b = 0; b < B; ++b)
      std::copy_n(&of.state[((k.reverse_at(d) ? k.T : k.length(b)) % 2 * B + b) * P], P, &a.h_n[b * P]);

    of.columns = fresh<T>(threads.copies * kernel.columns_packed_size(G, P));
    of.hr_columns = fresh<T>(kernel.columns_packed_size(P, H));
    if (!private_weights) pack_hh(a, of.columns.data(), 0, P);
    if (k.projected()) kernel.pack_columns(a.w_hr.data(), P, H, 1, 0, H, of.hr_columns.data());
    of.dgates = fresh<T>(N * G);
    of.dr = fresh<T>(N * P);
    of.all_hidden = fresh<T>(N * H);
    of.dh = fresh<T>(B * ld);
    for (int64_t b = 0; b < B; ++b) std::copy_n(&a.dh_n[b * P], P, &of.dh[b * ld]);
    a.dc0 = a.dc_n;
    of.scratch = fresh<T>(threads.threads() * kernel.backward_scratch(H, P));
    BackwardArgs<T>& backward = of.backward;
    backward.rows = rows[d];
    backward.H = H;
    backward.P = P;
    backward.reverse = k.reverse_at(d);
    backward.steps = k.T;
    backward.gates = of.gates.data();
    backward.cells = cells.data() + d * H;
    backward.c0 = a.c0.data();
    backward.dy = a.dy.data();
    backward.cells_stride = D * H;
    backward.dy_stride = P;
    backward.w_hh = a.w_hh.data();
    backward.w_hr = k.projected() ? of.hr_columns.data() : nullptr;
    backward.dgates = of.dgates.data();
    backward.dr = k.projected() ? of.dr.data() : nullptr;
    backward.hidden = k.projected() ? of.all_hidden.data() : nullptr;
    backward.dh = of.dh.data();
    backward.dc = a.dc0.data();
    backward.scratch = of.scratch.data();
  }
  {
    Members members(threads, rows, H, P, kernel.unit_block);
    launch(members, [&](int64_t d, const Member& me) {
      BackwardArgs<T> mine = directions[d].backward;
      if (!unpacked) {
        mine.packed = copy_of(directions[d].columns, threads, me);
        if (private_weights) pack_hh(layers[d], mine.packed, me.feature_begin, me.feature_end);
      }
      kernel.backward(mine, me);
    });
  }

  for (int64_t d = 0; d < D; ++d) {
    Layer<T>& a = layers[d];
    const Direction<T>& of = directions[d];
    a.dh0.clear();
    for (int64_t b = 0; b < B; ++b) a.dh0.insert(a.dh0.end(), &of.dh[b * ld], &of.dh[b * ld] + P);
    Array<T> h_in(N * P);  // of each step
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < k.length(b); ++t) {
        const int64_t before = k.reverse_at(d) ? t + 1 : t - 1;
        const bool first = before < 0 || before == k.length(b);
        std::copy_n(first ? &a.h0[b * P] : &a.y[(rows[d].offset_at(before) + b) * P], P,
                    &h_in[(rows[d].offset_at(t) + b) * P]);
      }
    a.dx = small_product(N, I, G, of.dgates, false, a.w_ih);
    a.dw_ih = small_product(G, I, N, of.dgates, true, a.x);
    a.dw_hh = small_product(G, P, N, of.dgates, true, h_in);
    if (k.projected()) a.dw_hr = small_product(P, H, N, of.dr, true, of.all_hidden);
    a.db = fresh<T>(G);
    kernel.column_sums(of.dgates.data(), N, G, 0, G, a.db.data());
  }
}

template <class T>
Array<double> widen(const Array<T>& v) {
  return Array<double>(v.begin(), v.end());
}

// The results by name.
template <class T>
std::vector<std::pair<const char*, const Array<T>*>> results(const Layer<T>& a) {
  return {{"y", &a.y},         {"h_n", &a.h_n}, {"c_n", &a.c_n}, {"dx", &a.dx},       {"dw_ih", &a.dw_ih},
          {"dw_hh", &a.dw_hh}, {"db", &a.db},   {"dh0", &a.dh0}, {"dw_hr", &a.dw_hr}, {"dc0", &a.dc0}};
}

// Returns true if every result of a direction differs from the loop's by no more than the rounding of the
// longest chain of sums, the gates of all steps of a row, in T. Both start from the same numbers.
template <class T>
bool is_right(const Case& k, int64_t d, const Layer<T>& ours) {
  Layer<double> truth;
  for (const auto& [to, from] : {std::pair{&truth.x, &ours.x},
                                 {&truth.w_ih, &ours.w_ih},
                                 {&truth.w_hh, &ours.w_hh},
                                 {&truth.bias, &ours.bias},
                                 {&truth.w_hr, &ours.w_hr},
                                 {&truth.h0, &ours.h0},
                                 {&truth.c0, &ours.c0},
                                 {&truth.dy, &ours.dy},
                                 {&truth.dh_n, &ours.dh_n},
                                 {&truth.dc_n, &ours.dc_n}})
    *to = widen(*from);
  reference(k, k.reverse_at(d), truth);
  const double allowed = std::numeric_limits<T>::epsilon() * double(k.T * (4 * k.H + k.I));
  bool right = true;
  const auto wanted_results = results(truth);
  for (size_t n = 0; n < wanted_results.size(); ++n) {
    const auto [name, wanted] = wanted_results[n];
    const Array<T>* got = results(ours)[n].second;
    double error = got->size() == wanted->size() ? 0 : INFINITY, scale = 0;
    for (size_t i = 0; i < std::min(got->size(), wanted->size()); ++i) {
      const double apart = std::abs(double((*got)[i]) - (*wanted)[i]);
      error = apart <= error ? error : apart;  // NaN comes through
      scale = std::max(scale, std::abs((*wanted)[i]));
    }
    if (error <= allowed * scale) continue;
    right = false;
    std::printf("T=%d B=%d I=%d H=%d P=%d%s %s, weights %s: %s is %g off, allowed %g\n", int(k.T), int(k.B),
                int(k.I), int(k.H), int(k.P), k.reverse_at(d) ? " reverse" : "",
                std::is_same_v<T, float> ? "float" : "double", kNames[int(k.weights)], name, error,
                allowed * scale);
  }
  return right;
}

}  // namespace host
