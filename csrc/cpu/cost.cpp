// The cost model and the candidates of cpu/cost.h.
#include "cpu/cost.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace fastlstm {
namespace {

// directions: each on a thread of its own, undivided. grid: groups split the rows, and their members the
// units.
enum class Split { none, directions, rows, units, grid };

constexpr int64_t kCacheLineBytes = 64;
constexpr double kNever = std::numeric_limits<double>::infinity();

// Of whole numbers. A division of doubles takes less time than one of int64_t.
double ceil_div(double n, double by) { return static_cast<double>(static_cast<int64_t>((n + by - 1) / by)); }

// Predicts the time of a loop on the threads of a partition. Only differences between partitions matter: what
// all do alike (bias sums, gathering of states, the products after the loop) is left out, and so is packing
// W_hr.
class LoopCost {
 public:
  LoopCost(const Loop& loop, const Machine& machine);

  // Microseconds of the loop of all directions, fork and join included. members and row_groups: per
  // direction.
  [[gnu::always_inline]] double predicted_us(Split split, int members, int row_groups, bool concurrent) const;

  int64_t max_row_members() const { return std::max<int64_t>(1, loop_.shape.B); }
  // Of two whole blocks at least; the last block may be narrower. A row's layer normalization needs all
  // units.
  int64_t max_unit_members() const {
    return loop_.even || loop_.shape.norm || loop_.shape.H < 2 * unit_block_
               ? 1
               : static_cast<int64_t>(unit_blocks_);
  }
  // A single step splits rows where each thread has enough of them to pack the weights for itself, and units
  // otherwise. With layer normalization all threads pack the weights before it.
  bool single_step() const { return loop_.shape.T == 1 && !loop_.even; }
  bool rows_allowed(int members) const {
    return !single_step() || loop_.shape.norm ||
           (loop_.products == Products::real && weight_bytes_ <= kSingleStepRowSplitMaxBytes &&
            loop_.shape.B >= kSingleStepRowSplitMinRows * members);
  }
  // Returns true if a member fewer would have the same largest share and pack as fast, and so take less time.
  bool is_dominated(Split split, int members, int row_groups) const {
    if (loop_.even || single_step() || members - row_groups < figures_.l3_full_speed_max_threads)
      return false;
    if (split == Split::rows) return !ragged_ && rows_of_member(members) == rows_of_member(members - 1);
    const int shares = members / row_groups;
    return shares > 2 && units_of_member(shares) == units_of_member(shares - 1);
  }
  bool private_copies() const {
    return loop_.packed > 0 && loop_.products == Products::real && weight_bytes_ <= private_max_bytes_;
  }

 private:
  [[gnu::always_inline]] double step_us(double rows, double units, int threads, bool concurrent) const;
  [[gnu::always_inline]] double pack_us(Split split, int members, int row_groups, bool concurrent) const;

  // Of the weights of all gates, per element of depth: bfloat16 stays so where an L2 does not hold float
  // panels.
  double panel_bytes(double units) const {
    const bool narrow = loop_.shape.dtype == Dtype::bfloat16 && loop_.products == Products::real &&
                        depth_bytes_ * loop_.depth * units > l2_resident_bytes_ * vector_units_;
    return narrow ? depth_bytes_ / 2 : depth_bytes_;
  }

  // The largest share, which the others wait for.
  double rows_of_member(int members) const {
    if (ragged_) return std::max(1.0, loop_.shape.active_rows / members);
    return ceil_div(B_, members);
  }
  double units_of_member(int members) const {
    return members == 1 ? vector_units_
                        : std::min(vector_units_, ceil_div(unit_blocks_, members) * unit_block_);
  }

