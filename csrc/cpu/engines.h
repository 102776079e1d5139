// The Engine (cpu/engine.h) that a plan names.
#pragma once

#include "cpu/engine_bf16.h"
#include "cpu/engine_float.h"
#include "cpu/engine_int8.h"

namespace fastlstm {

// f(E{}) for numbers stored as T, of the Engines that have a backward pass.
template <class T, class F>
auto with_engine(EngineKind kind, F&& f) {
  if constexpr (!std::is_same_v<T, double>)
    if (kind == EngineKind::bf16_products) return f(Bf16Engine<T>{});
  if constexpr (std::is_same_v<T, Bf16>)
    if (kind == EngineKind::bf16_panels) return f(FloatEngine<T, PanelBf16>{});
  return f(FloatEngine<T, Real<T>>{});
}

// f(E{}), those of frozen layers included.
template <class T, class F>
auto with_forward_engine(EngineKind kind, F&& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (kind == EngineKind::int8_products) return f(Int8Engine{});
    if (kind == EngineKind::bf16_panels) return f(FloatEngine<T, PanelBf16>{});
  }
  return with_engine<T>(kind, f);
}

}  // namespace fastlstm
