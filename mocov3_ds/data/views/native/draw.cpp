#include "draw.h"

#include <cmath>

namespace views {
namespace {

// The first number of SplitMix64 from this state, as in mocov3_ds/data/splitmix.py.
uint64_t hash_word(uint64_t word) {
  word += 0x9E3779B97F4A7C15u;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

double draw_uniform(uint64_t key, int purpose) {
  return double(hash_word(key + purpose) >> 11) * 0x1p-53;
}

int draw_below(uint64_t key, int purpose, int bound) {
  return int(((hash_word(key + purpose) >> 32) * uint64_t(bound)) >> 32);
}

// exp(x) by its series and squares: the same bits everywhere, unlike a libm's.
double exp_series(double x) {
  if (std::fabs(x) >= 0.3) {
    const double half = exp_series(x / 2);
    return half * half;
  }
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

// Half to even, as Python's round.
int round_half_even(double x) { return int(std::nearbyint(x)); }

Box draw_box(uint64_t key, const Spec& spec, int height, int width) {
  const double pixels = double(int64_t(height) * width);
  for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
    const double share =
        spec.crop_min + (spec.crop_max - spec.crop_min) * draw_uniform(key, 2 * attempt);
    const double drawn = 2 * draw_uniform(key, 2 * attempt + 1) - 1;
    const double ratio = exp_series(spec.log_aspect[0] + drawn * spec.log_aspect[1]);
    const double area = share * pixels;
    const double w = std::nearbyint(std::sqrt(area * ratio));
    const double h = std::nearbyint(std::sqrt(area / ratio));
    if (0 < w && w <= width && 0 < h && h <= height) {
      const int crop_width = int(w), crop_height = int(h);
      return {draw_below(key, DRAW_TOP, height - crop_height + 1),
              draw_below(key, DRAW_LEFT, width - crop_width + 1), crop_height, crop_width};
    }
  }
  int crop_height = height, crop_width = width;
  const double aspect = double(width) / double(height);
  if (aspect < spec.aspect[0])
    crop_height = round_half_even(width / spec.aspect[0]);
  else if (aspect > spec.aspect[1])
    crop_width = round_half_even(height * spec.aspect[1]);
  return {(height - crop_height) / 2, (width - crop_width) / 2, crop_height, crop_width};
}

// Pillow's box filter for a blur, with its mixture of float32 and float64 (`box_filter` in
// draw.py).
void box_filter(double drawn_sigma, float* params) {
  const float sigma = float(drawn_sigma);
  const float variance = sigma * sigma / 3.0f;
  const float length = float(std::sqrt(12.0 * double(variance) + 1.0));
  const float floored = float(std::floor((double(length) - 1.0) / 2.0));
  float fraction = (2.0f * floored + 1.0f) * (floored * (floored + 1.0f) - 3.0f * variance);
  fraction /= 6.0f * (variance - (floored + 1.0f) * (floored + 1.0f));
  const float radius = floored + fraction;
  const int weight = int(float(1 << 24) / (radius * 2.0f + 1.0f));
  params[BOX_RADIUS] = float(int(radius));
  params[BOX_WEIGHT] = float(weight);
  params[BOX_EDGE] = float(((1 << 24) - (2 * int(radius) + 1) * weight) / 2);
}

}  // namespace

uint64_t hash_counters(uint64_t seed, uint64_t epoch, uint64_t sample_id) {
  return hash_word(hash_word(hash_word(seed) + epoch) + sample_id);
}

void draw_view(const Spec& spec, uint64_t sample_key, int view, int height, int width, Box* box,
               bool* flip, float* params) {
  const uint64_t key = hash_word(sample_key + view);
  *box = draw_box(key, spec, height, width);
  *flip = draw_uniform(key, DRAW_FLIP) < spec.flip_p;
  for (int i = 0; i < PARAMETERS; i++) params[i] = PLAIN_PARAMS[i];
  if (draw_uniform(key, DRAW_JITTER) < spec.jitter_p) {
    const double strengths[3] = {spec.brightness, spec.contrast, spec.saturation};
    for (int i = 0; i < 3; i++)
      params[i] = float(1 - strengths[i] + 2 * strengths[i] * draw_uniform(key, DRAW_FACTORS + i));
    const double turn = spec.hue * (2 * draw_uniform(key, DRAW_FACTORS + HUE) - 1);
    params[HUE] = spec.hue > 0 ? float(int(turn * 255) & 255) : -1.0f;
    params[ORDER] = float(draw_below(key, DRAW_ORDER, ORDER_COUNT));
  }
  params[GREY] = draw_uniform(key, DRAW_GREY) < spec.grey_p;
  if (draw_uniform(key, DRAW_BLUR) < spec.blur_p[view]) {
    const double low = spec.blur_sigma[0], high = spec.blur_sigma[1];
    box_filter(low + (high - low) * draw_uniform(key, DRAW_SIGMA), params);
  }
  if (draw_uniform(key, DRAW_SOLARISE) < spec.solarise_p[view])
    params[SOLARISE] = float(spec.solarise_threshold / 128);
}

}  // namespace views