  const Loop loop_;
  const CostFigures& figures_;
  bool ragged_;
  double T_, B_, D_, row_bytes_, row_boundary_us_, handed_over_us_;
  double full_steps_;    // of active_rows rows; the others have about one row
  double depth_bytes_;   // of the weights of all gates, per element of depth
  double weight_bytes_;  // of a direction, but W_hr
  double l2_resident_bytes_, private_max_bytes_, unit_block_, unit_blocks_, vector_units_;
  double us_per_mac_, gate_macs_, l2_read_rows_, l3_read_rows_, l3_hidden_rows_;
  double pack_us_, use_us_;      // packing of a direction's weights on one thread: before the steps, on use
  double read_us_, pack_tasks_;  // reading what another core has packed; threads that may pack at once
  double fork_us_, barriers_, barrier_us_, exchanged_us_;  // barriers_: of all steps
};

LoopCost::LoopCost(const Loop& loop, const Machine& machine) : loop_(loop), figures_(*machine.figures) {
  const LayerShape& s = loop.shape;
  const double width = static_cast<double>(machine.vector_bytes / s.real_bytes());
  const CostFigures& f = *machine.figures;
  ragged_ = s.N < s.T * s.B;
  T_ = s.T, B_ = s.B, D_ = s.D, row_bytes_ = s.H * s.real_bytes();
  const bool whole_lines =
      s.H * s.real_bytes() % kCacheLineBytes == 0 && s.P * s.real_bytes() % kCacheLineBytes == 0;
  row_boundary_us_ = whole_lines ? f.whole_line_row_boundary_us : f.row_boundary_us;
  full_steps_ = s.N / std::max(1.0, s.active_rows);
  const bool narrow = loop.products == Products::bf16 || s.frozen == Frozen::bfloat16;
  depth_bytes_ = 4.0 * s.H * (loop.products == Products::int8 ? 1 : narrow ? 2 : s.real_bytes());
  weight_bytes_ = depth_bytes_ * (loop.depth + loop.input);
  if (loop.products == Products::bf16) {
    us_per_mac_ = 1 / f.bf16_macs_per_us, gate_macs_ = f.bf16_gate_cost_macs;
    l2_read_rows_ = f.bf16_l2_read_rows, l3_read_rows_ = f.bf16_l3_read_rows,
    l3_hidden_rows_ = f.bf16_l3_hidden_min_rows;
    l2_resident_bytes_ = kBf16L2ResidentMaxFraction * machine.l2_bytes;
    unit_block_ = bf16::kUnits, vector_units_ = s.H;
  } else if (loop.products == Products::int8) {
    const double lanes = int8_width(s, machine);
    us_per_mac_ = 1 / (f.int8_vector_macs_per_us * lanes), gate_macs_ = f.int8_gate_cost_macs;
    l2_read_rows_ = f.int8_l2_read_rows, l3_read_rows_ = f.int8_l3_read_rows,
    l3_hidden_rows_ = f.int8_l3_hidden_min_rows;
    l2_resident_bytes_ = kL2ResidentMaxFraction * machine.l2_bytes;
    unit_block_ = lanes, vector_units_ = ceil_div(s.H, lanes) * lanes;
  } else {
    us_per_mac_ = 1 / (f.vector_fmas_per_us * width), gate_macs_ = f.gate_cost_macs;
    l2_read_rows_ = f.l2_read_rows, l3_read_rows_ = f.l3_read_rows, l3_hidden_rows_ = f.l3_hidden_min_rows;
    l2_resident_bytes_ = kL2ResidentMaxFraction * machine.l2_bytes;
    unit_block_ = 2 * width, vector_units_ = ceil_div(s.H, width) * width;
  }
  private_max_bytes_ = kPrivatePackMaxL2Fraction * machine.l2_bytes;
  unit_blocks_ = ceil_div(s.H, unit_block_);
  fork_us_ = f.fork_join_us, barrier_us_ = f.barrier_us;
  pack_us_ = loop.packed * depth_bytes_ / f.pack_bytes_per_us;
  use_us_ = loop.used_once * depth_bytes_ / f.pack_bytes_per_us;
  read_us_ = loop.packed * depth_bytes_ / f.core_to_core_bytes_per_us;
  pack_tasks_ = std::min(f.l3_full_speed_max_threads,
                         std::max(1.0, ceil_div(4.0 * s.H * loop.packed, double(kPackTaskMinElements))));
  barriers_ = double(s.T) * loop.barriers;
  exchanged_us_ =
      loop.exchanged * (loop.products == Products::bf16 ? 2 : s.real_bytes()) / f.core_to_core_bytes_per_us;
  handed_over_us_ = s.N * loop.handed_over * s.real_bytes() / f.core_to_core_bytes_per_us;
}

// A step of a thread. Prefetching hides a part of the reading, the larger the more rows there are to
// multiply.
inline double LoopCost::step_us(double rows, double units, int threads, bool concurrent) const {
  const bool hoisted = loop_.products != Products::bf16 && loop_.input > 0 &&
                       hoists_input_projection(loop_.shape.T, loop_.ih_prepacked, rows);
  const double depth = loop_.depth + loop_.projection + (hoisted ? 0 : loop_.input);
  double read_rows = l2_read_rows_, hidden_rows = l2_read_rows_;
  if (panel_bytes(units) * depth * units > l2_resident_bytes_ * vector_units_) {
    const double share =
        std::max(1.0, threads / figures_.l3_full_speed_max_threads) *  // of the L3's bandwidth
        (concurrent && loop_.products != Products::bf16 ? figures_.l3_two_directions : 1);
    read_rows = l3_read_rows_ * share, hidden_rows = l3_hidden_rows_ * share;
  }
  if (loop_.products == Products::bf16) rows = std::ceil(rows / kBf16TileCostRows) * kBf16TileCostRows;
  const double product_rows = rows < hidden_rows ? rows + read_rows * (1 - rows / hidden_rows) : rows;
  return 4 * units *
         (depth * product_rows + (hoisted ? loop_.input * rows : 0) +
          gate_macs_ * std::max(rows, figures_.gate_cost_min_rows)) *
         us_per_mac_;
}

// Packing the weights of all directions. Those that one thread reads, it packs (private_weights); others are
// packed by all of the partition's threads before the loop's own start, and each reads what the others
// packed.
inline double LoopCost::pack_us(Split split, int members, int row_groups, bool concurrent) const {
  const bool split_units = split == Split::units || split == Split::grid;
  const double share = split_units ? units_of_member(members / row_groups) / vector_units_ : 1;
  const double turns = concurrent ? 1 : D_;
  const double on_use = turns * use_us_ * share;
  const bool own = loop_.products == Products::real && (split == Split::units || split == Split::directions ||
                                                        (split == Split::rows && private_copies()));
  if (own || split == Split::none) return turns * pack_us_ * share + on_use;
  const double tasks = std::min<double>(concurrent ? 2 * members : members, pack_tasks_);
  const double read = tasks > 1 ? 1 - 1 / tasks : 1;
  return D_ * (pack_us_ / tasks + (tasks > 1 ? fork_us_ : 0)) + turns * read_us_ * read * share + on_use;
}

inline double LoopCost::predicted_us(Split split, int members, int row_groups, bool concurrent) const {
  const bool split_units = split == Split::units || split == Split::grid;
  const int threads = concurrent ? 2 * members : members;
  double us;
  if (loop_.even) {
    us = step_us(loop_.shape.active_rows, vector_units_, 1, false) / members;
  } else {
    const int shares = split_units ? members / row_groups : 1;
    const int row_shares = split_units ? row_groups : members;
    const double rows = row_shares > 1 ? rows_of_member(row_shares) : loop_.shape.active_rows;
    const double units = units_of_member(shares);
    us = full_steps_ * step_us(rows, units, threads, concurrent);
    if (ragged_) us += std::max(0.0, T_ - full_steps_) * step_us(1, units, threads, concurrent);
    if (row_shares > 1) us += T_ * row_boundary_us_ * std::max(1.0, kRowBoundaryBytes / (rows * row_bytes_));
    if (split_units)
      us += barriers_ * (barrier_us_ + (shares - 2) * figures_.barrier_thread_us) +
            full_steps_ * rows * exchanged_us_ * (1 - 1.0 / shares);
  }
  if (!concurrent) us *= D_;
  us += D_ * handed_over_us_ * (1 - 1.0 / threads);
  if (!loop_.even) us += pack_us(split, members, row_groups, concurrent);
  return threads == 1 ? us : us + loop_.regions * (fork_us_ + (threads - 2) * figures_.fork_join_thread_us);
}

// Calls f(split, members, row groups, concurrent) for every candidate, by rising number of threads. More
// threads add candidates and change none, so the least predicted time never rises with them. A grid has a
// power of two of row groups, and directions that run in turn have none: the choice is to take less than 2 us
// at 64 threads. all: dominated candidates too.
template <class F>
void for_candidates(const LoopCost& cost, int64_t D, int threads, bool all, F&& f) {
  const int64_t max_rows = cost.max_row_members(), max_units = cost.max_unit_members();
  const auto divided = [&](int members, bool concurrent) {
    const auto candidate = [&](Split split, int groups) {
      if (all || !cost.is_dominated(split, members, groups)) f(split, members, groups, concurrent);
    };
    const bool rows = members <= max_rows && cost.rows_allowed(members);
    if (rows) candidate(Split::rows, 1);
    if (members <= max_units && !(rows && cost.single_step())) candidate(Split::units, 1);
    if (max_units == 1 || cost.single_step() || (D == 2 && !concurrent)) return;
    for (int groups = 2; 2 * groups <= members && members % groups == 0; groups *= 2)
      if (groups <= max_rows && members / groups <= max_units) candidate(Split::grid, groups);
  };
  f(Split::none, 1, 1, false);
  for (int n = 2; n <= threads; ++n) {
    if (D == 2 && n == 2) f(Split::directions, 1, 1, true);
    if (D == 2 && n > 2 && n % 2 == 0) divided(n / 2, true);
    divided(n, false);
  }
}

// Returns true if the threads meet at a barrier in every step.
bool has_step_barrier(Split split) { return split == Split::units || split == Split::grid; }

bool is_choice(const PartitionChoice& p, Split split, int members, int row_groups, bool concurrent) {
  return p.members == members && p.row_groups == row_groups && p.concurrent == concurrent &&
         p.split_units == has_step_barrier(split);
}

ThreadPartition partition_of(const LoopCost& cost, int64_t D, Split split, int members, int row_groups,
                             bool concurrent) {
  ThreadPartition p;
  p.D = D, p.members = members, p.concurrent = concurrent;
  p.split_units = has_step_barrier(split);
  p.row_groups = row_groups;
  p.copies = split == Split::rows && cost.private_copies() ? members : 1;
  return p;
}

}  // namespace

