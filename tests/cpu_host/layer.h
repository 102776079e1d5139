// Runs the CPU kernels of csrc/cpu, which include no torch header, on layers of random numbers and compares
// every result with a plain loop in double. A program of its own, so that it runs where torch does not: under
// an emulator. The equations are those of csrc/cell.h, the arguments those of csrc/cpu/sequence.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/sequence.h"

namespace {

using fastlstm::BackwardArgs;
using fastlstm::ForwardArgs;
using fastlstm::Kernels;
using fastlstm::Member;
using fastlstm::Rows;
using fastlstm::WeightMode;

template <class T>
using Array = std::vector<T>;

constexpr const char* kNames[] = {"prepacked", "packed on use", "unpacked"};  // by WeightMode

struct Case {
  int64_t T, B, I, H, P;
  bool reverse;
  WeightMode weights;
  bool projected() const { return P != H; }
};

// What a layer takes and gives; dense rows [T, B, .].
template <class T>
struct Layer {
  Array<T> x, w_ih, w_hh, bias, w_hr, h0, c0, dy, dh_n, dc_n;
  Array<T> y, h_n, c_n, dx, dw_ih, dw_hh, db, dw_hr, dh0, dc0;
};

std::mt19937 generator(7);

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
  const int64_t G = 4 * k.H;
  Layer<T> a;
  a.x = random<T>(k.T * k.B * k.I, 1);
  a.w_ih = random<T>(G * k.I, scale);
  a.w_hh = random<T>(G * k.P, scale);
  a.bias = random<T>(G, scale);
  if (k.projected()) a.w_hr = random<T>(k.P * k.H, scale);
  a.h0 = random<T>(k.B * k.P, 1);
  a.c0 = random<T>(k.B * k.H, 1);
  a.dy = random<T>(k.T * k.B * k.P, 1);
  a.dh_n = random<T>(k.B * k.P, 1);
  a.dc_n = random<T>(k.B * k.H, 1);
  return a;
}

double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

// c (+)= op(a) b for row-major a [m, k] (or [k, m] if transposed) and b [k, n].
void product(int64_t m, int64_t n, int64_t k, const double* a, bool transposed, const double* b, double* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t q = 0; q < k; ++q)
      for (int64_t j = 0; j < n; ++j)
        c[i * n + j] += (transposed ? a[q * m + i] : a[i * k + q]) * b[q * n + j];
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t q = 0; q < n; ++q) sum += a[q] * b[q];
  return sum;
}

