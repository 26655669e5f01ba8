// Stored JPEG to resized uint8 crops in one pass: only the rows and columns that some crop needs are
// decoded, a strip at a time, and each strip is weighed into the crops while it is in the cache.
//
// Every function returns a Verdict. Whatever is not plain (colour spaces, damage, truncation) is not
// judged here: the caller gives the bytes to Pillow, which reads it or says what is wrong with it.

#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "draw.h"
#include "entropy.h"
#include "jpeg_library.h"
#include "kernels.h"
#include "photometric.h"

#if X86_KERNELS
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

namespace {

enum Verdict : int { READ = 0, NOT_PLAIN = 1, DAMAGED = 2, TRUNCATED = 3, NO_MEMORY = 4 };

constexpr int WEIGHT_BITS = 22, LOW_BITS = 11, HALF = 1 << (WEIGHT_BITS - 1);
constexpr int SLACK = 64;  // bytes that vector loads and stores may touch past the end of a row
constexpr int STRIP = 2;   // rows decoded before they are weighed, while they are in the first cache
constexpr int GROUP = 4;   // outputs whose weights lie together, as vectors take them
constexpr int PACKED = 2;  // 16-bit numbers there for each weight
constexpr int MARGIN = 8;  // columns around the region: upsampled chroma looks at its neighbours

// Where the outputs of one axis come from: output i is the sum of taps[i] inputs from first[i] on.
struct Axis {
  int size, stride;
  int *first, *taps;
  int16_t *high, *low;  // (size, stride) each; beyond taps[i] they are 0
  // For weigh_columns: of each group of outputs the steps of four inputs, and for each step a vector
  // of high 0 to 3 and low 0 to 3 of each output.
  int* steps;
  int16_t* packed;
};

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

jpeg::Library library;

// Memory of one thread for one image. Nothing in it owns anything, so a jump out of the library
// leaves nothing behind; what is large is given back after use.
struct Scratch {
  uint8_t* bytes = nullptr;
  size_t size = 0;
  static constexpr size_t KEPT = size_t(32) << 20;