ThreadPartition choose_partition(const Loop& loop, const Machine& machine) {
  const LoopCost cost(loop, machine);
  const int64_t D = loop.shape.D;
  struct {
    Split split = Split::none;
    int members = 1, row_groups = 1;
    bool concurrent = false;
    int threads = 1;
    double us = kNever;
  } best;
  double least[5] = {kNever, kNever, kNever, kNever, kNever};  // by Split
  for_candidates(cost, D, machine.threads, machine.forced.has_value(),
                 [&](Split split, int members, int row_groups, bool concurrent) {
                   if (machine.forced && !is_choice(*machine.forced, split, members, row_groups, concurrent))
                     return;
                   const double us = cost.predicted_us(split, members, row_groups, concurrent);
                   double& of_kind = least[static_cast<int>(split)];
                   of_kind = std::min(of_kind, us);
                   const int threads = concurrent ? 2 * members : members;
                   const bool needs_min_gain =
                       threads > best.threads || (has_step_barrier(split) && !has_step_barrier(best.split));
                   if (us < (needs_min_gain ? 1 - kPartitionMinGain : 1) * best.us)
                     best = {split, members, row_groups, concurrent, threads, us};
                 });
  if (best.us == kNever) throw std::invalid_argument("the forced thread partition is no candidate");
  ThreadPartition p = partition_of(cost, D, best.split, best.members, best.row_groups, best.concurrent);
  p.one_available = machine.threads == 1;
  p.predicted_us = best.us;
  p.one_thread_us = least[0], p.directions_us = least[1], p.rows_us = least[2], p.units_us = least[3],
  p.grid_us = least[4];
  return p;
}

