// Layers on the AMX kernels of int8, emulated, against those of AVX512_VNNI: every result must be equal to
// the bit. Both read the same packed weights.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/int8.h"

namespace fastlstm {
int64_t l2_bytes() { return 1 << 16; }  // small, so that blocks are read in alternating order
namespace int8 {
const Kernels& amx_kernels();
const Kernels& avx512_kernels();
bool tiles_are_configured();
}  // namespace int8
}  // namespace fastlstm

namespace {

using namespace fastlstm;

struct Sizes {
  int64_t T, B, I, H, P;
};

// A weight at random in exactly the memory that its blocks have, with zeros behind K and numbers where there
// is no row.
struct Packed {
  std::vector<int8_t> weight;
  std::vector<float> scale;
  std::vector<int32_t> offset;

  Packed(int64_t blocks, int64_t K, const int8::Layout& layout, std::mt19937& random)
      : weight(blocks * int8::block_size(K, layout)),
        scale(blocks * 4 * layout.width),
        offset(blocks * 4 * layout.width) {
    const int64_t lanes = 4 * layout.width, n = int8::groups(K, layout.group);
    std::uniform_real_distribution<float> scales(0.001f, 0.01f);
    for (float& s : scale) s = scales(random);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t group = block * n + k / layout.group;
          int8_t& w = weight[(group * lanes + lane) * layout.group + k % layout.group];
          w = static_cast<int8_t>(int(random() % 255) - 127);
          offset[block * lanes + lane] += w;
        }
  }
  int8::Weight view() const { return {weight.data(), scale.data(), offset.data()}; }
};

std::vector<float> normal(int64_t n, std::mt19937& random) {
  std::normal_distribution<float> of;
  std::vector<float> out(n);
  for (float& v : out) v = of(random);
  return out;
}

struct Results {
  std::vector<float> y, cells, h, c;
};

// members: rows are split over so many, which run one after the other.
Results run(const int8::Kernels& kernel, const Sizes& s, bool reverse, bool ragged, int members) {
  std::mt19937 random(1);
  std::vector<int64_t> count(s.T), offset(s.T);
  std::vector<uint8_t> fresh;
  int64_t N = 0;
  for (int64_t t = 0; t < s.T; N += count[t++]) {
    count[t] = ragged ? s.B - s.B * t / s.T : s.B;
    offset[t] = N;
  }
  for (int64_t k = 0; ragged && k < N; ++k) fresh.push_back(random() % 5 == 0);
  const int64_t W = kernel.layout.width, blocks = (s.H + W - 1) / W;
  const Packed ih(blocks, s.I, kernel.layout, random), hh(blocks, s.P, kernel.layout, random),
      hr((s.P + 4 * W - 1) / (4 * W), s.H, kernel.layout, random);
  const std::vector<float> x = normal(N * s.I, random), bias = normal(4 * s.H, random);
  Results out{std::vector<float>(s.T * s.B * s.P), std::vector<float>(s.T * s.B * s.H),
              normal(2 * s.B * s.P, random), normal(s.B * s.H, random)};
  std::vector<float> hidden(s.P == s.H ? 0 : s.B * s.H);
  // NaN and 255 as what is read without being written.
  std::vector<uint8_t> scratch(members * kernel.forward_scratch(s.B, s.I, s.H, s.P), 255);

  int8::ForwardArgs args{};
  auto& layer = args.layer;
  layer.rows = {s.T,
                s.B,
                N,
                ragged ? count.data() : nullptr,
                ragged ? offset.data() : nullptr,
                nullptr,
                ragged ? fresh.data() : nullptr,
                false};
  layer.I = s.I, layer.H = s.H, layer.P = s.P, layer.reverse = reverse;
  layer.x = x.data(), layer.bias = bias.data();
  layer.hidden = hidden.empty() ? nullptr : hidden.data();
  layer.h[0] = out.h.data(), layer.h[1] = out.h.data() + s.B * s.P;
  layer.c0 = out.c.data(), layer.c = out.c.data();
  layer.y = out.y.data(), layer.cells = out.cells.data(), layer.y_stride = s.P, layer.cells_stride = s.H;
  args.ih = ih.view(), args.hh = hh.view(), args.hr = hr.view(), args.scratch = scratch.data();
  for (int k = 0; k < members; ++k)
    kernel.forward(args, {s.B * k / members, s.B * (k + 1) / members, 0, s.H, 0, s.P, k, nullptr});
  return out;
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  bool numbers = !a.empty();
  for (float v : a) numbers = numbers && std::isfinite(v);
  return numbers && a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
  int total = 0, right = 0;
  for (const Sizes& s : {Sizes{3, 1, 5, 16, 16},
                         {9, 7, 33, 47, 47},
                         {5, 20, 64, 65, 65},
                         {4, 40, 129, 64, 30},
                         {3, 150, 63, 100, 70}})
    for (const bool ragged : {false, true})
      for (const bool reverse : {false, true})
        for (const int members : {1, 2}) {
          const Results a = run(int8::amx_kernels(), s, reverse, ragged, members),
                        b = run(int8::avx512_kernels(), s, reverse, ragged, 1);
          const bool same = equal(a.y, b.y) && equal(a.cells, b.cells) && equal(a.h, b.h) &&
                            equal(a.c, b.c) && !int8::tiles_are_configured();
          ++total, right += same;
          if (!same)
            std::printf("T=%d B=%d I=%d H=%d P=%d%s%s, %d members: not equal\n", int(s.T), int(s.B), int(s.I),
                        int(s.H), int(s.P), ragged ? " ragged" : "", reverse ? " reverse" : "", members);
        }
  std::printf("%d of %d layers are equal\n", right, total);
  return right < total;
}
