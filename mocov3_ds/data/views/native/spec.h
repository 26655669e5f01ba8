// What Python and C++ must agree on: the distribution of views, the columns of a parameter row and
// the place of each random number. mocov3_ds/data/views/spec.py explains all of it; when the
// library is loaded, Python compares its numbers with these (`mocov3_layout`).
#pragma once

namespace views {

// Columns of a parameter row.
enum Column : int {
  BRIGHTNESS,
  CONTRAST,
  SATURATION,
  HUE,
  ORDER,
  GREY,
  BOX_RADIUS,
  BOX_WEIGHT,
  BOX_EDGE,
  SOLARISE,
  PARAMETERS  // number of columns
};
constexpr float PLAIN_PARAMS[PARAMETERS] = {1, 1, 1, 0, -1, 0, -1, 0, 0, 0};
constexpr int ORDER_COUNT = 24;  // orders of the four jitter operations

// Places of the random numbers in the sequence of a view.
enum Purpose : int {
  DRAW_TOP = 20,
  DRAW_LEFT,
  DRAW_FLIP,
  DRAW_JITTER,
  DRAW_ORDER,
  DRAW_GREY,
  DRAW_BLUR,
  DRAW_SIGMA,
  DRAW_SOLARISE,
  DRAW_FACTORS  // four places
};
constexpr int ATTEMPTS = 10;  // tries of a random crop, two places each, from place 0 on

// The fields of ViewSpec that are drawn from.
struct Spec {
  double crop_min, crop_max;
  double brightness, contrast, saturation, hue;
  double jitter_p, grey_p;
  double blur_p[2], blur_sigma[2], solarise_p[2];
  double flip_p;
  double aspect[2], log_aspect[2];  // ends of the range; centre and half width of its logarithm
  double solarise_threshold;
};

}  // namespace views