// The truth: one row and one unit at a time.
void reference(const Case& k, Layer<double>& a) {
  const int64_t T = k.T, B = k.B, I = k.I, H = k.H, P = k.P, G = 4 * H, N = T * B;
  const auto time = [&](int64_t s) { return k.reverse ? T - 1 - s : s; };
  Array<double> gates(N * G), c(N * H), hidden(N * H), h_in(N * P), c_in(N * H);
  a.y.assign(N * P, 0);
  Array<double> h = a.h0, c_now = a.c0;
  for (int64_t s = 0; s < T; ++s)
    for (int64_t b = 0; b < B; ++b) {
      const int64_t row = time(s) * B + b;
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
      const int64_t row = time(s) * B + b;
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

template <class T>
Array<T> small_product(int64_t m, int64_t n, int64_t k, const Array<T>& a, bool transposed,
                       const Array<T>& b) {
  const Kernels<T>& kernel = fastlstm::kernels<T>();
  Array<T> c = fresh<T>(m * n), scratch = fresh<T>(kernel.small_product_scratch(k));
  kernel.small_product(
      {m, n, k, a.data(), transposed ? m : k, transposed, b.data(), n, false, c.data(), n, scratch.data()});
  return c;
}

// The same layer on the kernels, as cpu/layer_forward.cpp and cpu/layer_backward.cpp run them on one thread.
template <class T>
void run(const Case& k, Layer<T>& a) {
  const Kernels<T>& kernel = fastlstm::kernels<T>();
  const int64_t B = k.B, I = k.I, H = k.H, P = k.P, G = 4 * H, N = k.T * B;
  const Rows rows{k.T, B, N, nullptr, nullptr, nullptr, nullptr, false};
  const Member me{0, B, 0, H, 0, P, 0, nullptr};
  const bool packed = k.weights == WeightMode::prepacked, unpacked = k.weights == WeightMode::unpacked;

  Array<T> ih = fresh<T>(kernel.forward_packed_size(H, I)), hh = fresh<T>(kernel.forward_packed_size(H, P));
  kernel.pack_forward(a.w_ih.data(), H, I, 0, H, ih.data());
  kernel.pack_forward(a.w_hh.data(), H, P, 0, H, hh.data());
  Array<T> hr = fresh<T>(kernel.columns_packed_size(H, P));
  if (k.projected()) kernel.pack_columns(a.w_hr.data(), H, 1, H, 0, P, hr.data());
  Array<T> gates = fresh<T>(N * G), cells = fresh<T>(N * H), hidden = fresh<T>(B * H), state = a.h0, c = a.c0;
  state.resize(2 * B * P, std::numeric_limits<T>::quiet_NaN());
  Array<T> scratch = fresh<T>(kernel.forward_scratch(N, I, H, P));
  a.y = fresh<T>(N * P);
  ForwardArgs<T> forward{};
  forward.rows = rows;
  forward.I = I;
  forward.H = H;
  forward.P = P;
  forward.reverse = k.reverse;
  forward.x = a.x.data();
  forward.gates = gates.data();
  forward.bias = a.bias.data();
  forward.ih = {a.w_ih.data(), packed ? ih.data() : nullptr, k.weights};
  forward.hh = {a.w_hh.data(), packed ? hh.data() : nullptr, k.weights};
  if (k.projected())
    forward.hr = {a.w_hr.data(), unpacked ? nullptr : hr.data(),
                  unpacked ? WeightMode::unpacked : WeightMode::prepacked};
  forward.hidden = k.projected() ? hidden.data() : nullptr;
  forward.h[0] = state.data();
  forward.h[1] = state.data() + B * P;
  forward.c0 = c.data();
  forward.c = c.data();
  forward.y = a.y.data();
  forward.cells = cells.data();
  forward.y_stride = P;
  forward.cells_stride = H;
  forward.scratch = scratch.data();
  kernel.forward(forward, me);
  a.h_n.assign(state.begin() + k.T % 2 * B * P, state.begin() + (k.T % 2 + 1) * B * P);
  a.c_n = c;

  const int64_t ld = kernel.padded_columns(P);
  Array<T> columns = fresh<T>(kernel.columns_packed_size(G, P)),
           hr_columns = fresh<T>(kernel.columns_packed_size(P, H));
  kernel.pack_columns(a.w_hh.data(), G, P, 1, 0, P, columns.data());
  if (k.projected()) kernel.pack_columns(a.w_hr.data(), P, H, 1, 0, H, hr_columns.data());
  Array<T> dgates = fresh<T>(N * G), dr = fresh<T>(N * P), all_hidden = fresh<T>(N * H),
           dh = fresh<T>(B * ld);
  for (int64_t b = 0; b < B; ++b) std::copy_n(&a.dh_n[b * P], P, &dh[b * ld]);
  a.dc0 = a.dc_n;
  scratch = fresh<T>(kernel.backward_scratch(H, P));
  BackwardArgs<T> backward{};
  backward.rows = rows;
  backward.H = H;
  backward.P = P;
  backward.reverse = k.reverse;
  backward.steps = k.T;
  backward.gates = gates.data();
  backward.cells = cells.data();
  backward.c0 = a.c0.data();
  backward.dy = a.dy.data();
  backward.cells_stride = H;
  backward.dy_stride = P;
  backward.w_hh = a.w_hh.data();
  backward.packed = unpacked ? nullptr : columns.data();
  backward.w_hr = k.projected() ? hr_columns.data() : nullptr;
  backward.dgates = dgates.data();
  backward.dr = k.projected() ? dr.data() : nullptr;
  backward.hidden = k.projected() ? all_hidden.data() : nullptr;
  backward.dh = dh.data();
  backward.dc = a.dc0.data();
  backward.scratch = scratch.data();
  kernel.backward(backward, me);

  for (int64_t b = 0; b < B; ++b) a.dh0.insert(a.dh0.end(), &dh[b * ld], &dh[b * ld] + P);
  Array<T> h_in(N * P);  // of each step
  for (int64_t s = 0; s < k.T; ++s) {
    const int64_t t = k.reverse ? k.T - 1 - s : s, before = k.reverse ? t + 1 : t - 1;
    std::copy_n(s == 0 ? a.h0.data() : &a.y[before * B * P], B * P, &h_in[t * B * P]);
  }
  a.dx = small_product(N, I, G, dgates, false, a.w_ih);
  a.dw_ih = small_product(G, I, N, dgates, true, a.x);
  a.dw_hh = small_product(G, P, N, dgates, true, h_in);
  if (k.projected()) a.dw_hr = small_product(P, H, N, dr, true, all_hidden);
  a.db = fresh<T>(G);
  kernel.column_sums(dgates.data(), N, G, 0, G, a.db.data());
}

template <class T>
Array<double> widen(const Array<T>& v) {
  return Array<double>(v.begin(), v.end());
}

// Returns true if every result differs from the loop's by no more than the rounding of the longest chain of
// sums, the gates of all steps of a row, in T. Both start from the same numbers.
template <class T>
bool check(const Case& k) {
  Layer<T> ours = make<T>(k);
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
  run(k, ours);
  reference(k, truth);
  const double allowed = std::numeric_limits<T>::epsilon() * double(k.T * (4 * k.H + k.I));
  bool right = true;
  for (const auto& [name, got, wanted] : {std::tuple{"y", &ours.y, &truth.y},
                                          {"h_n", &ours.h_n, &truth.h_n},
                                          {"c_n", &ours.c_n, &truth.c_n},
                                          {"dx", &ours.dx, &truth.dx},
                                          {"dw_ih", &ours.dw_ih, &truth.dw_ih},
                                          {"dw_hh", &ours.dw_hh, &truth.dw_hh},
                                          {"db", &ours.db, &truth.db},
                                          {"dw_hr", &ours.dw_hr, &truth.dw_hr},
                                          {"dh0", &ours.dh0, &truth.dh0},
                                          {"dc0", &ours.dc0, &truth.dc0}}) {
    double error = got->size() == wanted->size() ? 0 : INFINITY, scale = 0;
    for (size_t i = 0; i < std::min(got->size(), wanted->size()); ++i) {
      const double apart = std::abs(double((*got)[i]) - (*wanted)[i]);
      error = apart <= error ? error : apart;  // NaN comes through
      scale = std::max(scale, std::abs((*wanted)[i]));
    }
    if (error <= allowed * scale) continue;
    right = false;
    std::printf("T=%d B=%d I=%d H=%d P=%d%s %s, weights %s: %s is %g off, allowed %g\n", int(k.T), int(k.B),
                int(k.I), int(k.H), int(k.P), k.reverse ? " reverse" : "",
                std::is_same_v<T, float> ? "float" : "double", kNames[int(k.weights)], name, error,
                allowed * scale);
  }
  return right;
}

}  // namespace

int main() {
  int cases = 0, failed = 0;
  // Units and features with and without a narrow last block, rows for each tile and for a remainder.
  for (const auto& [B, I, H, P] : {std::array<int64_t, 4>{1, 3, 5, 5},
                                   {2, 16, 16, 16},
                                   {7, 9, 19, 19},
                                   {13, 20, 32, 32},
                                   {30, 1, 51, 51},
                                   {5, 12, 24, 7},
                                   {3, 33, 40, 18}})
    for (const int64_t T : {1, 6})
      for (const bool reverse : {false, true})
        for (const WeightMode weights :
             {WeightMode::prepacked, WeightMode::pack_on_use, WeightMode::unpacked}) {
          if (weights == WeightMode::pack_on_use && T > 1) continue;
          const Case k{T, B, I, H, P, reverse, weights};
          cases += 2;
          failed += !check<float>(k) + !check<double>(k);
        }
  std::printf("%s: %d of %d layers are right\n", fastlstm::isa_name(), cases - failed, cases);
  return failed != 0;
}
