// CRC-32 (IEEE 802.3, reflected) by the "slicing" tables of M. Kounavis and F. Berry, "Novel Table Lookup-Based
// Algorithms for High-Performance CRC Generation": eight bytes a step.
#include "checksum.h"

#include <string.h>

namespace halo {
namespace {

struct Tables {
  uint32_t of[8][256];

  Tables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1)));
      of[0][byte] = crc;
    }
    for (int slice = 1; slice < 8; ++slice)
      for (int byte = 0; byte < 256; ++byte)
        of[slice][byte] = of[slice - 1][byte] >> 8 ^ of[0][of[slice - 1][byte] & 255];
  }
};

}  // namespace

uint32_t crc32(const uint8_t *data, size_t size) {
  static const Tables tables;
  const uint32_t(&of)[8][256] = tables.of;
  uint32_t crc = ~0u;
  for (; size >= 8; data += 8, size -= 8) {
    uint32_t low, high;
    memcpy(&low, data, 4);
    memcpy(&high, data + 4, 4);
    low ^= crc;
    crc = of[7][low & 255] ^ of[6][low >> 8 & 255] ^ of[5][low >> 16 & 255] ^ of[4][low >> 24] ^ of[3][high & 255] ^
          of[2][high >> 8 & 255] ^ of[1][high >> 16 & 255] ^ of[0][high >> 24];
  }
  for (; size; ++data, --size) crc = crc >> 8 ^ of[0][(crc ^ *data) & 255];
  return ~crc;
}

}  // namespace halo