std::vector<ThreadPartition> partition_candidates(const Loop& loop, const Machine& machine) {
  const LoopCost cost(loop, machine);
  std::vector<ThreadPartition> all;
  for_candidates(cost, loop.shape.D, machine.threads, true,
                 [&](Split split, int members, int row_groups, bool concurrent) {
                   all.push_back(partition_of(cost, loop.shape.D, split, members, row_groups, concurrent));
                   all.back().predicted_us = cost.predicted_us(split, members, row_groups, concurrent);
                 });
  return all;
}

// Threads that split units read all of h; with projection first h before it.
Loop float_forward_loop(const LayerShape& s, WeightMode w_ih, WeightMode w_hh) {
  Loop loop{s, s.P, s.I};
  const auto sum = [&](WeightMode mode) { return (w_ih == mode ? s.I : 0) + (w_hh == mode ? s.P : 0); };
  loop.packed = sum(WeightMode::prepacked), loop.used_once = sum(WeightMode::pack_on_use);
  loop.ih_prepacked = w_ih == WeightMode::prepacked;
  loop.exchanged = s.proj() ? s.H + s.P : s.H, loop.barriers = s.proj() ? 2 : 1;
  if (s.proj()) loop.projection = s.P / 4.0;  // H P multiply-adds a row
  return loop;
}

