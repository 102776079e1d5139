// The Engine (cpu/engine.h) that a plan names.
#pragma once

#include "cpu/engine_bf16.h"
#include "cpu/engine_float.h"

namespace fastlstm {

// f(E{}) for numbers stored as T.
template <class T, class F>
auto with_engine(EngineKind kind, F&& f) {
  if constexpr (std::is_same_v<T, Bf16>) {
    if (kind == EngineKind::bf16_products) return f(Bf16Engine{});
    if (kind == EngineKind::bf16_panels) return f(FloatEngine<T, PanelBf16>{});
  }
  return f(FloatEngine<T, Real<T>>{});
}

}  // namespace fastlstm
