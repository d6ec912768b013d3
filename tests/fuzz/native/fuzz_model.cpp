// libFuzzer over the native engine: a prepared file that lies, opened, and decoded a little where it is taken.
// The input is tests/fuzz/target.py's `sparse` form. Flags: 1 checksums of header and directory made anew, 2 those of
// the tensors too, 4 and 8 another path than the best, 16 two threads, 32 and 64 the form of the KV cache.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../../../engine/native/cpu/checksum.h"
#include "../../../engine/native/halo.h"

namespace {

typedef std::vector<uint8_t> Bytes;

const size_t kPage = 4096, kEntry = 128, kHeader = 92, kMost = 1 << 20;

template <class T>
T read(const uint8_t *data) {
  T value;
  memcpy(&value, data, sizeof value);
  return value;
}

void write32(uint8_t *at, uint32_t value) { memcpy(at, &value, 4); }

Bytes expand(const uint8_t *data, size_t size) {
  Bytes file(std::min<size_t>(read<uint32_t>(data + 1), kMost));
  for (size_t at = 5; at + 6 <= size;) {
    size_t offset = read<uint32_t>(data + at), length = read<uint16_t>(data + at + 4);
    size_t given = std::min(length, size - at - 6);
    if (offset < file.size()) memcpy(&file[offset], data + at + 6, std::min(given, file.size() - offset));
    at += 6 + length;
  }
  return file;
}

void seal(Bytes &file, bool tensors) {
  if (file.size() < 2 * kPage) return;
  uint64_t size = file.size();
  memcpy(&file[16], &size, 8);
  size_t count = read<uint32_t>(&file[12]);
  if (count > (file.size() - kPage) / kEntry) return;
  for (size_t i = 0; tensors && i < count; ++i) {
    uint8_t *entry = &file[kPage + kEntry * i];
    uint64_t offset = read<uint64_t>(entry + 64), bytes = read<uint64_t>(entry + 72);
    if (offset > file.size() || bytes > file.size() - offset) return;
    uint32_t piece = halo::crc32(file.data() + offset, bytes);  // a file here is one piece of 1 MiB at most
    write32(entry + 112, halo::crc32((const uint8_t *)&piece, 4));
  }
  write32(&file[32], halo::crc32(&file[kPage], kEntry * count));
  write32(&file[kHeader], halo::crc32(file.data(), kHeader));
}

void expect(bool sound, const char *what) {
  if (sound) return;
  fprintf(stderr, "%s: %s\n", what, halo_last_error());
  abort();
}

// A refusal is one of three, and says why.
bool taken(halo_status status) {
  expect(status == HALO_OK || status == HALO_FORMAT || status == HALO_IO || status == HALO_NUMERIC ||
             status == HALO_INVALID || status == HALO_UNSUPPORTED,
         "a status that no file may cause");
  expect(status == HALO_OK || *halo_last_error(), "a refusal without a sentence");
  return status == HALO_OK;
}

void decode(halo_model *model, uint8_t flags) {
  const char *const forms[] = {"int8", "f32", "f16", "rotor3"};
  halo_config c;
  expect(halo_model_config(model, &c) == HALO_OK, "config");
  int context = std::min(c.max_seq_len, 20);
  halo_session *session;
#if defined(__x86_64__)
  const char *const second = "avx2";
#else
  const char *const second = "neon";
#endif
  const char *path = flags & 8 ? "scalar" : flags & 4 ? second : nullptr;
  if (!taken(halo_session_create(model, 2, context, flags & 16 ? 2 : 1, path, forms[flags >> 5 & 3], &session))) return;
  std::vector<int32_t> tokens, slots, positions, ids(64);
  std::vector<uint8_t> want;
  std::vector<float> logits((size_t)c.vocab_size * 3 + 64);
  for (int i = 0; i < std::min(context, 18); ++i) {
    tokens.push_back((int)(i * 7919ll % c.vocab_size));
    slots.push_back(0);
    positions.push_back(i);
    want.push_back(i == 0 || i == 17);
  }
  int n = (int)tokens.size();
  bool well = taken(halo_session_run(session, n, tokens.data(), slots.data(), positions.data(), want.data(), 0,
                                     logits.data(), logits.size(), nullptr, 0));
  // Both slots at once, the first rewound; arg max, and then what is near it.
  const int32_t both[] = {0, c.vocab_size - 1}, two[] = {0, 1}, at[] = {well ? std::min(1, context - 1) : 0, 0};
  const uint8_t yes[] = {1, 1};
  well = taken(halo_session_run(session, 2, both, two, at, yes, HALO_RUN_ARGMAX, nullptr, 0, ids.data(), ids.size()));
  for (int i = 0; well && i < 2; ++i) expect(ids[i] >= 0 && ids[i] < c.vocab_size, "an id outside of the vocabulary");
  int32_t found[2] = {0, 0}, winners[2];
  const int32_t start[] = {0, 0};
  for (float &noise : logits) noise = (float)(&noise - logits.data()) / 16;
  std::vector<float> near(8);
  if (taken(halo_session_draw(session, 2, both, two, start, yes, logits.data(), flags & 4 ? 0.5f : 1e30f, 4, 2, winners,
                              found, ids.data(), near.data())))
    for (int i = 0; i < 2; ++i) {
      expect(found[i] >= -1 && found[i] <= 4, "more tokens than there is room for");
      expect(winners[i] >= 0 && winners[i] < c.vocab_size, "a winner outside of the vocabulary");
      taken(halo_session_logits(session, i, logits.data(), (size_t)c.vocab_size));
    }
  halo_session_close(session);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 5) return 0;
  static const bool plain = getenv("HALO_FUZZ_PLAIN") != nullptr;  // no checksum is made anew
  Bytes file = expand(data, size);
  if (data[0] & 3 && !plain) seal(file, data[0] & 2);
  int memory = memfd_create("model", 0);
  expect(memory >= 0 && ::write(memory, file.data(), file.size()) == (ssize_t)file.size(), "no memory file");
  std::string path = "/proc/self/fd/" + std::to_string(memory);
  halo_model *model;
  if (taken(halo_model_open(path.c_str(), &model))) {
    decode(model, data[0]);
    halo_model_close(model);
  }
  close(memory);
  return 0;
}
