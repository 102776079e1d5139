// Layers of random numbers, and a plain loop in double that computes them one row and one unit at a time. The
// equations are those of csrc/cell.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/sequence.h"

// ThreadSanitizer leaves the reference's inner loops alone, which take most of the time.
#if defined(__SANITIZE_THREAD__)
#define HOST_PLAIN __attribute__((no_sanitize("thread"), noinline))
#else
#define HOST_PLAIN
#endif

namespace host {

using fastlstm::Rows;
using fastlstm::WeightMode;

template <class T>
using Array = std::vector<T>;

struct Case {
  int64_t T, B, I, H, P;
  bool reverse;  // with two directions, the first one
  WeightMode weights;
  Array<int64_t> lengths = {};  // of the rows, falling; none: T
  bool projected() const { return P != H; }
  bool reverse_at(int64_t d) const { return reverse != (d == 1); }
  int64_t length(int64_t r) const { return lengths.empty() ? T : lengths[r]; }
};

// The packed rows of a case, as cpu/sequence.h has them.
class PackedRows {
 public:
  explicit PackedRows(const Case& k) : ragged_(!k.lengths.empty()), T_(k.T), B_(k.B) {
    for (int64_t t = 0; t < T_; ++t) {
      offset_.push_back(N_);
      count_.push_back(0);
      for (int64_t r = 0; r < B_; ++r) count_[t] += t < k.length(r);
      N_ += count_[t];
    }
  }
  int64_t N() const { return N_; }
  Rows rows() const {
    return {T_,      B_,      N_,     ragged_ ? count_.data() : nullptr, ragged_ ? offset_.data() : nullptr,
            nullptr, nullptr, ragged_};
  }

 private:
  const bool ragged_;
  const int64_t T_, B_;
  int64_t N_ = 0;
  Array<int64_t> count_, offset_;
};

// What a direction of a layer takes and gives; packed rows [N, .].
template <class T>
struct Layer {
  Array<T> x, w_ih, w_hh, bias, w_hr, h0, c0, dy, dh_n, dc_n;
  Array<T> y, h_n, c_n, dx, dw_ih, dw_hh, db, dw_hr, dh0, dc0;
};

inline std::mt19937 generator(7);

template <class T>
Array<T> random(int64_t n, double scale) {
  std::uniform_real_distribution<double> uniform(-scale, scale);
  Array<T> v(n);
  for (T& value : v) value = static_cast<T>(uniform(generator));
  return v;
}

// Memory that is read before it is written shows.
template <class T>
Array<T> fresh(int64_t n) {
  return Array<T>(n, std::numeric_limits<T>::quiet_NaN());
}

template <class T>
Layer<T> make(const Case& k) {
  const double scale = 1 / std::sqrt(double(k.H));
  const int64_t G = 4 * k.H, N = PackedRows(k).N();
  Layer<T> a;
  a.x = random<T>(N * k.I, 1);
  a.w_ih = random<T>(G * k.I, scale);
  a.w_hh = random<T>(G * k.P, scale);
  a.bias = random<T>(G, scale);
  if (k.projected()) a.w_hr = random<T>(k.P * k.H, scale);
  a.h0 = random<T>(k.B * k.P, 1);
  a.c0 = random<T>(k.B * k.H, 1);
  a.dy = random<T>(N * k.P, 1);
  a.dh_n = random<T>(k.B * k.P, 1);
  a.dc_n = random<T>(k.B * k.H, 1);
  return a;
}

inline double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

// c (+)= op(a) b for row-major a [m, k] (or [k, m] if transposed) and b [k, n].
HOST_PLAIN inline void product(int64_t m, int64_t n, int64_t k, const double* a, bool transposed,
                               const double* b, double* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t q = 0; q < k; ++q)
      for (int64_t j = 0; j < n; ++j)
        c[i * n + j] += (transposed ? a[q * m + i] : a[i * k + q]) * b[q * n + j];
}

HOST_PLAIN inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t q = 0; q < n; ++q) sum += a[q] * b[q];
  return sum;
}

