// The choice of a thread partition: every partition that may run is a candidate, a cost model (cost.cpp)
// predicts the time of each from the figures of tuning.h, and the least wins.
#pragma once

#include <vector>

#include "cpu/bf16.h"
#include "cpu/plan.h"

namespace fastlstm {

// Of the float kernels, of cpu/bf16.h, or of cpu/int8.h.
enum class Products { real, bf16, int8 };

// The time loop of a pass, which shape.D directions run.
struct Loop {
  LayerShape shape;
  int64_t depth;           // of a gate's product with what every step reads
  int64_t input = 0;       // with W_ih, which is read for several steps at once where it is hoisted
  double projection = 0;   // with W_hr, as depth
  double exchanged = 0;    // elements per row and step that threads which split units read of each other
  double handed_over = 0;  // elements per row that the calling thread alone reads after the loop
  int regions = 1;         // parallel regions, each a fork and a join
  int barriers = 1;        // per step, if units are split
  int64_t packed = 0;      // depth of the weights that are packed before the steps
  int64_t used_once = 0;   // of those that each thread packs on use, for its units and all steps
  bool ih_prepacked = false;
  Products products = Products::real;
  // Only rows may be split, and the work is divided evenly whatever the rows: LSTMCell's backward, whose
  // threads divide the weight gradients too.
  bool even = false;
};

// The loops of a layer's passes (plan.cpp).
Loop forward_loop(const LayerShape& s, const Machine& machine);
Loop backward_loop(const LayerShape& s, const Machine& machine);
// Those of the float kernels, those of cpu/bf16.h and cpu/int8.h, and that of LSTMCell's backward.
Loop float_forward_loop(const LayerShape& s, WeightMode w_ih, WeightMode w_hh);
Loop float_backward_loop(const LayerShape& s, bool pack_hh, int64_t chunk_steps);
Loop bf16_forward_loop(const LayerShape& s);
Loop bf16_backward_loop(const LayerShape& s, int64_t chunk_steps);
Loop int8_forward_loop(const LayerShape& s);
Loop cell_backward_loop(const LayerShape& s);

// The candidate of the least predicted time. They are compared by rising number of threads; one that adds
// threads or a barrier per step replaces the best so far only if it saves more than kPartitionMinGain.
ThreadPartition choose_partition(const Loop& loop, const Machine& machine);

// All candidates, by rising number of threads; for tests.
std::vector<ThreadPartition> partition_candidates(const Loop& loop, const Machine& machine);

}  // namespace fastlstm