  bool ensure(size_t wanted) {
    if (wanted <= size) return true;
    std::free(bytes);
    bytes = static_cast<uint8_t*>(std::aligned_alloc(64, wanted));
    size = bytes ? wanted : 0;
    return bytes;
  }
  void trim() {
    if (size > KEPT) release();
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

}  // namespace

// One crop: the box of the image is resized to out_height x out_width (mirrored if flip), and the
// window of size x size at (window_top, window_left) of that is written.
struct Crop {
  int top, left, height, width;
  int out_height, out_width;
  int window_top, window_left, size;
  int flip;
  int64_t plane, row;  // strides of `out` in bytes
  uint8_t* out;
};

namespace {

int taps_of(int in, int out) {
  const double scale = double(in) / out;
  return int(std::ceil(scale < 1 ? 1 : scale)) * 2 + 1;
}

// Pillow's weights for outputs [window, window + size) of an axis of `out` outputs.
void fill(Axis& axis, int in, int out, int window, bool flip, double* weights) {
  const double scale = double(in) / out, stretch = scale < 1 ? 1 : scale;
  const double support = stretch, shrink = 1.0 / stretch;
  for (int i = 0; i < axis.size; i++) {
    const int at = flip ? out - 1 - (window + i) : window + i;
    const double centre = (at + 0.5) * scale;
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
void pack(Axis& axis) {
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

// A crop being made.
struct Work {
  Axis columns, rows;
  int first_row, end_row;   // of the image, that the crop looks at
  int first_column, end_column;
  bool rows_first;
  size_t plane, stride;     // of `kept`: bytes of a plane and of a row
  uint8_t* kept;            // columns first: rows of three planes, weighed; else RGBX rows as decoded
};

// Newer Pillows weigh the rows first where that is much less work; the rounding in between shows.
bool pillow_weighs_tall_rows_first = false;

bool rows_first(const Crop& crop) {
  const int wider = crop.width - crop.out_width;
  return pillow_weighs_tall_rows_first &&
         crop.height - crop.out_height > 2 * (wider > 0 ? wider : 0);
}

void lay_axis(Pieces& pieces, Axis& axis, int in, int out, int size, bool columns) {
  axis.size = size;
  axis.stride = (taps_of(in, out) + 3) / 4 * 4;
  axis.first = pieces.take<int>(size);
  axis.taps = pieces.take<int>(size);
  axis.high = pieces.take<int16_t>(size_t(size) * axis.stride);
  axis.low = pieces.take<int16_t>(size_t(size) * axis.stride);
  axis.steps = pieces.take<int>(size / GROUP);
  axis.packed = columns ? pieces.take<int16_t>(size_t(size) * axis.stride * PACKED) : nullptr;
}

void range_of(const Axis& axis, int* first, int* end) {
  *first = axis.first[0];
  *end = 0;
  for (int i = 0; i < axis.size; i++) {
    if (axis.first[i] < *first) *first = axis.first[i];
    if (axis.first[i] + axis.taps[i] > *end) *end = axis.first[i] + axis.taps[i];
  }
}

constexpr int MOST_CROPS = 2;

struct Plan {
  int count;
  Work works[MOST_CROPS];
  double* weights;
  uint8_t* strip;
  size_t strip_stride;
  uint8_t* line;
};

void lay(Pieces& pieces, Plan& plan, const Crop* crops, int image_width) {
  int most_taps = 0;
  size_t longest = 0;
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    lay_axis(pieces, work.columns, crop.width, crop.out_width, crop.size, true);
    lay_axis(pieces, work.rows, crop.height, crop.out_height, crop.size, false);
    if (work.columns.stride > most_taps) most_taps = work.columns.stride;
    if (work.rows.stride > most_taps) most_taps = work.rows.stride;
    work.plane = size_t(crop.size);
    work.rows_first = rows_first(crop);
    work.stride = (work.rows_first ? 4 * size_t(crop.width) : 3 * work.plane) + 31;
    work.stride = work.stride / 32 * 32;
    if (work.stride > longest) longest = work.stride;
    work.kept = pieces.take<uint8_t>(work.stride * crop.height);
  }
  plan.weights = pieces.take<double>(most_taps);
  plan.line = pieces.take<uint8_t>(longest + 4 * most_taps);
  // Neighbouring outputs are weighed together: each reads as many pixels as the most taps of them.
  plan.strip_stride = (4 * (size_t(image_width) + most_taps) + SLACK + 63) / 64 * 64;
  plan.strip = pieces.take<uint8_t>(plan.strip_stride * STRIP);
}

// Fills the weights; boxes are inside the image.
bool prepare(Plan& plan, const Crop* crops, int image_width) {
  Pieces sizes{nullptr};
  lay(sizes, plan, crops, image_width);
  if (!scratch.ensure(sizes.used)) return false;
  Pieces pieces{scratch.bytes};
  lay(pieces, plan, crops, image_width);
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    fill(work.columns, crop.width, crop.out_width, crop.window_left, crop.flip, plan.weights);
    pack(work.columns);
    fill(work.rows, crop.height, crop.out_height, crop.window_top, false, plan.weights);
    range_of(work.columns, &work.first_column, &work.end_column);
    range_of(work.rows, &work.first_row, &work.end_row);
    work.first_row += crop.top, work.end_row += crop.top;
    work.first_column += crop.left, work.end_column += crop.left;
  }
  return true;
}

void weigh_columns(const Axis& axis, const uint8_t* pixels, uint8_t* out, size_t plane) {
  ON_THIS_CPU(weigh_columns(axis, pixels, out, plane));
}

void weigh_rows(const Axis& axis, int y, const uint8_t* rows, size_t stride, size_t count,
                uint8_t* out) {
  ON_THIS_CPU(weigh_rows(axis, y, rows, stride, count, out));
}

// Takes `count` decoded rows, the first of which is row `y` of the image; column 0 of the strip is
// column `left` of the image.
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
      uint8_t* kept = work.kept + work.stride * (row - crop.top);
      if (work.rows_first)
        std::memcpy(kept + 4 * skipped, pixels, 4 * size_t(work.end_column - work.first_column));
      else
        weigh_columns(work.columns, pixels, kept, work.plane);
    }
  }
}

void finish(Plan& plan, const Crop* crops) {
  for (int i = 0; i < plan.count; i++) {
    const Crop& crop = crops[i];
    Work& work = plan.works[i];
    for (int y = 0; y < crop.size; y++) {
      const uint8_t* rows = work.kept + work.stride * work.rows.first[y];
      uint8_t* out = crop.out + y * crop.row;
      if (work.rows_first) {
        weigh_rows(work.rows, y, rows, work.stride, 4 * size_t(crop.width), plan.line);
        weigh_columns(work.columns, plan.line, out, size_t(crop.plane));
      } else {
        weigh_rows(work.rows, y, rows, work.stride, 3 * work.plane, plan.line);
        for (int c = 0; c < 3; c++)
          std::memcpy(out + c * crop.plane, plan.line + c * work.plane, work.plane);
      }
    }
  }
}

// An image being decoded; plain data, so that leaving it by a jump is allowed.
struct Reading {
  jpeg::Decompressor object;
  jpeg::Errors errors;
  const uint8_t* bytes;
  size_t size;
  entropy::Scan scan;
};

bool hook_wanted = true;
std::atomic<int64_t> hooked_images{0};

int decode_mcu(jpeg::Decompressor* object, entropy::Block** blocks) {
  if (!entropy::decode_mcu(static_cast<Reading*>(object->client)->scan, blocks)) jpeg::leave(object);
  return 1;
}

// Puts our Huffman decoding in the place of the library's, for a scan that ours knows.
bool hook(Reading& reading) {
  jpeg::Decompressor& object = reading.object;
  if (!hook_wanted || library.version != jpeg::HOOKED_VERSION ||
      library.size != jpeg::HOOKED_SIZE || sizeof(void*) != 8)
    return false;
  if (!entropy::begin(reading.scan, reading.bytes, reading.size, object.source->next))
    return false;
  jpeg::EntropyDecoder* decoder;
  std::memcpy(&decoder, reinterpret_cast<char*>(&object) + jpeg::ENTROPY_OFFSET, sizeof decoder);
  object.client = &reading;
  decoder->decode_mcu = decode_mcu;
  hooked_images.fetch_add(1, std::memory_order_relaxed);
  return true;
}

// The library invents an end for bytes that stop early. The true end marker must follow what has
// been read; within compressed data its two bytes cannot occur.
bool ends(const Reading& reading) {
  const uint8_t *next = reading.object.source->next, *end = reading.bytes + reading.size;
  if (next < reading.bytes || next > end) return false;  // it reads its invention
  if (next - reading.bytes >= 2) next -= 2;              // it stopped behind the marker
  for (const uint8_t* at = end - 2; at >= next; at--)
    if (at[0] == 0xFF && at[1] == 0xD9) return true;
  return false;
}

Verdict open(Reading& reading, const uint8_t* bytes, size_t size, int64_t most_pixels) {
  jpeg::Decompressor& object = reading.object;
  reading.bytes = bytes;
  reading.size = size;
  library.create(&object, library.version, library.size);
  library.memory_source(&object, bytes, size);
  library.read_header(&object, 1);
  if (object.width < 1 || object.height < 1 ||
      int64_t(object.width) * object.height > most_pixels)
    return NOT_PLAIN;
  const bool grey = object.components == 1 && object.stored_colours == jpeg::GREY;
  const bool colour = object.components == 3 && (object.stored_colours == jpeg::YCC ||
                                                 object.stored_colours == jpeg::RGB);
  return grey || colour ? READ : NOT_PLAIN;
}

// The object's header is read.
Verdict decode(Reading& reading, const Crop* crops, int count) {
  jpeg::Decompressor& object = reading.object;
  Plan plan;
  plan.count = count;
  if (!prepare(plan, crops, int(object.width))) return NO_MEMORY;
  int top = int(object.height), bottom = 0, left = int(object.width), right = 0;
  for (int i = 0; i < count; i++) {
    const Work& work = plan.works[i];
    if (work.first_row < top) top = work.first_row;
    if (work.end_row > bottom) bottom = work.end_row;
    if (work.first_column < left) left = work.first_column;
    if (work.end_column > right) right = work.end_column;
  }
  object.colours = jpeg::RGBX;
  library.start(&object);
  if (object.output_width != object.width || object.output_height != object.height ||
      object.output_channels != 4)
    return NOT_PLAIN;
  const bool hooked = hook(reading);
  unsigned column = unsigned(left > MARGIN ? left - MARGIN : 0);
  unsigned columns = unsigned(right) + MARGIN - column;
  if (column + columns > object.width) columns = object.width - column;
  // Where scans of a progressive image are missing, the library smooths across blocks, and at a cut
  // column with other neighbours than a whole image has.
  if (library.has_multiple_scans(&object))
    column = 0;
  else if (columns < object.width)
    library.crop_columns(&object, &column, &columns);
  if (top > 0 && library.skip_rows(&object, unsigned(top)) != unsigned(top)) return DAMAGED;
  uint8_t* rows[STRIP];
  for (int i = 0; i < STRIP; i++) rows[i] = plan.strip + plan.strip_stride * i;
  for (int y = top; y < bottom;) {
    int read = 0;
    const int wanted = bottom - y < STRIP ? bottom - y : STRIP;
    while (read < wanted) {
      const unsigned got = library.read_rows(&object, rows + read, unsigned(wanted - read));
      if (!got) return DAMAGED;
      read += int(got);
    }
    take_strip(plan, crops, y, read, int(column));
    y += read;
  }
  if (hooked) object.source->next = reading.scan.bits.next;
  if (!ends(reading)) return TRUNCATED;
  finish(plan, crops);
  return READ;
}

bool inside(const Crop& crop, int64_t height, int64_t width) {
  return crop.top >= 0 && crop.left >= 0 && crop.height > 0 && crop.width > 0 &&
         int64_t(crop.top) + crop.height <= height && int64_t(crop.left) + crop.width <= width &&
         crop.size > 0 && crop.window_top >= 0 && crop.window_left >= 0 &&
         int64_t(crop.window_top) + crop.size <= crop.out_height &&
         int64_t(crop.window_left) + crop.size <= crop.out_width;
}

// What is asked of an opened image: crops that are known, or views that its size decides.
struct Request {
  Crop* crops;
  int count;
  const views::Spec* spec;  // null: the crops are known
  uint64_t sample_key;
  float* rows;  // (2, PARAMETERS)
};

Verdict read(const uint8_t* bytes, size_t size, int64_t most_pixels, const Request& request) {
  if (!library.version) return NOT_PLAIN;
  Reading reading;
  jpeg::prepare(library, reading.object, reading.errors);
  Verdict verdict = DAMAGED;
  if (!setjmp(reading.errors.back)) {
    verdict = open(reading, bytes, size, most_pixels);
    const int height = int(reading.object.height), width = int(reading.object.width);
    if (verdict == READ && request.spec) {
      for (int view = 0; view < 2; view++) {
        views::Box box;
        bool flip;
        views::draw(*request.spec, request.sample_key, view, height, width, &box, &flip,
                    request.rows + view * views::PARAMETERS);
        Crop& crop = request.crops[view];
        crop.top = box.top, crop.left = box.left, crop.height = box.height, crop.width = box.width;
        crop.flip = flip;
      }
    }
    for (int i = 0; i < request.count && verdict == READ; i++)
      if (!inside(request.crops[i], height, width)) verdict = NOT_PLAIN;
    if (verdict == READ) verdict = decode(reading, request.crops, request.count);
  } else {
    verdict = DAMAGED;
  }
  library.destroy(&reading.object);
  scratch.trim();
  return verdict;
}

template <typename F>
bool find(void* handle, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(handle, name));
  return function;
}

