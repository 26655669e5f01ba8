// Loops worth it are written once and compiled for each instruction set: a .cpp includes its
// kernels into namespaces plain, avx2 and avx512, and ON_THIS_CPU calls the best that the processor
// has. The numbers are the same on all (tests compare them): no operation is reordered or
// contracted.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_KERNELS 1
#if defined(__clang__)
#define BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2\"))), apply_to = function)")
#define BEGIN_AVX512                                                                           \
  _Pragma(                                                                                     \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq\"))), " \
      "apply_to = function)")
#define END_KERNELS _Pragma("clang attribute pop")
#else
#define BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2\")")
#define BEGIN_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq\")")
#define END_KERNELS _Pragma("GCC pop_options")
#endif
#else
#define X86_KERNELS 0
#endif

enum class Cpu { PLAIN, AVX2, AVX512 };

// The best instruction set of this processor, or a lesser one that MOCOV3_DS_CPU names.
inline Cpu this_cpu() {
  static const Cpu cpu = [] {
    Cpu best = Cpu::PLAIN;
#if X86_KERNELS
    if (__builtin_cpu_supports("avx2")) best = Cpu::AVX2;
    if (best == Cpu::AVX2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = Cpu::AVX512;
    const char* requested = std::getenv("MOCOV3_DS_CPU");
    if (requested && !std::strcmp(requested, "plain")) best = Cpu::PLAIN;
    if (requested && !std::strcmp(requested, "avx2") && best > Cpu::AVX2) best = Cpu::AVX2;
#endif
    return best;
  }();
  return cpu;
}

#if X86_KERNELS
#define ON_THIS_CPU(...)                          \
  switch (this_cpu()) {                           \
    case Cpu::AVX512: avx512::__VA_ARGS__; break; \
    case Cpu::AVX2: avx2::__VA_ARGS__; break;     \
    case Cpu::PLAIN: plain::__VA_ARGS__; break;   \
  }
#else
#define ON_THIS_CPU(...) plain::__VA_ARGS__
#endif
