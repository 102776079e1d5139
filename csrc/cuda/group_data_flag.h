// Grid variant with data flags: as group_flags.h, but the words of a state are their own flags (exchange.h),
// so there is no flag, no fence before a state is sent, and no second round trip to L2 after its arrival. A
// group has one batch tile of 8 rows.
//
// Instead of pointer() and send() a group has
//   store(warp, words, values)  the lanes' elements of state n + 1, which are on their way from here on
//   clear(warp, words)          the same words of state n + 3
//   fence(warp)                 between clear() and the next receive()
// where `words` are address()'s, kNoWord for lanes that write none: an element of 16 bits shares its word
// with that of the next unit, in the next lane, and the lane of the even unit writes both.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/exchange.h"
#include "cuda/resident.h"

namespace fastlstm::cuda {

// Loads words of a state that may not be there yet, for StateGemm.
struct PollWords {
  static constexpr bool kPolls = true;
  uint32_t epoch, *fault;

  FASTLSTM_DEVICE static uint4 load(const uint4* p) { return load_relaxed(p); }
  FASTLSTM_DEVICE void check(uint32_t polls) const {
    if (polls == kMaxPolls) trap_on_timeout(fault, epoch);
  }
};

// GATES: elements per unit and row in a state, UNITS elements apart.
template <class T, int UNITS, int ROWS, int GATES, int REGISTER_ITERS>
class DataFlagGroup {
 public:
  static constexpr bool kCluster = false, kDataFlag = true;
  static constexpr int kUnits = UNITS, kBatchTileRows = 8;
  using Elements = ElementMap<UNITS, kBatchTileRows>;
  // Of a word of 32 bits in the exchange buffer: a register less than a pointer.
  using StateAddress = int;
  static constexpr StateAddress kNoWord = -kDataFlagMaxWords;  // negative in each slot
  static_assert(Elements::kElements == 1 && UNITS % 2 == 0, "neighbouring lanes share a word");

  FASTLSTM_DEVICE DataFlagGroup(const Persistent& s, const Warp& warp, const CtaCoord& cta)
      : s_(s), cta_(cta), product_(warp, s.packed_weights, cta.global_rank(s.layout), s.layout.iters, 0) {}

  FASTLSTM_DEVICE void bind(const Warp& warp, int batch_tile, int n) {
    epoch_ = s_.epoch + 1 + static_cast<uint32_t>(n);
    first_slot_ = (cta_.d * s_.layout.batch_tiles + batch_tile) * kDataFlagSlots * words();
    for (const int lane : warp.lanes()) {
      from_[0][lane] =
          s_.exchange + first_slot_ + slot(epoch_) * words() + product_.first_word(warp, lane, 0);
    }
  }

  FASTLSTM_DEVICE void advance(const Warp& warp) {
    const int distance = (epoch_ % kDataFlagSlots == kDataFlagSlots - 1 ? 1 - kDataFlagSlots : 1) * words();
    for (const int lane : warp.lanes()) from_[0][lane] += distance;
    ++epoch_;
  }

  // Zeros in the padding of all slots: rows past B, units past H, and K past the group's units. By all warps,
  // once before the first state of a sequence; padding is never cleared.
  FASTLSTM_DEVICE void fill_padding(const Warp& warp, int batch_tile, int64_t H, int64_t B) const {
    const int all = product_.k_slices() * kKSliceElements<T>;
    const int part = GATES * UNITS, begin = cta_.rank * part;
    const int end = cta_.rank == s_.layout.ctas_per_group - 1 ? all : begin + part;
    const int words_of_row = (end - begin) / kWordElements;
    for (const int lane : warp.lanes()) {
#pragma unroll 1
      for (int i = warp.index() * 32 + lane; i < words_of_row * kBatchTileRows; i += kWarps * 32) {
        const int row = i / words_of_row, k = i % words_of_row * kWordElements;
        const bool padding = k >= part || cta_.rank * UNITS + k % UNITS >= H ||
                             int64_t{batch_tile} * kBatchTileRows + row >= B;
        if (!padding) continue;
        uint32_t* const word = buffer() + 4 * first_slot_ + word_offset(row, begin + k);
#pragma unroll
        for (int slot = 0; slot < kDataFlagSlots; ++slot) store_relaxed(word + slot * 4 * words(), 0);
      }
    }
  }

  FASTLSTM_DEVICE StateAddress address(const Warp&, int row, int k) const {
    return 4 * (first_slot_ + slot(epoch_ + 1) * words()) + word_offset(row, cta_.rank * GATES * UNITS + k);
  }
  FASTLSTM_DEVICE StateAddress next(StateAddress address) const {
    return address +
           ((epoch_ + 1) % kDataFlagSlots == kDataFlagSlots - 1 ? 1 - kDataFlagSlots : 1) * 4 * words();
  }

