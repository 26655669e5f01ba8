// Columns of a parameter row, as mocov3_ds/data/views/photometric.py defines them.
#pragma once

namespace views {

enum Column : int {
  BRIGHTNESS, CONTRAST, SATURATION, HUE,  // factors; HUE is a turn in 1/256
  ORDER,                                  // of the four; -1 = none happens
  GREY,
  BOX_RADIUS, BOX_WEIGHT, BOX_EDGE,       // radius -1 = no blur
  SOLARISE,
  PARAMETERS
};

}  // namespace views
