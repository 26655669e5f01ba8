// Colour work on planes of pixels. Included once per instruction set (kernels.h), inside a
// namespace.
//
// The arithmetic of mocov3_ds/data/views/photometric.py, operation by operation: whole numbers 0 ..
// 255 in float32, one rounding per operation as written there. Loops are plain so that a compiler
// turns them into vectors; no contraction of multiply and add is allowed (see pyproject.toml).

struct Block {
  float r[BLOCK], g[BLOCK], b[BLOCK];
};

static void load(const uint8_t* in, size_t plane, int count, Block& x) {
  for (int i = 0; i < count; i++) x.r[i] = in[i];
  for (int i = 0; i < count; i++) x.g[i] = in[plane + i];
  for (int i = 0; i < count; i++) x.b[i] = in[2 * plane + i];
}

static void store_plane(const float* x, int count, uint8_t* out) {
  for (int i = 0; i < count; i++) out[i] = uint8_t(int(x[i]));
}

static inline float truncate(float x) {
  x = x < 0.0f ? 0.0f : x;
  x = x > 255.0f ? 255.0f : x;
  return float(int(x));
}

static void brightness_plane(float* x, int count, float factor) {
  for (int i = 0; i < count; i++) x[i] = truncate(x[i] * factor);
}

static void blend_plane(float* x, int count, float base, float factor) {
  for (int i = 0; i < count; i++) x[i] = truncate((x[i] - base) * factor + base);
}

static inline int luma(float r, float g, float b) {
  return (int(r) * 19595 + int(g) * 38470 + int(b) * 7471 + 32768) >> 16;
}

static int luma_sum(const Block& x, int count) {
  int total = 0;
  for (int i = 0; i < count; i++) total += luma(x.r[i], x.g[i], x.b[i]);
  return total;
}

static void saturation(Block& x, int count, float factor) {
  for (int i = 0; i < count; i++) {
    const float base = float(luma(x.r[i], x.g[i], x.b[i]));
    x.r[i] = truncate((x.r[i] - base) * factor + base);
    x.g[i] = truncate((x.g[i] - base) * factor + base);
    x.b[i] = truncate((x.b[i] - base) * factor + base);
  }
}

static inline float channel_value(float hue, float ahead, float saturation, float value) {
  float position = hue + ahead;
  position = position >= 1530.0f ? position - 1530.0f : position;
  const float descending = 1020.0f - position;
  float weight = position < descending ? position : descending;
  weight = weight < 0.0f ? 0.0f : weight;
  weight = weight > 255.0f ? 255.0f : weight;
  return float(int((65025.0f - weight * saturation) * value * float(1.0 / 65025.0) + 0.5f));
}

static void hue(Block& x, int count, float turn) {
  for (int i = 0; i < count; i++) {
    const float r = x.r[i], g = x.g[i], b = x.b[i];
    float value = r > g ? r : g;
    value = value > b ? value : b;
    float low = r < g ? r : g;
    low = low < b ? low : b;
    const float chroma = value - low, divisor = chroma < 1.0f ? 1.0f : chroma;
    const float red = (value - r) / divisor, green = (value - g) / divisor,
                blue = (value - b) / divisor;
    float sector = green == 1.0f ? 5.0f - red : 3.0f + green;
    const float warm = red == 1.0f ? 3.0f - blue : 1.0f + red;
    sector = green == 0.0f ? warm : sector;
    sector = red == 0.0f ? blue - green : sector;
    sector /= 6.0f;
    sector = sector < 0.0f ? sector + 1.0f : sector;
    float new_hue = float(int(sector * 255.0f)) + turn;
    new_hue = new_hue >= 256.0f ? new_hue - 256.0f : new_hue;
    new_hue *= 6.0f;
    const float divisor_of_value = value < 1.0f ? 1.0f : value;
    const float saturation = float(int(chroma * 255.0f / divisor_of_value));
    x.r[i] = channel_value(new_hue, 1275.0f, saturation, value);
    x.g[i] = channel_value(new_hue, 765.0f, saturation, value);
    x.b[i] = channel_value(new_hue, 255.0f, saturation, value);
  }
}

