// The C ABI: checks what a caller hands over, and turns every failure into a status and a sentence. The same file for
// every backend; HALO_GPU says which.
#include <sched.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "../halo.h"
#include "failure.h"
#ifdef HALO_GPU
#include "../hip/session.h"
#else
#include "model.h"
#include "paths.h"
#include "session.h"
#endif

#ifdef HALO_GPU
typedef halo::GpuModel BackendModel;
typedef halo::GpuSession BackendSession;
#else
typedef halo::Model BackendModel;
typedef halo::Session BackendSession;
#endif

struct halo_model {
  std::shared_ptr<const BackendModel> model;
};

struct halo_session {
  BackendSession session;
};

namespace {

using halo::Failure;

const int kMostThreads = 256, kMostSlots = 4096;

thread_local char last_error[512] = "";

halo_status fail(halo_status status, const char *message) {
  snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

template <class F>
halo_status guarded(F f) {
  last_error[0] = 0;
  try {
    f();
    return HALO_OK;
  } catch (const Failure &failure) {
    return fail(failure.status, failure.message.c_str());
  } catch (const std::bad_alloc &) {
    return fail(HALO_NO_MEMORY, "out of memory");
  } catch (const std::exception &error) {
    return fail(HALO_INTERNAL, error.what());
  } catch (...) {
    return fail(HALO_INTERNAL, "an unknown exception");
  }
}

void need(bool condition, const char *what) {
  if (!condition) throw Failure(HALO_INVALID, "%s", what);
}

void within(const char *name, int value, int least, int most) {
  if (value < least || value > most)
    throw Failure(HALO_INVALID, "%s = %d; %d to %d is possible", name, value, least, most);
}

void give_text(const std::string &text, char *buffer, size_t capacity, size_t *needed) {
  need(needed != nullptr, "needed is NULL");
  *needed = text.size() + 1;
  if (!buffer || capacity < *needed) throw Failure(HALO_INVALID, "the facts need %zu bytes", *needed);
  memcpy(buffer, text.c_str(), *needed);
}

#ifdef HALO_GPU

using halo::device_facts;
using halo::ternary_sums;

const halo_config &config_of(const BackendModel &model) { return model.config(); }

#else

const halo_config &config_of(const BackendModel &model) { return model.config; }

int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, (int)std::thread::hardware_concurrency());
}

std::string device_facts() {
  std::string names;
  std::vector<const halo::Kernels *> paths = halo::usable_paths();
  for (const halo::Kernels *path : paths) names += std::string(names.empty() ? "\"" : ",\"") + path->name + "\"";
  return "{\"backend\":\"cpu\",\"abi\":" + std::to_string(HALO_ABI_VERSION) + ",\"isa\":\"" + paths[0]->name +
         "\",\"paths\":[" + names + "],\"cpus\":" + std::to_string(usable_cpus()) + "}";
}

void ternary_sums(const char *path, const uint8_t *codes, int rows, int cols, const int8_t *x, int tokens,
                  int32_t *sums) {
  using halo::round_up;
  const halo::Kernels &kernels = halo::choose_path(path);
  int groups = round_up(cols, halo::kTernaryCols) / 4, chunks = 4 * groups / halo::kTernaryCols;
  int blocks = round_up(rows, halo::kRows) / halo::kRows;
  for (int first = 0; first < tokens; first += halo::kTileTokens) {
    int count = std::min(halo::kTileTokens, tokens - first);
    std::vector<int32_t> packed((size_t)groups * count, 0), out((size_t)blocks * count * halo::kRows), offsets(count, 0);
    for (int t = 0; t < count; ++t)
      for (int j = 0; j < cols; ++j) {
        int8_t value = x[(size_t)(first + t) * cols + j];
        ((int8_t *)&packed[(size_t)(j / 4) * count + t])[j % 4] = value;
        offsets[t] += value;
      }
    kernels.ternary(codes, blocks, chunks, packed.data(), count, out.data());
    for (int t = 0; t < count; ++t)
      for (int r = 0; r < rows; ++r)
        sums[(size_t)(first + t) * rows + r] =
            out[((size_t)(r / halo::kRows) * count + t) * halo::kRows + r % halo::kRows] - offsets[t];
  }
}

#endif

}  // namespace

uint32_t halo_abi_version(void) { return HALO_ABI_VERSION; }

const char *halo_last_error(void) { return last_error; }

halo_status halo_device_facts(char *buffer, size_t capacity, size_t *needed) {
  return guarded([&] { give_text(device_facts(), buffer, capacity, needed); });
}