// Asks the library for something it must refuse, and returns the number it asks for instead.
int complaint(const jpeg::Library& opened, int version, size_t size) {
  jpeg::Decompressor object;
  jpeg::Errors errors;
  jpeg::prepare(opened, object, errors);
  if (!setjmp(errors.back)) {
    opened.create(&object, version, size);
    return 0;
  }
  return errors.manager.parameters.i[0];
}

}  // namespace

extern "C" {

// Whether scans may be decoded by our own Huffman decoder; returns how many have been.
EXPORT int64_t mocov3_hook(int wanted) {
  hook_wanted = wanted;
  return hooked_images;
}

// Opens the libjpeg-turbo at `path`; its ABI (62, 70, 80), or 0 if it is none that can be used.
// `tall_rows_first`: whether the Pillow to be equal to weighs the rows of tall crops first.
EXPORT int mocov3_open_library(const char* path, int tall_rows_first) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return 0;
  jpeg::Library opened;
  if (!(find(handle, "jpeg_std_error", opened.std_error) &&
        find(handle, "jpeg_CreateDecompress", opened.create) &&
        find(handle, "jpeg_destroy_decompress", opened.destroy) &&
        find(handle, "jpeg_mem_src", opened.memory_source) &&
        find(handle, "jpeg_read_header", opened.read_header) &&
        find(handle, "jpeg_has_multiple_scans", opened.has_multiple_scans) &&
        find(handle, "jpeg_start_decompress", opened.start) &&
        find(handle, "jpeg_crop_scanline", opened.crop_columns) &&
        find(handle, "jpeg_skip_scanlines", opened.skip_rows) &&
        find(handle, "jpeg_read_scanlines", opened.read_rows)))
    return 0;
  const int version = complaint(opened, -1, 0);
  if (version != 62 && version != 70 && version != 80) return 0;
  const int size = complaint(opened, version, 0);
  if (size < int(offsetof(jpeg::Decompressor, tail)) || size > int(sizeof(jpeg::Decompressor)))
    return 0;
  opened.version = version;
  opened.size = size_t(size);
  library = opened;
  pillow_weighs_tall_rows_first = tall_rows_first;
  return version;
}

