// A region of code for CPUs with some features, between FASTLSTM_BEGIN_TARGET("avx2,fma") and
// FASTLSTM_END_TARGET. Only what stands inside may use them: the standard headers come first, here, so that
// no inline function of theirs is compiled for these CPUs and then linked into code for older ones.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#if !defined(FASTLSTM_BEGIN_TARGET)  // tests that emulate instructions define both
#define FASTLSTM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTLSTM_BEGIN_TARGET(features) \
  FASTLSTM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTLSTM_END_TARGET _Pragma("clang attribute pop")
#else
#define FASTLSTM_BEGIN_TARGET(features) _Pragma("GCC push_options") FASTLSTM_PRAGMA(GCC target(features))
#define FASTLSTM_END_TARGET _Pragma("GCC pop_options")
#endif
#endif
