// The products of cpu/int8_kernels.h for one instruction set against scalar sums. The compiler is given
// FASTLSTM_ISA, FASTLSTM_VECTOR_BYTES, FASTLSTM_INT8_NAME and, for VNNI, FASTLSTM_VNNI. AVX_VNNI runs on a
// CPU with AVX512_VNNI, whose instruction for 256 bits computes the same.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#if defined(FASTLSTM_AVX_VNNI_AS_AVX512)
#include <immintrin.h>
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#endif
#include "cpu/int8_kernels.h"

namespace fastlstm {
int64_t l2_bytes() { return 1 << 20; }
}  // namespace fastlstm
namespace kernels = fastlstm::FASTLSTM_ISA;

int main() {
  std::mt19937 random(1);
  constexpr int64_t kGroup = kernels::kGroup, kRows = kernels::kInt8Block, kLanes = kernels::kLanes;
  int64_t checked = 0, right = 0;
  for (int64_t K : {1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 500, 4099}) {
    for (bool extreme : {false, true}) {
      std::vector<int8_t> weight(kRows * K), packed(fastlstm::int8::block_size(K, {kLanes, kGroup}));
      std::vector<float> x(K), scale(kRows, 1.0f);
      std::vector<int32_t> row_sums(kRows), sums(kRows);
      std::vector<uint8_t> scratch(2 * (K + 64));
      for (int8_t& w : weight) w = static_cast<int8_t>(extreme ? 127 : int(random() % 255) - 127);
      for (float& v : x) v = extreme ? 1.0f : static_cast<float>(int(random() % 2001) - 1000) / 500;
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t k = 0; k < K; ++k) {
          packed[(k / kGroup * kRows + r) * kGroup + k % kGroup] = weight[r * K + k];
          row_sums[r] += weight[r * K + k];
        }
      float found = 0, least = 0, most = 0;
      kernels::block_sums(K, x.data(), {packed.data(), scale.data(), row_sums.data()}, scratch.data(),
                          sums.data(), &found);
      for (float v : x) least = std::min(least, v), most = std::max(most, v);
      const float scale_of_x = (0.5f * most - 0.5f * least) * (2.0f / 255.0f), inverse = 1.0f / scale_of_x;
      const auto nearest = [](float v, float by) {
        volatile float product = v * by;  // rounded, not part of a fused operation
        return static_cast<int64_t>(std::nearbyint(product));
      };
      const int64_t zero = nearest(-least, inverse);
      for (int64_t r = 0; r < kRows; ++r, ++checked) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; ++k) {
          sum += (std::min<int64_t>(255, nearest(x[k], inverse) + zero) - zero) * weight[r * K + k];
        }
        if (sum == sums[r] && found == scale_of_x)
          ++right;
        else if (right == checked)
          std::printf("K=%ld row %ld: %d, expected %ld\n", K, r, sums[r], sum);
      }
    }
  }
  std::printf("%ld of %ld sums are right\n", right, checked);
  return right == checked ? 0 : 1;
}
