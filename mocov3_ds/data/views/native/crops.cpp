// Stored JPEG to the crops of its two views in one pass: only the rows and columns that some crop
// needs are decoded, a strip at a time (resample.h). Python calls the functions at the end.
//
// Most functions return a Verdict. Whatever is not plain (colour spaces, damage, truncation) is not
// judged here: the caller gives the bytes to Pillow, which reads it or says what is wrong with it.

#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "draw.h"
#include "entropy.h"
#include "jpeg_library.h"
#include "photometric.h"
#include "resample.h"

#define EXPORT __attribute__((visibility("default")))

namespace {

enum Verdict : int { READ = 0, NOT_PLAIN = 1, DAMAGED = 2, TRUNCATED = 3, NO_MEMORY = 4 };

constexpr int MARGIN = 8;  // columns around the region: upsampled chroma looks at its neighbours
constexpr int STRIP = resample::STRIP;
constexpr int MAX_SCANS = 32;  // each costs a pass over all pixels, whatever few bytes it takes

jpeg::Library library;

// An image being decoded; plain data, so that leaving it by a jump is allowed.
struct Reading {
  jpeg::Decompressor object;
  jpeg::Errors errors;
  const uint8_t* bytes;
  size_t size;
  entropy::Scan scan;
};

bool own_huffman = true;
std::atomic<int64_t> hooked_images{0};

int decode_mcu(jpeg::Decompressor* object, entropy::Block** blocks) {
  if (!entropy::decode_mcu(static_cast<Reading*>(object->client)->scan, blocks))
    jpeg::leave(object);
  return 1;
}

// Puts our Huffman decoding in the place of the library's, for a scan that ours knows.
bool hook_huffman(Reading& reading) {
  jpeg::Decompressor& object = reading.object;
  if (!own_huffman || library.version != jpeg::HOOKED_VERSION ||
      library.size != jpeg::HOOKED_SIZE || sizeof(void*) != 8)
    return false;
  if (!entropy::begin(reading.scan, reading.bytes, reading.size, object.source->next)) return false;
  jpeg::EntropyDecoder* decoder;
  std::memcpy(&decoder, reinterpret_cast<char*>(&object) + jpeg::ENTROPY_OFFSET, sizeof decoder);
  object.client = &reading;
  decoder->decode_mcu = decode_mcu;
  hooked_images.fetch_add(1, std::memory_order_relaxed);
  return true;
}

// The library invents an end for bytes that stop early. The true end marker must follow what has
// been read; within compressed data its two bytes cannot occur.
bool has_end_marker(const Reading& reading) {
  const uint8_t *next = reading.object.source->next, *end = reading.bytes + reading.size;
  if (next < reading.bytes || next > end) return false;  // it reads its invention
  if (next - reading.bytes >= 2) next -= 2;              // it stopped behind the marker
  for (const uint8_t* byte = end - 2; byte >= next; byte--)
    if (byte[0] == 0xFF && byte[1] == 0xD9) return true;
  return false;
}

// Whether a JPEG may have more scans than are read without a question; scans of a thumbnail inside
// it count, too.
bool has_many_scans(const uint8_t* bytes, size_t size) {
  const uint8_t* end = bytes + size;
  int scans = 0;
  for (const uint8_t* byte = bytes; byte < end - 1 && scans <= MAX_SCANS; byte++) {
    byte = static_cast<const uint8_t*>(std::memchr(byte, 0xFF, size_t(end - 1 - byte)));
    if (!byte) break;
    scans += byte[1] == 0xDA;
  }
  return scans > MAX_SCANS;
}

Verdict open_image(Reading& reading, const uint8_t* bytes, size_t size, int64_t most_pixels) {
  jpeg::Decompressor& object = reading.object;
  reading.bytes = bytes;
  reading.size = size;
  library.create(&object, library.version, library.size);
  library.memory_source(&object, bytes, size);
  library.read_header(&object, 1);
  if (object.width < 1 || object.height < 1 || int64_t(object.width) * object.height > most_pixels)
    return NOT_PLAIN;
  if (library.has_multiple_scans(&object) && has_many_scans(bytes, size)) return NOT_PLAIN;
  const bool grey = object.components == 1 && object.stored_colours == jpeg::GREY;
  const bool colour = object.components == 3 &&
                      (object.stored_colours == jpeg::YCC || object.stored_colours == jpeg::RGB);
  return grey || colour ? READ : NOT_PLAIN;
}

// Pillow's grey of RGBX pixels, in each of their three colours.
void turn_grey(uint8_t* pixels, size_t count) {
  for (size_t i = 0; i < count; i++, pixels += 4) {
    const int luma = (pixels[0] * 19595 + pixels[1] * 38470 + pixels[2] * 7471 + 32768) >> 16;
    pixels[0] = pixels[1] = pixels[2] = uint8_t(luma);
  }
}

// Decodes what the crops look at, after open_image.
Verdict decode_crops(Reading& reading, const Crop* crops, int count) {
  jpeg::Decompressor& object = reading.object;
  resample::Plan plan;
  plan.count = count;
  if (!resample::prepare_plan(plan, crops, int(object.width))) return NO_MEMORY;
  int top = int(object.height), bottom = 0, left = int(object.width), right = 0;
  for (int i = 0; i < count; i++) {
    const resample::Work& work = plan.works[i];
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
  const bool hooked = hook_huffman(reading);
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
  uint8_t* strip_rows[STRIP];
  for (int i = 0; i < STRIP; i++) strip_rows[i] = plan.strip + plan.strip_stride * i;
  const bool to_grey = crops[0].channels == 1 && object.stored_colours != jpeg::GREY;
  for (int y = top; y < bottom;) {
    int taken = 0;
    const int count_in_strip = bottom - y < STRIP ? bottom - y : STRIP;
    while (taken < count_in_strip) {
      const unsigned delivered =
          library.read_rows(&object, strip_rows + taken, unsigned(count_in_strip - taken));
      if (!delivered) return DAMAGED;
      taken += int(delivered);
    }
    for (int i = 0; i < taken && to_grey; i++) turn_grey(strip_rows[i], object.output_width);
    resample::take_strip(plan, crops, y, taken, int(column));
    y += taken;
  }
  if (hooked) object.source->next = reading.scan.bits.next;
  if (!has_end_marker(reading)) return TRUNCATED;
  resample::write_crops(plan, crops);
  return READ;
}

bool lies_inside(const Crop& crop, int64_t height, int64_t width) {
  return crop.top >= 0 && crop.left >= 0 && crop.height > 0 && crop.width > 0 &&
         int64_t(crop.top) + crop.height <= height && int64_t(crop.left) + crop.width <= width &&
         crop.tall > 0 && crop.wide > 0 && crop.window_top >= 0 && crop.window_left >= 0 &&
         int64_t(crop.window_top) + crop.tall <= crop.out_height &&
         int64_t(crop.window_left) + crop.wide <= crop.out_width &&
         (crop.channels == 1 || crop.channels == 3);
}

// What is asked of an image: crops that are known, or views that are drawn for its size.
struct Request {
  Crop* crops;
  int count;
  const views::Spec* spec;  // null: the crops are known
  uint64_t sample_key;
  float* params;  // (2, PARAMETERS), written if the views are drawn
};

Verdict read_crops(const uint8_t* bytes, size_t size, int64_t most_pixels, const Request& request) {
  if (!library.version) return NOT_PLAIN;
  Reading reading;
  jpeg::prepare(library, reading.object, reading.errors);
  Verdict verdict = DAMAGED;
  if (!setjmp(reading.errors.back)) {
    verdict = open_image(reading, bytes, size, most_pixels);
    const int height = int(reading.object.height), width = int(reading.object.width);
    if (verdict == READ && request.spec) {
      for (int view = 0; view < 2; view++) {
        views::Box box;
        bool flip;
        views::draw_view(*request.spec, request.sample_key, view, height, width, &box, &flip,
                         request.params + view * views::PARAMETERS);
        Crop& crop = request.crops[view];
        crop.top = box.top, crop.left = box.left, crop.height = box.height, crop.width = box.width;
        crop.flip = flip;
      }
    }
    for (int i = 0; i < request.count && verdict == READ; i++)
      if (!lies_inside(request.crops[i], height, width)) verdict = NOT_PLAIN;
    if (verdict == READ) verdict = decode_crops(reading, request.crops, request.count);
  } else {
    verdict = DAMAGED;
  }
  library.destroy(&reading.object);
  resample::trim_scratch();
  return verdict;
}

template <typename F>
bool find_symbol(void* handle, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(handle, name));
  return function;
}

// Asks the library for something that it must refuse; its complaint names the number it expects.
int expected_number(const jpeg::Library& opened, int version, size_t size) {
  jpeg::Decompressor object;
  jpeg::Errors errors;
  jpeg::prepare(opened, object, errors);
  if (!setjmp(errors.back)) {
    opened.create(&object, version, size);
    return 0;
  }
  return errors.manager.parameters.i[0];
}

// A number that Python has to agree with. `LAYOUT_VERSION` is raised with every change of what a
// function below takes or returns.
struct Fact {
  const char* name;
  int value;
};
constexpr int LAYOUT_VERSION = 2;
#define NUMBER(name) {#name, int(views::name)}
#define FIELD(type, name) {#type "." #name, int(offsetof(type, name))}
using views::Spec;
// clang-format off
constexpr Fact LAYOUT[] = {
    {"LAYOUT_VERSION", LAYOUT_VERSION}, {"MAX_SCANS", MAX_SCANS}, NUMBER(PARAMETERS), NUMBER(ATTEMPTS), NUMBER(ORDER_COUNT),
    NUMBER(BRIGHTNESS), NUMBER(CONTRAST), NUMBER(SATURATION), NUMBER(HUE), NUMBER(ORDER),
    NUMBER(GREY), NUMBER(BOX_RADIUS), NUMBER(BOX_WEIGHT), NUMBER(BOX_EDGE), NUMBER(SOLARISE),
    NUMBER(DRAW_TOP), NUMBER(DRAW_LEFT), NUMBER(DRAW_FLIP), NUMBER(DRAW_JITTER),
    NUMBER(DRAW_ORDER), NUMBER(DRAW_GREY), NUMBER(DRAW_BLUR), NUMBER(DRAW_SIGMA),
    NUMBER(DRAW_SOLARISE), NUMBER(DRAW_FACTORS),
    {"sizeof Spec", sizeof(Spec)}, FIELD(Spec, crop_min), FIELD(Spec, crop_max),
    FIELD(Spec, brightness), FIELD(Spec, contrast), FIELD(Spec, saturation), FIELD(Spec, hue),
    FIELD(Spec, jitter_p), FIELD(Spec, grey_p), FIELD(Spec, blur_p), FIELD(Spec, blur_sigma),
    FIELD(Spec, solarise_p), FIELD(Spec, flip_p), FIELD(Spec, aspect), FIELD(Spec, log_aspect),
    FIELD(Spec, solarise_threshold),
    {"sizeof Crop", sizeof(Crop)}, FIELD(Crop, top), FIELD(Crop, left), FIELD(Crop, height),
    FIELD(Crop, width), FIELD(Crop, out_height), FIELD(Crop, out_width), FIELD(Crop, window_top),
    FIELD(Crop, window_left), FIELD(Crop, tall), FIELD(Crop, wide), FIELD(Crop, flip),
    FIELD(Crop, channels), FIELD(Crop, plane), FIELD(Crop, row), FIELD(Crop, out),
};
// clang-format on

}  // namespace

