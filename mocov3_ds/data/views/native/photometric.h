#pragma once

#include <cstdint>

namespace views {

// Jitter, grey, blur and solarisation of a planar image (channels, height, width) in place, as
// `params` (PARAMETERS columns) says. Images of other than 3 channels have no colours: each channel
// is changed as a grey image by itself. False: no memory.
bool augment(uint8_t* image, int channels, int height, int width, const float* params);

}  // namespace views
