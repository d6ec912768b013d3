// For test_hip_head.py: the GPU head on the simulated device, beside the CPU's, over one prepared file. Hidden states are
// given, not computed. Not a program of halo.
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/head.h"
#include "hip/head.h"
#include "hip/head_kernels.h"

namespace {

using namespace halo;

struct Both {
  explicit Both(const char *path)
      : model(path),
        rows{model.head.data, model.head.row_bytes, model.head.bf16},
        status(16),
        weights(model, rows, stream),
        gpu(weights, HALO_AGAIN, status.device<uint32_t>()),
        pool(1),
        cpu(model, scalar_table, pool),
        hidden(round_up(model.config.hidden_size, 16)) {}
  Model model;
  HeadRows rows;
  Stream stream;
  SharedBytes status;
  HeadWeights weights;
  GpuHead gpu;
  Pool pool;
  Head cpu;
  int hidden;

  // What the status word says, as the calls of the CPU's head say it; the word is cleared.
  int finite() {
    stream.sync();
    uint32_t was = *status.host<uint32_t>();
    *status.host<uint32_t>() = 0;
    return was == 0;
  }

  std::vector<float> normed(const float *x, const int32_t *wanted, int count) {
    std::vector<float> out((size_t)count * hidden);
    for (int t = 0; t < count; ++t)
      scalar_table.rmsnorm(x + (size_t)(wanted ? wanted[t] : t) * hidden, model.final_norm, model.config.hidden_size,
                           model.config.rms_norm_eps, &out[(size_t)t * hidden]);
    return out;
  }
};

std::string message;

template <class F>
int guarded(F f) {
  try {
    return f();
  } catch (const Failure &failure) {
    message = failure.message;
    return -(int)failure.status;
  }
}

}  // namespace

extern "C" {

const char *driver_message() { return message.c_str(); }

int driver_open(const char *path, Both **both) {
  return guarded([&] { return *both = new Both(path), 0; });
}
void driver_close(Both *both) { delete both; }

// The level of a weight in the device's layout, read as head_launch.h tells it.
int driver_level(Both *b, int row, int col) {
  const int in = col % kHeadStepCols, lane = in / 64 * 8 + row % 8, at = in % 64, byte = at % 4;
  const size_t step = (size_t)(row / 8) * b->weights.steps + col / kHeadStepCols;
  auto word = [&](int i) {
    const uint8_t *piece = (const uint8_t *)(b->weights.tiles() + step * kHeadStepWords + i / 4 * 32 + lane);
    return piece[i % 4 * 4 + byte];
  };
  if (at < 48) return word(at / 4) & 63;
  const int j = 3 * ((at - 48) / 4);
  return word(j) >> 6 | word(j + 1) >> 6 << 2 | word(j + 2) >> 6 << 4;
}

// Each: 1 where all logits that were computed are finite, 0 where not, negative for a failure. graph: captured, run twice.
int driver_argmax(Both *b, const float *x, const int32_t *wanted, int count, int graph, int32_t *gpu_ids, int32_t *cpu_ids,
                  int *cpu_finite) {
  return guarded([&] {
    auto work = [&] { b->gpu.put_argmax(x, b->hidden, wanted, count, gpu_ids, b->stream); };
    if (graph) {
      Graph captured = b->stream.capture(work);
      b->stream.run(captured);
      b->stream.run(captured);
    } else {
      work();
    }
    *cpu_finite = b->cpu.largest(b->normed(x, wanted, count).data(), b->hidden, count, nullptr, cpu_ids);
    return b->finite();
  });
}

int driver_draw(Both *b, const float *x, int count, const float *noise, float depth, int room, int32_t *winners,
                int32_t *found, int32_t *ids, float *logits, int32_t *cpu_winners, int32_t *cpu_found, int32_t *cpu_ids,
                float *cpu_logits, int *cpu_finite) {
  return guarded([&] {
    b->gpu.put_draw(x, b->hidden, nullptr, count, {noise, &depth, room, winners, found, ids, logits}, b->stream);
    *cpu_finite = b->cpu.draw(b->normed(x, nullptr, count).data(), b->hidden, count,
                              {noise, depth, (size_t)room, cpu_winners, cpu_found, cpu_ids, cpu_logits});
    return b->finite();
  });
}

int driver_logits(Both *b, const float *x, const int32_t *wanted, int count, float *gpu_logits, float *cpu_logits) {
  return guarded([&] {
    b->gpu.put_logits(x, b->hidden, wanted, count, gpu_logits, b->stream);
    b->cpu.all(b->normed(x, wanted, count).data(), b->hidden, count, cpu_logits);
    return b->finite();
  });
}

int driver_logits_again(Both *b, int k, float *logits) {
  return guarded([&] { return b->gpu.put_logits_again(k, logits, b->stream), b->finite(); });
}

}
