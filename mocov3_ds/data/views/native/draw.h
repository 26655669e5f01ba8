// What is random about a view: the same bits as mocov3_ds/data/views/draw.py, which explains it.
#pragma once

#include <cstdint>

#include "spec.h"

namespace views {

struct Box {
  int top, left, height, width;
};

// Box, flip and parameter row of view 0 or 1 of a sample, whose image has this height and width.
void draw_view(const Spec& spec, uint64_t sample_key, int view, int height, int width, Box* box,
               bool* flip, float* params);

// The key of a sample: a hash of three numbers, each modulo 2^64.
uint64_t hash_counters(uint64_t seed, uint64_t epoch, uint64_t sample_id);

}  // namespace views