halo_status halo_model_open(const char *path, halo_model **model) {
  return guarded([&] {
    need(path && model, "path or model is NULL");
    *model = nullptr;
    *model = new halo_model{std::make_shared<const BackendModel>(path)};
  });
}

halo_status halo_model_config(const halo_model *model, halo_config *config) {
  return guarded([&] {
    need(model && config, "model or config is NULL");
    *config = config_of(*model->model);
  });
}

void halo_model_close(halo_model *model) { delete model; }

halo_status halo_session_create(halo_model *model, int32_t slots, int32_t context, int32_t threads, const char *path,
                                const char *kv, halo_session **session) {
  return guarded([&] {
    need(model && session, "model or session is NULL");
    *session = nullptr;
    within("slots", slots, 1, kMostSlots);
    within("context", context, 1, config_of(*model->model).max_seq_len);
    within("threads", threads, 0, kMostThreads);
#ifdef HALO_GPU
    *session = new halo_session{{model->model, slots, context, path, kv}};
#else
    const halo::Kernels &kernels = halo::choose_path(path);
    halo::KvForm form = halo::kv_form(kv);
    int count = threads ? threads : std::min(usable_cpus(), kMostThreads);
    *session = new halo_session{{model->model, slots, context, count, kernels, form}};
#endif
  });
}

halo_status halo_session_facts(halo_session *session, char *buffer, size_t capacity, size_t *needed) {
  return guarded([&] {
    need(session != nullptr, "session is NULL");
    give_text(session->session.facts(), buffer, capacity, needed);
  });
}

void halo_session_close(halo_session *session) { delete session; }

halo_status halo_session_run(halo_session *session, int32_t n, const int32_t *tokens, const int32_t *slots,
                             const int32_t *positions, const uint8_t *want, uint32_t flags, float *logits,
                             size_t logits_count, int32_t *ids, size_t ids_count) {
  return guarded([&] {
    need(session != nullptr, "session is NULL");
    need(n >= 0, "n is negative");
    need(n == 0 || (tokens && slots && positions && want), "tokens, slots, positions or want is NULL");
    need((flags & ~HALO_RUN_ARGMAX) == 0, "a flag is unknown");
    bool argmax = flags & HALO_RUN_ARGMAX, wanted = false;
    for (int i = 0; i < n; ++i) wanted |= want[i] != 0;
    need(!wanted || (argmax ? (void *)ids : (void *)logits), "the array for the results is NULL");
    session->session.run({n, tokens, slots, positions, want, argmax ? nullptr : logits, logits_count,
                          argmax ? ids : nullptr, ids_count, nullptr, 0});
  });
}

halo_status halo_session_draw(halo_session *session, int32_t n, const int32_t *tokens, const int32_t *slots,
                              const int32_t *positions, const uint8_t *want, const float *noise, float depth,
                              size_t room, size_t wanted_count, int32_t *winners, int32_t *found, int32_t *ids,
                              float *logits) {
  return guarded([&] {
    need(session != nullptr, "session is NULL");
    need(n >= 0, "n is negative");
    need(n == 0 || (tokens && slots && positions && want), "tokens, slots, positions or want is NULL");
    need(n == 0 || (noise && winners && found), "noise, winners or found is NULL");
    need(n == 0 || room == 0 || (ids && logits), "ids or logits is NULL");
    need(depth >= 0, "the depth is below zero or no number");
    halo::Draw draw = {noise, depth, room, winners, found, ids, logits};
    session->session.run({n, tokens, slots, positions, want, nullptr, 0, nullptr, 0, &draw, wanted_count});
  });
}

halo_status halo_session_logits(halo_session *session, int32_t k, float *logits, size_t logits_count) {
  return guarded([&] {
    need(session && logits, "session or logits is NULL");
    session->session.logits_again(k, logits, logits_count);
  });
}

halo_status halo_session_copy(halo_session *session, int32_t from, int32_t to, int32_t length) {
  return guarded([&] {
    need(session != nullptr, "session is NULL");
    session->session.copy(from, to, length);
  });
}

halo_status halo_ternary_sums(const char *path, const uint8_t *codes, int32_t rows, int32_t cols, const int8_t *x,
                              int32_t tokens, int32_t *sums) {
  return guarded([&] {
    need(codes && x && sums, "codes, x or sums is NULL");
    within("rows", rows, 1, 1 << 24);
    within("cols", cols, 1, 262144);
    within("tokens", tokens, 1, 4096);
    ternary_sums(path, codes, rows, cols, x, tokens, sums);
  });
}
