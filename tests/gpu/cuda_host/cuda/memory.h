// The simulation's global memory: delays, flags, and relaxed stores that become visible in any order.
#pragma once

#include <vector_types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "cuda/plan.h"

namespace fastlstm::cuda {

inline uint32_t kMaxPolls = uint32_t{1} << 26;
inline int max_delay_us = 0;   // random delays before barriers, flags and loads of the state; 0: none
inline int silent_block = -1;  // never raises its flags, sends no remote store, and reports no timeout
// Which relaxed stores become visible only at a fence: for certain none, those of kEmptyWord, or all.
enum class HeldStores { none, clears, all };
inline HeldStores held_stores = HeldStores::none;

inline void random_delay() {
  if (max_delay_us == 0) return;
  thread_local std::minstd_rand draw(
      static_cast<unsigned>(std::hash<std::thread::id>()(std::this_thread::get_id()) >> 4));
  if (draw() % 4 != 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds(draw() % max_delay_us));
}

inline thread_local int this_block = 0;

inline void store_release(uint32_t* flag, uint32_t value) {
  random_delay();
  if (this_block != silent_block) std::atomic_ref<uint32_t>(*flag).store(value, std::memory_order_release);
}

inline uint32_t load_acquire(const uint32_t* flag) {
  std::this_thread::yield();
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(flag)).load(std::memory_order_acquire);
}

inline uint4 load_l2(const uint4* p) { return *p; }

// Relaxed stores of a thread that other threads do not see yet. They become visible in any order, except that
// stores to one word keep theirs: at the thread's polls, all of them at a fence, or when the thread ends. A
// held store becomes visible at a fence, after the others, or before a later store to the same word.
struct RelaxedStore {
  uint32_t* to;
  uint32_t value;
};
inline thread_local std::vector<RelaxedStore> store_buffer;
inline thread_local std::minstd_rand store_order(1);

inline bool is_held(const RelaxedStore& store) {
  return held_stores == HeldStores::all || (held_stores == HeldStores::clears && store.value == kEmptyWord);
}

// Makes one store visible: `chosen`, or the first one to the same word.
inline void publish_store(size_t chosen) {
  for (size_t k = 0; k < chosen; ++k) {
    if (store_buffer[k].to == store_buffer[chosen].to) chosen = k;
  }
  const RelaxedStore store = store_buffer[chosen];
  store_buffer.erase(store_buffer.begin() + static_cast<std::ptrdiff_t>(chosen));
  std::atomic_ref<uint32_t>(*store.to).store(store.value, std::memory_order_relaxed);
  random_delay();
}

inline void drain_stores(bool all) {
  std::vector<size_t> free;
  while (!store_buffer.empty() && (all || store_order() % 4 != 0)) {
    free.clear();
    for (size_t k = 0; k < store_buffer.size(); ++k) {
      if (!is_held(store_buffer[k])) free.push_back(k);
    }
    if (!free.empty()) {
      publish_store(free[store_order() % free.size()]);
    } else if (all) {
      // The others are visible; this thread is late with those that were held.
      if (held_stores != HeldStores::none && store_order() % 4 == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      while (!store_buffer.empty()) publish_store(store_order() % store_buffer.size());
    } else {
      return;
    }
  }
}

inline void store_relaxed(uint32_t* p, uint32_t x) {
  if (this_block == silent_block) return;
  store_buffer.push_back({p, x});
}

inline uint4 load_relaxed(const uint4* p) {
  drain_stores(false);
  uint32_t words[4];
  for (int k = 0; k < 4; ++k) {
    uint32_t* const word = reinterpret_cast<uint32_t*>(const_cast<uint4*>(p)) + k;
    words[k] = std::atomic_ref<uint32_t>(*word).load(std::memory_order_relaxed);
    if (words[k] == kEmptyWord) std::this_thread::yield();
  }
  return {words[0], words[1], words[2], words[3]};
}

inline void fence() { drain_stores(true); }

}  // namespace fastlstm::cuda
