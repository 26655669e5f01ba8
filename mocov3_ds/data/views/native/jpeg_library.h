// The libjpeg-turbo that Pillow brought, opened at run time: no header, no package is needed.
//
// Only the head of libjpeg's decompression object is declared here; it is the same in ABI 62, 70
// and 80, which differ in what follows. The library itself says which ABI it is and how large its
// object is (`mocov3_open_libjpeg` asks with wrong answers and reads the right ones from the
// complaint), so the tail is opaque bytes.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>

namespace jpeg {

enum ColourSpace : int { GREY = 1, RGB = 2, YCC = 3, RGBX = 7 };

struct ErrorManager {
  void (*error_exit)(void*);
  void (*emit_message)(void*, int);
  void (*output_message)(void*);
  void (*format_message)(void*, char*);
  void (*reset)(void*);
  int code;
  union {
    int i[8];
    char s[80];
  } parameters;
  int trace_level;
  long warnings;
  unsigned char tail[256];  // message tables: the library's business
};

struct Source {
  const uint8_t* next;
  size_t left;
};

struct Decompressor {
  ErrorManager* error;
  void* memory;
  void* progress;
  void* client;
  int is_decompressor;
  int state;
  Source* source;
  unsigned width, height;
  int components;
  int stored_colours, colours;  // ColourSpace
  unsigned scale_up, scale_down;
  double gamma;
  int buffered, raw;
  int dct_method;
  int fancy_upsampling, block_smoothing;
  int quantise, dither, two_pass, wanted_colours, one_pass, external, second_pass;
  unsigned output_width, output_height;
  int output_components, output_channels, rows_at_once, palette_size;
  uint8_t** palette;
  unsigned row;  // next row that comes out
  unsigned char tail[1024];
};

// What the library calls for each MCU, and where its object points to it. Both are as they were in
// libjpeg 6b, 1998: an object of this size and ABI has them there.
struct EntropyDecoder {
  void (*start_pass)(Decompressor*);
  int (*decode_mcu)(Decompressor*, int16_t (**)[64]);
};
constexpr int HOOKED_VERSION = 62;
constexpr size_t HOOKED_SIZE = 632, ENTROPY_OFFSET = 592;

struct Library {
  int version = 0;  // ABI: 62, 70 or 80; 0 = not open
  size_t size = 0;  // of the library's decompression object
  ErrorManager* (*std_error)(ErrorManager*);
  void (*create)(Decompressor*, int, size_t);
  void (*destroy)(Decompressor*);
  void (*memory_source)(Decompressor*, const uint8_t*, unsigned long);
  int (*read_header)(Decompressor*, int);
  int (*has_multiple_scans)(Decompressor*);
  int (*start)(Decompressor*);
  void (*crop_columns)(Decompressor*, unsigned*, unsigned*);
  unsigned (*skip_rows)(Decompressor*, unsigned);
  unsigned (*read_rows)(Decompressor*, uint8_t**, unsigned);
};

// An error of the library jumps back to where it was entered; its messages go nowhere.
struct Errors {
  ErrorManager manager;  // first, as the library hands back its address
  std::jmp_buf back;
};

inline void leave(void* object) {
  std::longjmp(reinterpret_cast<Errors*>(static_cast<Decompressor*>(object)->error)->back, 1);
}
inline void say_nothing(void*) {}
inline void count_nothing(void*, int) {}

inline void prepare(const Library& library, Decompressor& object, Errors& errors) {
  object.error = library.std_error(&errors.manager);
  object.memory = nullptr;
  errors.manager.error_exit = leave;
  errors.manager.output_message = say_nothing;
  errors.manager.emit_message = count_nothing;
}

}  // namespace jpeg
