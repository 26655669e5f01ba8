// Weighs pixels along rows and columns. Included once per instruction set (kernels.h), inside a
// namespace; AVX2 and AVX512 are defined to 0 or 1.
//
// Pillow's bilinear resampling with antialiasing, bit for bit: weights are whole numbers of 1/2^22,
// columns first, then rows, each rounded to 8 bits. A weight k is kept as high * 2^11 + low, so
// that 16-bit multiply-adds, of which there are fast ones, give the exact 32-bit sum.

// One row of RGBX pixels to one row of three planes (`plane` bytes apart): weighs along the row.
// `pixels` is readable 16 bytes past the last pixel.
static void weigh_columns(const Axis& axis, const uint8_t* pixels, uint8_t* out, size_t plane) {
#if AVX2
  // Channel by channel the first two and the last two of four pixels, as 16-bit numbers.
  const __m128i first = _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
  const __m128i last = _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
#endif
#if AVX512
  const __m512i pair01 = _mm512_broadcast_i32x4(first), pair23 = _mm512_broadcast_i32x4(last);
  const __m512i half = _mm512_set1_epi32(HALF);
  constexpr auto HIGH01 = _MM_PERM_AAAA, HIGH23 = _MM_PERM_BBBB, LOW01 = _MM_PERM_CCCC,
                 LOW23 = _MM_PERM_DDDD;
  // Four output pixels, one per 128-bit lane: four sums (R, G, B, X) each.
  const auto four = [&](int x) {
    const uint8_t* a = pixels + 4 * axis.first[x];
    const uint8_t* b = pixels + 4 * axis.first[x + 1];
    const uint8_t* c = pixels + 4 * axis.first[x + 2];
    const uint8_t* d = pixels + 4 * axis.first[x + 3];
    const auto* k = (const __m512i*)(axis.packed + size_t(x) * axis.stride * PACKED);
    __m512i high = _mm512_setzero_si512(), low = half;
    for (int step = 0; step < axis.steps[x / GROUP]; step++, k++) {
      // Weights beyond a pixel's own taps are 0, and what is read there is inside the row's slack.
      const __m256i ab =
          _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a + step)),
                                  _mm_loadu_si128((const __m128i*)b + step), 1);
      const __m256i cd =
          _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)c + step)),
                                  _mm_loadu_si128((const __m128i*)d + step), 1);
      const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
      const __m512i v01 = _mm512_shuffle_epi8(v, pair01), v23 = _mm512_shuffle_epi8(v, pair23);
      const __m512i w = _mm512_loadu_si512(k);
      high = _mm512_add_epi32(high, _mm512_madd_epi16(v01, _mm512_shuffle_epi32(w, HIGH01)));
      high = _mm512_add_epi32(high, _mm512_madd_epi16(v23, _mm512_shuffle_epi32(w, HIGH23)));
      low = _mm512_add_epi32(low, _mm512_madd_epi16(v01, _mm512_shuffle_epi32(w, LOW01)));
      low = _mm512_add_epi32(low, _mm512_madd_epi16(v23, _mm512_shuffle_epi32(w, LOW23)));
    }
    low = _mm512_add_epi32(low, _mm512_slli_epi32(high, LOW_BITS));
    return _mm512_cvtusepi32_epi8(_mm512_srai_epi32(low, WEIGHT_BITS));
  };
#elif AVX2
  const __m256i pair01 = _mm256_broadcastsi128_si256(first);
  const __m256i pair23 = _mm256_broadcastsi128_si256(last);
  const __m256i half = _mm256_set1_epi32(HALF);
  // Two output pixels, one per 128-bit lane: four sums (R, G, B, X) each.
  const auto two = [&](int x) {
    const uint8_t* a = pixels + 4 * axis.first[x];
    const uint8_t* b = pixels + 4 * axis.first[x + 1];
    const int group = x / GROUP * GROUP;
    const auto* k =
        (const __m256i*)(axis.packed + size_t(group) * axis.stride * PACKED) + (x - group) / 2;
    __m256i high = _mm256_setzero_si256(), low = half;
    for (int step = 0; step < axis.steps[x / GROUP]; step++, k += 2) {
      // Weights beyond a pixel's own taps are 0, and what is read there is inside the row's slack.
      const __m256i v =
          _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a + step)),
                                  _mm_loadu_si128((const __m128i*)b + step), 1);
      const __m256i v01 = _mm256_shuffle_epi8(v, pair01), v23 = _mm256_shuffle_epi8(v, pair23);
      const __m256i w = _mm256_loadu_si256(k);
      high = _mm256_add_epi32(high, _mm256_madd_epi16(v01, _mm256_shuffle_epi32(w, 0x00)));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(v23, _mm256_shuffle_epi32(w, 0x55)));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(v01, _mm256_shuffle_epi32(w, 0xAA)));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(v23, _mm256_shuffle_epi32(w, 0xFF)));
    }
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low), WEIGHT_BITS);
  };
  const auto four = [&](int x) {
    const __m256i words = _mm256_packs_epi32(two(x), two(x + 2));  // lanes: pixels 0 2, 1 3
    const __m256i bytes = _mm256_packus_epi16(words, words);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  };
