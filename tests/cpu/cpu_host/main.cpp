// Runs layers of random numbers on the CPU kernels. A program of its own, so that it runs where torch does
// not: under an emulator.
#include "layer.h"

#include <array>

namespace {

using fastlstm::WeightMode;
using host::Case;

template <class T>
bool check(const Case& k) {
  std::vector<host::Layer<T>> layers = {host::make<T>(k)};
  host::run(k, fastlstm::ThreadPartition{}, layers,
            [](fastlstm::Members& members, auto&& body) { members.run_serially(body); });
  return host::is_right(k, 0, layers[0]);
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
