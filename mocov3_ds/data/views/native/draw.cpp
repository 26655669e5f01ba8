#include "draw.h"

#include <cmath>

namespace views {
namespace {

// Purposes: places in the sequence of a view.
enum { TOP = 20, LEFT, FLIP, JITTER, ORDER_OF, GREY_OF, BLUR, SIGMA, SOLARISE_OF, FACTORS };
constexpr int ATTEMPTS = 10;
constexpr int ORDERS = 24;
constexpr double NARROW = 3.0 / 4.0, WIDE = 4.0 / 3.0;

uint64_t mix(uint64_t word) {
  word += 0x9E3779B97F4A7C15u;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

double uniform(uint64_t key, int purpose) {
  return double(mix(key + purpose) >> 11) * 0x1p-53;
}

int below(uint64_t key, int purpose, int bound) {
  return int(((mix(key + purpose) >> 32) * uint64_t(bound)) >> 32);
}

double exp_series(double x) {
  static const struct Taylor {
    double coefficient[14];
    Taylor() {
      double factorial = 1;  // 13! is exact
      for (int n = 0; n < 14; n++) {
        if (n) factorial *= n;
        coefficient[13 - n] = 1 / factorial;
      }
    }
  } taylor;
  double total = 0;
  for (double coefficient : taylor.coefficient) total = total * x + coefficient;
  return total;
}

int rounded(double x) { return int(std::nearbyint(x)); }  // half to even, as Python's round

Box draw_box(uint64_t key, const Spec& spec, int height, int width) {
  // log of the double 4/3, by its bits: a libm may differ in the last one.
  constexpr double LOG_RATIO = 0x1.269621134db91p-2;
  const double pixels = double(int64_t(height) * width);
  for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
    const double share =
        spec.crop_min + (spec.crop_max - spec.crop_min) * uniform(key, 2 * attempt);
    const double ratio = exp_series((2 * uniform(key, 2 * attempt + 1) - 1) * LOG_RATIO);
    const double area = share * pixels;
    const double w = std::nearbyint(std::sqrt(area * ratio));
    const double h = std::nearbyint(std::sqrt(area / ratio));
    if (0 < w && w <= width && 0 < h && h <= height) {
      const int crop_width = int(w), crop_height = int(h);
      return {below(key, TOP, height - crop_height + 1), below(key, LEFT, width - crop_width + 1),
              crop_height, crop_width};
    }
  }
  int crop_height = height, crop_width = width;
  const double aspect = double(width) / double(height);
  if (aspect < NARROW)
    crop_height = rounded(width / NARROW);
  else if (aspect > WIDE)
    crop_width = rounded(height * WIDE);
  return {(height - crop_height) / 2, (width - crop_width) / 2, crop_height, crop_width};
}

// Pillow's box filter for a blur, with its mixture of float32 and float64 (views.box_of).
void box_of(double drawn, float* row) {
  const float sigma = float(drawn);
  const float variance = sigma * sigma / 3.0f;
  const float length = float(std::sqrt(12.0 * double(variance) + 1.0));
  const float whole = float(std::floor((double(length) - 1.0) / 2.0));
  float part = (2.0f * whole + 1.0f) * (whole * (whole + 1.0f) - 3.0f * variance);
  part /= 6.0f * (variance - (whole + 1.0f) * (whole + 1.0f));
  const float radius = whole + part;
  const int weight = int(float(1 << 24) / (radius * 2.0f + 1.0f));
  row[BOX_RADIUS] = float(int(radius));
  row[BOX_WEIGHT] = float(weight);
  row[BOX_EDGE] = float(((1 << 24) - (2 * int(radius) + 1) * weight) / 2);
}

}  // namespace

uint64_t key_of(uint64_t seed, uint64_t epoch, uint64_t sample_id) {
  return mix(mix(mix(seed) + epoch) + sample_id);
}

void draw(const Spec& spec, uint64_t sample_key, int view, int height, int width, Box* box,
          bool* flip, float* row) {
  const uint64_t key = mix(sample_key + view);
  *box = draw_box(key, spec, height, width);
  *flip = uniform(key, FLIP) < spec.flip_p;
  const float plain[PARAMETERS] = {1, 1, 1, 0, -1, 0, -1, 0, 0, 0};
  for (int i = 0; i < PARAMETERS; i++) row[i] = plain[i];
  if (uniform(key, JITTER) < spec.jitter_p) {
    const double strengths[3] = {spec.brightness, spec.contrast, spec.saturation};
    for (int i = 0; i < 3; i++)
      row[i] = float(1 - strengths[i] + 2 * strengths[i] * uniform(key, FACTORS + i));
    const double turn = spec.hue * (2 * uniform(key, FACTORS + HUE) - 1);
    row[HUE] = float(int(turn * 255) & 255);
    row[ORDER] = float(below(key, ORDER_OF, ORDERS));
  }
  row[GREY] = uniform(key, GREY_OF) < spec.grey_p;
  if (uniform(key, BLUR) < spec.blur_p[view]) {
    const double low = spec.blur_sigma[0], high = spec.blur_sigma[1];
    box_of(low + (high - low) * uniform(key, SIGMA), row);
  }
  row[SOLARISE] = uniform(key, SOLARISE_OF) < spec.solarise_p[view];
}

}  // namespace views
