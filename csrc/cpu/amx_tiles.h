// The tile registers of AMX. Included inside the target region of its includer.
#pragma once

#include "cpu/vec.h"

namespace fastlstm::FASTLSTM_ISA {

constexpr int64_t kAmxTileRows = 16, kAmxRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileConfig() {
    for (int i = 0; i < 8; ++i) bytes[i] = kAmxRowBytes, rows[i] = kAmxTileRows;
  }
};

// A thread's tile registers, all of full size, for as long as this lives; none if not `used`.
class ProductScope {
 public:
  explicit ProductScope(bool configures_tiles = true) : configures_tiles_(configures_tiles) {
    static constexpr TileConfig config;
    if (configures_tiles_) _tile_loadconfig(&config);
  }
  ~ProductScope() {
    if (configures_tiles_) _tile_release();
  }
  ProductScope(const ProductScope&) = delete;

 private:
  const bool configures_tiles_;
};

// Tiles 0 to 3, the sums. What tiles load must be stored by now, which GCC's intrinsics do not say.
FASTLSTM_INLINE void clear_tiles() {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

}  // namespace fastlstm::FASTLSTM_ISA