#endif
#if AVX2
  const __m128i planar = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int x = 0;
  for (; x + 4 * GROUP <= axis.size; x += 4 * GROUP) {  // few stores: loads wait for near ones
    const __m128i a = _mm_shuffle_epi8(four(x), planar);
    const __m128i b = _mm_shuffle_epi8(four(x + GROUP), planar);
    const __m128i c = _mm_shuffle_epi8(four(x + 2 * GROUP), planar);
    const __m128i d = _mm_shuffle_epi8(four(x + 3 * GROUP), planar);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);  // red and green
    const __m128i ef = _mm_unpackhi_epi32(a, b), gh = _mm_unpackhi_epi32(c, d);  // blue
    _mm_storeu_si128((__m128i*)(out + x), _mm_unpacklo_epi64(ab, cd));
    _mm_storeu_si128((__m128i*)(out + plane + x), _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128((__m128i*)(out + 2 * plane + x), _mm_unpacklo_epi64(ef, gh));
  }
  for (; x + GROUP <= axis.size; x += GROUP) {
    const __m128i planes = _mm_shuffle_epi8(four(x), planar);
    const int red = _mm_cvtsi128_si32(planes), green = _mm_extract_epi32(planes, 1),
              blue = _mm_extract_epi32(planes, 2);
    memcpy(out + x, &red, 4);
    memcpy(out + plane + x, &green, 4);
    memcpy(out + 2 * plane + x, &blue, 4);
  }
#else
  int x = 0;
#endif
  for (; x < axis.size; x++) {
    const int16_t* high = axis.high + size_t(x) * axis.stride;
    const int16_t* low = axis.low + size_t(x) * axis.stride;
    const uint8_t* p = pixels + 4 * axis.first[x];
    int sum[3] = {HALF, HALF, HALF};
    for (int i = 0; i < axis.taps[x]; i++) {
      const int weight = (high[i] << LOW_BITS) + low[i];
      for (int c = 0; c < 3; c++) sum[c] += weight * p[4 * i + c];
    }
    for (int c = 0; c < 3; c++) out[c * plane + x] = clip8(sum[c] >> WEIGHT_BITS);
  }
}

// One row of `count` bytes from the rows `stride` apart that output row `y` looks at.
// Rows are readable and `out` is writable to the next multiple of 16 bytes.
static void weigh_rows(const Axis& axis, int y, const uint8_t* rows, size_t stride, size_t count,
                       uint8_t* out) {
  const int16_t* high = axis.high + size_t(y) * axis.stride;
  const int16_t* low = axis.low + size_t(y) * axis.stride;
  const int taps = axis.taps[y];
#if AVX2
  const __m256i half = _mm256_set1_epi32(HALF);
  for (size_t x = 0; x < count; x += 16) {
    __m256i high0 = _mm256_setzero_si256(), high1 = high0, low0 = half, low1 = half;
    for (int i = 0; i < taps; i += 2) {  // an odd last row is paired with itself at weight 0
      const uint8_t* row = rows + stride * i + x;
      const __m128i u = _mm_loadu_si128((const __m128i*)row);
      const __m128i v = _mm_loadu_si128((const __m128i*)(i + 1 < taps ? row + stride : row));
      int high_pair, low_pair;
      memcpy(&high_pair, high + i, 4);
      memcpy(&low_pair, low + i, 4);
      const __m256i kh = _mm256_set1_epi32(high_pair), kl = _mm256_set1_epi32(low_pair);
      const __m256i a = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(u, v));
      const __m256i b = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(u, v));
      high0 = _mm256_add_epi32(high0, _mm256_madd_epi16(a, kh));
      low0 = _mm256_add_epi32(low0, _mm256_madd_epi16(a, kl));
      high1 = _mm256_add_epi32(high1, _mm256_madd_epi16(b, kh));
      low1 = _mm256_add_epi32(low1, _mm256_madd_epi16(b, kl));
    }
    low0 = _mm256_add_epi32(low0, _mm256_slli_epi32(high0, LOW_BITS));
    low1 = _mm256_add_epi32(low1, _mm256_slli_epi32(high1, LOW_BITS));
    __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(low0, WEIGHT_BITS),
                                       _mm256_srai_epi32(low1, WEIGHT_BITS));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)(out + x), bytes);
  }
#else
  for (size_t start = 0; start < count; start += 64) {
    const size_t end = count < start + 64 ? count : start + 64;
    int sum[64];
    for (size_t x = start; x < end; x++) sum[x - start] = HALF;
    for (int i = 0; i < taps; i++) {
      const int weight = (high[i] << LOW_BITS) + low[i];
      const uint8_t* row = rows + stride * i;
      for (size_t x = start; x < end; x++) sum[x - start] += weight * row[x];
    }
    for (size_t x = start; x < end; x++) out[x] = clip8(sum[x - start] >> WEIGHT_BITS);
  }
#endif
}
