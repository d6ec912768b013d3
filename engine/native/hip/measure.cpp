// A program that measures the kernels of a decode step on a GPU, one shape at a time, as JSON lines. Weights rotate
// through more than the last-level cache; launches lie in a graph, as in a step, so a figure is the time from one kernel's
// end to the next one's. Not a test: nothing is compared here.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "../cpu/failure.h"
#include "kernels.h"
#include "prefill_launch.h"

namespace {

using namespace halo;

const size_t kRotate = (size_t)600 << 20;
const int kRounds = 15;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Microseconds a launch of a graph of `count` launches, the median of some rounds.
double microseconds(Stream &stream, int count, const std::function<void(int)> &put) {
  Graph graph = stream.capture([&] {
    for (int i = 0; i < count; ++i) put(i);
  });
  std::vector<double> times;
  for (int round = 0; round < kRounds + 2; ++round) {
    stream.sync();
    double start = seconds();
    stream.run(graph);
    stream.sync();
    if (round >= 2) times.push_back((seconds() - start) / count * 1e6);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

struct Shape {
  const char *name;
  int rows, cols;
  Epilogue epilogue;
};
const Shape kShapes[] = {{"qkv", 3840, 2560, kStore}, {"o", 2560, 2560, kAdd}, {"gate_up", 13824, 2560, kGated},
                         {"down", 2560, 6912, kAdd}};

void fill(DeviceBytes &memory, Stream &stream, unsigned mask) {
  std::vector<uint32_t> words(memory.bytes() / 4);
  uint64_t state = 88172645463325252u;
  for (uint32_t &word : words) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    word = (uint32_t)(state >> 16) & mask;
  }
  stream.copy_in(memory.as<>(), words.data(), memory.bytes());
  stream.sync();
}

void fill_floats(DeviceBytes &memory, Stream &stream) {
  std::vector<float> values(memory.bytes() / 4);
  for (size_t i = 0; i < values.size(); ++i) values[i] = (float)((int)(i * 2654435761u >> 20) - 2048) / 2048.0f;
  stream.copy_in(memory.as<>(), values.data(), memory.bytes());
  stream.sync();
}

enum Input { kFloats, kInt8 };  // what a product of one token takes: a row to be normed and quantised, or as it comes out

void measure_products(Stream &stream, Packing packing, int tokens, bool gemm, Input input = kInt8) {
  for (const Shape &shape : kShapes) {
    const int cols = step_cols(packing), steps = (shape.cols + cols - 1) / cols, tile_count = shape.rows / kTileRows;
    const size_t bytes = (size_t)tile_count * steps * kStepBytes;
    const int copies = (int)(kRotate / bytes) + 1, stride = (steps * cols + 63) / 64 * 64;
    DeviceBytes tiles(bytes * copies, "the weights"), scales((size_t)shape.rows * 4, "scales"),
        x((size_t)shape.cols * 4, "x"), q((size_t)tokens * stride, "q"), facts((size_t)tokens * 8, "facts"),
        out((size_t)tokens * shape.rows * 4, "out"), status(16, "status");
    fill(tiles, stream, packing == Packing::two_bits ? 0x55aa55aa : 0x7f7f7f7f);
    fill(q, stream, 0x7f7f7f7f);
    fill_floats(scales, stream);
    fill_floats(x, stream);
    fill_floats(facts, stream);
    auto put = [&](int i) {
      ProductArgs a = {};
      a.tiles = (const uint4 *)(tiles.as<>() + (size_t)(i % copies) * bytes);
      a.weight_scale = scales.as<float>();
      a.rows = shape.rows, a.tile_count = tile_count, a.steps = steps, a.n = shape.cols, a.eps = 1e-5f;
      a.tokens = tokens, a.out_stride = shape.rows, a.epilogue = shape.epilogue;
      a.out = out.as<float>();
      a.status = status.as<uint32_t>();
      if (input == kFloats) {
        a.x = x.as<float>(), a.norm = x.as<float>();
      } else {
        a.q = {q.as<int8_t>(), facts.as<float>(), facts.as<int32_t>() + tokens, stride};
      }
      if (gemm) {
        launch_gemm({(const uint8_t *)a.tiles, a.weight_scale, a.rows, a.tile_count, a.steps, a.q, tokens, a.out_stride,
                     shape.epilogue, 0, a.out},
                    packing, stream);
      } else {
        launch_product(a, packing, stream);
      }
    };
    const double us = microseconds(stream, std::max(copies, 100), put);
    printf("{\"kernel\": \"%s\", \"shape\": \"%s\", \"packing\": \"%s\", \"tokens\": %d, \"input\": \"%s\", \"us\": %.2f, "
           "\"gb_per_s\": %.0f, \"tera_ops\": %.1f}\n",
           gemm ? "gemm" : "product", shape.name, packing == Packing::two_bits ? "two_bits" : "base_three", tokens,
           input == kFloats ? "floats" : "int8", us, bytes / us / 1e3, 2.0 * shape.rows * shape.cols * tokens / us / 1e6);
    fflush(stdout);
  }
}

}  // namespace

int main(int count, char **arguments) {
  try {
    Stream stream;
    printf("{\"device\": \"%s\", \"arch\": \"%s\", \"multiprocessors\": %d}\n", device().name.c_str(), device().arch.c_str(),
           device().multiprocessors);
    const bool prefill = count > 1 && arguments[1][0] == 'p';
    for (Packing packing : {Packing::two_bits, Packing::base_three}) {
      if (prefill) {
        for (int tokens : {32, 512, 4096}) measure_products(stream, packing, tokens, true);
      } else {
        measure_products(stream, packing, 1, false, kFloats);
        for (int tokens : {1, 2, 4, 8, 16}) measure_products(stream, packing, tokens, false);
      }
    }
  } catch (const Failure &failure) {
    fprintf(stderr, "measure: %s\n", failure.message.c_str());
    return 1;
  }
}
