// Decoded rows to resized crops: Pillow's bilinear filter with antialiasing, bit for bit. Rows come
// a strip at a time, and each strip is weighed into the crops while it is in the first cache.
#pragma once

#include <cstddef>
#include <cstdint>

// One crop: the box of the image is resized to out_height x out_width (mirrored if flip), and the
// window of tall x wide at (window_top, window_left) of that is written.
struct Crop {
  int top, left, height, width;
  int out_height, out_width;
  int window_top, window_left, tall, wide;
  int flip;
  int channels;  // planes that are written: 3, or 1 where all three are the same
  int64_t plane, row;  // strides of `out` in bytes
  uint8_t* out;
};

namespace resample {

constexpr int MOST_CROPS = 2;  // of one image
constexpr int STRIP = 2;       // rows of a strip

// Where the outputs of one axis come from: output i is the sum of taps[i] inputs from first[i] on.
struct Axis {
  int size, stride;
  int *first, *taps;
  int16_t *high, *low;  // (size, stride) each; beyond taps[i] they are 0
  // For weigh_columns: of each group of outputs the steps of four inputs, and for each step a
  // vector of high 0 to 3 and low 0 to 3 of each output.
  int* steps;
  int16_t* packed;
};

// A crop being made.
struct Work {
  Axis columns, rows;
  int first_row, end_row;  // of the image, that the crop looks at
  int first_column, end_column;
  bool rows_first;
  size_t plane, stride;  // of `rows_held`: bytes of a plane and of a row
  uint8_t* rows_held;    // columns first: rows of three planes, weighed; else RGBX rows as decoded
};

// What is held between the strips of one image; all memory belongs to the thread's scratch.
struct Plan {
  int count;
  Work works[MOST_CROPS];
  double* weights;
  uint8_t* strip;
  size_t strip_stride;
  uint8_t* line;
  uint8_t* planes;  // an output row, where it is not in `line`
};

// Whether the Pillow to be equal to weighs the rows of tall crops first, as newer ones do where
// that is much less work; the rounding in between shows.
extern bool pillow_weighs_tall_rows_first;

// Lays out the memory and computes the weights of crops that lie inside the image. False: no
// memory.
bool prepare_plan(Plan& plan, const Crop* crops, int image_width);

// Takes `count` decoded rows, the first of which is row `y` of the image; column 0 of the strip is
// column `left` of the image.
void take_strip(Plan& plan, const Crop* crops, int y, int count, int left);

// Writes the crops when all rows that they look at have been taken.
void write_crops(Plan& plan, const Crop* crops);

// Gives back what the thread holds after an unusually large image.
void trim_scratch();

}  // namespace resample
