// Written once, compiled for each instruction set: every .cpp that has loops worth it includes its
// kernels through FOR_EACH_CPU and picks one of the resulting namespaces at run time.
#pragma once

#include <cstdlib>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX2_KERNELS 1
#if defined(__clang__)
#define BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2\"))), apply_to = function)")
#define END_AVX2 _Pragma("clang attribute pop")
#else
#define BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2\")")
#define END_AVX2 _Pragma("GCC pop_options")
#endif
#else
#define HAS_AVX2_KERNELS 0
#endif

// Whether the AVX2 kernels run: if the processor has it and nobody asked for the plain ones.
inline bool use_avx2() {
#if HAS_AVX2_KERNELS
  static const bool has = __builtin_cpu_supports("avx2") && !std::getenv("MOCOV3_DS_PLAIN_KERNELS");
  return has;
#else
  return false;
#endif
}
