// Huffman decoding of plain JPEG scans, for the library's hook: see entropy.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entropy {

using Block = int16_t[64];

constexpr int LOOK = 11;         // bits that the tables resolve at once
constexpr int MOST_BLOCKS = 10;  // of an MCU, by the standard

// What the next LOOK bits begin with. If a coefficient's code and value fit into them: bits of
// both, zeros before it, and its value. Else bits is 0, and if the code fits: its length and
// symbol.
struct Step {
  int16_t value;  // or the symbol
  uint8_t zeros;  // or the length of the code, 0 = longer than LOOK
  uint8_t bits;
};

// The same for AC codes, with the coefficient after it, if that fits in as well. Without one, the
// next coefficient is the first again, so that two can be written each time.
struct Pair {
  int16_t value, next_value;
  uint8_t zeros;  // or, if `all_bits` is 0, the length of the code, and `value` the symbol
  uint8_t next;   // place of the next coefficient, counted from where this begins; END = none comes
  uint8_t bits;   // of the first coefficient
  uint8_t all_bits;  // of both
};
constexpr int END = 127;

struct Table {
  Step steps[1 << LOOK];
  Pair pairs[1 << LOOK];  // of AC codes
  uint32_t code_end[17];  // first 16-bit pattern that is no code of length n or shorter
  int32_t shift[17];      // symbol of a code of length n: symbols[code + shift[n]]
  uint8_t symbols[256];
  int count;
};

// Unread data: what is in the buffer, and what comes after it.
struct Bits {
  const uint8_t *next, *end;
  uint64_t buffer;  // the first bit on top
  int count;        // bits in the buffer
  int invented;     // of them, zeros behind the end of the data
};

// State of one scan. Plain data: the library's errors jump over it.
struct Scan {
  Bits bits;
  int blocks;  // of an MCU
  const Table *dc[MOST_BLOCKS], *ac[MOST_BLOCKS];
  int component[MOST_BLOCKS];
  uint32_t last_dc[4];  // modulo 2^32, as damaged data may add up to anything
  int restart_interval, until_restart, next_restart;
  Table tables[2][4];  // DC and AC, by number
};

// Reads the headers in front of the scan data at `scan`. False: not a scan that this code decodes
// (progressive, several scans, anything unusual).
bool begin(Scan& state, const uint8_t* bytes, size_t size, const uint8_t* scan);

// Decodes one MCU into zeroed blocks in natural order, or past it if `blocks` is null. False: the
// data are damaged or have ended.
bool decode_mcu(Scan& state, Block** blocks);

}  // namespace entropy
