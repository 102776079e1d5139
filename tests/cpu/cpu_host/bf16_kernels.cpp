// The AMX kernels, emulated, against those of AVX512_BF16, which the tests in Python compare with float64:
// both multiply the same bfloat16 numbers and add in another order.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/bf16.h"

namespace fastlstm {
int64_t l2_bytes() { return 1 << 16; }  // small, so that blocks are read in alternating order
namespace bf16 {
template <class T>
const Kernels<T>& amx_kernels();
template <class T>
const Kernels<T>& avx512_kernels();
}  // namespace bf16
}  // namespace fastlstm

namespace {

using namespace fastlstm;
namespace bf = fastlstm::bf16;

int total = 0, failed = 0;

float value(float x) { return x; }
float value(Bf16 x) {
  const uint32_t bits = uint32_t{x} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <class T>
std::vector<T> random(int64_t n, std::mt19937& generator) {
  std::uniform_real_distribution<float> uniform(-0.5f, 0.5f);
  std::vector<T> out(n);
  for (T& x : out) {
    const float drawn = uniform(generator);
    uint32_t bits;
    std::memcpy(&bits, &drawn, sizeof(bits));
    if constexpr (sizeof(T) == 2)
      x = static_cast<T>(bits >> 16);
    else
      x = drawn;
  }
  return out;
}

// Whether a and b differ by at most `allowed` of their largest element.
template <class T>
void compare(const char* what, const std::vector<T>& a, const std::vector<T>& b, float allowed) {
  float largest = 0, off = 0;
  for (size_t k = 0; k < a.size(); ++k) {
    largest = std::max(largest, std::fabs(value(b[k])));
    off = std::max(off, std::fabs(value(a[k]) - value(b[k])));
    if (!std::isfinite(value(a[k])) || !std::isfinite(value(b[k]))) off = INFINITY;
  }
  ++total;
  if (off <= allowed * largest) return;
  ++failed;
  std::printf("%s: off by %g of %g\n", what, off, largest);
}

struct Sizes {
  int64_t T, B, I, H, P = 0;  // P: with projection
  bool masked = false;        // recurrent dropout and zoneout
};

// Numbers for h as it enters a step's product, flags and numbers for zoneouts.
struct Masks {
  std::vector<float> recurrent, share;
  std::vector<uint8_t> flags;
  Masks(const Sizes& s, int64_t P, std::mt19937& generator)
      : recurrent(s.T * s.B * P), share(s.T * s.B * s.H), flags(s.T * s.B * P) {
    std::uniform_real_distribution<float> uniform(0, 1);
    for (float& x : recurrent) x = uniform(generator) < 0.25f ? 0.0f : 4.0f / 3;
    for (float& x : share) x = uniform(generator);
    for (uint8_t& x : flags) x = uniform(generator) < 0.3f;
  }
  RowMasks<float> rows(const Sizes& s, int64_t P) const {
    return {{nullptr, recurrent.data(), s.B * P, P},
            {flags.data(), nullptr, s.B * P, P},
            {nullptr, share.data(), s.B * s.H, s.H}};
  }
};

template <class T>
struct Results {
  std::vector<T> y, cells, gates, h_state;
  std::vector<float> c, dh, dc, db;
  std::vector<Bf16> dgates, dr, hidden;
};

template <class T>
Results<T> run(const bf::Kernels<T>& kernel, const Sizes& s, bool reverse) {
  std::mt19937 generator(1);
  const int64_t N = s.T * s.B, G = 4 * s.H, P = s.P ? s.P : s.H;
  const auto w_ih = random<T>(G * s.I, generator), w_hh = random<T>(G * P, generator),
             w_hr = random<T>(s.P * s.H, generator), x = random<T>(N * s.I, generator),
             dy = random<T>(N * P, generator);
  const auto bias = random<float>(G, generator);
  std::vector<Bf16> packed_ih(bf::packed_gates_size(s.H, s.I)), packed_hh(bf::packed_gates_size(s.H, P)),
      packed_hr(bf::packed_columns_size(s.H, s.P));
  kernel.pack_gates(w_ih.data(), s.H, s.I, 0, s.H, packed_ih.data());
  kernel.pack_gates(w_hh.data(), s.H, P, 0, s.H, packed_hh.data());
  kernel.pack_rows(w_hr.data(), s.P, s.H, 0, s.P, packed_hr.data());
  const Masks numbers(s, P, generator);
  const RowMasks<float> masks = s.masked ? numbers.rows(s, P) : RowMasks<float>();
  const std::vector<float> h0(s.B * P), c0(s.B * s.H);
  const Rows rows{s.T, s.B, N, nullptr, nullptr, nullptr, nullptr, false};
  const Member me{0, s.B, 0, s.H, 0, P, 0, nullptr};
  Results<T> out;
  out.y.resize(N * P), out.cells.resize(N * s.H), out.gates.resize(N * G), out.c.resize(s.B * s.H);
  out.h_state.resize(2 * s.B * P);
  std::vector<Bf16> h(2 * bf::factor_rows(s.B) * bf::row_stride(P)), scratch(bf::forward_scratch(s.I)),
      hidden(bf::factor_rows(s.B) * bf::row_stride(s.H));
  kernel.forward({rows,
                  s.I,
                  s.H,
                  P,
                  reverse,
                  x.data(),
                  bias.data(),
                  packed_ih.data(),
                  packed_hh.data(),
                  s.P ? packed_hr.data() : nullptr,
                  out.gates.data(),
                  h.data(),
                  sizeof(T) == 4 ? out.h_state.data() : nullptr,
                  hidden.data(),
                  out.c.data(),
                  out.y.data(),
                  out.cells.data(),
                  P,
                  s.H,
                  scratch.data(),
                  masks,
                  h0.data()},
                 me);
  std::vector<Bf16> columns(bf::packed_columns_size(G, P)), columns_hr(bf::packed_columns_size(s.P, s.H));
  kernel.pack_columns(w_hh.data(), G, P, P, 0, P, columns.data());
  kernel.pack_columns(w_hr.data(), s.P, s.H, s.H, 0, s.H, columns_hr.data());
  std::vector<float> kept_h(s.B * bf::padded(P));
  out.dh.resize(s.B * bf::padded(P)), out.dc.resize(s.B * s.H), out.db.resize(G);
  out.dgates.resize(bf::factor_rows(N) * bf::row_stride(G));
  if (s.P) out.dr.resize(bf::factor_rows(N) * bf::row_stride(P)), out.hidden.resize(N * s.H);
  std::vector<float> dhidden(s.B * bf::padded(s.H));
  kernel.backward({rows,
                   s.H,
                   P,
                   reverse,
                   0,
                   s.T,
                   0,
                   out.gates.data(),
                   out.cells.data(),
                   c0.data(),
                   dy.data(),
                   nullptr,
                   s.H,
                   P,
                   s.H,
                   columns.data(),
                   s.P ? columns_hr.data() : nullptr,
                   out.dgates.data(),
                   out.dr.data(),
                   s.P ? out.hidden.data() : nullptr,
                   out.dh.data(),
                   dhidden.data(),
                   out.dc.data(),
                   out.db.data(),
                   masks,
                   kept_h.data()},
                  me);
  return out;
}

template <class T>
void layer(const Sizes& s, bool reverse) {
  const Results<T> a = run(bf::amx_kernels<T>(), s, reverse), b = run(bf::avx512_kernels<T>(), s, reverse);
  // An element that is rounded the other way by another order of summation is off by 2^-8.
  const float allowed = sizeof(T) == 4 ? 2e-3f : 2e-2f;
  compare("y", a.y, b.y, allowed);
  compare("cells", a.cells, b.cells, allowed);
  compare("gates", a.gates, b.gates, allowed);
  compare("h_state", a.h_state, b.h_state, allowed);
  compare("c", a.c, b.c, allowed);
  compare("dgates", a.dgates, b.dgates, 2e-2f);
  compare("dr", a.dr, b.dr, 2e-2f);
  compare("hidden", a.hidden, b.hidden, 2e-2f);
  compare("dh", a.dh, b.dh, 2e-2f);
  compare("dc", a.dc, b.dc, 2e-2f);
  compare("db", a.db, b.db, 2e-2f);
}

void gemm(int64_t m, int64_t n, int64_t k, bool transposed, bool add) {
  std::mt19937 generator(2);
  const int64_t lda = transposed ? m + 3 : bf::row_stride(k), rows = transposed ? k : m;
  std::vector<Bf16> a((rows + bf::kTileRows) * lda);
  const std::vector<Bf16> given = random<Bf16>(rows * (transposed ? m : k), generator);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t columns = transposed ? m : k;
    std::copy_n(given.data() + r * columns, columns, a.data() + r * lda);
  }
  const auto b = random<Bf16>(k * n, generator);
  std::vector<double> exact(m * n, add ? 1.0 : 0.0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t j = 0; j < n; ++j)
        exact[i * n + j] += double(value(given[transposed ? p * m + i : i * k + p])) * value(b[p * n + j]);
  std::vector<Bf16> packed(bf::packed_columns_size(k, n)), scratch(bf::kGemmScratch);
  bf::amx_kernels<Bf16>().pack_columns(b.data(), k, n, n, 0, n, packed.data());
  for (const auto* kernel : {&bf::amx_kernels<float>(), &bf::avx512_kernels<float>()}) {
    std::vector<float> c(m * (n + 1), 1.0f);
    kernel->gemm({m, n, k, a.data(), lda, transposed, packed.data(), add, c.data(), n + 1, scratch.data()});
    std::vector<float> found(m * n), expected(exact.begin(), exact.end());
    bool margin = true;
    for (int64_t i = 0; i < m; ++i) {
      std::copy_n(c.data() + i * (n + 1), n, found.data() + i * n);
      margin = margin && c[i * (n + 1) + n] == 1.0f;
    }
    compare("gemm", found, expected, 1e-5f);
    ++total;
    if (!margin) ++failed, std::printf("%s writes past its columns\n", kernel->name);
  }
}

}  // namespace

int main() {
  for (const Sizes& s : {Sizes{3, 1, 5, 32},
                         {5, 17, 33, 47},
                         {4, 33, 64, 97},
                         {2, 150, 7, 64},
                         {3, 40, 31, 129},
                         {3, 10, 31, 129, 100},
                         {4, 17, 9, 47, 33},
                         {3, 40, 31, 64, 7},
                         {5, 17, 33, 47, 0, true},
                         {4, 33, 9, 97, 33, true}})
    for (const bool reverse : {false, true}) layer<float>(s, reverse), layer<Bf16>(s, reverse);
  for (const bool transposed : {false, true})
    for (const bool add : {false, true})
      for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1},
                                    {16, 33, 32},
                                    {129, 64, 40},
                                    {40, 97, 1056},
                                    {145, 31, 2049},
                                    {17, 20, 0}})
        gemm(m, n, k, transposed, add);
  std::printf("%d of %d results are right\n", total - failed, total);
  return failed > 0;
}
