// Runs layers on the CPU kernels of one instruction set, FASTLSTM_HOST_ISA, with the rows or units of each
// direction divided among threads as csrc/cpu/partition.h does it. For ThreadSanitizer, which does not know
// OpenMP: threads are std::threads. usage: partitions MAX_MEMBERS [without-barrier]
#include <cstdlib>
#include <cstring>
#include <thread>

#include "layer.h"

namespace fastlstm {

namespace FASTLSTM_HOST_ISA {
template <class T, class S>
const Kernels<T, S>& table();
extern template const Kernels<float, float>& table<float, float>();
}  // namespace FASTLSTM_HOST_ISA
template <>
const Kernels<float, float>& kernels<float, float>() {
  return FASTLSTM_HOST_ISA::table<float, float>();
}
// So small that odd steps of all but the smallest layers sweep the blocks of the weights in reverse order.
int64_t l2_bytes() { return 1 << 12; }

}  // namespace fastlstm

namespace {

using fastlstm::Member;
using fastlstm::Members;
using fastlstm::ThreadPartition;
using fastlstm::WeightMode;
using host::Case;

// Each member on a thread of its own.
struct Threads {
  int count;
  bool with_barrier;

  template <class F>
  void operator()(Members& members, F&& body) const {
    std::vector<std::thread> threads;
    for (int thread = 0; thread < count; ++thread)
      threads.emplace_back([&, thread] {
        members.run(thread, [&](int64_t d, Member me) {
          if (!with_barrier) me.barrier = nullptr;
          body(d, me);
        });
      });
    for (std::thread& thread : threads) thread.join();
  }
};

// Returns true if the members of each direction are as many as planned, and every row of every unit and of
// every feature is one member's, whose units begin at a multiple of unit_block.
bool covers_layer(const Case& k, const ThreadPartition& partition, int64_t unit_block) {
  const host::PackedRows packed(k);
  const std::vector<host::Rows> rows(partition.D, packed.rows());
  Members members(partition, rows, k.H, k.P, unit_block);
  host::Array<int> units(partition.D * k.B * k.H), features(partition.D * k.B * k.P), parts(partition.D);
  bool right = true;
  for (int thread = 0; thread < partition.threads(); ++thread)
    members.run(thread, [&](int64_t d, const Member& me) {
      ++parts[d];
      right &= me.index == thread && (me.barrier != nullptr) == partition.split_units;
      right &= me.unit_begin % unit_block == 0 && me.feature_begin % unit_block == 0;
      for (int64_t r = me.row_begin; r < me.row_end; ++r) {
        for (int64_t u = me.unit_begin; u < me.unit_end; ++u) ++units[(d * k.B + r) * k.H + u];
        for (int64_t p = me.feature_begin; p < me.feature_end; ++p) ++features[(d * k.B + r) * k.P + p];
      }
    });
  for (const auto& [counts, wanted] : {std::pair{&units, 1}, {&features, 1}, {&parts, partition.members}})
    for (const int count : *counts) right &= count == wanted;
  if (!right) std::printf("the members do not cover the layer:\n");
  return right;
}

// Returns true if a layer is right, and the same again.
bool check(const Case& k, const ThreadPartition& partition, bool with_barrier) {
  const Threads launch{partition.threads(), with_barrier};
  std::vector<host::Layer<float>> layers, again;
  for (int64_t d = 0; d < partition.D; ++d) layers.push_back(host::make<float>(k));
  again = layers;
  host::run(k, partition, layers, launch);
  if (!with_barrier) return true;  // nobody knows what it computed
  host::run(k, partition, again, launch);
  bool right = covers_layer(k, partition, fastlstm::kernels<float>().unit_block);
  for (int64_t d = 0; d < partition.D; ++d) {
    right &= host::is_right(k, d, layers[d]);
    for (size_t n = 0; n < host::results(layers[d]).size(); ++n) {
      const auto [name, first] = host::results(layers[d])[n];
      if (*first == *host::results(again[d])[n].second) continue;
      std::printf("%s differs from run to run:\n", name);
      right = false;
    }
  }
  if (!right)
    std::printf("  %d directions %s, %d members each by %s, %d row groups, %d copies\n", int(partition.D),
                partition.concurrent ? "at once" : "in turn", partition.members,
                partition.split_units ? "units" : "rows", partition.row_groups, partition.copies);
  return right;
}

// From T down, unlike among rows that different members run.
host::Array<int64_t> falling_lengths(int64_t T, int64_t B) {
  host::Array<int64_t> lengths;
  for (int64_t r = 0; r < B; ++r) lengths.push_back(T - r * T / B);
  return lengths;
}

}  // namespace

int main(int argc, char** argv) {
  const int max_members = argc < 2 ? 8 : std::atoi(argv[1]);
  const bool with_barrier = argc < 3 || std::strcmp(argv[2], "without-barrier") != 0;
  const int64_t unit_block = fastlstm::kernels<float>().unit_block;
  int cases = 0, failed = 0;
  const auto run = [&](const Case& k, const ThreadPartition& partition) {
    if (!with_barrier && !partition.split_units) return;
    ++cases;
    failed += !check(k, partition, with_barrier);
  };
  for (int members = 2; members <= max_members; ++members)
    for (const bool units : {false, true})
      for (const bool ragged : {false, true})
        for (const bool projected : {false, true}) {
          // Units: a block for each member, and a narrow one; fewer blocks of features than members.
          const int64_t T = 5, B = units ? 3 : 2 * members + 1, I = 6,
                        H = units ? members * unit_block + 5 : 2 * unit_block + 3,
                        P = projected ? H / 2 + 1 : H;
          const WeightMode weights = members % 4 == 3 ? WeightMode::unpacked : WeightMode::prepacked;
          Case k{T, B, I, H, P, members % 2 == 1, weights};
          if (ragged) k.lengths = falling_lengths(T, B);
          for (const int copies : {1, members}) {
            if (copies > 1 && (units || members > 4)) continue;
            run(k, {1, members, false, units, copies});
            run(k, {2, members, true, units, copies});
            if (members <= 3) run(k, {2, members, false, units, copies});
          }
          if (units && members % 2 == 0) {  // two groups of rows, whose members split the units
            run(k, {1, members, false, true, 1, 2});
            if (members <= 4) run(k, {2, members, true, true, 1, 2});
          }
        }
  for (const bool projected : {false, true}) {
    const int64_t H = 2 * unit_block + 3, P = projected ? unit_block + 1 : H;
    // More rows than a row block, and in each step enough for a product of their own with W_ih.
    run({3, 107, 6, H, P, false, WeightMode::prepacked}, {1, 2, false, true});
    run({3, 107, 6, H, P, true, WeightMode::prepacked}, {1, 2, false, false});
    // A single step, for which each block of the weights is packed when it is used.
    run({1, 9, 6, H, P, false, WeightMode::pack_on_use}, {1, 3, false, true});
    run({1, 9, 6, H, P, false, WeightMode::pack_on_use}, {1, 3, false, false});
  }
  std::printf("%d of %d partitions are right\n", cases - failed, cases);
  return failed != 0;
}