extern "C" {

// The number `index` of what Python has to agree with: its name, and null behind the last one.
EXPORT const char* mocov3_layout(int index, int* value) {
  if (index < 0 || index >= int(sizeof LAYOUT / sizeof *LAYOUT)) return nullptr;
  *value = LAYOUT[index].value;
  return LAYOUT[index].name;
}

// Whether scans may be decoded by our own Huffman decoder; returns how many have been.
EXPORT int64_t mocov3_use_own_huffman(int enabled) {
  own_huffman = enabled;
  return hooked_images;
}

// Opens the libjpeg-turbo at `path`; its ABI (62, 70, 80), or 0 if it is none that can be used.
// `tall_rows_first`: whether the Pillow to be equal to weighs the rows of tall crops first.
EXPORT int mocov3_open_libjpeg(const char* path, int tall_rows_first) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return 0;
  jpeg::Library opened;
  if (!(find_symbol(handle, "jpeg_std_error", opened.std_error) &&
        find_symbol(handle, "jpeg_CreateDecompress", opened.create) &&
        find_symbol(handle, "jpeg_destroy_decompress", opened.destroy) &&
        find_symbol(handle, "jpeg_mem_src", opened.memory_source) &&
        find_symbol(handle, "jpeg_read_header", opened.read_header) &&
        find_symbol(handle, "jpeg_has_multiple_scans", opened.has_multiple_scans) &&
        find_symbol(handle, "jpeg_start_decompress", opened.start) &&
        find_symbol(handle, "jpeg_crop_scanline", opened.crop_columns) &&
        find_symbol(handle, "jpeg_skip_scanlines", opened.skip_rows) &&
        find_symbol(handle, "jpeg_read_scanlines", opened.read_rows)))
    return 0;
  const int version = expected_number(opened, -1, 0);
  if (version != 62 && version != 70 && version != 80) return 0;
  const int size = expected_number(opened, version, 0);
  if (size < int(offsetof(jpeg::Decompressor, tail)) || size > int(sizeof(jpeg::Decompressor)))
    return 0;
  opened.version = version;
  opened.size = size_t(size);
  library = opened;
  resample::pillow_weighs_tall_rows_first = tall_rows_first;
  return version;
}