// Crops (at most 2) of one image.
EXPORT int mocov3_crops(const uint8_t* bytes, int64_t size,
                                                        int64_t most_pixels, Crop* crops,
                                                        int count) {
  if (count < 1 || count > MOST_CROPS) return NOT_PLAIN;
  return read(bytes, size_t(size), most_pixels, {crops, count, nullptr, 0, nullptr});
}

// Height and width of an image that can be read here.
EXPORT int mocov3_size(const uint8_t* bytes, int64_t size,
                                                       int64_t most_pixels, int* height_width) {
  if (!library.version) return NOT_PLAIN;
  Reading reading;
  jpeg::prepare(library, reading.object, reading.errors);
  Verdict verdict = DAMAGED;
  if (!setjmp(reading.errors.back)) {
    verdict = open(reading, bytes, size_t(size), most_pixels);
    height_width[0] = int(reading.object.height);
    height_width[1] = int(reading.object.width);
  } else {
    verdict = DAMAGED;
  }
  library.destroy(&reading.object);
  return verdict;
}

// The two views of a sample: drawn for the size of the image, cropped to size x size at `out`
// (strides in bytes), parameter rows (2, 10) at `rows`. If `augmented`, each crop must be contiguous
// and its colours are changed as its row says.
EXPORT int mocov3_views(
    const uint8_t* bytes, int64_t length, int64_t most_pixels, const views::Spec* spec,
    uint64_t seed, uint64_t epoch, uint64_t sample_id, int size, uint8_t* out, int64_t view_stride,
    int64_t plane_stride, int64_t row_stride, float* rows, int augmented) {
  Crop crops[2] = {};
  for (int view = 0; view < 2; view++) {
    Crop& crop = crops[view];
    crop.size = crop.out_height = crop.out_width = size;
    crop.plane = plane_stride;
    crop.row = row_stride;
    crop.out = out + view * view_stride;
  }
  Verdict verdict = read(bytes, size_t(length), most_pixels,
                         {crops, 2, spec, views::key_of(seed, epoch, sample_id), rows});
  if (!augmented) return verdict;
  for (int view = 0; view < 2 && verdict == READ; view++)
    if (!views::augment(crops[view].out, size, size, rows + view * views::PARAMETERS))
      verdict = NO_MEMORY;
  return verdict;
}

// Boxes (2, 4), flips (2) and parameter rows (2, 10) of a sample.
EXPORT void mocov3_draw(const views::Spec* spec, uint64_t seed,
                                                        uint64_t epoch, uint64_t sample_id,
                                                        int height, int width, int* boxes,
                                                        int* flips, float* rows) {
  const uint64_t key = views::key_of(seed, epoch, sample_id);
  for (int view = 0; view < 2; view++) {
    views::Box box;
    bool flip;
    views::draw(*spec, key, view, height, width, &box, &flip, rows + view * views::PARAMETERS);
    std::memcpy(boxes + 4 * view, &box, sizeof box);
    flips[view] = flip;
  }
}

}  // extern "C"
