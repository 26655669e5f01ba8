#include "resample.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if X86_KERNELS
#include <immintrin.h>
#endif

namespace resample {

bool pillow_weighs_tall_rows_first = false;

namespace {

constexpr int WEIGHT_BITS = 22, LOW_BITS = 11, HALF = 1 << (WEIGHT_BITS - 1);
constexpr int SLACK = 64;  // bytes that vector loads and stores may touch past the end of a row
constexpr int GROUP = 4;   // outputs whose weights lie together, as vectors take them
constexpr int PACKED = 2;  // 16-bit numbers there for each weight

inline uint8_t clip8(int x) { return uint8_t(x < 0 ? 0 : x > 255 ? 255 : x); }

namespace plain {
#define AVX2 0
#define AVX512 0
#include "resample_kernels.h"
#undef AVX2
}  // namespace plain
#if X86_KERNELS
BEGIN_AVX2
namespace avx2 {
#define AVX2 1
#include "resample_kernels.h"
#undef AVX512
}  // namespace avx2
END_KERNELS
BEGIN_AVX512
namespace avx512 {
#define AVX512 1
#include "resample_kernels.h"
#undef AVX512
#undef AVX2
}  // namespace avx512
END_KERNELS
#endif

// Memory of one thread for one image. Nothing in it owns anything, so a jump out of the library
// leaves nothing behind; what is large is given back after use.
struct Scratch {
  uint8_t* bytes = nullptr;
  size_t size = 0;
  static constexpr size_t KEEP_AT_MOST = size_t(32) << 20;

  bool ensure(size_t needed) {
    if (needed <= size) return true;
    std::free(bytes);
    bytes = static_cast<uint8_t*>(std::aligned_alloc(64, needed));
    size = bytes ? needed : 0;
    return bytes;
  }
  void trim() {
    if (size > KEEP_AT_MOST) release();
  }
  void release() {
    std::free(bytes);
    bytes = nullptr;
    size = 0;
  }
  ~Scratch() { release(); }
};
thread_local Scratch scratch;

// Hands out aligned pieces of the scratch; run once without memory to learn the size.
struct Pieces {
  uint8_t* base;
  size_t used = 0;
  template <typename T>
  T* take(size_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * sizeof(T) + SLACK + 63) / 64 * 64;
    return piece;
  }
};

int count_taps(int in, int out) {
  const double scale = double(in) / out;
  return int(std::ceil(scale < 1 ? 1 : scale)) * 2 + 1;
}

// Pillow's weights for outputs [window, window + size) of an axis of `out` outputs.
void fill_weights(Axis& axis, int in, int out, int window, bool flip, double* weights) {
  const double scale = double(in) / out, stretch = scale < 1 ? 1 : scale;
  const double support = stretch, shrink = 1.0 / stretch;
  for (int i = 0; i < axis.size; i++) {
    const int output = flip ? out - 1 - (window + i) : window + i;
    const double centre = (output + 0.5) * scale;
    int first = int(centre - support + 0.5), end = int(centre + support + 0.5);
    if (first < 0) first = 0;
    if (end > in) end = in;
    double total = 0;
    for (int x = first; x < end; x++) {
      const double distance = std::fabs((x - centre + 0.5) * shrink);
      weights[x - first] = distance < 1 ? 1 - distance : 0;
      total += weights[x - first];
    }
    int16_t *high = axis.high + size_t(i) * axis.stride, *low = axis.low + size_t(i) * axis.stride;
    int taps = end - first;
    for (int t = 0; t < axis.stride; t++) {
      int weight = 0;
      if (t < taps) weight = int(0.5 + weights[t] / total * (1 << WEIGHT_BITS));
      high[t] = int16_t(weight >> LOW_BITS);
      low[t] = int16_t(weight & ((1 << LOW_BITS) - 1));
    }
    while (taps > 1 && !high[taps - 1] && !low[taps - 1]) taps--;
    axis.first[i] = first;
    axis.taps[i] = taps;
  }
}

// Lays the weights of whole groups out as weigh_columns takes them.
void pack_weights(Axis& axis) {
  for (int x = 0; x + GROUP <= axis.size; x += GROUP) {
    int most = 0;
    for (int i = x; i < x + GROUP; i++) most = axis.taps[i] > most ? axis.taps[i] : most;
    const int steps = axis.steps[x / GROUP] = (most + 3) / 4;
    int16_t* to = axis.packed + size_t(x) * axis.stride * PACKED;
    for (int step = 0; step < steps; step++)
      for (int i = x; i < x + GROUP; i++)
        for (const int16_t* from : {axis.high, axis.low}) {
          std::memcpy(to, from + size_t(i) * axis.stride + 4 * step, 8);
          to += 4;
        }
  }
}

bool rows_first(const Crop& crop) {
  const int wider = crop.width - crop.out_width;
  return pillow_weighs_tall_rows_first &&
         crop.height - crop.out_height > 2 * (wider > 0 ? wider : 0);
}

void lay_out_axis(Pieces& pieces, Axis& axis, int in, int out, int size, bool columns) {
  axis.size = size;
  axis.stride = (count_taps(in, out) + 3) / 4 * 4;
  axis.first = pieces.take<int>(size);
  axis.taps = pieces.take<int>(size);
  axis.high = pieces.take<int16_t>(size_t(size) * axis.stride);
  axis.low = pieces.take<int16_t>(size_t(size) * axis.stride);
  axis.steps = pieces.take<int>(size / GROUP);
  axis.packed = columns ? pieces.take<int16_t>(size_t(size) * axis.stride * PACKED) : nullptr;
}

void find_range(const Axis& axis, int* first, int* end) {
  *first = axis.first[0];
  *end = 0;
  for (int i = 0; i < axis.size; i++) {
    if (axis.first[i] < *first) *first = axis.first[i];
    if (axis.first[i] + axis.taps[i] > *end) *end = axis.first[i] + axis.taps[i];
  }
}

void lay_out(Pieces& pieces, Plan& plan, const Crop* crops, int image_width) {
  int most_taps = 0;
  size_t longest = 0, widest = 0;
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    lay_out_axis(pieces, work.columns, crop.width, crop.out_width, crop.wide, true);
    lay_out_axis(pieces, work.rows, crop.height, crop.out_height, crop.tall, false);
    if (work.columns.stride > most_taps) most_taps = work.columns.stride;
    if (work.rows.stride > most_taps) most_taps = work.rows.stride;
    work.plane = size_t(crop.wide);
    work.rows_first = rows_first(crop);
    work.stride = (work.rows_first ? 4 * size_t(crop.width) : 3 * work.plane) + 31;
    work.stride = work.stride / 32 * 32;
    if (work.stride > longest) longest = work.stride;
    if (3 * work.plane > widest) widest = 3 * work.plane;
    work.rows_held = pieces.take<uint8_t>(work.stride * crop.height);
  }
  plan.weights = pieces.take<double>(most_taps);
  plan.line = pieces.take<uint8_t>(longest + 4 * most_taps);
  plan.planes = pieces.take<uint8_t>(widest);
  // Neighbouring outputs are weighed together: each reads as many pixels as the most taps of them.
  plan.strip_stride = (4 * (size_t(image_width) + most_taps) + SLACK + 63) / 64 * 64;
  plan.strip = pieces.take<uint8_t>(plan.strip_stride * STRIP);
}

