// The products of cpu/int8_kernels.h for one instruction set against scalar sums. The compiler is given
// FASTLSTM_ISA, FASTLSTM_VECTOR_BYTES, FASTLSTM_INT8_NAME and, for VNNI, FASTLSTM_VNNI. AVX_VNNI runs on a
// CPU with AVX512_VNNI, whose instruction for 256 bits computes the same, and AMX (FASTLSTM_INT8_AMX) on
// emulated tiles (FASTLSTM_EMULATED_TILES).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#if defined(FASTLSTM_AVX_VNNI_AS_AVX512)
#include <immintrin.h>
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#endif
#if defined(FASTLSTM_EMULATED_TILES)
#include "emulated_tiles.h"
#endif
#include "cpu/int8_kernels.h"

namespace fastlstm {
int64_t l2_bytes() { return 1 << 20; }
}  // namespace fastlstm
namespace kernels = fastlstm::FASTLSTM_ISA;

namespace int8 = fastlstm::int8;

namespace {

constexpr int64_t kGroup = kernels::kGroup, kRows = kernels::kInt8Block, kLanes = kernels::kLanes;
int64_t checked = 0, right = 0;

void count(bool is_right, const char* what, int64_t K, int64_t row, double found, double expected) {
  if (!is_right && right == checked)
    std::printf("%s, K=%ld row %ld: %.9g, expected %.9g\n", what, long(K), long(row), found, expected);
  ++checked, right += is_right;
}

// A block of weights [kRows, K], also as the kernels read it.
struct Block {
  std::vector<int8_t> weight, packed;
  std::vector<float> scale;
  std::vector<int32_t> row_sums;

  template <class F>
  Block(int64_t K, F&& next)
      : weight(kRows * K), packed(int8::block_size(K, {kLanes, kGroup})), scale(kRows), row_sums(kRows) {
    for (int8_t& w : weight) w = next();
    for (int64_t r = 0; r < kRows; ++r) {
      scale[r] = 0.25f + 0.01f * static_cast<float>(r);
      for (int64_t k = 0; k < K; ++k) {
        packed[(k / kGroup * kRows + r) * kGroup + k % kGroup] = weight[r * K + k];
        row_sums[r] += weight[r * K + k];
      }
    }
  }
  int8::Weight view() const { return {packed.data(), scale.data(), row_sums.data()}; }
};

int64_t nearest(float v, float by) {
  volatile float product = v * by;  // rounded, not part of a fused operation
  return static_cast<int64_t>(std::nearbyint(product));
}

// A quantized row, q - zero.
struct Row {
  float scale;
  std::vector<int64_t> q;

  Row(int64_t K, const float* x) : q(K) {
    float least = 0, most = 0;
    for (int64_t k = 0; k < K; ++k) least = std::min(least, x[k]), most = std::max(most, x[k]);
    scale = (0.5f * most - 0.5f * least) * (2.0f / 255.0f);
    const float inverse = 1.0f / scale;
    const int64_t zero = nearest(-least, inverse);
    for (int64_t k = 0; k < K; ++k) q[k] = std::min<int64_t>(255, nearest(x[k], inverse) + zero) - zero;
  }
  int64_t sum(const Block& block, int64_t r) const {
    int64_t sum = 0;
    for (size_t k = 0; k < q.size(); ++k) sum += q[k] * block.weight[r * q.size() + k];
    return sum;
  }
};

// The sums of one row.
void check_sums(int64_t K, bool extreme, std::mt19937& random) {
  const Block block(K, [&] { return static_cast<int8_t>(extreme ? 127 : int(random() % 255) - 127); });
  std::vector<float> x(K);
  for (float& v : x) v = extreme ? 1.0f : static_cast<float>(int(random() % 2001) - 1000) / 500;
  std::vector<int32_t> sums(kRows);
  std::vector<uint8_t> scratch(int8::sums_scratch(K));
  float scale = 0;
  kernels::block_sums(K, x.data(), block.view(), scratch.data(), sums.data(), &scale);
  const Row row(K, x.data());
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t sum = row.sum(block, r);
    count(sum == sums[r] && scale == row.scale, "sums", K, r, sums[r], double(sum));
  }
}

// The products of several rows, as numbers; add: to what is there.
void check_products(int64_t rows, int64_t K, bool add, std::mt19937& random) {
  const Block block(K, [&] { return static_cast<int8_t>(int(random() % 255) - 127); });
  const int64_t readable = rows + kernels::kInt8SpareRows;
  std::vector<float> x(rows * K), out(rows * kRows, 0.5f);
  for (float& v : x) v = static_cast<float>(int(random() % 2001) - 900) / 500;
  // Behind the rows and their K factors is what no sum may contain.
  std::vector<kernels::Factor> q(readable * kernels::factor_stride(K), kernels::Factor(201));
  std::vector<kernels::Quantization> quantization(rows);
  const kernels::FactorRows factors{q.data(), quantization.data(), K};
  for (int64_t m = 0; m < rows; ++m) factors.quantize(m, x.data() + m * K);
  {
    const kernels::ProductScope scope(true);
    kernels::block_products(rows, factors, block.view(), out.data(), add);
  }
  for (int64_t m = 0; m < rows; ++m) {
    const Row row(K, x.data() + m * K);
    for (int64_t r = 0; r < kRows; ++r) {
      const float sum = static_cast<float>(row.sum(block, r));
      volatile float scale = block.scale[r] * row.scale, product = sum * scale;
#if defined(__FMA__) || defined(__aarch64__)
      const float expected = add ? std::fma(sum, scale, 0.5f) : product;
#else
      const float expected = add ? product + 0.5f : product;
#endif
      count(out[m * kRows + r] == expected, add ? "sums of products" : "products", K, m, out[m * kRows + r],
            expected);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int64_t K : {1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 4099})
    for (bool extreme : {false, true}) check_sums(K, extreme, random);
  for (int64_t K : {1, 63, 64, 65, 129, 192, 300})
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 20, 21, 31, 32, 33, 37, 65}) {
      check_products(rows, K, false, random);
      check_products(rows, K, true, random);
    }
  std::printf("%ld of %ld sums are right\n", long(right), long(checked));
  return right == checked ? 0 : 1;
}