// x W_ih^T has no part in it. Threads that split units read all gradients of the gates.
Loop float_backward_loop(const LayerShape& s, bool pack_hh, int64_t chunk_steps) {
  Loop loop{s, s.P};
  loop.regions = static_cast<int>(ceil_div(s.T, chunk_steps));
  loop.packed = pack_hh ? s.P : 0;
  loop.exchanged = s.proj() ? 4 * s.H + s.P : 4 * s.H, loop.barriers = s.proj() ? 2 : 1;
  if (s.proj()) loop.projection = s.P / 4.0;
  const int64_t rows = std::min(s.N, chunk_steps * s.B);
  if (gemm_kind(4 * s.H, std::max(s.I, s.P), rows, true, false) == Gemm::small) loop.handed_over = 4 * s.H;
  return loop;
}

Loop bf16_forward_loop(const LayerShape& s) {
  Loop loop{s, s.P, s.I};
  loop.packed = s.I + s.P, loop.products = Products::bf16;
  loop.exchanged = s.proj() ? s.H + s.P : s.H, loop.barriers = s.proj() ? 2 : 1;
  if (s.proj()) loop.projection = s.P / 4.0;
  return loop;
}

Loop bf16_backward_loop(const LayerShape& s, int64_t chunk_steps) {
  Loop loop{s, s.P};
  loop.regions = static_cast<int>(ceil_div(s.T, chunk_steps));
  loop.packed = s.P, loop.products = Products::bf16;
  loop.exchanged = s.proj() ? 4 * s.H + s.P : 4 * s.H, loop.barriers = s.proj() ? 2 : 1;
  if (s.proj()) loop.projection = s.P / 4.0;
  return loop;
}

// Weights are packed when a layer is frozen.
Loop int8_forward_loop(const LayerShape& s) {
  Loop loop{s, s.P, s.I};
  loop.ih_prepacked = true, loop.products = Products::int8;
  loop.exchanged = s.proj() ? s.H + s.P : s.H, loop.barriers = s.proj() ? 2 : 1;
  if (s.proj()) loop.projection = s.P / 4.0;
  return loop;
}

// Twice the products of forward: gradients of the inputs and of the weights.
Loop cell_backward_loop(const LayerShape& s) {
  Loop loop{s, 2 * (s.I + s.P)};
  loop.even = true;
  return loop;
}

}  // namespace fastlstm