// The truth: one row and one unit at a time.
inline void reference(const Case& k, bool reverse, Layer<double>& a) {
  const PackedRows packed(k);
  const int64_t T = k.T, B = k.B, I = k.I, H = k.H, P = k.P, G = 4 * H, N = packed.N();
  // The packed row of the s-th step that row b runs.
  const auto row_at = [&](int64_t s, int64_t b) {
    return packed.rows().offset_at(reverse ? k.length(b) - 1 - s : s) + b;
  };
  Array<double> gates(N * G), c(N * H), hidden(N * H), h_in(N * P), c_in(N * H);
  a.y.assign(N * P, 0);
  Array<double> h = a.h0, c_now = a.c0;
  for (int64_t s = 0; s < T; ++s)
    for (int64_t b = 0; b < B; ++b) {
      if (s >= k.length(b)) continue;
      const int64_t row = row_at(s, b);
      std::copy_n(&h[b * P], P, &h_in[row * P]);
      std::copy_n(&c_now[b * H], H, &c_in[row * H]);
      for (int64_t g = 0; g < G; ++g) {
        const double pre =
            a.bias[g] + dot(&a.w_ih[g * I], &a.x[row * I], I) + dot(&a.w_hh[g * P], &h_in[row * P], P);
        gates[row * G + g] = g / H == 2 ? std::tanh(pre) : sigmoid(pre);
      }
      const double* gate = &gates[row * G];
      for (int64_t u = 0; u < H; ++u) {
        const double next = gate[H + u] * c_in[row * H + u] + gate[u] * gate[2 * H + u];
        c[row * H + u] = c_now[b * H + u] = next;
        hidden[row * H + u] = gate[3 * H + u] * std::tanh(next);
      }
      for (int64_t p = 0; p < P; ++p)
        h[b * P + p] = k.projected() ? dot(&a.w_hr[p * H], &hidden[row * H], H) : hidden[row * H + p];
      std::copy_n(&h[b * P], P, &a.y[row * P]);
    }
  a.h_n = h;
  a.c_n = c_now;

  Array<double> dgates(N * G), dr(N * P), dh = a.dh_n, dc = a.dc_n;
  for (int64_t s = T - 1; s >= 0; --s)
    for (int64_t b = 0; b < B; ++b) {
      if (s >= k.length(b)) continue;
      const int64_t row = row_at(s, b);
      for (int64_t p = 0; p < P; ++p) dr[row * P + p] = dh[b * P + p] + a.dy[row * P + p];
      for (int64_t u = 0; u < H; ++u) {
        double dhidden = k.projected() ? 0 : dr[row * P + u];
        for (int64_t p = 0; k.projected() && p < P; ++p) dhidden += dr[row * P + p] * a.w_hr[p * H + u];
        const double* gate = &gates[row * G + u];
        const double i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H],
                     tanh_c = std::tanh(c[row * H + u]);
        double& dc_u = dc[b * H + u];
        dc_u += dhidden * o * (1 - tanh_c * tanh_c);
        double* dgate = &dgates[row * G + u];
        dgate[0] = dc_u * g * i * (1 - i);
        dgate[H] = dc_u * c_in[row * H + u] * f * (1 - f);
        dgate[2 * H] = dc_u * i * (1 - g * g);
        dgate[3 * H] = dhidden * tanh_c * o * (1 - o);
        dc_u *= f;
      }
      std::fill_n(&dh[b * P], P, 0);
      product(1, P, G, &dgates[row * G], false, a.w_hh.data(), &dh[b * P]);
    }
  a.dh0 = dh;
  a.dc0 = dc;
  a.dx.assign(N * I, 0);
  a.dw_ih.assign(G * I, 0);
  a.dw_hh.assign(G * P, 0);
  a.db.assign(G, 0);
  product(N, I, G, dgates.data(), false, a.w_ih.data(), a.dx.data());
  product(G, I, N, dgates.data(), true, a.x.data(), a.dw_ih.data());
  product(G, P, N, dgates.data(), true, h_in.data(), a.dw_hh.data());
  for (int64_t r = 0; r < N; ++r)
    for (int64_t g = 0; g < G; ++g) a.db[g] += dgates[r * G + g];
  if (k.projected()) {
    a.dw_hr.assign(P * H, 0);
    product(P, H, N, dr.data(), true, hidden.data(), a.dw_hr.data());
  }
}

}  // namespace host