// Jitter operations turn[0 .. count) of `order`, on one block.
static void jitter(Block& x, int pixels, const int* order, int count, const float* params,
                   float mean) {
  for (int i = 0; i < count; i++) {
    const float factor = params[order[i]];
    switch (order[i]) {
      case BRIGHTNESS:
        brightness_plane(x.r, pixels, factor);
        brightness_plane(x.g, pixels, factor);
        brightness_plane(x.b, pixels, factor);
        break;
      case CONTRAST:
        blend_plane(x.r, pixels, mean, factor);
        blend_plane(x.g, pixels, mean, factor);
        blend_plane(x.b, pixels, mean, factor);
        break;
      case SATURATION: saturation(x, pixels, factor); break;
      default:
        if (factor >= 0) hue(x, pixels, factor);
    }
  }
}

// Jitter and grey, in position. The contrast needs the mean luma of all that comes before it.
static void change_colours(uint8_t* image, size_t plane, const float* params) {
  const bool jittered = params[ORDER] >= 0, grey = params[GREY] > 0;
  if (!jittered && !grey) return;
  Block x;
  int order[4], contrast_turn = 0, count = 0;
  float mean = 0;
  if (jittered) {
    fill_order(int(params[ORDER]), order);
    count = 4;
    while (order[contrast_turn] != CONTRAST) contrast_turn++;
    int64_t total = 0;
    for (size_t start = 0; start < plane; start += BLOCK) {
      const int pixels = plane - start < BLOCK ? int(plane - start) : BLOCK;
      load(image + start, plane, pixels, x);
      jitter(x, pixels, order, contrast_turn, params, 0);
      total += luma_sum(x, pixels);
      if (!contrast_turn) continue;
      store_plane(x.r, pixels, image + start);
      store_plane(x.g, pixels, image + plane + start);
      store_plane(x.b, pixels, image + 2 * plane + start);
    }
    mean = float(std::floor(double(total) / double(plane) + 0.5));
  }
  for (size_t start = 0; start < plane; start += BLOCK) {
    const int pixels = plane - start < BLOCK ? int(plane - start) : BLOCK;
    load(image + start, plane, pixels, x);
    jitter(x, pixels, order + contrast_turn, count - contrast_turn, params, mean);
    if (grey) {  // one plane is enough until the end
      for (int i = 0; i < pixels; i++) image[start + i] = uint8_t(luma(x.r[i], x.g[i], x.b[i]));
      continue;
    }
    store_plane(x.r, pixels, image + start);
    store_plane(x.g, pixels, image + plane + start);
    store_plane(x.b, pixels, image + 2 * plane + start);
  }
}

// One box pass: `out[i]` from in[i - radius - 1 .. i + radius + 1], those `step` apart.
static inline void box_pass(const uint16_t* in, ptrdiff_t step, int count, int radius,
                            uint32_t weight, uint32_t edge, uint16_t* out) {
  if (radius == 0) {
    const uint16_t *a = in - step, *b = in + step;
    for (int i = 0; i < count; i++)
      out[i] = uint16_t((in[i] * weight + uint32_t(a[i] + b[i]) * edge + (1u << 23)) >> 24);
  } else if (radius == 1) {
    const uint16_t *a = in - 2 * step, *b = in - step, *c = in + step, *d = in + 2 * step;
    for (int i = 0; i < count; i++)
      out[i] = uint16_t(
          (uint32_t(b[i] + in[i] + c[i]) * weight + uint32_t(a[i] + d[i]) * edge + (1u << 23)) >>
          24);
  } else {
    for (int i = 0; i < count; i++) {
      uint32_t middle = 0;
      for (int o = -radius; o <= radius; o++) middle += in[i + o * step];
      const uint32_t ends = in[i - (radius + 1) * step] + in[i + (radius + 1) * step];
      out[i] = uint16_t((middle * weight + ends * edge + (1u << 23)) >> 24);
    }
  }
}