void weigh_columns(const Axis& axis, const uint8_t* pixels, uint8_t* out, size_t plane) {
  ON_THIS_CPU(weigh_columns(axis, pixels, out, plane));
}

void weigh_rows(const Axis& axis, int y, const uint8_t* rows, size_t stride, size_t count,
                uint8_t* out) {
  ON_THIS_CPU(weigh_rows(axis, y, rows, stride, count, out));
}

}  // namespace

bool prepare_plan(Plan& plan, const Crop* crops, int image_width) {
  Pieces sizes{nullptr};
  lay_out(sizes, plan, crops, image_width);
  if (!scratch.ensure(sizes.used)) return false;
  Pieces pieces{scratch.bytes};
  lay_out(pieces, plan, crops, image_width);
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    fill_weights(work.columns, crop.width, crop.out_width, crop.window_left, crop.flip,
                 plan.weights);
    pack_weights(work.columns);
    fill_weights(work.rows, crop.height, crop.out_height, crop.window_top, false, plan.weights);
    find_range(work.columns, &work.first_column, &work.end_column);
    find_range(work.rows, &work.first_row, &work.end_row);
    work.first_row += crop.top, work.end_row += crop.top;
    work.first_column += crop.left, work.end_column += crop.left;
  }
  return true;
}

void take_strip(Plan& plan, const Crop* crops, int y, int count, int left) {
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    const int first = y > work.first_row ? y : work.first_row;
    const int end = y + count < work.end_row ? y + count : work.end_row;
    for (int row = first; row < end; row++) {
      const int64_t skipped = work.rows_first ? work.first_column - crop.left : 0;
      const uint8_t* pixels =
          plan.strip + plan.strip_stride * (row - y) + 4 * (crop.left - left + skipped);
      uint8_t* rows_held = work.rows_held + work.stride * (row - crop.top);
      if (work.rows_first)
        std::memcpy(rows_held + 4 * skipped, pixels,
                    4 * size_t(work.end_column - work.first_column));
      else
        weigh_columns(work.columns, pixels, rows_held, work.plane);
    }
  }
}

void write_crops(Plan& plan, const Crop* crops) {
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    for (int y = 0; y < crop.tall; y++) {
      const uint8_t* rows = work.rows_held + work.stride * work.rows.first[y];
      const uint8_t* planes = plan.line;
      if (work.rows_first) {
        weigh_rows(work.rows, y, rows, work.stride, 4 * size_t(crop.width), plan.line);
        weigh_columns(work.columns, plan.line, plan.planes, work.plane);
        planes = plan.planes;
      } else {
        weigh_rows(work.rows, y, rows, work.stride, crop.channels * work.plane, plan.line);
      }
      uint8_t* out = crop.out + y * crop.row;
      for (int c = 0; c < crop.channels; c++)
        std::memcpy(out + c * crop.plane, planes + c * work.plane, work.plane);
    }
  }
}

void trim_scratch() { scratch.trim(); }

}  // namespace resample
