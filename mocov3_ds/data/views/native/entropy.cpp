// Huffman decoding. The largest part of decoding a JPEG is undoing its Huffman codes. The library
// looks 8 bits ahead and takes a symbol and its value one after the other; this looks further ahead
// and takes both at once. It knows only what nearly all stored images are: one sequential scan of
// 8-bit samples. The rest, and whatever is odd, is left to the library, and damage to Pillow.

#include "entropy.h"

#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace entropy {
namespace {

// Natural position of the k-th coefficient of a block. Behind its end it is the last one's, which
// is written after that, or never read as the data are damaged.
struct Natural {
  uint8_t at[64 + END];
};
constexpr uint8_t ZIGZAG[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
constexpr Natural NATURAL = [] {
  Natural natural = {};
  for (int k = 0; k < 64 + END; k++) natural.at[k] = k < 64 ? ZIGZAG[k] : 63;
  return natural;
}();
constexpr int END_OF_BLOCK = 64;  // as a number of zeros

INLINE int signed_value(uint32_t raw, int size) {  // the top half of a size's range is positive
  return size && raw < 1u << (size - 1) ? int(raw) - (1 << size) + 1 : int(raw);
}

void pair_up(Table& table) {
  for (uint32_t pattern = 0; pattern < 1u << LOOK; pattern++) {
    const Step first = table.steps[pattern];
    Pair& pair = table.pairs[pattern];
    if (!first.bits) {
      pair = {first.value, 0, first.zeros, 0, 0, 0};
    } else if (first.zeros == END_OF_BLOCK) {
      pair = {0, 0, 0, END, first.bits, first.bits};
    } else {
      pair = {first.value, first.value, first.zeros, first.zeros, first.bits, first.bits};
      const Step next = table.steps[pattern << first.bits & ((1u << LOOK) - 1)];
      if (!next.bits || first.bits + next.bits > LOOK) continue;
      const bool ends = next.zeros == END_OF_BLOCK;
      pair.next_value = ends ? int16_t(0) : next.value;
      pair.next = uint8_t(ends ? END : first.zeros + 1 + next.zeros);
      pair.all_bits = uint8_t(first.bits + next.bits);
    }
  }
}

bool build(Table& table, const uint8_t* counts, const uint8_t* symbols, bool ac) {
  int total = 0;
  uint32_t code = 0;  // of the current length
  std::memset(table.steps, 0, sizeof table.steps);
  for (int length = 1; length <= 16; length++) {
    table.shift[length] = total - int(code);
    for (int i = 0; i < counts[length - 1]; i++, code++, total++) {
      if (total >= 256 || code >= 1u << length) return false;
      const int symbol = symbols[total];
      const int zeros = ac ? symbol >> 4 : 0, size = ac ? symbol & 15 : symbol;
      if (size > (ac ? 15 : 11) || (ac && !size && zeros && zeros != 15)) return false;
      table.symbols[total] = uint8_t(symbol);
      if (length > LOOK) continue;
      const bool value_fits = length + size <= LOOK;
      const int free = LOOK - length;
      for (uint32_t rest = 0; rest < 1u << free; rest++) {
        Step& step = table.steps[(code << free) | rest];
        if (value_fits) {
          step.bits = uint8_t(length + size);
          step.zeros = uint8_t(ac && symbol == 0 ? END_OF_BLOCK : zeros);
          step.value = int16_t(signed_value(size ? rest >> (free - size) : 0, size));
        } else {
          step = {int16_t(symbol), uint8_t(length), 0};
        }
      }
    }
    table.code_end[length] = code << (16 - length);
    code <<= 1;
  }
  table.count = total;
  if (ac) pair_up(table);
  return total > 0;
}

// Byte by byte: near the end, a stuffed FF, or a marker.
__attribute__((noinline)) Bits refill_slowly(Bits s) {
  s.buffer &= s.count ? ~uint64_t(0) << (64 - s.count) : 0;
  while (s.count <= 56) {
    uint64_t byte = 0;
    if (s.next < s.end && s.next[0] != 0xFF) {
      byte = *s.next++;
    } else if (s.end - s.next >= 2 && s.next[1] == 0) {
      byte = 0xFF;
      s.next += 2;
    } else {
      s.invented += 8;
    }
    s.buffer |= byte << (56 - s.count);
    s.count += 8;
  }
  return s;
}

// At least 57 bits in the buffer.
INLINE void refill(Bits& s) {
  if (s.end - s.next >= 8) {
    uint64_t word;
    std::memcpy(&word, s.next, 8);
    const uint64_t inverse = ~word;  // a byte of it is 0 where there is an FF
    if (!((inverse - 0x0101010101010101u) & word & 0x8080808080808080u)) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      word = __builtin_bswap64(word);
#endif
      s.buffer |= word >> s.count;  // bits of a byte that is not taken whole come again
      s.next += (63 - s.count) >> 3;
      s.count |= 56;
      return;
    }
  }
  s = refill_slowly(s);
}

INLINE void consume(Bits& s, int bits) {
  s.buffer <<= bits;
  s.count -= bits;
}

INLINE uint32_t take(Bits& s, int bits) {
  const uint32_t value = uint32_t((s.buffer >> 1) >> (63 - bits));
  consume(s, bits);
  return value;
}

// The symbol of a code longer than LOOK, or -1.
INLINE int long_symbol(Bits& s, const Table& table) {
  const uint32_t pattern = uint32_t(s.buffer >> 48);
  for (int length = LOOK + 1; length <= 16; length++) {
    if (pattern >= table.code_end[length]) continue;
    const int index = int(pattern >> (16 - length)) + table.shift[length];
    if (index < 0 || index >= table.count) return -1;
    consume(s, length);
    return table.symbols[index];
  }
  return -1;
}

template <bool STORED>
INLINE bool decode_block(Bits& s, const Table& dc, const Table& ac, uint32_t& last_dc,
                         int16_t* block) {
  if (s.count < 32) refill(s);
  const Step first = dc.steps[s.buffer >> (64 - LOOK)];
  if (first.bits) {
    consume(s, first.bits);
    last_dc += uint32_t(first.value);
  } else {
    int size = first.value;
    if (first.zeros)
      consume(s, first.zeros);
    else if ((size = long_symbol(s, dc)) < 0)
      return false;
    last_dc += uint32_t(signed_value(take(s, size), size));
  }
  if (STORED) block[0] = int16_t(last_dc);
  int k = 1;
  while (k < 64) {
    if (s.count < 32) refill(s);
    const Pair pair = ac.pairs[s.buffer >> (64 - LOOK)];
    if (pair.all_bits) {
      if (k + pair.zeros < 63) {
        consume(s, pair.all_bits);
        if (STORED) block[NATURAL.at[k + pair.next]] = pair.next_value;
        if (STORED) block[NATURAL.at[k + pair.zeros]] = pair.value;
        k += pair.next + 1;
        continue;
      }
      // The first coefficient is the block's last: what comes next is of another block.
      consume(s, pair.bits);
      if (pair.bits == pair.all_bits && pair.next == END) return true;
      k += pair.zeros;
      if (STORED && k == 63) block[63] = pair.value;
      return k == 63;
    }
    int symbol = pair.value;
    if (pair.zeros)
      consume(s, pair.zeros);
    else if ((symbol = long_symbol(s, ac)) < 0)
      return false;
    const int size = symbol & 15;
    if (symbol == 0) return true;
    k += symbol >> 4;
    if (k > 63) return false;
    const int value = signed_value(take(s, size), size);
    if (STORED) block[NATURAL.at[k]] = int16_t(value);
    k++;
  }
  return k == 64 || k > END;
}

// The next restart marker must be right here.
bool restart(Scan& s) {
  Bits& bits = s.bits;
  if (bits.count - bits.invented >= 8 || bits.end - bits.next < 2) return false;
  if (bits.next[0] != 0xFF || bits.next[1] != 0xD0 + s.next_restart) return false;
  bits.next += 2;
  bits.buffer = 0;
  bits.count = bits.invented = 0;
  std::memset(s.last_dc, 0, sizeof s.last_dc);
  s.next_restart = (s.next_restart + 1) & 7;
  s.until_restart = s.restart_interval;
  return true;
}

template <bool STORED>
bool decode_blocks(Scan& scan, Block** blocks) {
  Bits bits = scan.bits;  // in registers
  for (int i = 0; i < scan.blocks; i++) {
    uint32_t& last_dc = scan.last_dc[scan.component[i]];
    int16_t* block = STORED ? *blocks[i] : nullptr;
    if (!decode_block<STORED>(bits, *scan.dc[i], *scan.ac[i], last_dc, block)) return false;
  }
  scan.bits = bits;
  return bits.count >= bits.invented;  // else invented bits were used
}

}  // namespace

