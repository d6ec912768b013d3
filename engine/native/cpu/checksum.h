// CRC-32 as zlib has it. Not a hash: it finds damage, not malice.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace halo {

uint32_t crc32(const uint8_t *data, size_t size);

}  // namespace halo
