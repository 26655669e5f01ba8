// What is random about a view: the same bits as mocov3_ds/data/views/photometric.py (`draw`), which explains it.
#pragma once

#include <cstdint>

#include "parameters.h"

namespace views {

struct Box {
  int top, left, height, width;
};

// Fields of ViewSpec in this order, as Python packs them.
struct Spec {
  double crop_min, crop_max;
  double brightness, contrast, saturation, hue;
  double jitter_p, grey_p;
  double blur_p[2], blur_sigma[2], solarise_p[2];
  double flip_p;
};

// Box, flip and parameter row of view 0 or 1 of a sample.
void draw(const Spec& spec, uint64_t sample_key, int view, int height, int width, Box* box,
          bool* flip, float* row);

uint64_t key_of(uint64_t seed, uint64_t epoch, uint64_t sample_id);

}  // namespace views