  // values: a lane's elements of each gate; zero for an element that does not exist.
  FASTLSTM_DEVICE void store(const Warp& warp, const PerLane<StateAddress>& words,
                             const PerLane<T> (&values)[GATES]) const {
    PerLane<uint32_t> bits[GATES];
#pragma unroll
    for (int g = 0; g < GATES; ++g) {
      for (const int lane : warp.lanes()) bits[g][lane] = to_bits(values[g][lane]);
    }
    if constexpr (sizeof(T) == 2) {
      // Two gates of a lane, exchanged with the next unit's lane by one shuffle, make two words.
#pragma unroll
      for (int g = 0; g < GATES; g += 2) {
        const int other = GATES == 1 ? 0 : g + 1;
        PerLane<uint32_t> both;
        for (const int lane : warp.lanes()) both[lane] = bits[g][lane] | bits[other][lane] << 16;
        const PerLane<uint32_t> next_unit = swap_pairs(both);
        for (const int lane : warp.lanes()) {
          bits[other][lane] = both[lane] >> 16 | (next_unit[lane] & 0xffff0000u);
          bits[g][lane] = (both[lane] & 0xffff) | next_unit[lane] << 16;
        }
      }
    }
    for (const int lane : warp.lanes()) {
      if (words[lane] < 0) continue;
      uint32_t* const word = buffer() + words[lane];
      store_relaxed(word, non_empty(bits[0][lane]));
      if constexpr (GATES == 4) {
        store_relaxed(word + kGateWords<1>, non_empty(bits[1][lane]));
        store_relaxed(word + kGateWords<2>, non_empty(bits[2][lane]));
        store_relaxed(word + kGateWords<3>, non_empty(bits[3][lane]));
      }
    }
  }

  FASTLSTM_DEVICE void clear(const Warp& warp, const PerLane<StateAddress>& words) const {
    const int distance = ((epoch_ + 1) % kDataFlagSlots < kDataFlagSlots / 2 ? 2 : -2) * 4 * this->words();
    for (const int lane : warp.lanes()) {
      if (words[lane] < 0) continue;
      uint32_t* const word = buffer() + words[lane] + distance;
      store_relaxed(word, kEmptyWord);
      if constexpr (GATES == 4) {
        store_relaxed(word + kGateWords<1>, kEmptyWord);
        store_relaxed(word + kGateWords<2>, kEmptyWord);
        store_relaxed(word + kGateWords<3>, kEmptyWord);
      }
    }
  }

  FASTLSTM_DEVICE static void fence(const Warp& warp) {
    for (const int lane : warp.lanes()) {
      static_cast<void>(lane);
      cuda::fence();
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp) {
    product_.multiply(warp, from_, PollWords{epoch_, s_.fault});
    warp.block_sync();
  }

  FASTLSTM_DEVICE int sum_offset(int row, int column) const { return product_.sum_offset(row, column); }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int offset) const {
    return product_.sum(warp, offset);
  }
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int, int, int offset) const {
    return product_.sum4(warp, offset);
  }

  FASTLSTM_DEVICE void leave(const Warp&) const {}

  // Returns true if the lane writes the word of its element, which is the first of the word.
  FASTLSTM_DEVICE static bool writes(int lane) { return sizeof(T) == 4 || lane % 2 == 0; }

 protected:  // benchmarks/cuda/steps.cu derives variants without a stage
  static constexpr int kWordElements = 4 / static_cast<int>(sizeof(T));
  template <int GATE>
  static constexpr int kGateWords = kGateOffset<T, UNITS, GATE> / kWordElements;

  FASTLSTM_DEVICE static uint32_t to_bits(const T& x) {
    std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t> bits;
    memcpy(&bits, static_cast<const void*>(&x), sizeof bits);
    return bits;
  }

  FASTLSTM_DEVICE uint32_t* buffer() const { return reinterpret_cast<uint32_t*>(s_.exchange); }
  FASTLSTM_DEVICE int words() const {
    return static_cast<int>(s_.layout.state_words);
  }  // of a slot, 16 bytes
  FASTLSTM_DEVICE static int slot(uint32_t epoch) { return static_cast<int>(epoch % kDataFlagSlots); }
  FASTLSTM_DEVICE int word_offset(int row, int k) const {
    return state_offset<T>(product_.k_slices(), row, k) / kWordElements;
  }

  const Persistent& s_;
  const CtaCoord cta_;
  StateGemm<T, ROWS / 16, REGISTER_ITERS, 1, kWarps, true, true> product_;
  uint32_t epoch_;                 // of state n
  int first_slot_;                 // of the batch tile, in words of 16 bytes
  PerLane<const uint4*> from_[1];  // the lane's first word of state n
};

}  // namespace fastlstm::cuda
