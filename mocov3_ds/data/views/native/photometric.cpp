// Colour work on uint8 crops on the CPU: the same numbers as mocov3_ds/data/views/photometric.py.

#include "photometric.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <new>

#include "kernels.h"
#include "spec.h"

#define EXPORT __attribute__((visibility("default")))

namespace {

using namespace views;

constexpr int BLOCK = 1024;  // pixels that pass all operations while they are in the first cache

// The n-th permutation of 0 .. 3 in lexicographic order, as itertools gives them.
void fill_order(int n, int* order) {
  for (int i = 0; i < 4; i++) order[i] = i;
  for (; n > 0; n--) std::next_permutation(order, order + 4);
}

namespace plain {
#include "photometric_kernels.h"
}  // namespace plain
#if X86_KERNELS
BEGIN_AVX2
namespace avx2 {
#include "photometric_kernels.h"
}  // namespace avx2
END_KERNELS
BEGIN_AVX512
namespace avx512 {
#include "photometric_kernels.h"
}  // namespace avx512
END_KERNELS
#endif

// Memory that a thread keeps for its next image.
template <typename T>
struct ThreadMemory {
  T* values = nullptr;
  size_t size = 0;
  bool ensure(size_t count) {
    if (count <= size) return true;
    delete[] values;
    values = new (std::nothrow) T[count];
    size = values ? count : 0;
    return values;
  }
  ~ThreadMemory() { delete[] values; }
};
thread_local ThreadMemory<uint16_t> planes;  // two padded planes of 16-bit pixels for the blur
thread_local ThreadMemory<uint8_t> copy;     // the image being changed

}  // namespace

namespace views {

bool augment(uint8_t* image, int channels, int height, int width, const float* params) {
  const size_t reach = params[BOX_RADIUS] >= 0 ? size_t(params[BOX_RADIUS]) + 1 : 0;
  const size_t size = (height + 2 * reach) * (width + 2 * reach);
  if (!planes.ensure(2 * size)) return false;
  ON_THIS_CPU(
      augment(image, channels, height, width, params, planes.values, planes.values + size));
  return true;
}

template <typename T>
void normalise(const uint8_t* image, int channels, size_t plane, const float* scale,
               const float* shift, T* out) {
  for (int c = 0; c < channels; c++) {
    ON_THIS_CPU(normalise(image + c * plane, plane, scale[c], shift[c], out + c * plane));
  }
}

}  // namespace views

extern "C" {

// Views of crops (count, channels, height, width): colours as their rows (count, PARAMETERS) say,
// normalised to `out` of the same shape, float32 if kind is 0, bfloat16 if it is 1. Returns 0, or 1
// without memory.
EXPORT int mocov3_make_views(const uint8_t* crops, const float* params, int64_t count, int channels,
                             int height, int width, const float* scale, const float* shift,
                             int kind, void* out) {
  const size_t plane = size_t(height) * width, size = channels * plane;
  if (!copy.ensure(size)) return 1;
  uint8_t* image = copy.values;
  for (int64_t i = 0; i < count; i++) {
    std::memcpy(image, crops + size * i, size);
    if (!views::augment(image, channels, height, width, params + i * views::PARAMETERS)) return 1;
    if (kind == 0)
      views::normalise(image, channels, plane, scale, shift, static_cast<float*>(out) + size * i);
    else
      views::normalise(image, channels, plane, scale, shift,
                       static_cast<uint16_t*>(out) + size * i);
  }
  return 0;
}

// The same colours in place, without the normalisation. Returns 0, or 1 without memory.
EXPORT int mocov3_augment_crops(uint8_t* crops, const float* params, int64_t count, int channels,
                                int height, int width) {
  const size_t image = size_t(channels) * height * width;
  for (int64_t i = 0; i < count; i++)
    if (!views::augment(crops + image * i, channels, height, width, params + i * views::PARAMETERS))
      return 1;
  return 0;
}

}  // extern "C"
