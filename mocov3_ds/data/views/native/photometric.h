#pragma once

#include <cstdint>

namespace views {

// Jitter, grey, blur and solarisation of a planar image (3, height, width) in place, as `params`
// (PARAMETERS columns) says. False: no memory.
bool augment(uint8_t* image, int height, int width, const float* params);

}  // namespace views
