// For test_arm.py: runs tokens through a prepared model by the C ABI and writes the logits. Not a program of halo.
//
//   arm_driver MODEL.halo OUT PATH KV THREADS PREFILL TOKEN...
//
// The first PREFILL tokens in one run, the rest one by one; OUT gets a row of float32 logits a token. PATH "facts"
// prints what the library found on the machine instead.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "halo.h"

namespace {

void check(halo_status status) {
  if (status == HALO_OK) return;
  fprintf(stderr, "status %d: %s\n", (int)status, halo_last_error());
  exit(1);
}

void print_facts() {
  std::vector<char> text(4096);
  size_t needed = 0;
  check(halo_device_facts(text.data(), text.size(), &needed));
  puts(text.data());
}

// The logits of tokens first to end (exclusive) of slot 0, appended to `out`.
void run(halo_session *session, const std::vector<int32_t> &tokens, int first, int end, std::vector<float> &out,
         int vocabulary) {
  std::vector<int32_t> slots, positions;
  for (int i = first; i < end; ++i) {
    slots.push_back(0);
    positions.push_back(i);
  }
  std::vector<uint8_t> want(slots.size(), 1);
  size_t before = out.size(), count = slots.size() * (size_t)vocabulary;
  out.resize(before + count);
  check(halo_session_run(session, end - first, tokens.data() + first, slots.data(), positions.data(), want.data(), 0,
                         out.data() + before, count, nullptr, 0));
}

}  // namespace

int main(int argc, char **argv) {
  if (argc > 3 && !strcmp(argv[3], "facts")) return print_facts(), 0;
  if (argc < 8) return fputs("too few arguments\n", stderr), 2;
  std::vector<int32_t> tokens;
  for (int i = 7; i < argc; ++i) tokens.push_back(atoi(argv[i]));
  const int count = (int)tokens.size(), prefill = atoi(argv[6]);
  halo_model *model = nullptr;
  halo_session *session = nullptr;
  halo_config config;
  check(halo_model_open(argv[1], &model));
  check(halo_model_config(model, &config));
  check(halo_session_create(model, 1, count, atoi(argv[5]), argv[3], argv[4], &session));
  std::vector<float> logits;
  run(session, tokens, 0, prefill, logits, config.vocab_size);
  for (int i = prefill; i < count; ++i) run(session, tokens, i, i + 1, logits, config.vocab_size);
  halo_session_close(session);
  halo_model_close(model);
  FILE *file = fopen(argv[2], "wb");
  bool written = file && fwrite(logits.data(), sizeof(float), logits.size(), file) == logits.size();
  if (!file || fclose(file) != 0 || !written) return fputs("cannot write\n", stderr), 2;
  return 0;
}