bool decode_mcu(Scan& scan, Block** blocks) {
  if (scan.restart_interval && scan.until_restart-- == 0) {
    if (!restart(scan)) return false;
    scan.until_restart--;
  }
  return blocks ? decode_blocks<true>(scan, blocks) : decode_blocks<false>(scan, blocks);
}

bool begin(Scan& s, const uint8_t* bytes, size_t size, const uint8_t* scan) {
  struct {
    int id, blocks;
  } components[4];
  int count = 0;
  bool built[2][4] = {};
  s.restart_interval = 0;
  const uint8_t* const end = bytes + size;
  const uint8_t* segment = bytes + 2;
  while (end - segment >= 4) {
    if (segment[0] != 0xFF) return false;
    const int marker = segment[1];
    if (marker == 0xFF) {  // fill
      segment++;
      continue;
    }
    const ptrdiff_t length = segment[2] << 8 | segment[3];
    const uint8_t *payload = segment + 4, *segment_end = segment + 2 + length;
    if (length < 2 || end - (segment + 2) < length) return false;
    if (marker == 0xC4) {
      while (segment_end - payload >= 17) {
        const int kind = payload[0] >> 4, number = payload[0] & 15;
        int total = 0;
        for (int i = 1; i <= 16; i++) total += payload[i];
        if (kind > 1 || number > 3 || total > 256 || segment_end - (payload + 17) < total)
          return false;
        if (!build(s.tables[kind][number], payload + 1, payload + 17, kind == 1)) return false;
        built[kind][number] = true;
        payload += 17 + total;
      }
      if (payload != segment_end) return false;
    } else if (marker == 0xC0 || marker == 0xC1) {
      if (count || segment_end - payload < 6 || payload[0] != 8) return false;
      count = payload[5];
      if (count < 1 || count > 3 || segment_end - payload != 6 + 3 * count) return false;
      for (int i = 0; i < count; i++)
        components[i] = {payload[6 + 3 * i], (payload[7 + 3 * i] >> 4) * (payload[7 + 3 * i] & 15)};
    } else if (marker == 0xDD) {
      if (length != 4) return false;
      s.restart_interval = payload[0] << 8 | payload[1];
    } else if (marker == 0xDA) {
      if (segment_end != scan || !count || segment_end - payload != 4 + 2 * count ||
          payload[0] != count)
        return false;
      const uint8_t* range = payload + 1 + 2 * count;
      if (range[0] != 0 || range[1] != 63 || range[2] != 0) return false;
      s.blocks = 0;
      for (int i = 0; i < count; i++) {
        const int dc = payload[2 + 2 * i] >> 4, ac = payload[2 + 2 * i] & 15;
        if (payload[1 + 2 * i] != components[i].id || dc > 3 || ac > 3) return false;
        if (!built[0][dc] || !built[1][ac]) return false;
        const int blocks = count == 1 ? 1 : components[i].blocks;
        if (blocks < 1 || s.blocks + blocks > MOST_BLOCKS) return false;
        for (int j = 0; j < blocks; j++, s.blocks++) {
          s.dc[s.blocks] = &s.tables[0][dc];
          s.ac[s.blocks] = &s.tables[1][ac];
          s.component[s.blocks] = i;
        }
      }
      s.bits = {scan, end, 0, 0, 0};
      std::memset(s.last_dc, 0, sizeof s.last_dc);
      s.until_restart = s.restart_interval;
      s.next_restart = 0;
      return true;
    } else if (marker < 0xC0 || (marker > 0xC1 && marker < 0xE0 && marker != 0xDB)) {
      return false;  // another kind of frame, or no header
    }
    segment = segment_end;
  }
  return false;
}

}  // namespace entropy