// Cuts the given crops (at most 2) out of one image. Returns a Verdict.
EXPORT int mocov3_cut_crops(const uint8_t* bytes, int64_t length, int64_t most_pixels, Crop* crops,
                            int count) {
  if (count < 1 || count > resample::MOST_CROPS) return NOT_PLAIN;
  return read_crops(bytes, size_t(length), most_pixels, {crops, count, nullptr, 0, nullptr});
}

// Height and width of an image that can be read here. Returns a Verdict.
EXPORT int mocov3_read_size(const uint8_t* bytes, int64_t length, int64_t most_pixels,
                            int* height_width) {
  if (!library.version) return NOT_PLAIN;
  Reading reading;
  jpeg::prepare(library, reading.object, reading.errors);
  Verdict verdict = DAMAGED;
  if (!setjmp(reading.errors.back)) {
    verdict = open_image(reading, bytes, size_t(length), most_pixels);
    height_width[0] = int(reading.object.height);
    height_width[1] = int(reading.object.width);
  } else {
    verdict = DAMAGED;
  }
  library.destroy(&reading.object);
  return verdict;
}

// Draws the two views of a sample for the size of its image and cuts their crops, of 1 or 3
// channels, tall x wide, at `out` (strides in bytes); parameter rows (2, PARAMETERS) go to `params`.
// If `augment`, each crop must be contiguous, and its colours are changed as its row says. Returns a
// Verdict.
EXPORT int mocov3_make_crops(const uint8_t* bytes, int64_t length, int64_t most_pixels,
                             const views::Spec* spec, uint64_t seed, uint64_t epoch,
                             uint64_t sample_id, int channels, int tall, int wide, uint8_t* out,
                             int64_t view_stride, int64_t plane_stride, int64_t row_stride,
                             float* params, int augment) {
  Crop crops[2] = {};
  for (int view = 0; view < 2; view++) {
    Crop& crop = crops[view];
    crop.tall = crop.out_height = tall;
    crop.wide = crop.out_width = wide;
    crop.channels = channels;
    crop.plane = plane_stride;
    crop.row = row_stride;
    crop.out = out + view * view_stride;
  }
  Verdict verdict =
      read_crops(bytes, size_t(length), most_pixels,
                 {crops, 2, spec, views::hash_counters(seed, epoch, sample_id), params});
  if (!augment) return verdict;
  for (int view = 0; view < 2 && verdict == READ; view++)
    if (!views::augment(crops[view].out, channels, tall, wide, params + view * views::PARAMETERS))
      verdict = NO_MEMORY;
  return verdict;
}

}  // extern "C"
