// Throws damaged JPEGs at the extension; built with sanitizers by test_fuzz.py.
//
//     fuzz_native LIBJPEG SEED COUNT FILE...      COUNT mutations of the files, seeded

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "draw.h"

extern "C" {
int mocov3_open_libjpeg(const char*, int);
int mocov3_read_size(const uint8_t*, int64_t, int64_t, int*);
int mocov3_make_crops(const uint8_t*, int64_t, int64_t, const views::Spec*, uint64_t, uint64_t,
                      uint64_t, int, int, int, uint8_t*, int64_t, int64_t, int64_t, float*, int);
}

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

static size_t below(Random& random, size_t bound) { return bound ? random() % bound : 0; }

static void mutate(Bytes& data, const Bytes& other, Random& random) {
  const int changes = 1 + int(below(random, 6));
  for (int i = 0; i < changes && !data.empty(); i++) {
    const size_t at =
        below(random, below(random, 3) ? data.size() : std::min<size_t>(700, data.size()));
    const size_t length = std::min(data.size() - at, 1 + below(random, 40));
    switch (below(random, 8)) {
      case 0: data[at] ^= uint8_t(1 << below(random, 8)); break;
      case 1: data[at] = uint8_t(random()); break;
      case 2: data[at] = "\xFF\x00\x01\x7F\x80\xD9\xDA\xC4"[below(random, 8)]; break;
      case 3: data.erase(data.begin() + at, data.begin() + at + length); break;
      case 4: data.insert(data.begin() + at, length, uint8_t(random())); break;
      case 5: data.resize(at); break;
      case 6:
        for (size_t j = 0; j < length; j++) data[at + j] = uint8_t(random());
        break;
      default:
        if (!other.empty()) {
          const size_t from = below(random, other.size());
          for (size_t j = 0; j < length && from + j < other.size(); j++)
            data[at + j] = other[from + j];
        }
    }
  }
}

int main(int count, char** arguments) {
  if (count < 5 || !mocov3_open_libjpeg(arguments[1], 1)) return 2;
  Random random(std::strtoull(arguments[2], nullptr, 10));
  std::vector<Bytes> seeds;
  for (int i = 4; i < count; i++) {
    std::ifstream file(arguments[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  const views::Spec spec{0.08,     1,   0.4,           0.4,          0.2, 0.1, 0.8, 0.2, {1, 0.1}, {0.1, 2},
                         {0, 0.2}, 0.5, {0.75, 4. / 3}, {0, 0.28768}, 128};
  const long wanted = std::atol(arguments[3]);
  long verdicts[8] = {};
  for (long i = 0; i < wanted; i++) {
    Bytes mutated = seeds[below(random, seeds.size())];
    mutate(mutated, seeds[below(random, seeds.size())], random);
    // Exact sizes on the heap: a byte too far in any of them is seen.
    std::unique_ptr<uint8_t[]> data(new uint8_t[mutated.size()]);
    std::copy(mutated.begin(), mutated.end(), data.get());
    const int tall = 1 + int(below(random, 48)), wide = 1 + int(below(random, 48));
    const int channels = below(random, 2) ? 3 : 1, plane = tall * wide;
    std::unique_ptr<uint8_t[]> out(new uint8_t[2 * channels * plane]);
    std::unique_ptr<float[]> rows(new float[2 * views::PARAMETERS]);
    int height_width[2];
    mocov3_read_size(data.get(), int64_t(mutated.size()), 1 << 22, height_width);
    const int verdict =
        mocov3_make_crops(data.get(), int64_t(mutated.size()), 1 << 22, &spec, 1, 2, uint64_t(i),
                          channels, tall, wide, out.get(), channels * plane, plane, wide,
                          rows.get(), i % 2);
    verdicts[verdict & 7]++;
  }
  std::printf("%ld mutations: read %ld, not plain %ld, damaged %ld, truncated %ld\n", wanted,
              verdicts[0], verdicts[1], verdicts[2], verdicts[3]);
}
