// The draws of the C++ code alone, as a library for test_draw.py: no image is needed.

#include "draw.h"

extern "C" __attribute__((visibility("default"))) void draw_views(const views::Spec* spec,
                                                                  uint64_t seed, uint64_t epoch,
                                                                  uint64_t sample_id, int height,
                                                                  int width, views::Box* boxes,
                                                                  bool* flips, float* params) {
  const uint64_t key = views::hash_counters(seed, epoch, sample_id);
  for (int view = 0; view < 2; view++)
    views::draw_view(*spec, key, view, height, width, boxes + view, flips + view,
                     params + view * views::PARAMETERS);
}