// Three box passes along each axis, each rounded to 8 bits; borders repeat. `first` and `second`
// hold height + 2 * reach rows of width + 2 * reach values.
static void blur(uint8_t* image, int height, int width, const float* params, uint16_t* first,
                 uint16_t* second) {
  const int radius = int(params[BOX_RADIUS]), reach = radius + 1;
  const uint32_t weight = uint32_t(params[BOX_WEIGHT]), edge = uint32_t(params[BOX_EDGE]);
  const ptrdiff_t stride = width + 2 * reach;
  for (int y = 0; y < height; y++) {
    uint16_t* line = first + stride * (y + reach) + reach;
    uint16_t* other = second + reach;
    for (int x = 0; x < width; x++) line[x] = image[ptrdiff_t(width) * y + x];
    for (int pass = 0; pass < 3; pass++) {
      uint16_t *from = pass % 2 ? other : line, *to = pass % 2 ? line : other;
      for (int i = 1; i <= reach; i++) from[-i] = from[0], from[width - 1 + i] = from[width - 1];
      box_pass(from, 1, width, radius, weight, edge, to);
    }
    std::memcpy(line, other, sizeof(uint16_t) * size_t(width));
  }
  for (int pass = 0; pass < 3; pass++) {
    uint16_t *from = (pass % 2 ? second : first) + reach, *to = (pass % 2 ? first : second) + reach;
    for (int i = 0; i < reach; i++) {
      std::memcpy(from + stride * i, from + stride * reach, sizeof(uint16_t) * size_t(width));
      std::memcpy(from + stride * (height + reach + i), from + stride * (height + reach - 1),
                  sizeof(uint16_t) * size_t(width));
    }
    for (int y = reach; y < height + reach; y++)
      box_pass(from + stride * y, stride, width, radius, weight, edge, to + stride * y);
  }
  for (int y = 0; y < height; y++) {
    const uint16_t* line = second + stride * (y + reach) + reach;
    for (int x = 0; x < width; x++) image[ptrdiff_t(width) * y + x] = uint8_t(line[x]);
  }
}

static void solarise(uint8_t* x, size_t count, uint8_t threshold) {
  for (size_t i = 0; i < count; i++) x[i] = x[i] < threshold ? x[i] : uint8_t(255 - x[i]);
}

// Brightness and contrast of one channel that is a grey image by itself, in their drawn order.
static void change_levels(uint8_t* image, size_t plane, const float* params) {
  if (params[ORDER] < 0) return;
  int order[4];
  fill_order(int(params[ORDER]), order);
  float x[BLOCK];
  for (int operation : order) {
    if (operation != BRIGHTNESS && operation != CONTRAST) continue;
    float mean = 0;
    if (operation == CONTRAST) {
      int64_t total = 0;
      for (size_t i = 0; i < plane; i++) total += image[i];
      mean = float(std::floor(double(total) / double(plane) + 0.5));
    }
    for (size_t start = 0; start < plane; start += BLOCK) {
      const int pixels = plane - start < BLOCK ? int(plane - start) : BLOCK;
      for (int i = 0; i < pixels; i++) x[i] = image[start + i];
      blend_plane(x, pixels, mean, params[operation]);
      store_plane(x, pixels, image + start);
    }
  }
}

// All but the normalisation, in position.
static void augment(uint8_t* image, int channels, int height, int width, const float* params,
                    uint16_t* first, uint16_t* second) {
  const size_t plane = size_t(height) * width;
  const bool grey = channels == 3 && params[GREY] > 0;
  const int planes = grey ? 1 : channels;
  if (channels == 3)
    change_colours(image, plane, params);
  else
    for (int c = 0; c < planes; c++) change_levels(image + c * plane, plane, params);
  if (params[BOX_RADIUS] >= 0)
    for (int c = 0; c < planes; c++) blur(image + c * plane, height, width, params, first, second);
  if (params[SOLARISE] > 0) solarise(image, planes * plane, uint8_t(params[SOLARISE] * 128));
  if (grey) {
    std::memcpy(image + plane, image, plane);
    std::memcpy(image + 2 * plane, image, plane);
  }
}

static void normalise(const uint8_t* in, size_t count, float scale, float shift, float* out) {
  for (size_t i = 0; i < count; i++) out[i] = float(in[i]) * scale + shift;
}

static void normalise(const uint8_t* in, size_t count, float scale, float shift, uint16_t* out) {
  for (size_t i = 0; i < count; i++) {  // bfloat16, to nearest even
    const float x = float(in[i]) * scale + shift;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out[i] = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}
